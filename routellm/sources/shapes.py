"""The shapes that published preference data comes in, each brought to the battle schema.

A shape is recognised by its columns. Rows that make no good battle (an unknown winner, an empty
prompt) pass through: the expectations quarantine them, with the reason.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from routellm.battles import BATTLE_SCHEMA, battle_id, canonical_model
from routellm.errors import SourceError

_PREFERENCE = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}
_TIE_BAND = 0.05  # a judge this close to even called a tie
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """One published layout.

    Attributes
    ----------
    needs : columns that must be there.
    rows : turns a raw batch into battle rows; None for tables that are not battles.
    """

    name: str
    needs: frozenset[str]
    rows: Callable[[pa.RecordBatch, str], Iterable[Row]] | None


def find_shape(columns: Iterable[str], where: str) -> Shape:
    """Return the shape with these columns.

    Raises
    ------
    SourceError
        If there is none; names the closest shape and the columns it misses.
    """
    have = frozenset(columns)
    for shape in SHAPES:
        if shape.needs <= have:
            return shape
    closest = max(
        (s for s in SHAPES if s.rows), key=lambda s: (len(s.needs & have) / len(s.needs), s.name)
    )
    missing = ", ".join(sorted(closest.needs - have))
    raise SourceError(
        f"{where} has no shape we know: closest is {closest.name}, which also needs the column(s) "
        f"{missing}; found {', '.join(sorted(have)) or 'no columns'}"
    )


def to_battles(shape: Shape, batch: pa.RecordBatch, source: str) -> pa.RecordBatch:
    """Bring a raw batch of a shape to the battle schema."""
    assert shape.rows is not None
    columns: dict[str, list[Any]] = {name: [] for name in BATTLE_SCHEMA.names}
    for row in shape.rows(batch, source):
        key = row.pop("row_key", None)
        row["model_a"] = canonical_model(row["model_a"] or "")
        row["model_b"] = canonical_model(row["model_b"] or "")
        row.setdefault("judge", None)
        if row.get("preference_a") is None:
            row["preference_a"] = _PREFERENCE.get(row["winner"])
        row["source"] = source
        row["battle_id"] = row.pop("battle_id", None) or battle_id(
            row_key=key,
            prompt=row["prompt"] or "",
            model_a=row["model_a"],
            model_b=row["model_b"],
            winner=row["winner"] or "",
            preference_a=row["preference_a"],
            label_kind=row["label_kind"],
            judge=row["judge"],
        )
        for name, values in columns.items():
            values.append(row.get(name))
    return pa.RecordBatch.from_pydict(columns, schema=BATTLE_SCHEMA)


def _winner(raw: Any) -> str:
    text = str(raw).strip().lower() if raw is not None else ""
    return "tie" if text in {"tie (bothbad)", "both_bad", "bothbad", "tie"} else text


def _from_preference(p: float) -> str:
    if abs(p - 0.5) <= _TIE_BAND:
        return "tie"
    return "model_a" if p > 0.5 else "model_b"


def _text_turns(raw: Any) -> list[str | None]:
    """Read a turn list that is stored as a JSON string, or as a plain prompt."""
    if raw is None:
        return []
    if isinstance(raw, str):
        try:
            parsed = json.loads(raw)
        except ValueError:
            return [raw]
        return parsed if isinstance(parsed, list) else [raw]
    return list(raw)


def _user_texts(conversation: Any) -> list[str]:
    """Return the texts of a conversation's user turns; content may be text or a list of parts."""
    if isinstance(conversation, str):
        try:
            conversation = json.loads(conversation)
        except ValueError:
            return []
    texts = []
    for turn in conversation if conversation is not None else []:
        if not isinstance(turn, dict) or turn.get("role") != "user":
            continue
        content = turn.get("content")
        if content is not None and not isinstance(content, str):
            parts = [p for p in content if isinstance(p, dict)]
            content = "\n".join(str(p["text"]) for p in parts if p.get("text"))
        texts.append(content or "")
    return texts


def _when(raw: Any) -> datetime | None:
    if raw is None or raw == "":
        return None
    if isinstance(raw, datetime):
        return raw if raw.tzinfo else raw.replace(tzinfo=UTC)
    try:
        return datetime.fromtimestamp(float(raw), UTC)
    except ValueError:
        pass
    except (OverflowError, OSError):
        return None
    try:
        parsed = datetime.fromisoformat(str(raw))
    except ValueError:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def _kaggle(batch: pa.RecordBatch, source: str) -> Iterable[Row]:
    judged = "judge" in source.lower() or "gpt4" in source.lower()
    for row in batch.to_pylist():
        flags = [str(row[f"winner_{w}"]).strip().lower() for w in ("model_a", "model_b", "tie")]
        won = [w for w, f in zip(("model_a", "model_b", "tie"), flags, strict=True) if f in _TRUE]
        turns = _text_turns(row["prompt"])
        yield {
            "row_key": None if row.get("id") is None else str(row["id"]),
            "prompt": turns[0] if turns else None,
            "model_a": row["model_a"],
            "model_b": row["model_b"],
            "winner": won[0] if len(won) == 1 else "/".join(flags),
            "label_kind": "judge" if judged else "human",
            "judge": source if judged else None,
            "turns": len(turns),
        }


