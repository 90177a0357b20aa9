"""How a router's time and memory grow with the battles it learns from. SIMULATED battles.

Each figure of a router and a number of battles comes from two processes of their own: one draws
the battles, trains and saves; the other loads what was saved, as a gateway does, and answers.
Embeddings are drawn beforehand, so no encoder is in any figure.

``python -m benchmarks growth`` for all sizes; ``--help`` for fewer.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

SIZES = (10_000, 100_000, 1_000_000)
WEIGHTS = "label weights"  # not a kind: chosen once for all kinds, before they train
LIMIT_S = 900.0  # a kind and size that takes longer is stopped, and said to be
QUICK_LIMIT_S = 45.0
BATCH = 64
# a step of bert takes as long however many battles there are, and `max_steps` bounds the steps:
# one size with few steps says it all
BERT_STEPS = 20
BERT_TOKENS = 128
NOT_MEASURED = {"causal_llm": "needs a GPU and a model from a hub"}


@dataclass(frozen=True)
class Trained:
    """Figures of the process that trained; memory in MB, of the whole process.

    Attributes
    ----------
    data_mb : float
        Peak with the battles drawn and nothing trained.
    fit_s, fit_cpu_s : float
        Training, by the clock and in CPU time: on a busy machine only the latter says much.
    fit_mb, saved_mb : float
        Peak after training, and after saving as well.
    """

    data_mb: float
    fit_s: float
    fit_cpu_s: float
    fit_mb: float
    saved_mb: float


@dataclass(frozen=True)
class Served:
    """Figures of the process that answered; times in ms are of the fastest call of several."""

    load_s: float
    one_ms: float
    batch_ms: float
    served_mb: float


def peak_mb() -> float:
    """Return the most memory this process has held at once, in MB (10**6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _fastest_ms(call: Callable[[], object], times: int, budget_s: float = 20.0) -> float:
    """Return what a call takes when nothing else comes between, as on a machine to itself."""
    call()  # what is made once is made here
    took: list[float] = []
    while len(took) < times and (len(took) < 3 or sum(took) < budget_s):
        started = time.perf_counter()
        call()
        took.append(time.perf_counter() - started)
    return min(took) * 1000


def train_cell(kind: str, battles: int, folder: Path) -> Trained:
    """Train one kind and save it in `folder`. For a process of its own."""
    from benchmarks.simulated import draw_battles, draw_queries
    from routellm.bundle import Bundle, save_bundle
    from routellm.calibration import Calibration
    from routellm.label_weights import choose_label_weights
    from routellm.settings import EmbeddingSettings
    from routellm.training import train

    data = draw_battles(battles)
    _, encoder = draw_queries(1)
    data_mb = peak_mb()
    started, cpu = time.perf_counter(), time.process_time()

    def trained(fit_mb: float) -> Trained:
        return Trained(
            data_mb, time.perf_counter() - started, time.process_time() - cpu, fit_mb, fit_mb
        )

    if kind == WEIGHTS:
        choose_label_weights(data)
        return trained(peak_mb())
    options = {"max_steps": BERT_STEPS, "max_length": BERT_TOKENS} if kind == "bert" else None
    router, _ = train(kind, data, encoder, seed=0, options=options)
    figures = trained(peak_mb())
    bundle = Bundle(
        router=router, embedding=EmbeddingSettings(), calibration=Calibration("none", 1, (0.5,)),
        golden=(), snapshot="simulated", simulated=True, code_version="benchmark",
    )  # fmt: skip
    save_bundle(bundle, folder / "bundle")
    return replace(figures, saved_mb=peak_mb())


def serve_cell(folder: Path) -> Served:
    """Load what `train_cell` saved and answer queries. For a process of its own."""
    from benchmarks.simulated import draw_queries
    from routellm.bundle import load_bundle

    prompts, encoder = draw_queries(BATCH)
    started = time.perf_counter()
    router = load_bundle(folder / "bundle", encoder=encoder).router
    load_s = time.perf_counter() - started
    one_ms = _fastest_ms(lambda: router.win_rate(prompts[:1]), 30)
    batch_ms = _fastest_ms(lambda: router.win_rate(prompts), 10)
    return Served(load_s, one_ms, batch_ms, peak_mb())


def _in_process(arguments: Sequence[str], limit_s: float) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.growth", *arguments],
        stdout=subprocess.PIPE, text=True, check=True, timeout=limit_s,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def cell(kind: str, battles: int, limit_s: float) -> dict[str, float] | str:
    """Return the figures of one kind and size, or why there are none."""
    ends = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory() as folder:
        try:
            figures = _in_process(["train", kind, str(battles), folder], limit_s)
            if kind != WEIGHTS:
                figures |= _in_process(["serve", folder], max(1.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"over {limit_s:.0f} s"
        except subprocess.CalledProcessError as error:  # its own message is on the terminal
            return f"failed ({error.returncode})"
    return figures | {"own_mb": figures["saved_mb"] - figures["data_mb"]}


_ROWS = (
    ("fit_s", "training, s"),
    ("fit_cpu_s", "  CPU, s"),
    ("saved_mb", "  peak memory, saving included, MB"),
    ("own_mb", "  of it beyond the battles, MB"),
    ("one_ms", "  one query, ms"),
    ("batch_ms", f"  batch of {BATCH}, ms"),
    ("served_mb", "  peak memory of a server, MB"),
)


def rows_of(
    name: str, sizes: Sequence[int], cells: Sequence[dict[str, float] | str]
) -> list[tuple[str, str]]:
    """Return the table's rows for one kind: a figure for each size, and how it grows.

    Between two sizes, ``n^e`` says that the figure grew as the battles to the power e.
    """
    rows = []
    for key, what in _ROWS:
        values = [c.get(key) if isinstance(c, dict) else None for c in cells]
        if key != "fit_s" and not any(values):
            continue
        shown = [
            c if isinstance(c, str) else f"{c[key]:,.0f}" if c[key] >= 100 else f"{c[key]:.2g}"
            for c in cells
        ]
        steps = zip(values, values[1:], sizes, sizes[1:], strict=False)
        grew = [
            f"n^{np.log(v / u) / np.log(m / n):.1f}" if u and v else "?" for u, v, n, m in steps
        ]
        result = " · ".join(shown) + (f" ({', '.join(grew)})" if any(values) and grew else "")
        rows.append((what.replace("training", f"{name}: training"), result))
    return rows


def measured_kinds() -> tuple[str, ...]:
    """Return what is measured: every installed kind that can be, and the choice before them."""
    from routellm.routers.base import router_kinds

    return (*(k for k in router_kinds() if k not in NOT_MEASURED), WEIGHTS)


def measure(
    kinds: Sequence[str], sizes: Sequence[int], limit_s: float = LIMIT_S
) -> list[tuple[str, str]]:
    """Return the table's rows for kinds at numbers of battles."""
    from benchmarks.simulated import MAX_PROMPTS

    data: dict[int, str] = {}
    rows: list[tuple[str, str]] = []
    for kind in kinds:
        bert = kind == "bert"
        cells = []
        for n in sizes[:1] if bert else sizes:
            cells.append(cell(kind, n, limit_s))
            print(f"{kind}, {n:,} battles: {cells[-1]}", file=sys.stderr, flush=True)
            if isinstance(cells[-1], dict):
                data[n] = f"{cells[-1]['data_mb']:,.0f}"
        name = f"bert, {sizes[0]:,} battles, {BERT_STEPS} steps" if bert else kind
        rows += rows_of(name, sizes, cells)
    return [
        ("battles (growth in brackets)", " · ".join(f"{n:,}" for n in sizes)),
        (f"memory with these alone, MB (at most {MAX_PROMPTS:,} prompts)",
         " · ".join(data.get(n, "?") for n in sizes)),
        *rows,
        *((kind, f"not measured: {why}") for kind, why in NOT_MEASURED.items()),
    ]  # fmt: skip


def measure_quick() -> list[tuple[str, str]]:
    """Return the rows of the quick table: what is done in a few minutes."""
    return measure(measured_kinds(), SIZES[:2], QUICK_LIMIT_S)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["train", kind, battles, folder]:
            figures: Trained | Served = train_cell(kind, int(battles), Path(folder))
        case ["serve", folder]:
            figures = serve_cell(Path(folder))
        case _:
            sys.exit("run `python -m benchmarks growth`")
    print(json.dumps(asdict(figures)))
