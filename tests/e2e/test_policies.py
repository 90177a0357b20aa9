"""docs/policies.md: its command on a small table, and what it leaves; hashed words embed."""

import json

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from routellm.policies.encoder_score import EncoderScore
from routellm.settings import ScorerSettings
from tests.e2e.shared import inside
from tests.support.tiny_bert import save_tiny_bert
from tests.support.words_endpoint import as_environment, words_endpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STRONG, WEAK = "gpt-4-1106-preview", "mixtral-8x7b-instruct-v0.1"


@pytest.fixture
def tables(tmp_path):
    """A table in which weak fails on what is hard."""
    prompts = [f"{'hard' if i % 2 else 'easy'} question {i}" for i in range(300)]
    hard = np.arange(300) % 2 == 1
    said = {f"{WEAK}:response": ["river" if one else "tiger" for one in hard],
            f"{STRONG}:response": ["tiger"] * 300}  # fmt: skip
    table = {"prompt": prompts, WEAK: ~hard, STRONG: np.ones(300, bool), **said}
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table(table), tmp_path / "tables" / "gsm8k.parquet")
    return tmp_path / "tables"


def test_every_policy_is_measured_drawn_and_logged(tmp_path, tables, monkeypatch):
    home, out = tmp_path / "h", tmp_path / "report"
    monkeypatch.setenv("ROUTELLM_EVALUATION__BOOTSTRAP", "100")
    scorer = {"MODEL": save_tiny_bert(tmp_path / "bert"), "LEARNING_RATE": 5e-3, "EPOCHS": 3}
    for name, value in scorer.items():
        monkeypatch.setenv(f"ROUTELLM_POLICIES__SCORER__{name}", str(value))
    with words_endpoint() as url:
        for name, value in as_environment(url).items():
            monkeypatch.setenv(name, value)
        args = ("--home", home, "policies", "--data", tables, "--out", out)
        done = inside(*args, "--json")
        assert done.returncode == 0, done.stderr
        refused = inside(*args, "--tables", "gsm8k,nowhere")
        unknown = inside(*args, "--only", "Frugal", "--only", "frugal")
    found = {one["policy"]: one for one in json.loads(done.stdout)}
    oracle = found.pop("oracle")
    gain = found.pop("zero router")["figures"]["aiq_gain"]["value"]
    assert gain == pytest.approx(0, abs=1e-12)
    assert len(found) == 19
    for one in found.values():
        assert one["aiq"]["value"] <= oracle["aiq"]["value"] + 1e-9, one["policy"]
        routes = one["policy"].endswith("on a pair") or one["policy"].startswith("Hybrid-LLM")
        assert (one["apgr"] is not None) == routes, one["policy"]
        planted = one["policy"].startswith(("AutoMix", "cascade"))
        assert one["simulated"] == planted, one["policy"]
    for name in ("knn on a pair", "KNN over the pool", "FrugalGPT", "Hybrid-LLM, probabilistic"):
        assert found[name]["figures"]["aiq_gain"]["low"] > 0, name
    assert found["best of n"]["figures"]["all_gain"]["value"] <= 0  # strong alone is always right
    assert found["FrugalGPT"]["calls"]["value"] > 1.2
    assert found["LLM-Blender"]["points"][-1][0] > oracle["points"][-1][0]  # all is paid for
    assert (out / "pareto-gsm8k.png").read_bytes()[:4] == b"\x89PNG"
    saved = EncoderScore.load("the scorer", out / "scorer-gsm8k", ScorerSettings())
    assert saved.score([("easy", "tiger")]).shape == (1, 1)
    written = (out / "policies.md").read_text()
    assert "| gsm8k | AutoMix, POMDP (SIMULATED) |" in written
    assert "| FrugalGPT | half the cost at the best model's quality" in written

    uri = f"sqlite:///{home / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri, uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "routellm-policies")
    # a bare database would leave the figure in the folder that the command was run in
    assert experiment.artifact_location == (home / "mlartifacts").as_uri()
    runs = client.search_runs([experiment.experiment_id], "tags.role = 'policy'")
    assert {run.data.tags["policy"] for run in runs} == {*found, "zero router", "oracle"}
    knn = next(run for run in runs if run.data.tags["policy"] == "knn on a pair")
    told = found["knn on a pair"]
    assert knn.data.metrics["aiq"] == told["aiq"]["value"]
    curve = client.get_metric_history(knn.info.run_id, "curve.quality")
    assert [m.value for m in sorted(curve, key=lambda m: m.step)] == [q for _, q in told["points"]]

    assert refused.returncode == 2
    assert "no table 'nowhere'" in refused.stderr
    assert "it has gsm8k" in refused.stderr
    assert unknown.returncode == 2
    assert "no policy 'frugal': there are zero router; oracle; KNN over" in unknown.stderr
