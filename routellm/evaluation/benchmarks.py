"""Benchmarks: prompts by models, a score each; measuring on them calls no model.

Tables are read from a folder: the published ones by name (``mmlu.parquet``, ``gsm8k.parquet``,
``mt_bench_questions.parquet`` with ``mt_bench_judgements.parquet``), and any other Parquet or CSV
table in a subfolder or file named ``<name>.benchmark.parquet`` (or ``.csv``) with a ``prompt``
column and a score column per model. Columns that say more of a prompt are carried along:
``language``; ``category``, ``domain`` or ``task``; and ``question_id``, which the turns of one
question share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from routellm.battles import canonical_model
from routellm.errors import BenchmarkError
from routellm.routers.base import Pair

_LABELS = ("category", "language", "cluster")  # of a prompt, beside its scores
_CATEGORY = ("category", "domain", "task")  # columns that name one, the first that is there
_NO_SCORES = {"contaminated", "id", "question_id", "turn", "language", *_CATEGORY}


@dataclass(frozen=True)
class Benchmark:
    """A table of prompts by models.

    Attributes
    ----------
    prompts : tuple of str, length n
    scores : dict
        For each model float64 (n,); higher is better, in the benchmark's own unit.
    excluded : int
        Prompts taken out so far because training may have seen them.
    simulated : bool
    category, language : tuple of str, length n, or empty
        What the table says of each prompt, where it says it.
    cluster : tuple of str, length n, or empty
        Prompts of one cluster are resampled together: the turns of one question, say. Empty where
        each prompt stands alone.
    """

    name: str
    prompts: tuple[str, ...]
    scores: dict[str, NDArray[np.float64]]
    excluded: int = 0
    simulated: bool = False
    category: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    cluster: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in _LABELS:
            if len(getattr(self, name)) not in (0, len(self.prompts)):
                raise BenchmarkError(
                    f"benchmark {self.name} has {len(self.prompts)} prompts and "
                    f"{len(getattr(self, name))} values of {name}: give one for each, or none"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """Content digest: SHA-256 hex of name, prompts and scores."""
        out = hashlib.sha256(self.name.encode())
        for prompt in self.prompts:
            out.update(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest())
        for model in sorted(self.scores):
            out.update(model.encode())
            out.update(np.ascontiguousarray(self.scores[model]).tobytes())
        return out.hexdigest()

    def of_pair(self, pair: Pair) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the scores (n,) of strong and of weak.

        Raises
        ------
        BenchmarkError
            If one of them was not measured, or both score the same on average.
        """
        for model in (pair.strong, pair.weak):
            if model not in self.scores:
                have = ", ".join(sorted(self.scores))
                raise BenchmarkError(
                    f"benchmark {self.name} has no scores of {model!r}: it has {have}; set "
                    "`strong` and `weak` to two of these, or give another benchmark"
                )
        strong, weak = self.scores[pair.strong], self.scores[pair.weak]
        if len(strong) == 0 or strong.mean() <= weak.mean():
            raise BenchmarkError(
                f"on benchmark {self.name} {pair.strong} is no better than {pair.weak} "
                f"({len(strong)} prompts): there is no gap for a router to recover"
            )
        return strong, weak

    def without(self, seen: NDArray[np.bool_]) -> Benchmark:
        """Return the benchmark less the prompts marked in `seen` (n,)."""
        keep = ~seen

        def kept(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(compress(values, keep))

        return replace(
            self,
            prompts=kept(self.prompts),
            scores={m: s[keep] for m, s in self.scores.items()},
            excluded=self.excluded + int(seen.sum()),
            category=kept(self.category),
            language=kept(self.language),
            cluster=kept(self.cluster),
        )


def heldout_benchmark(
    prompts: Sequence[str], preference: NDArray[np.float64], pair: Pair, *, simulated: bool = False
) -> Benchmark:
    """Return held-out battles as a benchmark: a model's score is the share of votes for it."""
    unique, where = np.unique(np.array(prompts, dtype=object), return_inverse=True)
    mean = np.bincount(where, preference) / np.bincount(where)
    return Benchmark(
        "heldout", tuple(unique), {pair.strong: mean, pair.weak: 1.0 - mean}, simulated=simulated
    )


def load_benchmarks(folder: Path) -> list[Benchmark]:
    """Return the benchmarks in a folder, in name order.

    Raises
    ------
    BenchmarkError
        If the folder is missing or one of its benchmark tables is damaged.
    """
    if not folder.is_dir():
        raise BenchmarkError(f"no folder {folder} to read benchmarks from: give a folder of tables")
    found: list[Benchmark] = []
    for name in ("gsm8k", "mmlu"):
        path = folder / f"{name}.parquet"
        if path.exists():
            found.append(_scored(path, name))
    if (folder / "mt_bench_questions.parquet").exists():
        found.append(_mt_bench(folder))
    for path in sorted(folder.glob("*.benchmark.*")):
        found.append(_scored(path, path.name.split(".")[0]))
    return sorted(found, key=lambda b: b.name)


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix == ".csv":
            from pyarrow import csv

            return csv.read_csv(path)
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        first = str(error).splitlines()[0]
        raise BenchmarkError(f"cannot read the benchmark table {path} ({first})") from error


def _scored(path: Path, name: str) -> Benchmark:
    table = _read(path)
    if "prompt" not in table.column_names:
        raise BenchmarkError(
            f"benchmark table {path} has no column `prompt`: found {table.column_names}"
        )
    if "split" in table.column_names:  # `gold` rows are for training, `eval` rows measure
        table = table.filter(pa.array([s == "eval" for s in table["split"].to_pylist()]))
    scores = {
        canonical_model(field.name): np.asarray(table[field.name].to_numpy(), dtype=np.float64)
        for field in table.schema
        if field.name not in _NO_SCORES
        and (
            pa.types.is_boolean(field.type)
            or pa.types.is_floating(field.type)
            or pa.types.is_integer(field.type)
        )
    }
    if len(scores) < 2:
        raise BenchmarkError(
            f"benchmark table {path} needs a score column for each of two models: found "
            f"{table.column_names}"
        )
    bad = [model for model, s in scores.items() if not np.isfinite(s).all()]
    if bad:
        raise BenchmarkError(
            f"benchmark table {path} lacks scores of {', '.join(bad)}: fill or drop these rows"
        )
    whole = Benchmark(
        name,
        tuple(table["prompt"].to_pylist()),
        scores,
        category=_labels(table, *_CATEGORY),
        language=_labels(table, "language"),
        cluster=_labels(table, "question_id"),
    )
    return whole.without(_published_contamination(table))


def _mt_bench(folder: Path) -> Benchmark:
    questions = _read(folder / "mt_bench_questions.parquet")
    judgements = _read(folder / "mt_bench_judgements.parquet").to_pydict()
    ids = questions["question_id"].to_pylist()
    row = {one: i for i, one in enumerate(ids)}
    models = sorted(set(judgements["model"]))
    total = {m: np.zeros(len(ids)) for m in models}
    turns = {m: np.zeros(len(ids)) for m in models}
    keys = ("question_id", "model", "score")
    for question, model, score in zip(*(judgements[k] for k in keys), strict=True):
        total[model][row[question]] += score
        turns[model][row[question]] += 1
    if any((n == 0).any() for n in turns.values()):
        raise BenchmarkError(f"a question of mt_bench in {folder} has no judgement: fetch it again")
    # both turns are routed by the first, so a question's score is the mean of its turns
    whole = Benchmark(
        "mt_bench",
        tuple(t[0] for t in questions["turns"].to_pylist()),
        {canonical_model(m): total[m] / turns[m] for m in models},
        category=_labels(questions, *_CATEGORY),
    )
    return whole.without(_published_contamination(questions))


def _labels(table: pa.Table, *columns: str) -> tuple[str, ...]:
    """Return the first of these columns as text, or () if the table has none of them."""
    found = next((name for name in columns if name in table.column_names), None)
    if found is None:
        return ()
    return tuple("" if v is None else str(v) for v in table[found].to_pylist())


def _published_contamination(table: pa.Table) -> NDArray[np.bool_]:
    if "contaminated" not in table.column_names:
        return np.zeros(len(table), dtype=bool)
    return np.asarray(table["contaminated"].to_numpy(), dtype=bool)
