"""The gateway's own metrics, read back as Prometheus reads them: sums, shares, quantiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """An exposition, parsed.

    Attributes
    ----------
    samples : dict
        By sample name (``routellm_requests_total``): pairs of labels and value.
    """

    samples: dict[str, list[tuple[dict[str, str], float]]]

    @classmethod
    def of(cls, exposition: bytes) -> Figures:
        from prometheus_client.parser import text_string_to_metric_families

        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(exposition.decode()):
            for one in family.samples:
                samples.setdefault(one.name, []).append((one.labels, one.value))
        return cls(samples)

    def _matching(self, name: str, where: dict[str, str]) -> Iterator[tuple[dict[str, str], float]]:
        for labels, value in self.samples.get(name, []):
            if where.items() <= labels.items():
                yield labels, value

    def total(self, name: str, **where: str) -> float:
        """Return the sum of the samples with these labels; 0 if there are none."""
        return math.fsum(value for _, value in self._matching(name, where))

    def by(self, name: str, label: str, **where: str) -> dict[str, float]:
        """Return the sums by the values of a label."""
        out: dict[str, float] = {}
        for labels, value in self._matching(name, where):
            out[labels[label]] = out.get(labels[label], 0.0) + value
        return out

    def values_of(self, name: str, *labels: str) -> list[tuple[str, ...]]:
        """Return the values that labels have together, each once, in their order."""
        found = (tuple(have[label] for label in labels) for have, _ in self._matching(name, {}))
        return list(dict.fromkeys(found))

    def buckets(self, name: str, **where: str) -> list[tuple[float, float]]:
        """Return a histogram's upper bounds, in order, and how many are at or under each."""
        by_bound = self.by(f"{name}_bucket", "le", **where)
        return sorted((float(bound), count) for bound, count in by_bound.items())

    def quantile(self, q: float, name: str, **where: str) -> float | None:
        """Return a quantile of a histogram, as Prometheus's ``histogram_quantile`` does.

        Between two bounds observations are taken to be spread evenly; what is over the last finite
        bound is told as that bound. None if there are no observations.
        """
        buckets = self.buckets(name, **where)
        if not buckets or buckets[-1][1] == 0:
            return None
        rank = q * buckets[-1][1]
        low, under = 0.0, 0.0
        for bound, count in buckets:
            if count >= rank and count > under:
                if math.isinf(bound):
                    return low
                return low + (bound - low) * (rank - under) / (count - under)
            low, under = bound, count
        return low
