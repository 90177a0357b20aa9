"""The verb ``routellm forget``: remove what the gateway stored of a user."""

from __future__ import annotations

from typing import Annotated

import typer

from routellm.cli.context import load_settings, out, print_json
from routellm.cli.options import Json
from routellm.errors import UsageError

FORGET = "Example: routellm forget user-4711"


def forget(
    user: Annotated[str, typer.Argument(help="The id that requests gave as `user`.")],
    store: Annotated[
        str | None, typer.Option(help="Feedback store, if not the one that is set.")
    ] = None,
    json: Json = False,
) -> None:
    """Remove a user's decisions, prompts and judgements from the feedback store."""
    from routellm.feedback import store_url
    from routellm.feedback.store import FeedbackStore

    feedback = FeedbackStore(store or store_url(load_settings()))
    if not feedback.exists():
        raise UsageError(f"no feedback store {feedback.name}: there is nothing to forget")
    try:
        gone = feedback.forget(user)
    finally:
        feedback.close()
    if json:
        print_json({"store": feedback.name, "decisions": gone})
    elif gone:
        out.print(f"{gone:,} decisions and all that belongs to them are removed", soft_wrap=True)
        out.print(
            "[yellow]snapshots made before keep the battles, which name no user; see "
            "docs/feedback.md[/]",
            soft_wrap=True,
        )
    else:
        out.print("nothing is stored of this user")
