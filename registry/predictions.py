"""What a version answered, prompt by prompt: the tables that two versions are compared by.

::

    on a version's run      predictions/<benchmark>.parquet      win rates; no text of a prompt
    on the parent run       evaluation_sets/<benchmark>.parquet  prompts and every model's scores

The first is enough to compare two versions without asking either again. The second is what an
older version is asked when the prompts have changed since it was measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from routellm.errors import BenchmarkError
from routellm.evaluation.benchmarks import Benchmark
from routellm.evaluation.slices import SLICES, slices_of
from routellm.routers.base import Pair

PREDICTIONS, EVALUATION_SETS = "predictions", "evaluation_sets"  # folders of artifacts

_NUMBERS = ("win_rate", "strong", "weak")
_TEXT = ("question", "cluster", *SLICES)
_SCORE = "score:"  # before a model's name: a model may be called `prompt`
_META = b"routellm"


def predictions_table(benchmark: Benchmark, pair: Pair, win_rates: NDArray[np.float64]) -> pa.Table:
    """Return a router's win rates (n,) on a benchmark, with what comparing them needs.

    Columns: ``question`` (SHA-256 hex of the prompt), ``cluster`` (what a bootstrap resamples),
    ``win_rate``, ``strong`` and ``weak`` (scores), and one for each of `SLICES`. The benchmark's
    name, the pair and the prompts left out are in the schema's metadata (`about`).

    Raises
    ------
    BenchmarkError
        If the pair was not measured on the benchmark, or the win rates are not one a prompt.
    """
    strong, weak = benchmark.of_pair(pair)
    if np.shape(win_rates) != (len(benchmark),) or not np.isfinite(win_rates).all():
        raise BenchmarkError(
            f"benchmark {benchmark.name} has {len(benchmark)} prompts, and the router gave win "
            f"rates of shape {np.shape(win_rates)}: one finite number a prompt is needed"
        )
    question = [_question(p) for p in benchmark.prompts]
    columns = {
        "question": question,
        "cluster": list(benchmark.cluster) or question,
        "win_rate": np.asarray(win_rates, np.float64),
        "strong": strong,
        "weak": weak,
        **slices_of(benchmark),
    }
    about = {
        "benchmark": benchmark.name,
        "benchmark_digest": benchmark.digest,
        "strong": pair.strong,
        "weak": pair.weak,
        "excluded": benchmark.excluded,
        "simulated": benchmark.simulated,
    }
    return _table(columns, about)


def evaluation_set(benchmark: Benchmark) -> pa.Table:
    """Return a benchmark as it is kept on the parent run: prompts, scores of all models, slices."""
    columns = {
        "prompt": list(benchmark.prompts),
        "cluster": list(benchmark.cluster) or [_question(p) for p in benchmark.prompts],
        **slices_of(benchmark),
        **{f"{_SCORE}{model}": scores for model, scores in benchmark.scores.items()},
    }
    about = {
        "benchmark": benchmark.name,
        "benchmark_digest": benchmark.digest,
        "excluded": benchmark.excluded,
        "simulated": benchmark.simulated,
        "given": [n for n in ("cluster", "language", "category") if getattr(benchmark, n)],
    }
    return _table(columns, about)


def write_table(table: pa.Table, path: Path) -> None:
    """Write one of these tables as Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


def read_predictions(path: Path) -> pa.Table:
    """Read a predictions table.

    Raises
    ------
    BenchmarkError
        If the file is missing, damaged, lacks a column, or holds what cannot be.
    """
    table = _read(path, _TEXT, _NUMBERS)
    numbers = [table[name].to_numpy() for name in _NUMBERS]
    if not len(table) or not all(np.isfinite(n).all() for n in numbers):
        raise BenchmarkError(
            f"the predictions in {path.name} are empty or not all finite: the file is damaged; "
            "measure the version again"
        )
    return table


def read_evaluation_set(path: Path) -> Benchmark:
    """Read an evaluation set back into the benchmark that it was made of.

    Raises
    ------
    BenchmarkError
        If the file is missing, damaged, lacks a column, or is not what was written.
    """
    table = _read(path, ("prompt", "cluster", *SLICES), ())
    meta = about(table)
    given = {n: tuple(table[n].to_pylist()) for n in meta["given"]}
    benchmark = Benchmark(
        meta["benchmark"],
        tuple(table["prompt"].to_pylist()),
        {
            name.removeprefix(_SCORE): np.asarray(table[name].to_numpy(), np.float64)
            for name in table.column_names
            if name.startswith(_SCORE)
        },
        excluded=meta["excluded"],
        simulated=meta["simulated"],
        **given,
    )
    if benchmark.digest != meta["benchmark_digest"]:
        raise BenchmarkError(
            f"the evaluation set in {path.name} is not what was written (its digest differs): "
            "retrain to make another"
        )
    return benchmark


def about(table: pa.Table) -> dict[str, Any]:
    """Return what a table says of itself: benchmark, digest, pair, prompts left out."""
    return dict(json.loads(table.schema.metadata[_META]))


def _question(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def _table(columns: Mapping[str, Any], meta: Mapping[str, Any]) -> pa.Table:
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    return table.replace_schema_metadata({_META: json.dumps(meta)})


def _read(path: Path, text: tuple[str, ...], numbers: tuple[str, ...]) -> pa.Table:
    what = f"{path.parent.name}/{path.name}"
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BenchmarkError(
            f"cannot read {what} ({first[:120]}): the file is missing or damaged; measure the "
            "version again"
        ) from error
    lacking = [n for n in (*text, *numbers) if n not in table.column_names]
    lacking += [n for n in numbers if n not in lacking and table.schema.field(n).type != "double"]
    if lacking or _META not in (table.schema.metadata or {}):
        raise BenchmarkError(
            f"{what} lacks {', '.join(lacking) or 'its description'}: found "
            f"{', '.join(table.column_names)}; measure the version again"
        )
    return table
