"""The checks that hold a candidate against the champion, on the same prompts.

Each is a paired bootstrap of the difference in APGR. The candidate must be surely better on the
primary benchmark (superiority) and nowhere else worse by more than a margin (non-inferiority). An
interval decides as follows, where ``margin`` is what must be gained, or minus what may be lost::

    low > margin     pass: surely beyond it
    high <= margin   fail: surely not
    else             unsure

So identical routers, whose interval is [0, 0], fail. Two that differ and are equally good are
mostly unsure, and pass by chance half as often as the interval is wrong (2.5 % at 95 %). Where the
candidate is the best of k, each of them had that chance: the lower end is then so wide that all k
together have no more of it (Bonferroni).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from registry.checks import Check, CheckResult, Result
from routellm.errors import BenchmarkError
from routellm.evaluation.bootstrap import Draws, Floats, paired_bootstrap
from routellm.evaluation.metrics import exact_curve
from routellm.settings import Settings

if TYPE_CHECKING:
    from registry.evidence import Evidence
    from registry.paired import Paired

MIN_PROMPTS = 30  # of a slice or another benchmark; a bootstrap of fewer means nothing
MAX_NO_GAP = 0.01  # of the resamples: where strong is not surely better, APGR is a ratio to noise
QUALITIES = (0.5, 0.8)  # shares of the gap at which cost is compared: CPT(50) and CPT(80)
_SEED = 0  # the same evidence gives the same verdict


class Gain(Check):
    """The candidate is surely better on the primary benchmark, also as the best of several."""

    name = "delta_apgr"
    compares = True

    def run(self, evidence: Evidence, settings: Settings) -> Iterator[CheckResult]:
        paired, how = evidence.paired.get(evidence.primary), settings.promotion
        if paired is None:
            yield CheckResult(self.name, "unsure", detail=evidence.why_not(evidence.primary))
            return
        try:
            value, deltas, _ = _deltas(paired, settings)
        except BenchmarkError as error:
            yield CheckResult(self.name, "unsure", n=len(paired), detail=str(error))
            return
        among = evidence.chosen_among
        low, _ = _interval(deltas, _shared(how.confidence, among))
        _, high = _interval(deltas, how.confidence)
        outcome: Result = "unsure"
        said = f"does not surely clear {how.margin:g}"
        if low > how.margin:
            outcome, said = "pass", f"surely clears {how.margin:g}"
        elif high <= how.margin:
            outcome, said = "fail", f"surely does not clear {how.margin:g}"
        best = f" as one of {among} trained on these battles" if among > 1 else ""
        detail = f"on {paired.benchmark}, {said}{best}{_noted(paired)}"
        yield CheckResult(self.name, outcome, value, low, high, how.margin, len(paired), detail)


class OtherBenchmarks(Check):
    """The candidate is not worse by more than a margin on any other benchmark."""

    name = "benchmarks"
    compares = True

    def run(self, evidence: Evidence, settings: Settings) -> Iterator[CheckResult]:
        how = settings.promotion
        others = {n: p for n, p in evidence.paired.items() if n != evidence.primary}
        for name, why in evidence.missing.items():
            if name != evidence.primary:
                yield CheckResult(f"benchmark {name}", "skipped", detail=why)
        for name, paired in others.items():
            left_out = evidence.share_left_out(name)
            if left_out > how.max_excluded_share:
                why = f"training has seen {left_out:.0%} of its prompts: what is left is not it"
                yield CheckResult(f"benchmark {name}", "skipped", n=len(paired), detail=why)
            else:
                yield _no_worse(
                    f"benchmark {name}", paired, how.benchmark_margin, len(others), settings
                )
        if not others and not evidence.missing:
            yield self.skipped(f"there is no benchmark but {evidence.primary}")


class Slices(Check):
    """The candidate is not worse by more than a margin on any slice of the primary benchmark.

    Slices too small to make the gate unsure are reported one by one only where they fail, else as
    one row with the worst of them: a benchmark can have dozens.
    """

    name = "slices"
    compares = True

    def run(self, evidence: Evidence, settings: Settings) -> Iterator[CheckResult]:
        paired, how = evidence.paired.get(evidence.primary), settings.promotion
        if paired is None:
            yield self.skipped(evidence.why_not(evidence.primary))
            return
        parts = [(n, p) for n, p in paired.parts() if len(p) >= MIN_PROMPTS]
        of = Counter(name.split("=")[0] for name, _ in parts)
        small: list[CheckResult] = []
        for name, part in parts:
            family = of[name.split("=")[0]]
            found = _no_worse(f"slice {name}", part, how.slice_margin, family, settings)
            if len(part) < how.min_slice_prompts and found.outcome != "fail":
                small.append(found)
            else:
                yield found
        told = [one for one in small if one.value is not None]
        if told:
            worst = min(told, key=lambda one: one.value or 0.0)
            lowest = worst.name.removeprefix("slice ")
            yield CheckResult(
                "small slices", "pass", worst.value, worst.low, worst.high, -how.slice_margin,
                worst.n, f"none of {len(told)} surely loses more; the lowest: {lowest}",
            )  # fmt: skip
        if not parts:
            yield self.skipped(f"no slice has {MIN_PROMPTS} prompts")


class CostAtQuality(Check):
    """The champion's quality costs no more with the candidate.

    The quality at which the champion recovers half (and 80 %) of the gap is bought with each
    router, on the same prompts. The measured rise decides, and its interval only whether a rise is
    sure enough to reject: one point of a curve is known far worse than the area under it, and to
    ask for a sure 5 % would hold back nearly every router that the whole curve speaks for.
    """

    name = "cost"
    compares = True

    def run(self, evidence: Evidence, settings: Settings) -> Iterator[CheckResult]:
        paired, how = evidence.paired.get(evidence.primary), settings.promotion
        if paired is None:
            yield self.skipped(evidence.why_not(evidence.primary))
            return
        models = (evidence.candidate.strong, evidence.candidate.weak)
        strong_usd, weak_usd = (settings.usd_per_query(m) for m in models)
        if strong_usd is None or weak_usd is None or strong_usd + weak_usd == 0.0:
            lacking = [m for m in models if not settings.usd_per_query(m)]
            yield self.skipped(f"no price is set for {' and '.join(lacking)} (`prices`)")
            return
        try:
            _, _, draws = _deltas(paired, settings, cpts=QUALITIES)
        except BenchmarkError as error:
            yield self.skipped(str(error))
            return
        ones = np.ones(len(paired))
        curves = [
            exact_curve(rates, paired.strong, paired.weak, ones)
            for rates in (paired.champion, paired.candidate)
        ]
        for i, quality in enumerate(QUALITIES):

            def rise(fraction: Floats) -> Floats:  # (2, ...) of champion and candidate
                usd = fraction * strong_usd + (1.0 - fraction) * weak_usd
                # a champion that needs no call to strong may cost nothing
                return np.asarray((usd[1] - usd[0]) / np.maximum(usd[0], 1e-3 * strong_usd))

            value = float(rise(np.array([curve.cpt(quality) for curve in curves])))
            low, high = _interval(rise(draws.cpt[i]), how.confidence)
            outcome: Result = "pass" if value <= how.cost_tolerance else "unsure"
            if low > how.cost_tolerance:
                outcome = "fail"
            dearer = f"{abs(value):.1%} {'more' if value > 0 else 'less'}"
            yield CheckResult(
                f"cost at {quality:.0%}", outcome, value, low, high, how.cost_tolerance,
                len(paired), f"the quality of {quality:.0%} of the gap costs {dearer}",
            )  # fmt: skip


def _no_worse(name: str, paired: Paired, margin: float, of: int, settings: Settings) -> CheckResult:
    """Hold a slice or another benchmark to a margin.

    `low` is the interval's own. `high` is wide enough that all `of` such checks together (the parts
    of one slice, or the other benchmarks) say *fail* of a candidate that loses just the margin as
    seldom as one would (Bonferroni): of dozens of small parts one is always far off by chance.
    """
    how, n = settings.promotion, len(paired)

    def result(outcome: Result, detail: str, *figures: float) -> CheckResult:
        value, low, high = figures or (None, None, None)
        return CheckResult(name, outcome, value, low, high, -margin, n, detail + _noted(paired))

    if n < MIN_PROMPTS:
        return result("skipped", f"{n} prompts are too few to compare on")
    if paired.gap <= 0:
        return result("skipped", "strong is no better than weak here: there is nothing to lose")
    try:
        value, deltas, draws = _deltas(paired, settings)
    except BenchmarkError as error:
        return result("skipped", str(error))
    low, _ = _interval(deltas, how.confidence)
    _, high = _interval(deltas, _shared(how.confidence, of))
    if draws.no_gap > MAX_NO_GAP:
        return result("skipped", "strong is hardly better than weak here: APGR has no meaning")
    if low > -margin:
        return result("pass", f"surely loses less than {margin:g}", value, low, high)
    if high <= -margin:
        return result("fail", f"surely loses more than {margin:g}", value, low, high)
    if n < how.min_slice_prompts:
        why = f"{n} prompts are too few to tell (of {how.min_slice_prompts})"
        return result("skipped", why, value, low, high)
    return result("unsure", f"may lose more than {margin:g}", value, low, high)


def _deltas(
    paired: Paired, settings: Settings, cpts: tuple[float, ...] = ()
) -> tuple[float, Floats, Draws]:
    """Return the candidate's gain in APGR, measured and on each resample, and the resamples."""
    if paired.gap <= 0:
        raise BenchmarkError(f"strong is no better than weak on {len(paired)} prompts in common")
    draws = paired_bootstrap(
        (paired.champion, paired.candidate),
        paired.strong,
        paired.weak,
        paired.cluster,
        resamples=settings.promotion.resamples,
        rng=np.random.default_rng(_SEED),
        cpts=cpts,
    )
    value = paired.apgr(paired.candidate) - paired.apgr(paired.champion)
    return value, draws.apgr[1] - draws.apgr[0], draws


def _shared(confidence: float, of: int) -> float:
    """Return how sure each of so many must be, to err together as seldom as one (Bonferroni)."""
    return 1.0 - (1.0 - confidence) / of


def _interval(drawn: Floats, confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return float(low), float(high)


def _noted(paired: Paired) -> str:
    return f" ({paired.note})" if paired.note else ""
