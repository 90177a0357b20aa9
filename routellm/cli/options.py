"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Benchmarks = Annotated[
    str | None,
    typer.Option(help="Folder of benchmark tables, or `routellm` to fetch the paper's own."),
]
Threshold = Annotated[
    float | None, typer.Option(help="Win rate from which a query goes to strong, in [0, 1].")
]
Fraction = Annotated[float | None, typer.Option(help="Share of queries for strong, in [0, 1].")]
Version = Annotated[str, typer.Option("--version", help="Version number or alias.")]
Strong = Annotated[
    str | None,
    typer.Option(help="Another strong model than the version's own; give --weak with it."),
]
Weak = Annotated[
    str | None, typer.Option(help="Another weak model than the version's own; see --strong.")
]
