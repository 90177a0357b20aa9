"""AutoMix: what it asks, what that costs, and what a noisy verification is worth."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from routellm.errors import TrainingError, UsageError
from routellm.policies import Split, aiq, answered, measure
from routellm.policies.automix import PomdpAutoMix, ThresholdAutoMix
from routellm.policies.ibc import ibc
from routellm.policies.policy import fitted
from routellm.policies.verify import EndpointVerifier, PlantedVerifier, Verified
from routellm.routers.base import Pair
from routellm.settings import (
    JudgeSettings,
    Latency,
    PoliciesSettings,
    Price,
    Settings,
    VerifierSettings,
)
from tests.support.automixed import drawn, recorded
from tests.support.chat_server import Answer, chat_server

BETWEEN = Pair("big", "small")
KINDS = (ThresholdAutoMix, PomdpAutoMix)


def settings_with(tmp_path, *, read=1.0, written=2.0):
    return Settings(
        home=tmp_path / "home",
        prices={"small": Price(input=read, output=written), "big": Price(input=0, output=0)},
        policies=PoliciesSettings(latency={"small": Latency(first_token_s=0.5, token_s=0.01)}),
    )


@pytest.fixture
def cheap(tmp_path):
    """Verifications cost a tenth of a small answer, whose dollar is the tables' own."""
    return settings_with(tmp_path, read=20.0, written=20.0)


@dataclass(frozen=True)
class Said:
    """Votes as given, of two; each read 1,000 tokens, and the longer of a row wrote 30."""

    yes: tuple[float, ...]
    samples: int = 2
    simulated: bool = False
    voted: tuple[float, ...] | None = None

    def verify(self, table, column):
        n = len(table)
        return Verified(
            yes=np.array(self.yes[:n]),
            voted=np.array(self.voted or (2.0,) * n),
            calls=np.full(n, 2.0),
            input_tokens=np.full(n, 2000.0),
            output_tokens=np.full(n, 50.0),
            turns=np.ones(n),
            longest_tokens=np.full(n, 30.0),
        )


@dataclass(frozen=True)
class ByState:
    """Votes at a rate of their own for simple, complex and unsolvable rows."""

    rates: tuple[float, float, float]
    samples: int = 8
    simulated: bool = True

    def verify(self, table, column):
        state = np.where(table.quality[:, 0] == 1, 0, np.where(table.quality[:, 1] == 1, 1, 2))
        rate = np.array(self.rates)[state]
        planted = PlantedVerifier(0.5, 0.5, self.samples)
        drawn = np.array([planted._drawn(one, "small") for one in table.ids])
        found = planted.verify(table, column)
        return replace(found, yes=(drawn < rate[:, None]).sum(axis=1).astype(float))


def learnt(kind, verifier, settings, table, held):
    policy = kind("AutoMix", BETWEEN, verifier, settings)
    fitted(policy, table, held)
    return policy


# --- costs by hand


def test_dollars_seconds_and_calls_of_three_rows_by_hand(tmp_path):
    rows = recorded([(1, 1), (0, 1), (0, 0)], usd=(0.01, 0.1), seconds=(1.0, 3.0))
    verifier = Said(yes=(2.0, 1.0, 0.0))
    settings = settings_with(tmp_path)
    policy = learnt(ThresholdAutoMix, verifier, settings, rows, rows.where(np.zeros(3, bool)))
    never, one, two, always = policy.answer(rows)
    # 2,000 tokens read at 1 and 50 written at 2 dollars a million, and 30 tokens in a row
    usd, seconds = (2000 + 100) / 1e6, 0.5 + 0.3
    assert one.setting == "confidence below 1/2"
    assert one.usd == pytest.approx([0.01 + usd, 0.01 + usd, 0.01 + usd + 0.1])
    assert one.latency_s == pytest.approx([1 + seconds, 1 + seconds, 1 + seconds + 3])
    assert (one.calls.tolist(), one.quality.tolist()) == ([3, 3, 4], [1, 0, 0])
    assert two.setting == "confidence below 2/2"
    assert two.usd == pytest.approx([0.01 + usd, 0.11 + usd, 0.11 + usd])
    assert (two.calls.tolist(), two.quality.tolist()) == ([3, 4, 4], [1, 1, 0])
    # nothing hangs on a verification at the ends, so there is none
    assert (never.usd.tolist(), never.calls.tolist()) == ([0.01] * 3, [1] * 3)
    assert (always.usd.tolist(), always.latency_s.tolist()) == ([0.1] * 3, [3] * 3)


def test_a_threshold_has_a_setting_for_each_observable_confidence_and_two_ends(cheap):
    rows = recorded([(1, 1), (0, 1)] * 20)
    policy = learnt(ThresholdAutoMix, PlantedVerifier(samples=5), cheap, rows, rows)
    told = [point.setting for point in policy.answer(rows)]
    assert told == [
        "the small model alone", *(f"confidence below {i}/5" for i in range(1, 6)),
        "the large model alone",
    ]  # fmt: skip


