"""Run the measurements and print one table: ``make bench`` or ``python -m benchmarks``.

Speeds are ratios within one run, or come with what they were measured on: machines differ and
are shared. Data is SIMULATED: random battles of the right shape. What takes longer than a few
minutes runs when it is named: ``python -m benchmarks growth``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context

Rows = list[tuple[str, str]]

# section of the quick table: the module and the function that measures it
QUICK = {
    "refit": ("benchmarks.refit", "measure"),
    "encoder": ("benchmarks.encoder", "measure"),
    "ingest": ("benchmarks.ingest", "measure"),
    "routers": ("benchmarks.growth", "measure_quick"),
    "pacer": ("benchmarks.pacer", "measure"),
    "gateway": ("benchmarks.gateway", "measure"),
}


def in_own_process(section: str) -> Rows:
    """Return the rows of one section, measured in a process of its own.

    A process starts with its parent's peak memory as its own, so the parent must stay small for
    the peaks of what it starts to mean anything.
    """
    module, function = QUICK[section]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        rows: Rows = pool.submit(getattr(import_module(module), function)).result()
    return rows


def show(title: str, sections: Sequence[Rows]) -> None:
    """Print one table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("measurement")
    table.add_column("result", justify="right")
    for rows in sections:
        for row in rows:
            table.add_row(*row)
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    from benchmarks.growth import LIMIT_S, SIZES, measured_kinds

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(dest="verb")
    quick = verbs.add_parser("quick", help="the table (default): a few minutes on two cores")
    quick.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(QUICK)}")
    growth = verbs.add_parser("growth", help="routers up to a million battles: about half an hour")
    kinds, sizes = ",".join(measured_kinds()), ",".join(map(str, SIZES))
    growth.add_argument("--kinds", default=kinds, help="default: %(default)s")
    growth.add_argument("--sizes", default=sizes, help="default: %(default)s")
    growth.add_argument(
        "--limit-s", type=float, default=LIMIT_S, help="for a kind and size; default: %(default)s"
    )
    asked = parser.parse_args()
    unknown = set(getattr(asked, "names", [])) - set(QUICK)
    if unknown:
        parser.error(f"no measurement {', '.join(sorted(unknown))}: use {', '.join(QUICK)}")
    return asked


def main() -> None:
    asked = arguments()
    title = f"SIMULATED data, {os.cpu_count()} cores"
    if asked.verb == "growth":
        from benchmarks import growth

        sizes = [int(n) for n in asked.sizes.split(",")]
        show(title, [growth.measure(asked.kinds.split(","), sizes, asked.limit_s)])
        return
    show(title, [in_own_process(name) for name in getattr(asked, "names", None) or QUICK])


if __name__ == "__main__":
    main()
