"""``routellm deploy``: tell a Prefect server what runs by itself."""

from __future__ import annotations

from typing import Annotated

import typer

from routellm.cli.context import load_settings, out, print_json, registry_of
from routellm.cli.options import Json

DEPLOY = "Example: routellm deploy --first-retraining"


def deploy(
    first_retraining: Annotated[
        bool,
        typer.Option(
            "--first-retraining",
            help="Ask for a retraining where no version is registered and there is a source.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Start again what was under way when all workers stopped; only while none runs.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Bring the deployments on the Prefect server in PREFECT_API_URL up to date."""
    settings = load_settings()
    from flows.engine import configure

    configure(settings)
    from flows.apply import apply

    changed = apply(settings)
    if resume:
        from flows.resume import resume as start_again

        changed += [f"run {name} starts again" for name in start_again()]
    if first_retraining:
        from flows.wanted import ask_for_first
        from routellm.sources.inbox import sources_now

        names = sources_now(settings)
        if names and not registry_of(settings).versions():
            ask_for_first(settings.model, names)
            changed.append(f"a first retraining was asked for, on {', '.join(names)}")
    if json:
        print_json({"changed": changed})
        return
    for line in changed or ["nothing has changed"]:
        out.print(line, markup=False, soft_wrap=True)
