"""The verbs ``routellm keys add``, ``list`` and ``revoke``: who may use the gateway, and how much.

They change a file that running gateways read again at their next request; none needs a restart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from routellm.cli.context import load_settings, out, print_json
from routellm.cli.options import Fraction, Json, Threshold
from routellm.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from routellm.gateway.key_file import Key
    from routellm.gateway.limits import Spent
    from routellm.settings import Settings

ADD = "Example: routellm keys add search-team --strong-fraction 0.3 --usd-per-month 200"
LIST = "Example: routellm keys list --json"
REVOKE = "Example: routellm keys revoke 3f9a0c51d2be"

keys_app = typer.Typer(name="keys", no_args_is_help=True, rich_markup_mode="rich")


def add(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    requests_per_minute: Annotated[int | None, typer.Option(help="Most in a minute.")] = None,
    concurrent: Annotated[int | None, typer.Option(help="Most requests at once.")] = None,
    usd_per_day: Annotated[float | None, typer.Option(help="Budget of a day (UTC).")] = None,
    usd_per_month: Annotated[float | None, typer.Option(help="Budget of a month (UTC).")] = None,
    threshold: Threshold = None,
    strong_fraction: Fraction = None,
    quality: Annotated[
        float | None, typer.Option(help="Share of the quality gap to recover, in [0, 1].")
    ] = None,
    max_usd: Annotated[
        float | None, typer.Option(help="Most dollars that a query may cost on average.")
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="For the admin endpoints, and those alone.")
    ] = False,
    json: Json = False,
) -> None:
    """Make an API key for the gateway; it is shown this once. The first one closes the gateway."""
    from routellm.gateway.key_file import add_key

    settings = load_settings()
    limits = {
        "requests_per_minute": requests_per_minute,
        "concurrent": concurrent,
        "usd_per_day": usd_per_day,
        "usd_per_month": usd_per_month,
        "threshold": threshold,
        "strong_fraction": strong_fraction,
        "quality": quality,
        "max_usd": max_usd,
    }
    if admin and any(v is not None for v in limits.values()):
        raise UsageError("an admin key sends no queries: give it no limits and no target")
    if any(v is not None for v in (usd_per_day, usd_per_month, max_usd)):
        _check_prices(settings)
    key, text = add_key(_path(settings), name, admin=admin, **limits)
    if json:
        print_json({"key": text, **_doc(key, None)})
        return
    out.print(f"key [bold]{key.id}[/] for {_plain(key.name)}: {_plain(_allowed(key))}")
    out.print(text, soft_wrap=True, markup=False)
    out.print("[yellow]keep it now: it is stored nowhere and cannot be shown again[/]")


def list_keys(json: Json = False) -> None:
    """List the gateway's API keys, oldest first, with what they may and what they spent."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from routellm.gateway.keys import Keys

    settings = load_settings()
    found = Keys(_path(settings)).all()
    spent = _spent(settings, found)
    if json:
        print_json([_doc(key, spent.get(key.id)) for key in found])
        return
    if not found:
        out.print("no keys: the gateway answers whoever can reach it; see `routellm keys add`")
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("id", "name", "created (UTC)", "may"):
        table.add_column(column, overflow="fold")
    for column in ("$ today", "$ this month"):
        table.add_column(column, justify="right", no_wrap=True)
    for key in found:
        used = spent.get(key.id)
        money = ("", "") if used is None else (f"{used.today_usd:.2f}", f"{used.month_usd:.2f}")
        may = "[red]revoked[/]" if key.revoked_at else _plain(_allowed(key))
        table.add_row(key.id, _plain(key.name), f"{key.created_at:%Y-%m-%d %H:%M}", may, *money)
    out.print(table)


def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `routellm keys list` shows it.")],
    json: Json = False,
) -> None:
    """Revoke an API key; gateways that run refuse it from their next request on."""
    from routellm.gateway.key_file import revoke_key

    key = revoke_key(_path(load_settings()), key_id)
    if json:
        print_json(_doc(key, None))
    else:
        out.print(f"key [bold]{key.id}[/] of {_plain(key.name)} is revoked")


keys_app.command("add", epilog=ADD)(add)
keys_app.command("list", epilog=LIST)(list_keys)
keys_app.command("revoke", epilog=REVOKE)(revoke)


def _path(settings: Settings) -> Path:
    return settings.home / "keys.json"


def _check_prices(settings: Settings) -> None:
    """Refuse a budget that could not be kept: of a model without a price nothing is charged."""
    for route, upstream in settings.gateway.routes.items():
        if upstream.model not in settings.prices:
            raise UsageError(
                f"dollars cannot be kept to: {upstream.model} (gateway.{route}) has no price; set "
                f'[prices."{upstream.model}"] with input and output in routellm.toml'
            )


def _spent(settings: Settings, keys: list[Key]) -> dict[str, Spent]:
    """Return what each key has spent; nothing if no gateway has counted yet."""
    from routellm.gateway.limits import Limits

    path = settings.home / "spend.db"
    if not path.exists():
        return {}
    limits = Limits(path)
    limits.open()
    try:
        return {key.id: limits.spent(key.id) for key in keys}
    finally:
        limits.close()


def _doc(key: Key, spent: Spent | None) -> dict[str, Any]:
    doc = key.model_dump(mode="json", exclude={"digest"})
    if spent is not None:
        doc |= {"usd_today": spent.today_usd, "usd_this_month": spent.month_usd}
    return doc


def _allowed(key: Key) -> str:
    """Return in words what a key may do."""
    if key.admin:
        return "admin endpoints"
    said = []
    if key.requests_per_minute is not None:
        said.append(f"{key.requests_per_minute} requests a minute")
    if key.concurrent is not None:
        said.append(f"{key.concurrent} at once")
    if key.usd_per_day is not None:
        said.append(f"${key.usd_per_day:g} a day")
    if key.usd_per_month is not None:
        said.append(f"${key.usd_per_month:g} a month")
    if key.target is not None:
        said.append(str(key.target))
    return ", ".join(said) or "anything"


def _plain(text: str) -> str:
    """Return text that is printed as it is, whatever is in it."""
    from rich.markup import escape

    return escape(text)
