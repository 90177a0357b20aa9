"""Recorded answers: one table of (prompt, model, response), read as pairs of answers."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from routellm.battles import canonical_model
from routellm.errors import SourceError, UsageError

COLUMNS = ("prompt", "model", "response")
_MAX_CELL_CHARS = 10_000_000  # an answer longer than this is a broken quote, not an answer


@dataclass(frozen=True)
class AnswerPair:
    """Two models' answers to one prompt; `row` is where A's answer stands (the first is 1)."""

    prompt: str
    answer_a: str
    answer_b: str
    row: int


@dataclass(frozen=True)
class Answers:
    """What two models answered to the same prompts.

    Attributes
    ----------
    source : str
        The file's name.
    model_a, model_b : str
        Canonical names.
    left_out : int
        Prompts of either model that the other did not answer, or that are blank.
    repeated : int
        Rows after the first of the same prompt and model: not read.
    """

    source: str
    model_a: str
    model_b: str
    pairs: tuple[AnswerPair, ...]
    left_out: int
    repeated: int


def read_answers(path: Path, model_a: str, model_b: str, *, limit: int | None = None) -> Answers:
    """Read the pairs of answers of two models, in the order of the file.

    Parameters
    ----------
    path : Path
        Parquet, CSV or JSON Lines with the columns ``prompt, model, response``.
    limit : int, optional
        Keep this many pairs, the first ones.

    Raises
    ------
    UsageError
        If the two names are one model, or there is no such file.
    SourceError
        If the file cannot be read, lacks a column or a model, or has no prompt that both answered.
    """
    a, b = canonical_model(model_a), canonical_model(model_b)
    if a == b:
        raise UsageError(f"both models are {a}: name two models of {path}")
    if not path.is_file():
        raise UsageError(f"no file {path}: give a Parquet, CSV or JSON Lines file of answers")
    found: dict[str, dict[str, tuple[int, str]]] = {a: {}, b: {}}
    repeated = 0
    models: set[str] = set()
    for row, (prompt, name, response) in enumerate(_rows(path), start=1):
        model = canonical_model(_text(name, "model", path, row))
        models.add(model)
        if model not in found:
            continue
        text = _text(prompt, "prompt", path, row)
        if text in found[model]:
            repeated += 1
        else:
            found[model][text] = row, _text(response, "response", path, row)
    for one in (a, b):
        if not found[one]:
            have = ", ".join(sorted(models)[:20]) or "no models"
            raise SourceError(f"{path} has no answers of {one}: it has {have}")
    pairs = tuple(
        AnswerPair(prompt, answer, found[b][prompt][1], row)
        for prompt, (row, answer) in found[a].items()
        # a blank answer is a call that failed when the answers were recorded
        if prompt.strip() and answer.strip() and found[b].get(prompt, (0, ""))[1].strip()
    )
    if not pairs:
        raise SourceError(f"{path} has no prompt that both {a} and {b} answered: use other models")
    left_out = len(found[a].keys() | found[b].keys()) - len(pairs)
    return Answers(path.name, a, b, pairs[:limit], left_out, repeated)


def _rows(path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Yield (prompt, model, response) as stored, with every failure as one sentence."""
    readers = {".parquet": _parquet, ".csv": _csv, ".jsonl": _json_lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SourceError(f"{path} ends in {path.suffix!r}: use one of {', '.join(readers)}")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8: convert the whole file to UTF-8") from error
    except (pa.ArrowException, csv.Error, OSError) as error:
        first = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise SourceError(f"{path} cannot be read ({first}): mend it or fetch it again") from error


def _parquet(path: Path) -> Iterator[tuple[Any, Any, Any]]:
    with pq.ParquetFile(path) as file:
        _check_columns(file.schema_arrow.names, path)
        for batch in file.iter_batches(batch_size=4096, columns=list(COLUMNS)):
            yield from zip(*(batch.column(name).to_pylist() for name in COLUMNS), strict=True)


def _csv(path: Path) -> Iterator[tuple[Any, Any, Any]]:
    csv.field_size_limit(_MAX_CELL_CHARS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        _check_columns(rows.fieldnames or (), path)
        for row in rows:
            if None in row or None in row.values():
                raise SourceError(
                    f"{path} has a row near line {rows.line_num} with more or fewer cells than "
                    "its header: mend the row or its quoting"
                )
            yield row["prompt"], row["model"], row["response"]


def _json_lines(path: Path) -> Iterator[tuple[Any, Any, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{path} line {number} is not JSON: mend it") from error
            if not isinstance(row, dict):
                raise SourceError(
                    f"{path} line {number} holds {type(row).__name__}, expected an object a line"
                )
            _check_columns(row, path)
            yield row["prompt"], row["model"], row["response"]


def _check_columns(have: Collection[str], path: Path) -> None:
    missing = ", ".join(name for name in COLUMNS if name not in have)
    if missing:
        raise SourceError(
            f"{path} lacks the column(s) {missing}: recorded answers need {', '.join(COLUMNS)}; "
            f"found {', '.join(sorted(have)) or 'none'}"
        )


def _text(value: Any, column: str, path: Path, row: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SourceError(
            f"{path} row {row} has a {column} that is {type(value).__name__}, expected text: "
            "convert the column"
        )
    # JSON can hold half a surrogate pair, which neither an endpoint nor Parquet takes
    return value.encode("utf-8", "replace").decode("utf-8")