def test_a_share_of_votes_that_could_be_read_is_taken_as_the_nearest_of_all(tmp_path):
    rows = recorded([(0, 1)] * 3)
    verifier = Said(yes=(1.0, 1.0, 0.0), voted=(1.0, 2.0, 0.0))  # 1, a half, and nothing read
    policy = learnt(ThresholdAutoMix, verifier, settings_with(tmp_path), rows, rows)
    _, one, two, _ = policy.answer(rows)
    assert one.quality.tolist() == [0, 0, 1]
    assert two.quality.tolist() == [0, 1, 1]


# --- IBC


def test_ibc_by_hand():
    # 0.2 for 4 dollars more, where the large model brings 0.4 for 20 dollars more
    found = ibc(0.7, 5.0, small=(0.5, 1.0), large=(0.9, 21.0))
    assert found.method == pytest.approx(0.05)
    assert found.base == pytest.approx(0.02)
    assert found.delta_percent == pytest.approx(150.0)


def test_ibc_of_the_large_model_and_of_a_blind_mix_is_nothing_more():
    ends = {"small": (0.5, 1.0), "large": (0.9, 21.0)}
    assert ibc(0.9, 21.0, **ends).delta_percent == pytest.approx(0.0)
    assert ibc(0.6, 6.0, **ends).delta_percent == pytest.approx(0.0)
    assert ibc(0.4, 6.0, **ends).delta_percent == pytest.approx(-200.0)


@pytest.mark.parametrize(
    ("quality", "usd", "large"),
    [(0.5, 1.0, (0.9, 21.0)), (0.6, 0.5, (0.9, 21.0)), (0.6, 2.0, (0.4, 21.0)),
     (0.6, 2.0, (0.9, 1.0))],
    ids=["costs the same", "costs less", "large is worse", "large costs the same"],
)  # fmt: skip
def test_without_a_dollar_more_or_anything_to_gain_there_is_no_delta(quality, usd, large):
    assert math.isnan(ibc(quality, usd, small=(0.5, 1.0), large=large).delta_percent)


# --- what verification is worth


def height(policy, table):
    points = answered(policy, table)
    usd = np.array([p.usd.mean() for p in points])
    quality = np.array([p.quality.mean() for p in points])
    return aiq(usd, quality, 1.0, 10.0)


@pytest.fixture
def split():
    rng = np.random.default_rng(0)
    shares = (0.5, 0.25, 0.25)
    return Split(
        drawn(rng, 1500, shares), drawn(rng, 500, shares, 1500), drawn(rng, 2000, shares, 2000)
    )


def test_where_unsolvable_rows_are_the_least_sure_the_pomdp_beats_every_threshold(split, cheap):
    verifier = ByState((0.9, 0.5, 0.1))
    heights = {
        kind: height(learnt(kind, verifier, cheap, split.train, split.held), split.measure)
        for kind in KINDS
    }
    assert heights[PomdpAutoMix] > heights[ThresholdAutoMix] + 0.01


def test_where_confidence_says_it_all_the_pomdp_is_as_good_as_thresholds(split, cheap):
    verifier = PlantedVerifier(0.8, 0.4)
    threshold, pomdp = (learnt(kind, verifier, cheap, split.train, split.held) for kind in KINDS)
    blind = split.measure.quality.mean()
    assert height(pomdp, split.measure) == pytest.approx(height(threshold, split.measure), abs=2e-3)
    assert height(pomdp, split.measure) > blind + 0.02
    for policy in (threshold, pomdp):
        (found,) = measure([policy], split, resamples=100, rng=np.random.default_rng(0))
        assert found.figures["delta_ibc"].low > 0.0
        assert found.simulated


@pytest.mark.parametrize("kind", KINDS)
def test_a_useless_verifier_gives_less_for_a_dollar_than_the_large_model(split, cheap, kind):
    policy = learnt(kind, PlantedVerifier(0.6, 0.6), cheap, split.train, split.held)
    small, large = (
        (float(split.measure.quality[:, c].mean()), float(split.measure.usd[:, c].mean()))
        for c in (0, 1)
    )
    for point in policy.answer(split.measure):
        if point.calls.max() > 1:
            found = ibc(point.quality.mean(), point.usd.mean(), small=small, large=large)
            assert found.delta_percent < 10.0, point.setting
    (found,) = measure([policy], split, resamples=100, rng=np.random.default_rng(0))
    if "delta_ibc" in found.figures:
        assert found.figures["delta_ibc"].low < 0.0
    # the ends are open to it as to all, so it is no worse than blind mixing, and no better
    assert found.aiq.value == pytest.approx(split.measure.quality.mean(), abs=0.01)


