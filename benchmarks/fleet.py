"""Following an alias with 1,000 gateways: the load on MLflow, and the time to a new version.

``python -m benchmarks.fleet`` first measures on real servers what a lookup, a new version and a
webhook cost MLflow (`benchmarks.mlflow_load`), then holds the simulation against 40 real pollers,
then simulates 1,000 replicas (`benchmarks.fleet_simulation`). It takes about five minutes and needs
PostgreSQL (``python -m benchmarks.fleet sqlite`` does not); it prints Markdown.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fleet_simulation import GIVES_UP_S, Costs, Fleet, Floats, Plan

ROUNDS = 6  # of holding it against real pollers


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def seconds(values: Floats | list[float], *quantiles: float) -> str:
    """Return quantiles in words: ``0.21 / 3.4 / 12 s``."""
    found = np.quantile(values, quantiles)
    return " / ".join(f"{v:.0f}" if v >= 10 or v < 0.001 else f"{v:.2g}" for v in found)


def row(name: str, plan: Plan, costs: Costs) -> list[str]:
    """Simulate a plan, and return what is told of it."""
    found = Fleet(plan, costs).run()
    gone = f" ({found.given_up:,} over {GIVES_UP_S:.0f} s)" if found.given_up else ""
    return [
        name, f"{found.per_s:.0f}", f"{found.utilisation:.0%}",
        seconds(1000 * found.wait_s, 0.5, 0.99), seconds(found.serving_s, 0.5, 0.99, 1.0),
        f"{found.longest_s:.2g}{gone}",
    ]  # fmt: skip


HEADER = (
    "1,000 replicas", "lookups/s at MLflow", "busy", "wait p50 / p99, ms",
    "new version serves at p50 / p99 / all, s", "longest answer meanwhile, s",
)  # fmt: skip


def plans(processes: int, nudge_per_s: float) -> Iterator[tuple[str, Plan, bool]]:
    """Yield the plans of the page: a name, the plan, whether a cache in front has all files."""
    for poll_s in (2.0, 5.0, 10.0, 30.0, 60.0):
        yield f"poll {poll_s:.0f} s", Plan(poll_s, processes=processes), False
    for jitter_s in (0.0, 10.0, 30.0):
        how = f", jitter {jitter_s:.0f} s" if jitter_s else ""
        plan = Plan(60.0, processes=processes, nudge_per_s=nudge_per_s, jitter_s=jitter_s)
        yield f"poll 60 s, nudged{how}", plan, False
    plan = Plan(60.0, processes=processes, nudge_per_s=nudge_per_s)
    yield "poll 60 s, nudged, files cached", plan, True
    yield "poll 60 s, nudged, all cached for 1 s", replace(plan, cache_s=1.0), True
    yield "poll 2 s, all cached for 1 s", Plan(2.0, processes=processes, cache_s=1.0), True


def validate(server: Any, registry: Any, *, pollers: int = 40) -> list[list[str]]:
    """Hold the simulation against real pollers, at about 60 % utilisation; returns rows.

    Each round times lookups before and after its polling and is simulated with these: a machine
    that others use is slower in some rounds than in others.
    """
    import psutil

    from benchmarks import mlflow_load as real

    versions, rows = itertools.cycle(["2", "1"]), []

    def move() -> None:
        registry.client.set_registered_model_alias(real.MODEL, "champion", next(versions))

    for nudged in (False, True):
        rounds = []
        psutil.cpu_percent()
        for _ in range(ROUNDS):
            before, _ = real.lookup_s(server, 100)
            poll_s = pollers * float(before.mean()) / 0.6
            seen = real.poll(
                server, move, pollers=pollers, poll_s=poll_s, seconds=8 * poll_s, nudged=nudged
            )
            costs = Costs(np.concatenate([before, real.lookup_s(server, 100)[0]]))
            plan = Plan(poll_s, pollers, nudge_per_s=1e9 if nudged else None)
            rounds.append((seen, Fleet(plan, costs).run(), costs.lookup_s.mean()))
        how = f"{pollers} pollers" + (", nudged" if nudged else "")
        how += f" (machine {psutil.cpu_percent():.0f} % busy)"
        measured, simulated, service_s = zip(*rounds, strict=True)
        for name, found, serving in (
            ("measured", measured, [r.seen_s for r in measured]),
            ("simulated", simulated, [r.serving_s for r in simulated]),
        ):
            busy = np.mean([r.per_s * s for r, s in zip(found, service_s, strict=True)])
            response_s = np.concatenate([r.response_s for r in found])
            rows.append(
                [f"{how}: {name}", f"{np.mean([r.per_s for r in found]):.0f}", f"{busy:.0%}",
                 seconds(1000 * response_s, 0.5, 0.9, 0.99),
                 seconds(np.concatenate(serving), 0.5, 0.9),
                 seconds([max(x) for x in serving], 0.5)]
            )  # fmt: skip
    return rows


def main() -> None:
    from benchmarks import mlflow_load as real

    webhooks: dict[str, Any] = {
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_CACHE_TTL": "1",
    }
    measured: list[list[str]] = []
    backends = ["sqlite"] if "sqlite" in sys.argv else ["sqlite", "postgresql"]
    for backend in backends:
        with (
            tempfile.TemporaryDirectory() as home,
            real.mlflow(backend, **webhooks) as server,
        ):
            registry = real.registered(server.url, Path(home), ("mf", "knn"))
            small, large = (real.load_of(registry, server, v) for v in ("1", "2"))
            registry.client.set_registered_model_alias(real.MODEL, "champion", "1")
            took, cpu_s = real.lookup_s(server)
            ms = seconds(1000 * took, 0.5, 0.99)
            measured.append([f"{backend}: a lookup", f"{1000 * cpu_s:.1f} ms", f"{ms} ms", "1", ""])
            for name, load in (("mf", small), ("knn", large)):
                measured.append(
                    [f"{backend}: a new version ({name}, {real.BATTLES:,} battles)",
                     f"{1000 * load.server_s:.0f} ms", f"{1000 * load.own_s:.0f} ms of its own",
                     f"{load.requests}, {load.requests - load.records} for files",
                     f"{load.mb:.1f}"]
                )  # fmt: skip
            time.sleep(1.5)  # until MLflow forgets that there were no webhooks
            nudge_per_s = real.webhooks_per_s(registry.client)
            measured.append([f"{backend}: webhooks", f"{nudge_per_s:.0f}/s", "", "", ""])
            if backend == backends[-1]:
                checked = validate(server, registry)
    print("Measured (a replica's time is its answer's for a lookup, CPU time for a load)\n")
    header = ["", "MLflow's CPU time", "replica", "requests", "MB"]
    print(table(header, measured))
    print(f"The simulation and real pollers, {backends[-1]}\n")
    header = ["", "lookups/s", "busy", "answer p50 / p90 / p99, ms", "seen p50 / p90, s", "by all"]
    print(table(header, checked))
    costs = Costs(np.array([cpu_s]), small.requests, small.server_s, small.own_s)
    records = replace(costs, load_requests=small.records, load_s=small.records * cpu_s)
    for processes in (1, 4):
        print(f"SIMULATED: {backends[-1]}, {processes} server process(es), a new `mf`\n")
        told = plans(processes, nudge_per_s)
        print(table(HEADER, [row(n, plan, records if files else costs) for n, plan, files in told]))


if __name__ == "__main__":
    main()
