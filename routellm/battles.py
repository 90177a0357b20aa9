"""The battle: one preference between two models' answers to one prompt, as an Arrow schema.

Every source is brought to this schema, every snapshot is stored in it, every router learns
from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final, Literal

import pyarrow as pa

LabelKind = Literal["human", "judge", "golden", "feedback"]
LABEL_KINDS: Final[tuple[str, ...]] = ("human", "judge", "golden", "feedback")
WINNERS: Final[tuple[str, ...]] = ("model_a", "model_b", "tie")

SCHEMA_VERSION: Final = 1

BATTLE_SCHEMA: Final[pa.Schema] = pa.schema(
    [
        pa.field("battle_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string()),  # the first user turn: what a router reads
        pa.field("model_a", pa.string()),  # canonical names, see canonical_model
        pa.field("model_b", pa.string()),
        pa.field("winner", pa.string()),  # model_a | model_b | tie (else quarantined)
        # P(model_a preferred): 1, 0.5, 0 for a vote; a judge's probability where published
        pa.field("preference_a", pa.float64()),
        pa.field("label_kind", pa.string()),  # one of LABEL_KINDS
        pa.field("judge", pa.string()),  # who or what judged; null for a person's vote
        pa.field("source", pa.string()),  # where the row came from
        pa.field("category", pa.string()),  # task, domain or dataset part; null if unknown
        pa.field("language", pa.string()),  # as published; null if unknown
        pa.field("turns", pa.int32()),  # user turns in the conversation, if known
        pa.field("voted_at", pa.timestamp("us", tz="UTC")),  # null if unknown
    ]
)

_ALIASES: Final[dict[str, str]] = {
    "gpt4_1106_preview": "gpt-4-1106-preview",
    "gpt4": "gpt-4-0314",
    "gpt4_0314": "gpt-4-0314",
    "gpt4_0613": "gpt-4-0613",
    "text_davinci_003": "text-davinci-003",
}


def canonical_model(name: str) -> str:
    """Return the one spelling of a model's name that is used everywhere.

    Lower case, stripped of surrounding space, with the known aliases of
    ``alpaca_eval``'s tables mapped to the names of the other sets.
    """
    plain = name.strip().lower()
    return _ALIASES.get(plain, plain)


def battle_id(
    *,
    row_key: str | None,
    prompt: str,
    model_a: str,
    model_b: str,
    winner: str,
    preference_a: float | None,
    label_kind: str,
    judge: str | None,
) -> str:
    """Return the stable id of a battle: 32 hex digits of SHA-256 over what makes it itself.

    The source's own row id (``row_key``) keeps apart two votes that agree in everything
    else; without one, equal rows are one battle. The path a row came by is left out, so the
    same row from a file and from the hub has one id.
    """
    parts = (
        row_key or "",
        prompt,
        model_a,
        model_b,
        winner,
        "" if preference_a is None else repr(float(preference_a)),
        label_kind,
        judge or "",
    )
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "big"))
        digest.update(raw)
    return digest.hexdigest()[:32]


def digest_of_ids(ids: Iterable[str]) -> str:
    """Return a content digest (SHA-256 hex) of a set of battle ids, whatever their order."""
    digest = hashlib.sha256(f"battles/{SCHEMA_VERSION}".encode())
    for one in sorted(ids):
        digest.update(one.encode())
    return digest.hexdigest()


_SPLIT_SALT = b"routellm/split/1:"


def prompt_split(prompt: str, *, validation_share: float, heldout_share: float) -> str:
    """Say which split a prompt belongs to: ``heldout``, ``validation`` or ``train``.

    The prompt's own hash decides, so a prompt stays on its side as snapshots grow and no
    prompt is ever on two sides. The hash is salted: publishers split their sets by a plain hash
    too, and with the same one a published part falls on one side as a whole.
    """
    salted = _SPLIT_SALT + prompt.encode("utf-8", "surrogatepass")
    raw = hashlib.sha256(salted).digest()[:8]
    u = int.from_bytes(raw, "big") / 2**64
    if u < heldout_share:
        return "heldout"
    return "validation" if u < heldout_share + validation_share else "train"
