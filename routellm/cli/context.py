"""What every verb needs: the settings in force, and how to print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from routellm.errors import UsageError

if TYPE_CHECKING:
    from registry import Registry
    from routellm.settings import Settings

out = Console(highlight=False)
_overrides: dict[str, Any] = {}


def set_home(home: Path | None) -> None:
    """Remember the global options of this call."""
    _overrides.clear()
    if home is not None:
        _overrides["home"] = home


def load_settings(**overrides: Any) -> Settings:
    """Return the settings in force; flags that were not given (None) override nothing.

    Raises
    ------
    UsageError
        If a value in routellm.toml, the environment or a flag is not allowed.
    """
    import pydantic

    from routellm.settings import Settings

    given = {k: v for k, v in {**_overrides, **overrides}.items() if v is not None}
    try:
        return Settings(**given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "settings"
        raise UsageError(
            f"the setting {where} is not allowed: {first['msg']} (found "
            f"{str(first.get('input'))[:60]!r}); see docs/settings.md"
        ) from error
    except ValueError as error:
        raise UsageError(f"routellm.toml cannot be read: {error}; mend it") from error


def registry_of(settings: Settings) -> Registry:
    from registry import connect

    return connect(settings)


def print_json(doc: Any) -> None:
    """Print a document as JSON on standard output, and nothing else."""
    print(json.dumps(doc, indent=1, default=str))  # noqa: T201
