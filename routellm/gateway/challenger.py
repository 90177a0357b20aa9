"""The challenger beside the champion: a shadow scores and is not served, a canary decides.

Nothing it does can fail a request. In shadow it scores after the champion has decided, in a thread
of its own. As a canary it decides for a share of the conversations; where it raises, gives no win
rate or is not done in time, the champion decides.
"""

from __future__ import annotations

import asyncio
import logging
import queue
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from routellm.embeddings.memory import Encoders
from routellm.gateway.decide import Scored, on_canary_side
from routellm.gateway.evidence import Evidence
from routellm.gateway.follow import Follower, Serving
from routellm.gateway.lane import Lane
from routellm.gateway.metrics import Metrics
from routellm.gateway.source import RouterSource, VersionRef
from routellm.gateway.targets import QueryPrices, Target
from routellm.settings import GatewaySettings

if TYPE_CHECKING:
    from routellm.feedback.store import FeedbackStore

log = logging.getLogger("routellm.gateway")

# seconds; a challenger that takes longer over one prompt has failed on it. A canary's request waits
# for it; for a shadow nobody waits, and on a busy machine it may take long and be no worse
PATIENCE_S = {"canary": 2.0, "shadow": 30.0}
_LAST_S = 1.0  # for what still waits for the shadow when the gateway stops
_WAITING = 64  # prompts that may wait for it


class Challenger:
    """Follows the challenger's alias and asks what it points at.

    Its methods are called from the event loop.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        source: RouterSource,
        home: Path,
        metrics: Metrics,
        encoders: Encoders,
        prices: QueryPrices,
        store: FeedbackStore | None = None,
    ) -> None:
        self.prices = prices
        self.mode = settings.challenger
        self.fraction = settings.canary_fraction
        self.follower = Follower(source, None, settings.poll_s, encoders)
        self.evidence = Evidence(home / "online", self.mode, store)
        self.metrics = metrics
        self._lane: tuple[VersionRef, Lane] | None = None

    def start(self) -> None:
        self.follower.start()
        self.evidence.start()

    def stop(self) -> None:
        """Let what waits be scored, for a moment, and write the counts."""
        self.follower.stop()
        if self._lane is not None:
            self._lane[1].end(_LAST_S)
        self.evidence.stop()

    def standing(self, champion: Serving | None) -> tuple[Serving | None, str]:
        """Return the version that stands beside this champion, or None and why there is none."""
        one = self.follower.serving
        if one is None:
            return None, self.follower.problem or "the challenger is being loaded"
        if champion is None:
            return None, "there is no champion to stand beside"
        if one.ref == champion.ref:
            return None, f"version {one.ref.version} is the champion already"
        ours, theirs = one.bundle.pair, champion.bundle.pair
        if ours != theirs:
            return None, (
                f"version {one.ref.version} routes between {ours.strong} and {ours.weak}, the "
                f"champion between {theirs.strong} and {theirs.weak}: it is not asked; put a "
                "version for the champion's pair in line"
            )
        return one, self.follower.problem

    async def decide(
        self, champion: Serving, target: Target, user: str, first_turn: str, prompt: str
    ) -> tuple[Serving, Scored] | None:
        """Return a canary's decision, or None where the champion decides.

        The first user turn names the conversation, which stays on one side.
        """
        if self.mode != "canary":
            return None
        one = self._asked(champion, target)
        if one is None or not on_canary_side(one.ref.version, user, first_turn, self.fraction):
            return None
        try:
            threshold = target.threshold_on(one.bundle, self.prices)
            work = self._lane_of(one).submit(partial(one.score, prompt, threshold))
            scored = await asyncio.wait_for(asyncio.wrap_future(work), PATIENCE_S[self.mode])
        except queue.Full:
            self._drop(one)
            return None
        except Exception as error:  # whatever a broken router raises
            self._fail(one, error)
            return None
        self._count(one, target, scored)
        return one, scored

    def share(self, champion: Serving, target: Target) -> float:
        """Return the share of such requests that a canary decides for; 0 without one."""
        stands = self.mode == "canary" and self._asked(champion, target) is not None
        return self.fraction if stands else 0.0

    def watch(self, champion: Serving, target: Target, prompt: str, route: str) -> None:
        """Queue a prompt that the champion has decided for the shadow; returns at once."""
        if self.mode != "shadow":
            return
        one = self._asked(champion, target)
        if one is None:
            return

        def work() -> None:
            try:
                scored = one.score(prompt, target.threshold_on(one.bundle, self.prices))
            except Exception as error:
                self._fail(one, error)
            else:
                self._count(one, target, scored, agreed=scored.route == route)

        def done(future: Future[None]) -> None:
            if future.cancelled():  # the gateway stopped before its turn
                self._drop(one)

        try:
            self._lane_of(one).submit(work).add_done_callback(done)
        except queue.Full:
            self._drop(one)
        except TimeoutError as error:
            self._fail(one, error)

    def _asked(self, champion: Serving, target: Target) -> Serving | None:
        one, _ = self.standing(champion)
        # a request that insists on a kind of router is not for one of another kind
        return None if one is None or target.kind not in (None, one.bundle.kind) else one

    def _lane_of(self, one: Serving) -> Lane:
        """Return this version's lane: one that hung must not stand in the way of the next."""
        if self._lane is None or self._lane[0] != one.ref:
            if self._lane is not None:
                self._lane[1].close()
            name = f"challenger-{one.ref.version}"
            self._lane = one.ref, Lane(name, _WAITING, PATIENCE_S[self.mode])
        return self._lane[1]

    def _count(self, one: Serving, target: Target, scored: Scored, *, agreed: bool = False) -> None:
        self.metrics.answered(one.ref, self.mode, scored, agreed=agreed)
        self.evidence.answered(
            one.ref,
            strong=scored.route == "strong",
            asked=target.fraction_on(one.bundle, self.prices),
            latency_ms=scored.latency_ms,
            agreed=agreed,
        )

    def _fail(self, one: Serving, error: Exception) -> None:
        log.warning("challenger %s failed to score: %s", one.ref.version, type(error).__name__)
        self.metrics.failed(one.ref, self.mode)
        self.evidence.failed(one.ref)

    def _drop(self, one: Serving) -> None:
        self.metrics.dropped(one.ref, self.mode)
        self.evidence.dropped(one.ref)
