"""The status page at ``/``, and ``/status.json`` that refreshes it: one text for each place.

The page works without its script. With it, `/status.json` brings the same texts, rows and bars
again, so there is one place that says how a figure is written.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

from routellm import __version__
from routellm.errors import GatewayError
from routellm.gateway.gateway import Gateway
from routellm.gateway.status import Status, document, status_of
from routellm.gateway.status_text import HEIGHT, Bars, bars, rows, texts

LetIn = Callable[[Mapping[str, str]], object]

_FOLDER = Path(__file__).parent / "page"


class Page:
    """The page, and the headers that keep anything else out of it.

    Attributes
    ----------
    headers : dict
        Its policy names the page's own style and script by their digests: nothing else is applied,
        run or loaded, whatever a text in it says.
    """

    def __init__(self) -> None:
        self._html = Template((_FOLDER / "status.html").read_text())
        self._css = (_FOLDER / "status.css").read_text()
        self._js = (_FOLDER / "status.js").read_text()
        self.headers = {
            "content-security-policy": (
                f"default-src 'none'; style-src '{_digest(self._css)}'; "
                f"script-src '{_digest(self._js)}'; connect-src 'self'; img-src data:; "
                "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            ),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-store",
        }

    def json(self, status: Status) -> dict[str, object]:
        """Return the figures, and under ``shown`` what the page makes of them."""
        return {
            **document(status),
            "shown": {"texts": texts(status), "rows": rows(status), "bars": asdict(bars(status))},
        }

    def html(self, status: Status) -> str:
        said, lists = texts(status), rows(status)
        pieces = {
            name: f'<span data-text="{name}">{escape(text)}</span>' for name, text in said.items()
        }
        for name, table in lists.items():
            pieces[f"rows_{name}"] = _items(table) if name == "problems" else _table(table)
        for name, shown in {**lists, "no_swaps": said["no_swaps"]}.items():
            pieces[f"hidden_{name}"] = "" if shown else " hidden"
        lengths = bars(status)
        return self._html.substitute(
            pieces,
            split=_split(lengths),
            histogram=_histogram(lengths),
            page_state=status.state,
            page_css=self._css,
            page_js=self._js,
            release=escape(__version__),
        )


def add_routes(
    app: FastAPI,
    gateway: Gateway,
    let_in: LetIn,
    problems: Callable[[], Sequence[str]] = tuple,
) -> None:
    """Add the page and its figures to an app.

    Parameters
    ----------
    let_in : callable
        Takes the request's headers; raises GatewayError where its key does not open the page.
        A browser sends a key as the password of HTTP's own (Basic) login.
    problems : callable
        Returns what else is wrong, one sentence each; "" is left out.
    """
    page, started = Page(), datetime.now(UTC)

    def answered(request: Request, make: Callable[[Status], Response]) -> Response:
        try:
            let_in(_with_key(request.headers))
        except GatewayError as error:
            headers = {"www-authenticate": 'Basic realm="routellm", charset="UTF-8"'}
            return PlainTextResponse(
                f"{error}\n", error.status, headers if error.status == 401 else None
            )
        answer = make(status_of(gateway, started, problems()))
        answer.headers.update(page.headers)
        return answer

    # plain functions: figures of many versions take milliseconds, which a thread spends
    @app.get("/", include_in_schema=False)
    def status_page(request: Request) -> Response:
        return answered(request, lambda status: HTMLResponse(page.html(status)))

    @app.get("/status.json", include_in_schema=False)
    def status_json(request: Request) -> Response:
        return answered(request, lambda status: JSONResponse(page.json(status)))


def _split(lengths: Bars) -> str:
    return (
        '<rect class="none" width="100" height="4"/>'
        f'<rect class="weak" data-width="decided" width="{lengths.decided}" height="4"/>'
        f'<rect class="strong" data-width="strong" width="{lengths.strong}" height="4"/>'
    )


def _histogram(lengths: Bars) -> str:
    drawn = "".join(
        f'<rect class="{"weak" if i < lengths.weak_until else "strong"}" data-height="{i}" '
        f'x="{10 * i + 0.6:.1f}" width="8.8" y="{HEIGHT - h:.2f}" height="{h:.2f}"/>'
        for i, h in enumerate(lengths.win_rates)
    )
    at = lengths.threshold
    return f'{drawn}<line data-threshold x1="{at}" x2="{at}" y1="0" y2="{HEIGHT}"/>'


def _table(table: Sequence[Sequence[str]]) -> str:
    return "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table
    )


def _items(table: Sequence[Sequence[str]]) -> str:
    return "".join(f"<li>{escape(text)}</li>" for (text,) in table)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _with_key(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Return the headers, with the password of a Basic login as a bearer token."""
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return headers
    try:
        _, _, password = base64.b64decode(rest, validate=True).decode().partition(":")
    except ValueError:  # not base64, or not text
        return headers
    return {"authorization": f"Bearer {password}"}
