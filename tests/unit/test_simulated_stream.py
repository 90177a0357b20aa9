"""The simulated arena as a stream: off by default, and drifting as it says."""

import hashlib
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest

from routellm.errors import UsageError
from routellm.sources.simulated import _MODELS, SIM_STRONG, SIM_WEAK, SimulatedArena

# of 2,500 battles of seed 3, made before there were streams
AS_BEFORE = "d273130fda70ba40563b76baaddf019e64a17ec01eed30bacf833f65cb54f49e"


def battles(spec, since=None):
    return pa.Table.from_batches(SimulatedArena(spec).batches(since))


def test_without_drift_the_arena_is_what_it_was_to_the_byte():
    rows = repr(battles("simulated://arena?battles=2500&seed=3").to_pylist())
    assert hashlib.sha256(rows.encode()).hexdigest() == AS_BEFORE
    assert SimulatedArena("simulated://arena?seed=3").name == "simulated://arena?seed=3"


def test_every_battle_of_a_stream_asks_a_prompt_of_its_own_and_a_longer_one_goes_on():
    spec = "simulated://arena?drift=1&per_day=100&battles="
    whole = battles(f"{spec}2500")
    assert len(set(whole["prompt"].to_pylist())) == 2500
    first = battles(f"{spec}1700")
    rest = battles(f"{spec}2500", {"battles": 1700})
    assert pa.concat_tables([first, rest]).equals(whole)
    voted = whole["voted_at"].to_pylist()
    assert voted[2400] - voted[0] == timedelta(days=24)


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_what_models_are_good_at_turns_as_fast_as_drift_says(drift):
    arena = SimulatedArena(f"simulated://arena?battles=60000&drift={drift}&per_day=1000")
    blocks = {day: arena._stream(day) for day in (0, 30, 59)}
    strong, weak = (list(_MODELS).index(m) for m in (SIM_STRONG, SIM_WEAK))

    def by_topic(world):
        gap = world.quality[:, strong] - world.quality[:, weak]
        topics = sorted(set(world.topics))
        return np.array([gap[np.array(world.topics) == t].mean() for t in topics])

    alike = {d: np.corrcoef(by_topic(blocks[0]), by_topic(b))[0, 1] for d, b in blocks.items()}
    if drift:
        assert alike[30] < 0.6
        assert alike[59] < -0.5
    else:
        assert min(alike.values()) > 0.9
    overall = [by_topic(b).mean() for b in blocks.values()]
    assert np.ptp(overall) < 0.25  # models trade strengths, none gets better


@pytest.mark.parametrize(
    "wrong", ["drift=-1", "drift=nan", "drift=x", "per_day=0", "per_day=1.5", "drift=101"]
)
def test_a_drift_or_pace_that_cannot_be_is_refused(wrong):
    with pytest.raises(UsageError, match="per_day"):
        SimulatedArena(f"simulated://arena?{wrong}")
