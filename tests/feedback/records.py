"""Records for tests, and what is in a store, read without our own code."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from routellm.feedback.records import Decided, Dueled, Judged

NOW = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)


def decided(id: str = "chatcmpl-1", **changes: Any) -> Decided:
    given: dict[str, Any] = {
        "id": id, "at": NOW, "request_id": f"req-{id}", "key_id": "3f9a0c51d2be",
        "user": "ada", "version": "3", "kind": "mf", "route": "weak", "model": "small",
        "other_model": "large", "win_rate": 0.31, "threshold": 0.5, "probability": 1.0,
        "reason": "below the threshold", "canary": False, "endpoint": "chat/completions",
        "status": 200, "input_tokens": 12, "output_tokens": 300, "usd": 0.0012,
        "prompt": "Why is the sky blue?",
    }  # fmt: skip
    return Decided(**given | changes)


def judged(
    id: str, of: str = "chatcmpl-1", kind: Any = "thumbs", value: str = "down", s: float = 1
):
    return Judged(id, NOW + timedelta(seconds=s), of, kind, value)


def dueled(of: str = "chatcmpl-1", winner: Any = "strong", by: str = "gpt-judge", s: float = 2):
    return Dueled(of, NOW + timedelta(seconds=s), "weak", winner, by)


def rows(url: str, table: str) -> list[dict[str, Any]]:
    """Return a table's rows, with SQLAlchemy alone."""
    import sqlalchemy as sa

    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        found = [dict(r) for r in connection.exec_driver_sql(f"SELECT * FROM {table}").mappings()]
    engine.dispose()
    return found
