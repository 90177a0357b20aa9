"""The store's tables, and the steps that brought them to what they are.

Numbered steps of plain SQL, all in one transaction that holds a lock, and a table that says which
were taken. Alembic would do the same with more parts and less surely: it takes no lock, so two
gateways that start together would both migrate, and without care SQLite leaves a step half done.

A step only adds (a table, an index, or a column with a default), so that a gateway of the version
before can go on writing. A published step is never changed.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Double, Integer, MetaData, Table, Text

STEPS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE feedback_meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
        """CREATE TABLE feedback_decisions (
            uid TEXT PRIMARY KEY,
            id TEXT NOT NULL,
            at_us BIGINT NOT NULL,
            request_id TEXT NOT NULL,
            key_id TEXT,
            user_digest TEXT,
            version TEXT NOT NULL,
            kind TEXT NOT NULL,
            route TEXT NOT NULL,
            model TEXT NOT NULL,
            other_model TEXT NOT NULL,
            win_rate DOUBLE PRECISION,
            threshold DOUBLE PRECISION,
            probability DOUBLE PRECISION NOT NULL,
            reason TEXT NOT NULL,
            canary BOOLEAN NOT NULL,
            endpoint TEXT NOT NULL,
            status INTEGER NOT NULL,
            input_tokens BIGINT,
            output_tokens BIGINT,
            usd DOUBLE PRECISION
        )""",
        "CREATE INDEX feedback_decisions_id ON feedback_decisions (id)",
        "CREATE INDEX feedback_decisions_request_id ON feedback_decisions (request_id)",
        "CREATE INDEX feedback_decisions_user ON feedback_decisions (user_digest)",
        """CREATE TABLE feedback_prompts (
            uid TEXT PRIMARY KEY,
            at_us BIGINT NOT NULL,
            prompt TEXT NOT NULL
        )""",
        "CREATE INDEX feedback_prompts_at ON feedback_prompts (at_us)",
        """CREATE TABLE feedback_judgements (
            id TEXT PRIMARY KEY,
            at_us BIGINT NOT NULL,
            decision_id TEXT NOT NULL,
            kind TEXT NOT NULL,
            value TEXT NOT NULL,
            judge TEXT NOT NULL
        )""",
        "CREATE INDEX feedback_judgements_decision ON feedback_judgements (decision_id)",
        """CREATE TABLE feedback_duels (
            uid TEXT PRIMARY KEY,
            at_us BIGINT NOT NULL,
            decision_id TEXT NOT NULL,
            served_route TEXT NOT NULL,
            winner TEXT NOT NULL,
            judge TEXT NOT NULL
        )""",
        "CREATE INDEX feedback_duels_decision ON feedback_duels (decision_id)",
    ),
    # the monitor reads the latest decisions, every few minutes
    ("CREATE INDEX feedback_decisions_at ON feedback_decisions (at_us)",),
    # what challengers did: one row a gateway process and version, rewritten while it counts
    (
        """CREATE TABLE feedback_online (
            name TEXT PRIMARY KEY,
            counts TEXT NOT NULL
        )""",
    ),
)

# taken steps; made outside of the steps, since it says which to take
STEPS_TAKEN = """CREATE TABLE IF NOT EXISTS feedback_schema (
    step INTEGER PRIMARY KEY,
    at_us BIGINT NOT NULL
)"""

_metadata = MetaData()


def _text(name: str) -> Column[str]:
    return Column(name, Text)


meta = Table("feedback_meta", _metadata, _text("name"), _text("value"))
decisions = Table(
    "feedback_decisions",
    _metadata,
    *(_text(name) for name in ("uid", "id", "request_id", "key_id", "user_digest", "version",
                               "kind", "route", "model", "other_model", "reason", "endpoint")),
    *(Column(name, Double) for name in ("win_rate", "threshold", "probability", "usd")),
    *(Column(name, BigInteger) for name in ("at_us", "input_tokens", "output_tokens")),
    Column("status", Integer),
    Column("canary", Boolean),
)  # fmt: skip
prompts = Table(
    "feedback_prompts", _metadata, _text("uid"), Column("at_us", BigInteger), _text("prompt")
)
judgements = Table(
    "feedback_judgements",
    _metadata,
    *(_text(name) for name in ("id", "decision_id", "kind", "value", "judge")),
    Column("at_us", BigInteger),
)
online = Table("feedback_online", _metadata, _text("name"), _text("counts"))
duels = Table(
    "feedback_duels",
    _metadata,
    *(_text(name) for name in ("uid", "decision_id", "served_route", "winner", "judge")),
    Column("at_us", BigInteger),
)
