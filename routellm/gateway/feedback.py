"""What users and judges make of the gateway's answers, on its way to the feedback store."""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from routellm.augmentation.answers import AnswerPair, Answers
from routellm.augmentation.judge import Judge
from routellm.errors import GatewayError, RouteLLMError, UsageError
from routellm.feedback.records import VALUES, Decided, Dueled, Judged, JudgedBy, Route, Winner
from routellm.feedback.writer import Writer
from routellm.gateway.body import Body
from routellm.gateway.endpoints import CHAT
from routellm.gateway.exchange import Exchange
from routellm.gateway.metrics import Metrics
from routellm.gateway.money import Money
from routellm.gateway.upstreams import Headers, Upstreams
from routellm.gateway.usage import UsageReader
from routellm.settings import FeedbackSettings

log = logging.getLogger("routellm.gateway")

_DUELS_AT_ONCE = 4
_DAY_S = 86_400.0


@dataclass(frozen=True)
class FeedbackParts:
    """What feedback is made of, before there is a gateway.

    Attributes
    ----------
    judge : Judge or None
        Compares both models' answers to the prompts that are drawn for a duel.
    judged_by : str
        The judge's model.
    """

    settings: FeedbackSettings
    writer: Writer
    judge: Judge | None = None
    judged_by: str = ""


