import json
from dataclasses import replace

import numpy as np
import pytest

from routellm.bundle import Bundle, QualityCurve, golden_predictions, load_bundle, save_bundle
from routellm.calibration import Calibration
from routellm.errors import BundleError, UsageError
from routellm.settings import EmbeddingSettings
from routellm.snapshots import file_sha256
from routellm.training import train


@pytest.fixture
def bundle(planted, encoder):
    router, _ = train("random", planted, encoder, seed=0)
    prompts = list(planted.prompts)
    return Bundle(
        router, EmbeddingSettings(), Calibration.of(router.win_rate(prompts), "test"),
        golden_predictions(router, prompts), "abc", True, "0.1.0",
    )  # fmt: skip


def test_a_bundle_survives_its_files(bundle, tmp_path):
    save_bundle(bundle, tmp_path / "b")
    save_bundle(bundle, tmp_path / "b")  # replaces
    again = load_bundle(tmp_path / "b")
    again.check_golden()
    assert again.calibration == bundle.calibration
    assert (again.kind, again.pair, again.simulated) == ("random", bundle.pair, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


def test_a_curve_survives_its_files(bundle, tmp_path):
    curve = QualityCurve("gsm8k", 400, tuple((np.linspace(0, 1, 101) ** 0.5).tolist()))
    save_bundle(replace(bundle, curve=curve), tmp_path / "b")
    assert load_bundle(tmp_path / "b").curve == curve


def test_a_bundle_from_before_there_were_curves_loads_without_one(bundle, tmp_path):
    save_bundle(bundle, tmp_path / "b")
    doc = json.loads((tmp_path / "b" / "router.json").read_text())
    del doc["curve"]
    (tmp_path / "b" / "router.json").write_text(json.dumps(doc))
    sums = json.loads((tmp_path / "b" / "digests.json").read_text())
    sums["router.json"] = file_sha256(tmp_path / "b" / "router.json")
    (tmp_path / "b" / "digests.json").write_text(json.dumps(sums))
    assert load_bundle(tmp_path / "b").curve is None


@pytest.mark.parametrize("quality", [-0.1, 1.1, float("nan")])
def test_a_quality_outside_its_range_is_refused(quality):
    curve = QualityCurve("t", 2, (0.0, 0.5, 1.0))
    with pytest.raises(UsageError, match=r"quality .* is outside \[0, 1\]"):
        curve.strong_fraction(quality)


@pytest.mark.parametrize("name", ["weights.safetensors", "router.json", "digests.json"])
def test_a_damaged_file_is_found(bundle, tmp_path, name):
    save_bundle(bundle, tmp_path / "b")
    path = tmp_path / "b" / name
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    with pytest.raises(BundleError):
        load_bundle(tmp_path / "b")


def test_other_predictions_than_the_golden_ones_are_found(bundle):
    bundle.router.seed += 1
    with pytest.raises(BundleError, match="golden"):
        bundle.check_golden()


def test_a_threshold_sends_the_share_it_says():
    rates = np.random.default_rng(0).beta(2, 5, 5000)
    calibration = Calibration.of(rates, "test")
    for share in (0.1, 0.3, 0.5, 0.9, 1.0):
        assert (rates >= calibration.threshold(share)).mean() == pytest.approx(share, abs=0.002)
        back = calibration.strong_fraction(calibration.threshold(share))
        assert back == pytest.approx(share, abs=0.002)
    assert (rates >= calibration.threshold(0.0)).sum() == 0


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_its_range_is_refused(bundle, share):
    with pytest.raises(UsageError, match=r"outside \[0, 1\]"):
        bundle.thresholds(strong_fraction=share)
    with pytest.raises(UsageError, match=r"outside \[0, 1\]"):
        bundle.thresholds(threshold=share)


def test_a_thresholds_interval_covers_the_true_one_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    true = 0.7  # of uniform win rates, 30 % are above it
    covered = 0
    for _ in range(300):
        low, high = Calibration.of(rng.random(200), "test").threshold_interval(0.3)
        assert low <= high
        covered += low <= true <= high
    assert 0.91 <= covered / 300 <= 0.99


def test_more_queries_make_a_narrower_interval():
    rng = np.random.default_rng(0)
    widths = []
    for n in (100, 10_000):
        low, high = Calibration.of(rng.random(n), "test").threshold_interval(0.3)
        widths.append(high - low)
    assert widths[1] < widths[0] / 5
