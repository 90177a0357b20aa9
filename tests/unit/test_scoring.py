"""Prompts that wait at the same time are scored together, and a bad router holds nobody up."""

import asyncio
import threading
import time

import numpy as np
import pytest

from routellm.bundle import Bundle
from routellm.calibration import Calibration
from routellm.errors import BundleError
from routellm.gateway.follow import Serving
from routellm.gateway.scoring import Scorer
from routellm.gateway.source import VersionRef
from routellm.routers.base import Pair
from routellm.routers.random import RandomRouter
from routellm.settings import EmbeddingSettings
from tests.conftest import HashEncoder


class Watched(RandomRouter):
    """Notes its batches, and does what a prompt says."""

    def __init__(self):
        super().__init__(HashEncoder(), Pair("s", "w"))
        self.batches = []
        self.go_on = threading.Event()
        self.go_on.set()

    def win_rate(self, prompts):
        self.batches.append(list(prompts))
        self.go_on.wait(10)
        if "poison" in prompts:
            raise RuntimeError("boom")
        if "nan" in prompts:
            return np.full(len(prompts), np.nan)
        return super().win_rate(prompts)


def scorer(router, patience_s=5.0, **more):
    calibration = Calibration.of(np.linspace(0, 1, 50), "test")
    bundle = Bundle(router, EmbeddingSettings(), calibration, (), "d", False, "0")
    return Scorer(Serving(VersionRef("router", "1"), bundle), patience_s, **more)


def test_prompts_that_come_while_the_router_is_busy_are_one_batch():
    router = Watched()
    prompts = [f"prompt {i}" for i in range(100)]

    async def ask():
        asked = scorer(router)
        router.go_on.clear()
        answers = [asyncio.create_task(asked.rate(prompt)) for prompt in prompts]
        await asyncio.sleep(0.1)
        router.go_on.set()
        return [rate for rate, _ in await asyncio.gather(*answers)]

    rates = asyncio.run(ask())
    assert rates == RandomRouter.win_rate(router, prompts).tolist()
    assert [len(batch) for batch in router.batches] == [1, 64, 35]


def test_a_prompt_that_was_scored_is_remembered():
    router = Watched()

    async def ask():
        asked = scorer(router)
        return [(await asked.rate("the same"))[0] for _ in range(5)]

    assert len(set(asyncio.run(ask()))) == 1
    assert router.batches == [["the same"]]


@pytest.mark.parametrize(("bad", "error"), [("poison", RuntimeError), ("nan", BundleError)])
def test_a_prompt_that_the_router_cannot_read_spoils_nothing_for_the_others(bad, error):
    router = Watched()

    async def ask():
        asked = scorer(router)
        router.go_on.clear()
        names = ["first", "a", bad, "b"]
        answers = [asyncio.create_task(asked.rate(name)) for name in names]
        await asyncio.sleep(0.05)
        router.go_on.set()
        return await asyncio.gather(*answers, return_exceptions=True)

    first, a, broken, b = asyncio.run(ask())
    assert 0 <= first[0] <= 1
    assert 0 <= a[0] <= 1
    assert 0 <= b[0] <= 1
    assert isinstance(broken, error)


def test_a_router_that_hangs_costs_each_request_no_more_than_the_deadline():
    router = Watched()

    async def ask():
        asked = scorer(router, patience_s=0.2)
        router.go_on.clear()
        took = []
        for i in range(3):
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                await asked.rate(f"prompt {i}")
            took.append(time.monotonic() - began)
        router.go_on.set()
        await asyncio.sleep(0.1)
        return took, await asked.rate("afterwards")

    took, afterwards = asyncio.run(ask())
    assert took[0] < 2.0
    assert max(took[1:]) < 0.15  # known to hang: refused at once
    assert 0 <= afterwards[0] <= 1


def test_a_queue_that_is_full_refuses():
    router = Watched()

    async def ask():
        asked = scorer(router, most_waiting=3)
        router.go_on.clear()
        answers = [asyncio.create_task(asked.rate(f"prompt {i}")) for i in range(6)]
        await asyncio.sleep(0.05)
        router.go_on.set()
        return await asyncio.gather(*answers, return_exceptions=True)

    found = asyncio.run(ask())
    assert sum(isinstance(one, TimeoutError) for one in found) == 2  # one at work, three wait


def test_a_request_that_was_given_up_is_not_scored():
    router = Watched()

    async def ask():
        asked = scorer(router)
        router.go_on.clear()
        busy = asyncio.create_task(asked.rate("busy"))
        await asyncio.sleep(0.05)
        given_up = asyncio.create_task(asked.rate("given up"))
        await asyncio.sleep(0.05)
        given_up.cancel()
        router.go_on.set()
        await busy
        await asked.rate("next")

    asyncio.run(ask())
    assert router.batches == [["busy"], ["next"]]
