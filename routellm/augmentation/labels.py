"""From verdicts to labels: two orders that agree make a winner, two that differ make a tie."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from routellm.augmentation.answers import AnswerPair, Answers
from routellm.augmentation.template import Choice
from routellm.augmentation.verdicts import Verdict
from routellm.battles import BATTLE_SCHEMA, battle_id
from routellm.errors import JudgeError

_A_FIRST: dict[Choice | None, float] = {"first": 1.0, "second": 0.0, "tie": 0.5}
_B_FIRST: dict[Choice | None, float] = {"first": 0.0, "second": 1.0, "tie": 0.5}


@dataclass(frozen=True)
class Unjudged:
    """A pair that became no battle: its row in the file of answers, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class Labels:
    """What a run's verdicts say of the pairs.

    Attributes
    ----------
    battles : pa.Table
        In the battle schema: the pairs judged in both orders.
    disagreements : int
        Ties because the two orders gave different verdicts.
    unjudged : tuple of Unjudged
        Pairs asked about without getting two verdicts.
    remaining : int
        Pairs that the run did not come to.
    """

    battles: pa.Table
    disagreements: int
    unjudged: tuple[Unjudged, ...]
    remaining: int

    def winners(self) -> dict[str, int]:
        """Return how many battles ``model_a``, ``model_b`` and ``tie`` won."""
        return dict(Counter(self.battles.column("winner").to_pylist()))


def label(
    answers: Answers,
    keys: list[tuple[bytes, bytes]],
    verdicts: Mapping[bytes, Verdict],
    failed: Mapping[bytes, str],
    *,
    judge: str,
) -> Labels:
    """Make a battle of every pair with a verdict in both orders.

    Parameters
    ----------
    keys : list of (bytes, bytes)
        A pair: the keys of its questions, A first and B first.
    verdicts, failed : mapping
        By key: what was said, and why nothing was.
    judge : str
        Name of the judge.
    """
    columns: dict[str, list[Any]] = {name: [] for name in BATTLE_SCHEMA.names}
    unjudged = []
    disagreements = remaining = 0
    for pair, orders in zip(answers.pairs, keys, strict=True):
        found = [verdicts[k] for k in orders if k in verdicts]
        reasons = [failed[k] for k in orders if k in failed]
        reasons += [v.reason or "no verdict" for v in found if v.choice is None]
        if reasons:
            unjudged.append(Unjudged(pair.row, reasons[0]))
        elif len(found) < 2:
            remaining += 1
        else:
            votes = _A_FIRST[found[0].choice], _B_FIRST[found[1].choice]
            disagreements += votes[0] != votes[1]
            row = _battle(answers, pair, votes, judge)
            row["voted_at"] = max(v.judged_at for v in found)
            for name, values in columns.items():
                values.append(row.get(name))
    battles = pa.table(columns, schema=BATTLE_SCHEMA)
    return Labels(battles, disagreements, tuple(unjudged), remaining)


def _battle(
    answers: Answers, pair: AnswerPair, votes: tuple[float, float], judge: str
) -> dict[str, Any]:
    """Return a row of the battle schema; `votes` are each order's P(model_a preferred)."""
    preference_a = votes[0] if votes[0] == votes[1] else 0.5
    row: dict[str, Any] = {
        "prompt": pair.prompt,
        "model_a": answers.model_a,
        "model_b": answers.model_b,
        "winner": {1.0: "model_a", 0.0: "model_b", 0.5: "tie"}[preference_a],
        "preference_a": preference_a,
        "label_kind": "judge",
        "judge": judge,
    }
    # other answers of the same models are another battle, even if it ended alike
    texts = [pair.answer_a, pair.answer_b]
    row_key = "/".join(hashlib.sha256(t.encode()).hexdigest()[:32] for t in texts)
    return row | {
        "battle_id": battle_id(row_key=row_key, **row),
        "source": answers.source,
        "turns": 1,
    }


def write_battles(battles: pa.Table, path: Path) -> None:
    """Write battles to Parquet, so that readers see the old or the new file, never a part.

    Raises
    ------
    JudgeError
        If the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                pq.write_table(battles, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise JudgeError(
            f"cannot write {path} ({error.strerror or error}): name another file; the verdicts "
            "are kept, and running again asks for none of them"
        ) from error
