"""Every test runs in an empty folder, with nothing of the person's own settings."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings as hypothesis_settings

from routellm.cli import context
from routellm.routers.base import Pair, TrainingBattles
from routellm.settings import Settings

# a property is no slower for a busy machine: examples are not timed
hypothesis_settings.register_profile("untimed", deadline=None)
hypothesis_settings.load_profile("untimed")

REPOSITORY = Path(__file__).resolve().parents[1]
REAL_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("ROUTELLM_", "MLFLOW_TRACKING", "MLFLOW_REGISTRY", "PREFECT_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(context, "_overrides", {})  # what a command remembers for its process
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip("no folder of published tables beside the repository")
    return REAL_DATA


class HashEncoder:
    """A real, tiny encoder: words hashed into a unit vector (a bag of words)."""

    identity = "test/bag-of-words@1"
    dimensions = 64

    def encode(self, prompts, *, progress=None):
        out = np.zeros((len(prompts), self.dimensions), np.float32)
        for i, prompt in enumerate(prompts):
            for word in prompt.lower().split():
                out[i, sum(word.encode("utf-8", "replace")) % self.dimensions] += 1.0
            out[i, 0] += 0.1
        return out / np.linalg.norm(out, axis=1, keepdims=True)


@pytest.fixture
def encoder() -> HashEncoder:
    return HashEncoder()


@pytest.fixture
def planted(encoder: HashEncoder) -> TrainingBattles:
    """Battles in which strong wins on prompts with the word `hard` and ties on the others."""
    rng = np.random.default_rng(7)
    words = ["apple", "river", "tiger", "window", "garden", "pencil", "music", "winter"]
    prompts = [
        " ".join([*rng.choice(words, 3), "hard" if i % 2 else "easy", str(i)]) for i in range(400)
    ]
    n = 4000
    prompt = rng.integers(len(prompts), size=n)
    models = ("other", "strong", "weak")
    a, b = np.array([rng.permutation(3)[:2] for _ in range(n)]).T
    skill = np.array([0.0, 1.5, -0.5])
    hard = prompt % 2 == 1
    gap = np.where(hard, skill[a] - skill[b], 0.1 * (skill[a] - skill[b]))
    preference = (rng.random(n) < 1 / (1 + np.exp(-gap))).astype(float)
    return TrainingBattles(
        prompts=tuple(prompts),
        embeddings=encoder.encode(prompts),
        prompt=prompt,
        models=models,
        model_a=a,
        model_b=b,
        preference_a=preference,
        weight=np.ones(n),
        label_kind=np.full(n, "human"),
        validation=prompt % 10 < 2,
        pair=Pair("strong", "weak"),
    )


def battle_table(n: int = 200, **changes: object) -> pa.Table:
    """Return n good battles in the battle schema, with columns replaced by `changes`."""
    from routellm.battles import BATTLE_SCHEMA, battle_id

    rows = []
    for i in range(n):
        row = {
            "prompt": f"question {i} about something",
            "model_a": "m1" if i % 2 else "m2",
            "model_b": "m3",
            "winner": ("model_a", "model_b", "tie")[i % 3],
            "preference_a": (1.0, 0.0, 0.5)[i % 3],
            "label_kind": "human",
            "judge": None,
        }
        row["battle_id"] = battle_id(row_key=str(i), **row)
        rows.append(row | {"source": "test", "language": "English", "turns": 1})
    columns = {name: [row.get(name) for row in rows] for name in BATTLE_SCHEMA.names}
    columns |= changes
    return pa.table(columns, schema=BATTLE_SCHEMA)
