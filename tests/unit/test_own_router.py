"""The documented example of a router kind of one's own, installed and used as a user would."""

import re

import numpy as np
import pytest

from routellm.bundle import Bundle, golden_predictions, load_bundle, save_bundle
from routellm.calibration import Calibration
from routellm.errors import UsageError
from routellm.routers import router_class, router_kinds
from routellm.settings import EmbeddingSettings
from routellm.training import train
from tests.conftest import REPOSITORY


def install(folder, monkeypatch, *, module="long_prompts", target=None):
    """Put the page's example on the path, with the metadata that an installer would leave."""
    page = (REPOSITORY / "docs" / "own_router.md").read_text()
    code, toml = (
        re.search(rf"```{kind}\n(.*?)```", page, re.S).group(1) for kind in ("python", "toml")
    )
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}-package\nVersion: 1.0\n")
    name, value = re.search(r"(\w+) = \"(.+?)\"", toml).groups()
    (info / "entry_points.txt").write_text(f"[routellm.routers]\n{name} = {target or value}\n")
    monkeypatch.syspath_prepend(folder)


def test_the_documented_example_is_a_router_like_any_other(tmp_path, monkeypatch, planted, encoder):
    install(tmp_path, monkeypatch)
    assert "long_prompts" in router_kinds()
    router, report = train("long_prompts", planted, encoder, seed=0, options={"steps": 20})
    assert report.params["steps"] == 20
    prompts = ["short", "a much longer prompt " * 20]
    rates = router.win_rate(prompts)
    assert ((rates >= 0) & (rates <= 1)).all()
    assert rates[0] != rates[1]
    bundle = Bundle(
        router, EmbeddingSettings(), Calibration.of(rates, "test"),
        golden_predictions(router, prompts), "abc", True, "0.1.0",
    )  # fmt: skip
    save_bundle(bundle, tmp_path / "bundle")
    again = load_bundle(tmp_path / "bundle")
    again.check_golden()
    assert np.array_equal(again.router.win_rate(prompts), rates)
    assert again.router.options.steps == 20
    with pytest.raises(
        UsageError, match=r"training.options.long_prompts.steps: .*its options: steps"
    ):
        train("long_prompts", planted, encoder, seed=0, options={"steps": 0})


def test_the_example_is_short():
    page = (REPOSITORY / "docs" / "own_router.md").read_text()
    assert len(re.search(r"```python\n(.*?)```", page, re.S).group(1).splitlines()) <= 45


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("long_prompts:NoSuchClass", "cannot be imported from long_prompts:NoSuchClass"),
        ("long_prompts:LongPromptsOptions", "no subclass of routellm.routers.Router"),
    ],
)
def test_a_broken_package_is_named(tmp_path, monkeypatch, target, says):
    install(tmp_path, monkeypatch, target=target)
    with pytest.raises(UsageError, match=says):
        router_class("long_prompts")


def test_two_packages_that_claim_one_name_are_named(tmp_path, monkeypatch):
    for module in ("one", "two"):
        folder = tmp_path / module
        folder.mkdir()
        install(folder, monkeypatch, module=module, target=f"{module}:LongPromptsRouter")
    with pytest.raises(UsageError, match="claimed by one:LongPromptsRouter and two:Long"):
        router_class("long_prompts")
