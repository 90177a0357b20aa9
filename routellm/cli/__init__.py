"""The ``routellm`` command: the one place that puts library, registry and flows together."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; expected errors are one sentence on standard error."""
    import typer
    from rich.console import Console

    from routellm.cli.app import app
    from routellm.errors import RouteLLMError

    debug = "--debug" in sys.argv or os.environ.get("ROUTELLM_DEBUG") == "1"
    err = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        # Typer hands back the status of `typer.Exit` as the value of the call
        raise SystemExit(app(standalone_mode=False) or 0)
    except (typer.Abort, KeyboardInterrupt):
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        usage = getattr(error, "format_message", None)  # click's own complaints about usage
        if usage is not None:
            err.print(f"[red]error:[/] {usage()}", markup=True)
            raise SystemExit(2) from None
        if isinstance(error, RouteLLMError):
            err.print("[red]error:[/]", end=" ")
            err.print(str(error), markup=False)
            raise SystemExit(error.exit_code) from None
        err.print("[red]error:[/]", end=" ")
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        err.print(f"unexpected {what}; run again with --debug to see where", markup=False)
        raise SystemExit(1) from None
