"""Policies that may ask twice: weak answers, its answer is looked at, strong is asked if need be.

*cascade* looks with a trained scorer (FrugalGPT, Chen et al. 2023, arXiv 2305.05176, section 3),
*automix* has the weak model check its own answer k times (AutoMix, Aggarwal et al. 2024, arXiv
2310.12963, section 3). Both find a confidence in [0, 1], below which strong is asked. A request
asks for them by name, since an answer that is read whole cannot be streamed. docs/policies.md has
them measured.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import httpx

from routellm.errors import BundleError, GatewayError, UsageError
from routellm.gateway.body import Body
from routellm.gateway.decide import Routed
from routellm.gateway.endpoints import CHAT, Endpoint, scored_text
from routellm.gateway.exchange import Call, Exchange
from routellm.gateway.lane import Lane
from routellm.gateway.money import Money
from routellm.gateway.targets import Target
from routellm.gateway.upstreams import Answer, Headers, UpstreamFailed, Upstreams
from routellm.gateway.usage import Usage, UsageReader
from routellm.settings import AutoMixSettings, CascadeSettings, GatewaySettings, ScorerSettings

log = logging.getLogger("routellm.gateway")

_MOST_BYTES = 4_000_000  # of an answer that is read whole
_MOST_CHARS = 12_000  # of an answer that is checked, as when policies are measured
_WAITING = 256  # answers that may wait to be scored
_JSON: Headers = [(b"content-type", b"application/json")]


def thresholds(settings: GatewaySettings) -> dict[str, float]:
    """Return the threshold of each of these policies that is switched on."""
    out = {}
    if settings.cascade.scorer is not None:
        out["cascade"] = settings.cascade.threshold
    if settings.automix.samples:
        out["automix"] = settings.automix.threshold
    return out


def asked_first(
    policy: str,
    settings: GatewaySettings,
    endpoint: Endpoint,
    fields: Mapping[str, Any],
    target: Target,
) -> Routed:
    """Return where a request goes first that asks for a policy: to weak.

    Raises
    ------
    GatewayError
        If there is no such policy, or the request does not allow it.
    """
    known = thresholds(settings)
    shown = repr(policy[:40])
    if policy not in known:
        here = ", ".join([*known, *(["pool"] if settings.pool.models else [])])
        here = here or "none (settings gateway.pool, gateway.cascade and gateway.automix)"
        raise GatewayError(f"there is no policy {shown} here: there is {here}")
    refused = ""
    if endpoint is not CHAT:
        refused = "only chat completions are looked at; leave `policy` out"
    elif fields.get("stream"):
        refused = "an answer is read whole before it is given, so it cannot be streamed"
    elif fields.get("n") not in (None, 1):
        refused = "it looks at one answer: leave `n` out"
    elif target.by_request and target.threshold is None:
        refused = f"it takes a threshold of confidence, not {target}"
    if refused:
        raise GatewayError(f"the policy {shown} cannot be had for this request: {refused}")
    threshold = target.threshold if target.by_request else None
    assert settings.weak is not None
    return Routed(
        "weak",
        settings.weak.model,
        f"asked first by the policy {policy}",
        threshold=known[policy] if threshold is None else threshold,
        policy=policy,
        prompt=scored_text(endpoint.turns(fields), settings.scored, settings.scored_tokens),
    )


class Look(Protocol):
    """Finds how good an answer is."""

    async def confidence(self, prompt: str, answer: str, also: list[Call]) -> float:
        """Return a confidence in [0, 1]; adds the calls that it makes to `also`."""

    def close(self) -> None: ...


class Cascade:
    """Answers requests by a policy.

    Raises
    ------
    UsageError
        If the scorer cannot be read.
    """

    def __init__(self, settings: GatewaySettings, upstreams: Upstreams, money: Money) -> None:
        self._settings = settings
        self._upstreams = upstreams
        self._money = money
        self._looks: dict[str, Look] = {}
        if settings.cascade.scorer is not None:
            self._looks["cascade"] = ScorerLook(settings.cascade)
        if settings.automix.samples:
            self._looks["automix"] = SelfCheck(settings.automix, upstreams, money)

    def knows(self, policy: str) -> bool:
        return policy in self._looks

    def close(self) -> None:
        for look in self._looks.values():
            look.close()

    async def answer(self, exchange: Exchange, body: Body, headers: Headers) -> Answer:
        """Return the answer to a request; what was decided is left in the exchange.

        Where strong is to be asked and fails, weak's answer stands in, if that is allowed. Where
        the look fails, ``gateway.fallback`` says whose answer it is.

        Raises
        ------
        UpstreamFailed
            If none answers.
        """
        routed = exchange.routed
        assert routed is not None
        stand_in = self._settings.stand_in
        first = await self._upstreams.send(
            "weak", routed.model, CHAT, body, headers, may_stand_in=stand_in
        )
        if first.stood_in or first.response.status_code != 200:
            return first
        said = await _said(first.response)
        weak = _call(self._money, "weak", routed.model, said.usage)
        exchange.also.append(weak)
        routed = await self._looked_at(routed, said, exchange.also)
        exchange.routed = routed
        if routed.route == "strong":
            try:
                return await self._upstreams.send(
                    "strong", routed.model, CHAT, body, headers, may_stand_in=False
                )
            except UpstreamFailed as failed:
                if not stand_in or not said.whole:
                    if failed.response is None:
                        raise
                    return Answer("strong", routed.model, failed.response)
                log.warning("the strong model failed (%s): weak's answer is given", failed.code)
                if failed.response is not None:
                    await failed.response.aclose()
                self._upstreams.metrics.stand_ins.labels("strong", failed.code).inc()
                first.stood_in = f"strong failed: {failed.code}"
        exchange.also.remove(weak)  # it gives the answer
        first.response = said.again()
        return first

    async def _looked_at(self, routed: Routed, said: _Said, also: list[Call]) -> Routed:
        """Return the decision between weak's answer and asking strong."""
        threshold = routed.threshold
        assert threshold is not None
        strong = self._upstreams.ends["strong"].settings.model
        if not said.text:
            why = "weak's answer has no text to look at"
            return replace(routed, route="strong", model=strong, reason=why)
        try:
            look = self._looks[routed.policy]
            found = await look.confidence(routed.prompt or "", said.text, also)
            if not 0.0 <= found <= 1.0:
                raise ValueError(f"confidence {found}")
        except Exception as error:
            # as where a router fails: it costs the choice, never the answer
            log.error("the policy %s failed to look: %s", routed.policy, type(error).__name__)
            self._upstreams.metrics.fallbacks.inc()
            why = f"fallback: the policy {routed.policy} failed ({type(error).__name__})"
            if self._settings.fallback == "weak":
                return replace(routed, reason=why)
            return replace(routed, route="strong", model=strong, reason=why)
        why = f"confidence in weak's answer against a threshold of {threshold:g}"
        routed = replace(routed, confidence=found, reason=why)
        return routed if found >= threshold else replace(routed, route="strong", model=strong)


