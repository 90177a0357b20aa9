"""The ``judge`` verb: say what it will cost, ask the judge, write battles, say what came out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from routellm.cli.context import load_settings, out, print_json
from routellm.errors import JudgeError, UsageError

if TYPE_CHECKING:
    from routellm.augmentation.answers import Answers
    from routellm.augmentation.judge import Estimate, Judging
    from routellm.embeddings.base import Progress
    from routellm.settings import JudgeSettings

EXAMPLE = (
    "Example: routellm judge answers.parquet --model-a gpt-4-1106-preview "
    "--model-b mixtral-8x7b-instruct-v0.1 --out battles.parquet --estimate"
)
_SHOWN = 10  # unjudged pairs named in the summary; --json has all


def judge(
    answers: Annotated[
        Path, typer.Argument(help="Parquet, CSV or JSON Lines: prompt, model, response.")
    ],
    model_a: Annotated[str, typer.Option(help="One of its models.")],
    model_b: Annotated[str, typer.Option(help="Another of its models.")],
    output: Annotated[Path, typer.Option("--out", help="Parquet file of battles to write.")],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Judge this many prompts, the first ones.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Dollars to spend at most; by default the set ones.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say the cost and stop.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before spending.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Let an LLM judge recorded answers of two models, in both orders, into battles."""
    from routellm.augmentation.answers import read_answers
    from routellm.augmentation.judge import Judge
    from routellm.augmentation.labels import write_battles

    settings = load_settings()
    how: JudgeSettings = settings.judge
    if budget is not None:
        how = how.model_copy(update={"budget_usd": budget})
    if output.suffix != ".parquet" or output.is_dir():
        raise UsageError(f"--out {output} is no name for a Parquet file: end it in .parquet")
    if output.resolve() == answers.resolve():
        raise UsageError(f"--out {output} is the file of answers: name another one")
    pairs = read_answers(answers, model_a, model_b, limit=limit)
    labeller = Judge(how, settings.verdicts_path)
    expected = labeller.estimate(pairs)
    # with --json, standard output holds the document and nothing else
    told = Console(stderr=True, highlight=False) if json else out
    _say_estimate(told, pairs, expected, how)
    if estimate:
        if json:
            print_json({"estimate": asdict(expected)})
        return
    if expected.calls and not yes and sys.stdin.isatty():
        typer.confirm(f"Make {expected.calls:,} calls?", abort=True, err=True)
    with _bar() as progress:
        done = labeller.judge(pairs, progress=progress)
    wrote = done.labels.battles.num_rows > 0
    if wrote:
        write_battles(done.labels.battles, output)
    if json:
        print_json(_document(pairs, expected, done, output if wrote else None))
    else:
        _say_result(pairs, done, output if wrote else None)
    done.raise_if_stopped()
    if not wrote:
        first = done.labels.unjudged[0]
        raise JudgeError(
            f"no pair got two verdicts, so nothing was written: row {first.row} has {first.reason}"
        )


@contextmanager
def _bar() -> Iterator[Progress | None]:
    """Yield what draws a bar on a terminal; None where there is none."""
    from rich import progress as bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        bars.TextColumn("judging"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("judging", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say_estimate(told: Console, pairs: Answers, expected: Estimate, how: JudgeSettings) -> None:
    from routellm.augmentation.budget import dollars

    told.print(
        f"{escape(pairs.source)}: {expected.pairs:,} prompts answered by both "
        f"{escape(pairs.model_a)} and {escape(pairs.model_b)}",
        soft_wrap=True,
    )
    if pairs.left_out:
        told.print(f"[yellow]{pairs.left_out:,} prompts left out[/]: not answered by both")
    if pairs.repeated:
        told.print(f"[yellow]{pairs.repeated:,} rows not read[/]: the model answered before")
    if expected.answers_cut:
        told.print(
            f"[yellow]{expected.answers_cut:,} answers are cut[/] to {how.max_answer_chars:,} "
            "characters",
            soft_wrap=True,
        )
    told.print(
        f"estimate: [bold]{expected.calls:,} calls[/] to {escape(how.model)} ({expected.cached:,} "
        f"of {expected.verdicts:,} verdicts are known), {expected.input_tokens:,} tokens in and "
        f"{expected.output_tokens:,} out at four characters a token, "
        f"[bold]{dollars(expected.cost_usd)}[/]; budget {dollars(how.budget_usd)}",
        soft_wrap=True,
    )
    if expected.cost_usd > how.budget_usd:
        told.print("[yellow]the budget will stop it before the end[/]; run again to go on")


def _say_result(pairs: Answers, done: Judging, written: Path | None) -> None:
    from routellm.augmentation.budget import dollars

    labels = done.labels
    won = labels.winners()
    if written is not None:
        out.print(
            f"[green]{escape(str(written))}[/]: [bold]{labels.battles.num_rows:,} battles[/]; "
            f"{escape(pairs.model_a)} won {won.get('model_a', 0):,}, {escape(pairs.model_b)} "
            f"{won.get('model_b', 0):,}, ties {won.get('tie', 0):,}, of them "
            f"{labels.disagreements:,} because the two orders disagree",
            soft_wrap=True,
        )
    if labels.unjudged:
        some = ", ".join(f"row {u.row} ({u.reason})" for u in labels.unjudged[:_SHOWN])
        more = len(labels.unjudged) - _SHOWN
        out.print(
            f"[yellow]{len(labels.unjudged):,} unjudged[/]: {escape(some)}"
            + (f" and {more:,} more" if more > 0 else ""),
            soft_wrap=True,
        )
    unseen = ""
    if done.unseen_calls:
        unseen = (
            f", of it {dollars(done.unseen_usd)} for {done.unseen_calls:,} calls whose usage was "
            "not reported, counted at the most they could cost"
        )
    out.print(
        f"{done.calls:,} calls, {done.cached:,} verdicts known before, {dollars(done.cost_usd)}"
        + unseen,
        soft_wrap=True,
    )


def _document(
    pairs: Answers, expected: Estimate, done: Judging, written: Path | None
) -> dict[str, Any]:
    labels = done.labels
    return {
        "out": written,
        "judged": labels.battles.num_rows,
        "winners": labels.winners(),
        "ties_by_disagreement": labels.disagreements,
        "unjudged": [asdict(one) for one in labels.unjudged],
        "remaining": labels.remaining,
        "left_out": pairs.left_out,
        "repeated": pairs.repeated,
        "calls": done.calls,
        "cached": done.cached,
        "cost_usd": done.cost_usd,
        "unseen_calls": done.unseen_calls,
        "unseen_usd": done.unseen_usd,
        "stopped": done.stopped,
        "estimate": asdict(expected),
    }