class Feedback:
    """Records decisions, takes judgements, and has a share of the answers judged."""

    def __init__(
        self, parts: FeedbackParts, upstreams: Upstreams, metrics: Metrics, money: Money
    ) -> None:
        self.settings = parts.settings
        self.writer = writer = parts.writer
        self._judge, self._judged_by = parts.judge, parts.judged_by
        self._upstreams = upstreams
        self._metrics = metrics
        self._money = money
        self._running: set[asyncio.Task[None]] = set()
        self._spent_usd, self._day = 0.0, 0.0
        gauge = metrics.gauge
        gauge("routellm_feedback_waiting", "Records not written yet", lambda: writer.waiting())
        gauge("routellm_feedback_dropped", "Records that were lost", lambda: writer.dropped)
        gauge("routellm_feedback_unwritten", "Writes that failed", lambda: writer.unwritten)

    # --- decisions ---------------------------------------------------------------------------

    def seen(self, one: Exchange) -> None:
        """Queue the record of a request that was answered; an observer of exchanges."""
        routed = one.routed
        if routed is None or one.route not in ("strong", "weak") or not 200 <= one.status < 300:
            return
        pair = one.pair or {r: end.settings.model for r, end in self._upstreams.ends.items()}
        other = "weak" if one.route == "strong" else "strong"
        self.writer.put(
            Decided(
                id=one.usage.id or one.id,
                at=one.at,
                request_id=one.id,
                key_id=one.caller.id or None,
                user=one.user or None,
                version=routed.version,
                kind=routed.kind,
                route="strong" if one.route == "strong" else "weak",
                model=pair[one.route],
                other_model=pair[other],
                win_rate=routed.win_rate,
                threshold=routed.threshold,
                probability=routed.probability,
                reason=one.stood_in or routed.reason,
                canary=routed.canary,
                endpoint=one.endpoint,
                status=one.status,
                input_tokens=one.usage.input_tokens,
                output_tokens=one.usage.output_tokens,
                usd=one.usd,
                prompt=one.prompt if self.settings.store_prompts else None,
            )
        )

    # --- judgements --------------------------------------------------------------------------

    async def take(self, fields: Mapping[str, Any], key_id: str) -> dict[str, Any]:
        """Take a judgement of an answer: ``{"id": ..., "thumbs": "down"}`` and the like.

        Raises
        ------
        GatewayError
            If it is none, or no answer of this caller has the id.
        """
        quoted = fields.get("id")
        if not isinstance(quoted, str) or not 0 < len(quoted) <= 200:
            raise GatewayError("`id` must be the id of an answer, or its x-routellm-id")
        said = {kind: fields[kind] for kind in VALUES if kind != "judge" and kind in fields}
        if len(said) != 1 or set(fields) - {"id", *said}:
            kinds = ", ".join(kind for kind in VALUES if kind != "judge")
            raise GatewayError(f"give `id` and one of {kinds}")
        ((kind, value),) = said.items()
        value = "yes" if value is True else str(value) if isinstance(value, int | str) else ""
        try:
            found = await asyncio.to_thread(self.writer.find, quoted)
            # another caller's is as good as not there
            if found is None or (found.key_id or "") != key_id:
                raise GatewayError("no answer with this id is known here", status=404,
                                   code="not_found")  # fmt: skip
            judged = Judged(
                uuid.uuid4().hex, datetime.now(UTC), quoted, cast(JudgedBy, kind), value[:40]
            )
        except UsageError as error:
            raise GatewayError(str(error)) from error
        except GatewayError:
            raise
        except RouteLLMError as error:
            log.warning("feedback could not be taken: %s", error)
            raise GatewayError(
                "the feedback store does not answer: try again", status=503, code="store_down",
                retry_after_s=5.0,
            ) from error  # fmt: skip
        if not self.writer.put(judged):
            raise GatewayError(
                "too much feedback waits to be written: try again", status=503, code="store_down",
                retry_after_s=5.0,
            )  # fmt: skip
        self._metrics.judged.labels(kind).inc()
        return {"id": judged.id, "object": "feedback", "kind": kind, "value": judged.value}

    # --- duels -------------------------------------------------------------------------------

    def drawn(self, endpoint: str, exchange: Exchange) -> bool:
        """Say whether a request is drawn for a duel."""
        share = self.settings.duel_fraction
        if self._judge is None or share == 0.0 or endpoint != CHAT.path:
            return False
        routed = exchange.routed
        asked = routed is not None and not routed.named and bool(exchange.prompt)
        asked = asked and exchange.route in ("strong", "weak")  # no duels with others of a pool
        return asked and len(self._running) < _DUELS_AT_ONCE and random.random() < share

    def duel(self, exchange: Exchange, body: Body, headers: Headers, served: str) -> None:
        """Let the other model answer too, and have both judged; returns at once."""
        if exchange.broken or exchange.stood_in or exchange.status != 200 or not served:
            return
        if self._spent_today() >= self.settings.duel_usd_per_day:
            return
        task = asyncio.create_task(self._duel(_Duel(exchange, body, list(headers), served)))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def end(self, within_s: float = 5.0) -> None:
        """Give the duels at hand a moment, then stop."""
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=within_s)
            for task in late:
                task.cancel()
        await asyncio.to_thread(self.writer.stop)

    async def _duel(self, duel: _Duel) -> None:
        try:
            answer = await self._other_answer(duel)
            winner = await asyncio.to_thread(self._judged, duel, answer) if answer else None
        except Exception as error:  # a duel is for learning: nobody waits for it
            log.warning("a duel was not fought: %s", type(error).__name__)
            winner = None
        self._metrics.duels.labels(winner or "undecided").inc()
        if winner is not None:
            one = duel.exchange
            served: Route = "strong" if one.route == "strong" else "weak"
            said = Dueled(
                one.usage.id or one.id, datetime.now(UTC), served, winner, self._judged_by
            )
            self.writer.put(said)

    async def _other_answer(self, duel: _Duel) -> str:
        other = "weak" if duel.exchange.route == "strong" else "strong"
        model = self._upstreams.ends[other].settings.model
        answer = await self._upstreams.send(
            other, model, CHAT, duel.body.without("stream", "stream_options"), duel.headers,
            may_stand_in=False,
        )  # fmt: skip
        reader = UsageReader("application/json", text=True)
        try:
            async for chunk in answer.response.aiter_raw():
                reader.feed(chunk)
        finally:
            await answer.response.aclose()
        usage = reader.end()
        usd = self._money.usd(model, usage.input_tokens, usage.output_tokens)
        if usd is not None:
            self._spent_usd += usd
            self._metrics.spent.labels("duel").inc(usd)
        return reader.text

    def _judged(self, duel: _Duel, other: str) -> Winner | None:
        """Return who the judge prefers, in both orders; None if it gave no verdict."""
        assert self._judge is not None
        served = duel.exchange.route
        strong, weak = (duel.served, other) if served == "strong" else (other, duel.served)
        pair = AnswerPair(duel.exchange.prompt or "", strong, weak, 1)
        found = self._judge.judge(Answers("duel", "strong", "weak", (pair,), 0, 0))
        self._spent_usd += found.cost_usd
        self._metrics.spent.labels("judge").inc(found.cost_usd)
        rows = found.labels.battles.to_pylist()
        if not rows:
            return None
        row = rows[0]
        if row["winner"] == "tie":
            return "tie"
        return "strong" if row[row["winner"]] == "strong" else "weak"

    def _spent_today(self) -> float:
        if time.time() - self._day > _DAY_S:
            self._day, self._spent_usd = time.time(), 0.0
        return self._spent_usd


@dataclass(frozen=True)
class _Duel:
    exchange: Exchange
    body: Body
    headers: Headers
    served: str  # the text that the client got
