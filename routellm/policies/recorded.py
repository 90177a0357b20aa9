"""Recorded tables: what each model of a pool answered to each query, how well, and at what price.

A policy is measured on what models have answered before; no model is called. Read from a folder of
published tables (`load_recorded`): ``mmlu.parquet`` and ``gsm8k.parquet`` (the pair's correctness,
gsm8k with answers), ``model_pool.parquet`` (nine models' scores) and
``alpaca_eval_outputs.parquet`` with ``alpaca_eval_judgements.parquet`` (answers, and a judge's
preference over the reference's).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from routellm.battles import canonical_model
from routellm.errors import BenchmarkError
from routellm.evaluation.metrics import Floats
from routellm.policies.prices import price_of
from routellm.settings import Settings

CountTokens = Callable[[Sequence[str]], NDArray[np.int64]]

_SPLIT_SALT = b"routellm policies: what is trained on and what is measured on\0"


@dataclass(frozen=True)
class Recorded:
    """What every model of a pool did on every query.

    Attributes
    ----------
    name : str
    prompts : tuple of str, length n
    models : tuple of str, length m
    quality : ndarray (n, m)
        Score of each answer in [0, 1]; higher is better.
    usd : ndarray (n, m)
        What the answer cost, in dollars.
    latency_s : ndarray (n, m)
        Seconds until it was whole, by the stated model of latency.
    read_tokens : ndarray (n,)
        Tokens of each prompt.
    written_tokens : ndarray (n, m)
        Tokens of each answer.
    answers : dict
        By model, its answers (n); empty where none were recorded.
    tokens_assumed : bool
        Whether answers' tokens are the settings' mean, for none were recorded.
    """

    name: str
    prompts: tuple[str, ...]
    models: tuple[str, ...]
    quality: Floats
    usd: Floats
    latency_s: Floats
    read_tokens: Floats
    written_tokens: Floats
    answers: Mapping[str, tuple[str, ...]]
    tokens_assumed: bool

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def ids(self) -> tuple[str, ...]:
        """SHA-256 of each prompt: what tells rows trained on from rows measured on."""
        return tuple(
            hashlib.sha256(p.encode("utf-8", "surrogatepass")).hexdigest() for p in self.prompts
        )

    def where(self, keep: NDArray[np.bool_]) -> Recorded:
        """Return the rows marked in `keep` (n,)."""
        return replace(
            self,
            prompts=tuple(compress(self.prompts, keep)),
            quality=self.quality[keep],
            usd=self.usd[keep],
            latency_s=self.latency_s[keep],
            read_tokens=self.read_tokens[keep],
            written_tokens=self.written_tokens[keep],
            answers={m: tuple(compress(a, keep)) for m, a in self.answers.items()},
        )

    def of(self, models: Sequence[str]) -> Recorded:
        """Return the columns of some models, in the order given."""
        columns = [self.models.index(one) for one in models]
        return replace(
            self,
            models=tuple(models),
            quality=self.quality[:, columns],
            usd=self.usd[:, columns],
            latency_s=self.latency_s[:, columns],
            written_tokens=self.written_tokens[:, columns],
            answers={m: self.answers[m] for m in models if m in self.answers},
        )

    def cheapest(self) -> int:
        """Return the column of the model that costs least on average."""
        return int(self.usd.mean(axis=0).argmin())

    def best(self) -> int:
        """Return the column of the model that answers best on average."""
        return int(self.quality.mean(axis=0).argmax())


@dataclass(frozen=True)
class Split:
    """A table's rows: those to learn from, to choose settings by, and to measure on.

    No prompt is in two of them.
    """

    train: Recorded
    held: Recorded
    measure: Recorded


def load_recorded(folder: Path, settings: Settings, count_tokens: CountTokens) -> list[Split]:
    """Return the recorded tables of a folder, in name order, each split in two.

    ``mmlu`` comes split (gold, eval); of the others a hash of the prompt says which half a row is
    in. Of the rows that are not measured on, a hash keeps a quarter to choose settings by. Rows
    that the publisher calls contaminated are left out.

    Parameters
    ----------
    count_tokens : callable
        Returns the tokens of each text, of a real tokenizer.

    Raises
    ------
    BenchmarkError
        If there is no table, or one lacks a column, holds one model only, or a model has no price.
    """
    if not folder.is_dir():
        raise BenchmarkError(f"no folder {folder} to read tables from: give a folder of tables")
    read = {
        "alpaca_eval_outputs": ("alpaca", _alpaca), "gsm8k": ("gsm8k", _scored),
        "mmlu": ("mmlu", _scored), "model_pool": ("model_pool", _scored),
    }  # fmt: skip
    found = []
    for file, (name, reader) in read.items():
        path = folder / f"{file}.parquet"
        if path.exists():
            rows = reader(path)
            recorded = _priced(name, rows, settings, count_tokens)
            found.append(split(recorded, rows.train, settings.policies.rows))
    if not found:
        raise BenchmarkError(
            f"no recorded tables in {folder}: expected {', '.join(f'{f}.parquet' for f in read)}"
        )
    return found


def split(
    recorded: Recorded, in_train: NDArray[np.bool_] | None = None, most: int | None = None
) -> Split:
    """Split a table by its prompts' hashes: the same prompt is always on the same side.

    Parameters
    ----------
    in_train : ndarray of bool (n,), optional
        Rows that are not to be measured on; by default the half that the hashes say.
    most : int, optional
        Rows that are measured on at most: those with the lowest hashes.
    """
    drawn = [hashlib.sha256(_SPLIT_SALT + bytes.fromhex(i)).digest() for i in recorded.ids]
    if in_train is None:
        in_train = np.array([d[0] < 128 for d in drawn], dtype=bool)
    held = in_train & np.array([d[1] < 64 for d in drawn], dtype=bool)
    measured = ~in_train
    if most is not None and measured.sum() > most:
        last = sorted(d for d, one in zip(drawn, measured, strict=True) if one)[most - 1]
        measured &= np.array([d <= last for d in drawn], dtype=bool)
    return Split(recorded.where(in_train & ~held), recorded.where(held), recorded.where(measured))


@dataclass(frozen=True)
class _Rows:
    prompts: tuple[str, ...]
    quality: dict[str, Floats]
    answers: dict[str, tuple[str, ...]]
    train: NDArray[np.bool_] | None = None


def _read(path: Path, *columns: str) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        first = str(error).splitlines()[0]
        raise BenchmarkError(f"cannot read the table {path} ({first})") from error
    missing = [c for c in columns if c not in table.column_names]
    if missing:
        raise BenchmarkError(
            f"table {path} has no column `{missing[0]}`: found {table.column_names}"
        )
    return table


def _scored(path: Path) -> _Rows:
    table = _read(path, "prompt")
    if "contaminated" in table.column_names:
        table = table.filter(pa.array([not c for c in table["contaminated"].to_pylist()]))
    quality, answers = {}, {}
    for field in table.schema:
        if field.name.endswith(":response"):
            model = canonical_model(field.name.removesuffix(":response"))
            answers[model] = tuple(table[field.name].to_pylist())
        elif field.name != "contaminated" and (
            pa.types.is_boolean(field.type) or pa.types.is_floating(field.type)
        ):
            quality[canonical_model(field.name)] = np.asarray(
                table[field.name].to_numpy(), dtype=np.float64
            )
    train = None
    if "split" in table.column_names:
        train = np.array([s == "gold" for s in table["split"].to_pylist()], dtype=bool)
    return _Rows(tuple(table["prompt"].to_pylist()), quality, answers, train)


def _alpaca(path: Path) -> _Rows:
    """Read answers, and what one judge thought of each beside the reference model's.

    Of the judges the one that judged most of the models whose answers are there; the reference
    itself scores a half against itself.
    """
    outputs = _read(path, "prompt", "model", "response").to_pydict()
    answer = {
        (canonical_model(m), p): r
        for p, m, r in zip(outputs["prompt"], outputs["model"], outputs["response"], strict=True)
    }
    answered = {model for model, _ in answer}
    beside = path.with_name("alpaca_eval_judgements.parquet")
    said = _read(beside, "prompt", "model_a", "model_b", "preference", "judge").to_pydict()
    scores: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    keys = ("judge", "model_a", "model_b", "prompt", "preference")
    for judge, a, b, prompt, preference in zip(*(said[k] for k in keys), strict=True):
        reference, model = canonical_model(a), canonical_model(b)
        if model in answered and reference in answered:
            by_model = scores.setdefault((judge, reference), {}).setdefault(model, {})
            by_model.setdefault(prompt, []).append(preference - 1.0)
    if not scores:
        raise BenchmarkError(f"no judge in {beside} judged two models whose answers are in {path}")
    judge, reference = max(scores, key=lambda one: (len(scores[one]), one))
    judged = scores[judge, reference]
    judged[reference] = {p: [0.5] for m, p in answer if m == reference}
    models = sorted(judged)
    prompts = [
        p for p in dict.fromkeys(outputs["prompt"])
        if all(p in judged[m] and (m, p) in answer for m in models)
    ]  # fmt: skip
    return _Rows(
        tuple(prompts),
        {m: np.array([float(np.mean(judged[m][p])) for p in prompts]) for m in models},
        {m: tuple(answer[m, p] for p in prompts) for m in models},
    )


def _priced(name: str, rows: _Rows, settings: Settings, count_tokens: CountTokens) -> Recorded:
    models = tuple(rows.quality)
    if len(models) < 2:
        raise BenchmarkError(
            f"table {name} has scores of {len(models)} model{'' if len(models) == 1 else 's'}: "
            "there is nothing to choose between"
        )
    quality = np.column_stack([rows.quality[m] for m in models])
    bad = [m for m, column in zip(models, quality.T, strict=True) if not np.isfinite(column).all()]
    if bad:
        raise BenchmarkError(f"table {name} lacks scores of {bad[0]}: fill or drop these rows")
    prices = [price_of(m, settings) for m in models]
    unpriced = [m for m, price in zip(models, prices, strict=True) if price is None]
    if unpriced:
        raise BenchmarkError(
            f"table {name} has {len(unpriced)} models without a price ({', '.join(unpriced)}): set "
            f'input and output, in dollars per million tokens, in [prices."{unpriced[0]}"]'
        )
    read = count_tokens(rows.prompts)
    assumed = set(rows.answers) != set(models)
    written = (
        np.full(quality.shape, float(settings.evaluation.output_tokens))
        if assumed
        else np.column_stack([count_tokens(rows.answers[m]) for m in models]).astype(np.float64)
    )
    per_read, per_written = (np.array([getattr(p, k) for p in prices]) for k in ("input", "output"))
    how = [settings.policies.latency_of(m) for m in models]
    first, each = (np.array([getattr(h, k) for h in how]) for k in ("first_token_s", "token_s"))
    return Recorded(
        name,
        rows.prompts,
        models,
        quality,
        usd=(read[:, None] * per_read + written * per_written) / 1e6,
        latency_s=first + written * each,
        read_tokens=read.astype(np.float64),
        written_tokens=written,
        answers={} if assumed else rows.answers,
        tokens_assumed=assumed,
    )
