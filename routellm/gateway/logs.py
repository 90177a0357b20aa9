"""What the gateway writes on stderr: a line a request, and whatever its loggers say.

A line holds no prompt (unless the setting ``gateway.log_prompts`` is on) and no key. An error is
told by its type and the lines of code it came through: its message may quote what was being worked
on. Lines are made and written in a thread, from a queue that has an end: a stderr that nobody
reads costs lines, never requests.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any, Literal, TextIO

from routellm.gateway.exchange import Exchange

log = logging.getLogger("routellm.gateway.requests")

Format = Literal["json", "plain", "off"]

MOST_PROMPT = 2000  # characters of a prompt, where prompts are written
_MOST_TEXT = 300  # characters of any other text, some of which comes from the request
_WAITING = 10_000  # records that may wait to be written; about 10 MB
_LAST_S = 2.0  # for what still waits when the process ends
_FRAMES = 8  # of an error, the innermost
_OUR_KEY = re.compile(r"(rlk_[0-9a-f]{12})_[0-9a-f]{64}")  # sent as a request id, say


class RequestLog:
    """Writes a line about each request; an observer of exchanges.

    Parameters
    ----------
    prompts : bool
        Whether the text that was scored is written, too.
    """

    def __init__(self, *, prompts: bool = False) -> None:
        self.prompts = prompts

    def seen(self, one: Exchange) -> None:
        bad = one.status >= 500 or one.broken not in ("", "client_left")
        log.log(
            logging.WARNING if bad else logging.INFO,
            "request",
            extra={"fields": fields_of(one, prompts=self.prompts)},
        )


def fields_of(one: Exchange, *, prompts: bool = False) -> dict[str, Any]:
    """Return what a line says of a request: the same fields in each, null where unknown."""
    routed = one.routed
    out: dict[str, Any] = {
        "request_id": one.id,
        "endpoint": one.endpoint,
        "key_id": one.caller.id or None,
        "status": one.status or None,
        "route": one.route or None,
        "model": one.model[:_MOST_TEXT] or None,
        "version": routed.version or None if routed else None,
        "kind": routed.kind or None if routed else None,
        "win_rate": routed.win_rate if routed else None,
        "threshold": routed.threshold if routed else None,
        "policy": routed.policy or None if routed else None,
        "confidence": routed.confidence if routed else None,
        "canary": routed.canary if routed else None,
        "reason": routed.reason[:_MOST_TEXT] if routed else None,
        "stood_in": one.stood_in or None,
        "broken": one.broken or None,
        "streamed": one.streamed,
        "routing_s": round(one.routing_s, 6),
        "upstream_s": round(one.upstream_s, 6),
        "total_s": round(one.total_s, 6),
        "input_tokens": one.usage.input_tokens,
        "output_tokens": one.usage.output_tokens,
        "other_calls": len(one.also),
        "usd": one.usd,
        "saved_usd": one.saved_usd,
        "trace_id": one.traceparent[3:35] or None,
    }
    if prompts:
        out["prompt"] = None if one.prompt is None else one.prompt[:MOST_PROMPT]
    return out


def write_logs(how: Format, stream: TextIO | None = None) -> None:
    """Write what every logger of this process says to `stream`; the last call holds.

    Parameters
    ----------
    how : str
        ``json`` or ``plain``, with what is worth knowing of our own loggers; ``off`` is plain,
        with warnings and errors alone.
    stream : text stream, optional
        By default stderr.
    """
    root = logging.getLogger()
    for old in _ours():
        root.removeHandler(old)
        old.end()
    for name in ("uvicorn", "uvicorn.error", "routellm"):  # whoever set logging up before
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    root.addHandler(_Lines(stream or sys.stderr, JsonLine() if how == "json" else PlainLine()))
    logging.getLogger("routellm").setLevel(logging.WARNING if how == "off" else logging.INFO)
    log.disabled = how == "off"


def flush_logs() -> None:
    """Wait until all that was said is written, for a moment."""
    for handler in _ours():
        handler.flush()


def _ours() -> list[_Lines]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, _Lines)]


class JsonLine(logging.Formatter):
    """A record as one line of JSON, in ASCII: no text can end its line or hide in it."""

    def format(self, record: logging.LogRecord) -> str:
        doc = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_more(record),
        }
        return _without_keys(json.dumps(doc, default=str))


class PlainLine(logging.Formatter):
    """A record as one line to read: what is known of a request as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        said = record.getMessage().encode("unicode_escape").decode()  # one line, whatever it is
        pairs = [
            f"{name}={_plain(value)}"
            for name, value in _more(record).items()
            if value is not None and value is not False
        ]
        line = " ".join([_time_of(record), f"{record.levelname:7}", said, *pairs])
        return _without_keys(line)


class _Lines(logging.Handler):
    """Formats and writes records in a thread of its own."""

    def __init__(self, stream: TextIO, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._stream = stream
        self._queue: queue.SimpleQueue[logging.LogRecord | threading.Event | None]
        self._queue = queue.SimpleQueue()
        self._dropped = 0
        threading.Thread(target=self._run, name="write-logs", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._queue.qsize() < _WAITING:
            self._queue.put(record)
        else:
            self._dropped += 1

    def flush(self) -> None:
        """Wait until all that waits is written, for a moment."""
        written = threading.Event()
        self._queue.put(written)
        written.wait(_LAST_S)

    def end(self) -> None:
        # not `close`: whoever sets up logging of its own in this process (uvicorn does) calls that
        self.flush()
        self._queue.put(None)

    def _run(self) -> None:
        while (record := self._queue.get()) is not None:
            if isinstance(record, threading.Event):
                record.set()
                continue
            self._write(record)
            if self._dropped:  # all that came while writing stood still
                dropped, self._dropped = self._dropped, 0
                self._write(
                    logging.makeLogRecord(
                        {
                            "name": log.name,
                            "levelno": logging.WARNING,
                            "levelname": "WARNING",
                            "msg": "%d log lines were dropped: stderr is read too slowly",
                            "args": (dropped,),
                        }
                    )
                )

    def _write(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:
            line = f"a line of {record.name} could not be made: {type(error).__name__}"
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # stderr is closed: nobody is left to be told
            pass


def _more(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a record carries beside its message."""
    fields = getattr(record, "fields", None)
    out: dict[str, Any] = dict(fields) if isinstance(fields, Mapping) else {}
    if record.exc_info and record.exc_info[0] is not None:
        out["error"] = record.exc_info[0].__name__
        out["at"] = [
            f"{PurePath(frame.filename).name}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_tb(record.exc_info[2])[-_FRAMES:]
        ]
    return out


def _time_of(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value) if not isinstance(value, list) else " < ".join(reversed(value))
    return text if re.fullmatch(r"[\w.:/-]+", text, re.ASCII) else json.dumps(text)


def _without_keys(line: str) -> str:
    return _OUR_KEY.sub(r"\1_***", line)