class ScorerLook:
    """Scores answers with a trained encoder, one after the other in a thread."""

    def __init__(self, settings: CascadeSettings) -> None:
        from routellm.policies.encoder_score import EncoderScore

        assert settings.scorer is not None
        try:
            self._score = EncoderScore.load("the scorer", settings.scorer, ScorerSettings())
        except BundleError as error:
            raise UsageError(f"gateway.cascade.scorer: {error}") from error
        self._timeout_s = settings.timeout_s
        self._lane = Lane("score-answers", _WAITING, settings.timeout_s)

    async def confidence(self, prompt: str, answer: str, also: list[Call]) -> float:
        work = self._lane.submit(lambda: float(self._score.score([(prompt, answer)])[0, 0]))
        return await asyncio.wait_for(asyncio.wrap_future(work), self._timeout_s)

    def close(self) -> None:
        self._lane.end(1.0)


class SelfCheck:
    """Asks the weak model whether an answer of its own is right: the share of yes."""

    def __init__(self, settings: AutoMixSettings, upstreams: Upstreams, money: Money) -> None:
        self._settings = settings
        self._upstreams = upstreams
        self._money = money

    async def confidence(self, prompt: str, answer: str, also: list[Call]) -> float:
        from routellm.augmentation.template import cut
        from routellm.embeddings.sentence import clean
        from routellm.policies.verify_prompt import Check

        shown = clean(prompt), cut(clean(answer), _MOST_CHARS)
        checks = [Check(*shown, sample) for sample in range(self._settings.samples)]
        async with asyncio.timeout(self._settings.timeout_s):
            votes = await asyncio.gather(*(self._vote(check, also) for check in checks))
        read = [vote for vote in votes if vote is not None]
        if not read:
            raise ValueError("no vote could be read")
        return read.count("yes") / len(read)

    def close(self) -> None:
        pass

    async def _vote(self, check: Any, also: list[Call]) -> str | None:
        """Return yes, no, or None where there is no verdict."""
        from routellm.policies.verify_prompt import VERIFY_SYSTEM, read_vote

        model = self._upstreams.ends["weak"].settings.model
        asked = {
            "model": model,
            "messages": [
                {"role": "system", "content": VERIFY_SYSTEM},
                {"role": "user", "content": check.text()},
            ],
            "temperature": self._settings.temperature,
            "max_tokens": self._settings.max_output_tokens,
        }
        body = Body.parse(json.dumps(asked).encode())
        try:
            answer = await self._upstreams.send("weak", model, CHAT, body, _JSON,
                                                may_stand_in=False)  # fmt: skip
        except GatewayError as failed:
            if isinstance(failed, UpstreamFailed) and failed.response is not None:
                await failed.response.aclose()
            return None
        said = await _said(answer.response)
        also.append(_call(self._money, "weak", model, said.usage))
        return read_vote(said.text, whole=said.ended)


@dataclass(frozen=True)
class _Said:
    """An answer that was read.

    Attributes
    ----------
    whole : bool
        Whether all of it was read: it may break off, or be longer than is kept.
    text : str
        What it says; "" if it is not whole, or says nothing in words.
    ended : bool
        Whether the model ended by itself.
    """

    response: httpx.Response
    raw: bytes
    whole: bool
    text: str
    ended: bool
    usage: Usage

    def again(self) -> httpx.Response:
        """Return the answer as if nobody had read it."""
        stream = httpx.ByteStream(self.raw)
        return httpx.Response(
            self.response.status_code, headers=self.response.headers, stream=stream
        )


async def _said(response: httpx.Response) -> _Said:
    """Read an answer, as far as it comes and is kept."""
    reader = UsageReader(response.headers.get("content-type", ""), text=True)
    raw, whole = bytearray(), False
    try:
        async for chunk in response.aiter_raw():
            raw += chunk
            reader.feed(chunk)
            if len(raw) > _MOST_BYTES:
                break
        else:
            whole = True
    except httpx.HTTPError as error:
        log.warning("an answer of the weak model broke off (%s)", type(error).__name__)
    finally:
        await response.aclose()
    usage = reader.end()
    return _Said(response, bytes(raw), whole, reader.text if whole else "", reader.ended, usage)


def _call(money: Money, route: str, model: str, usage: Usage) -> Call:
    return Call(route, model, usage, money.usd(model, usage.input_tokens, usage.output_tokens))