def test_a_pomdp_does_not_ask_where_asking_gains_nothing(cheap):
    rows = recorded([(1, 1), (0, 0)] * 100)  # large is never the only one that is right
    policy = learnt(PomdpAutoMix, PlantedVerifier(0.9, 0.1), cheap, rows, rows)
    points = policy.answer(rows)
    assert [point.setting for point in points] == [
        "the small model alone", "the large model alone",
    ]  # fmt: skip
    assert policy.figures(points, rows, np.ones(200)) == {}


def test_what_a_pomdp_learns_of_a_confidence_by_hand(tmp_path):
    # confidence 2/2: two simple; 1/2: one complex; 0/2: one unsolvable
    rows = recorded([(1, 1), (1, 0), (0, 1), (0, 0)])
    policy = learnt(PomdpAutoMix, Said((2.0, 2.0, 1.0, 0.0)), settings_with(tmp_path), rows, rows)
    # P(c | s) with one row added to each of three confidences: simple (1, 1, 3) of 5, the others
    # 2 of 4 at their own and 1 of 4 elsewhere; shares 1/2, 1/4, 1/4; gains -1/2, 1 and 0
    weight = np.array([[0.5 * 0.2, 0.5 * 0.2, 0.5 * 0.6],
                       [0.25 * 0.25, 0.25 * 0.5, 0.25 * 0.25],
                       [0.25 * 0.5, 0.25 * 0.25, 0.25 * 0.25]])  # fmt: skip
    gain = (-0.5 * weight[0] + weight[1]) / weight.sum(axis=0)
    assert policy.gain == pytest.approx(gain)


# --- determinism, end to end, refusals


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_rows_changes_nothing(split, cheap, kind):
    def turned(table):
        order = np.arange(len(table))[::-1]
        return replace(
            table,
            prompts=table.prompts[::-1],
            quality=table.quality[order],
            answers={m: a[::-1] for m, a in table.answers.items()},
        )

    one = learnt(kind, PlantedVerifier(), cheap, split.train, split.held)
    other = learnt(kind, PlantedVerifier(), cheap, turned(split.train), turned(split.held))
    for a, b in zip(one.answer(split.measure), other.answer(turned(split.measure)), strict=True):
        assert a.setting == b.setting
        assert a.quality.tolist() == b.quality[::-1].tolist()
        assert a.usd.tolist() == b.usd[::-1].tolist()


@pytest.mark.slow  # it starts a server
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_verifies_itself_through_an_endpoint_is_not_simulated(tmp_path, cheap, kind):
    split = Split(*(recorded([(1, 1), (0, 1)] * 10, start=start) for start in (0, 20, 40)))
    with chat_server() as server:
        server.rule = lambda asked: Answer(
            f"Verdict: {'incorrect' if int(asked.prompt.split()[1]) % 2 else 'correct'}"
        )
        how = JudgeSettings(base_url=server.url, model="small")
        verifier = EndpointVerifier(
            VerifierSettings(endpoint=how, samples=2), tmp_path / "votes.db"
        )
        policy = learnt(kind, verifier, cheap, split.train, split.held)
        verifying = [p for p in answered(policy, split.measure) if p.calls.max() > 1]
        (found,) = measure([policy], split, resamples=20, rng=np.random.default_rng(0))
        # 20 rows of a part, twice; the second time they are known, and a threshold learns nothing
        assert len(server.asked) == (120 if kind is PomdpAutoMix else 80)
    for point in verifying:
        assert point.quality.mean() == 1.0
        assert point.calls.tolist() == [3.0, 4.0] * 10
    assert not policy.simulated
    assert not found.simulated
    assert found.figures["delta_ibc"].value > 0.0


def test_rows_that_it_learnt_from_or_chose_by_are_refused(split, cheap):
    policy = learnt(ThresholdAutoMix, PlantedVerifier(), cheap, split.train, split.held)
    for seen in (split.train, split.held):
        with pytest.raises(UsageError, match="AutoMix has learnt from"):
            answered(policy, seen)


def test_what_it_cannot_work_on_is_refused_with_one_sentence(cheap, tmp_path):
    rows = recorded([(1, 1), (0, 1)] * 5)
    none = rows.where(np.zeros(10, dtype=bool))
    with pytest.raises(TrainingError, match="cannot learn from 0 rows of hand"):
        learnt(PomdpAutoMix, PlantedVerifier(), cheap, none, rows)
    bare = replace(rows, answers={})
    with pytest.raises(UsageError, match="AutoMix reads what models answered"):
        learnt(ThresholdAutoMix, PlantedVerifier(), cheap, bare, rows)
    unpriced = Settings(home=tmp_path / "home")
    with pytest.raises(UsageError, match=r'small has no price.*in \[prices\."small"\]'):
        learnt(ThresholdAutoMix, PlantedVerifier(), unpriced, rows, rows)
    policy = ThresholdAutoMix("AutoMix", Pair("a", "b"), PlantedVerifier(), cheap)
    same = replace(rows, quality=rows.quality[:, ::-1])
    with pytest.raises(TrainingError, match="there is nothing to route between"):
        policy.fit(same, same)
