"""A snapshot in numbers: the counts that set rules and drift look at, without any prompt text."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from routellm.stability import psi as psi

# edges of prompt length in characters, for drift
_LENGTH_EDGES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
Profile = dict[str, Any]
COLUMNS = ("prompt", "model_a", "model_b", "winner", "label_kind", "language", "voted_at")


def profile(batches: Iterable[pa.RecordBatch]) -> Profile:
    """Count battles by prompt length, model, winner, label kind and language."""
    out: Profile = {
        "rows": 0,
        "prompt_length": [0] * (len(_LENGTH_EDGES) + 1),
        "model": {},
        "winner": {},
        "label_kind": {},
        "language": {},
        "newest": None,
    }
    for batch in batches:
        out["rows"] += len(batch)
        chars = pc.utf8_length(batch.column("prompt")).fill_null(0).to_numpy(zero_copy_only=False)
        bins = np.bincount(
            np.searchsorted(_LENGTH_EDGES, chars, "right"), minlength=len(_LENGTH_EDGES) + 1
        )
        out["prompt_length"] = [int(a + b) for a, b in zip(out["prompt_length"], bins, strict=True)]
        for name, column in (
            ("model", "model_a"), ("model", "model_b"), ("winner", "winner"),
            ("label_kind", "label_kind"), ("language", "language"),
        ):  # fmt: skip
            for one in pc.value_counts(batch.column(column)).to_pylist():
                if one["values"] is not None:
                    key = one["values"]
                    out[name][key] = out[name].get(key, 0) + one["counts"]
        newest = pc.max(batch.column("voted_at")).as_py()
        if newest is not None:
            out["newest"] = max(out["newest"] or "", newest.isoformat())
    return out


def merge(a: Profile, b: Profile) -> Profile:
    """Return the profile of two disjoint sets together."""
    out: Profile = {"rows": a["rows"] + b["rows"]}
    out["prompt_length"] = [
        x + y for x, y in zip(a["prompt_length"], b["prompt_length"], strict=True)
    ]
    for name in ("model", "winner", "label_kind", "language"):
        keys = {**a[name], **b[name]}
        out[name] = {k: a[name].get(k, 0) + b[name].get(k, 0) for k in keys}
    out["newest"] = max(filter(None, (a["newest"], b["newest"])), default=None)
    return out


def set_figures(
    whole: Profile, fresh: Profile, previous: Profile | None, quarantined: int
) -> dict[str, float]:
    """Return the observed value of each set rule's column."""
    n = max(whole["rows"], 1)
    languages = whole["language"]
    known = sum(languages.values())
    newest = whole["newest"]
    age = (
        (datetime.now(UTC) - datetime.fromisoformat(newest)).total_seconds() / 86400
        if newest
        else 0.0  # no battle says when it was fought: nothing is known to be old
    )

    def drift(name: str) -> float:
        if previous is None or not fresh["rows"]:
            return 0.0
        if name == "prompt_length":
            return psi(previous[name], fresh[name])
        keys = sorted({**previous[name], **fresh[name]})
        return psi(*([p[name].get(k, 0) for k in keys] for p in (previous, fresh)))

    return {
        "rows": float(whole["rows"]),
        "quarantine_share": quarantined / max(quarantined + fresh["rows"], 1),
        "tie_share": whole["winner"].get("tie", 0) / n,
        "fewest_battles": float(min(whole["model"].values(), default=0)),
        "other_language_share": 1.0 - max(languages.values()) / known if known else 0.0,
        "largest_label_kind_share": max(whole["label_kind"].values(), default=0) / n,
        "newest_age_days": age,
        "prompt_length_psi": drift("prompt_length"),
        "model_psi": drift("model"),
        "winner_psi": drift("winner"),
    }