_TRUE = {"1", "1.0", "true"}


def _arena(batch: pa.RecordBatch, source: str) -> Iterable[Row]:
    for row in batch.to_pylist():
        texts = _user_texts(row["conversation_a"])
        key = row.get("id") or row.get("question_id")
        session = row.get("evaluation_session_id")
        if key is None and session is not None:
            key = f"{session}/{row.get('evaluation_order')}"
        category = row.get("category")
        yield {
            "row_key": None if key is None else str(key),
            "prompt": texts[0] if texts else None,
            "model_a": row["model_a"],
            "model_b": row["model_b"],
            "winner": _winner(row["winner"]),
            "label_kind": "human",
            "category": category if isinstance(category, str) else _category(row),
            "language": row.get("language"),
            "turns": len(texts),
            "voted_at": _when(row.get("tstamp", row.get("timestamp"))),
        }


def _category(row: Row) -> str | None:
    return "code" if str(row.get("is_code")).lower() in _TRUE else None


def _alpaca(batch: pa.RecordBatch, source: str) -> Iterable[Row]:
    for row in batch.to_pylist():
        raw = row["preference"]
        try:
            value = float(raw)
        except (TypeError, ValueError):
            value = float("nan")
        # 1: model_a preferred, 2: model_b preferred, between: the judge's probability, 0: neither
        p = 0.5 if value == 0.0 else 2.0 - value
        known = 0.0 <= p <= 1.0
        yield {
            "prompt": row["prompt"],
            "model_a": row["model_a"],
            "model_b": row["model_b"],
            "winner": _from_preference(p) if known else f"preference {raw}",
            "preference_a": p if known else None,
            "label_kind": "judge",
            "judge": row.get("judge"),
            "category": row.get("dataset"),
        }


def _scores(batch: pa.RecordBatch, source: str) -> Iterable[Row]:
    """Golden labels: every pair of models on a prompt, the better score wins, equal is a tie."""
    names = [
        f.name
        for f in batch.schema
        if pa.types.is_floating(f.type)
        or pa.types.is_integer(f.type)
        or pa.types.is_boolean(f.type)
    ]
    names = [n for n in names if n not in _NOT_MODELS]
    if "split" in batch.schema.names:  # only `gold` may be trained on
        batch = batch.filter(pa.array([s == "gold" for s in batch.column("split").to_pylist()]))
    prompts = batch.column("prompt").to_pylist()
    part = next((n for n in ("task", "domain", "category") if n in batch.schema.names), None)
    categories = batch.column(part).to_pylist() if part else [None] * len(prompts)
    scores = {
        n: np.array([np.nan if v is None else float(v) for v in batch.column(n).to_pylist()])
        for n in names
    }
    for a, b in itertools.combinations(names, 2):
        gap = np.sign(scores[a] - scores[b])
        for prompt, category, sign in zip(prompts, categories, gap, strict=True):
            if np.isnan(sign):
                continue  # a model that was not asked has no score
            winner = "tie" if sign == 0 else "model_a" if sign > 0 else "model_b"
            yield {
                "prompt": prompt,
                "model_a": a,
                "model_b": b,
                "winner": winner,
                "label_kind": "golden",
                "category": category,
            }


_NOT_MODELS = {"contaminated", "question_id", "id", "turn", "index"}


def _own(batch: pa.RecordBatch, source: str) -> Iterable[Row]:
    for row in batch.to_pylist():
        yield {name: row.get(name) for name in BATTLE_SCHEMA.names if name != "battle_id"} | {
            "battle_id": row["battle_id"]
        }


SHAPES: tuple[Shape, ...] = (
    Shape(
        "routellm battles",
        frozenset({"battle_id", "prompt", "model_a", "model_b", "winner", "label_kind"}),
        _own,
    ),
    Shape(
        "lmsys-arena-human-preference-55k",
        frozenset(
            {"prompt", "model_a", "model_b", "winner_model_a", "winner_model_b", "winner_tie"}
        ),
        _kaggle,
    ),
    Shape(
        "arena conversations (33k, 100k, 140k)",
        frozenset({"model_a", "model_b", "winner", "conversation_a"}),
        _arena,
    ),
    Shape(
        "alpaca_eval judgements",
        frozenset({"prompt", "model_a", "model_b", "preference"}),
        _alpaca,
    ),
    Shape("mmlu with a gold split", frozenset({"prompt", "domain", "split"}), _scores),
    Shape("benchmark (contaminated)", frozenset({"prompt", "contaminated"}), None),
    Shape("benchmark questions", frozenset({"question_id", "turns"}), None),
    Shape("benchmark judgements", frozenset({"question_id", "model", "score"}), None),
    Shape("recorded answers", frozenset({"prompt", "model", "response"}), None),
    Shape("prompts by models by scores", frozenset({"prompt", "task"}), _scores),
)
