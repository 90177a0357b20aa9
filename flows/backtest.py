"""History replayed: routers trained at each date on what was known then, and what they gave after.

Nothing is registered. What a router of a date said is remembered by content, under
``<home>/backtest/trained/<training key>``: its held-out APGR, and its win rates on the prompts of
a window. A backtest that was killed goes on where it was, and one that is run again, or over more
dates, trains only what it has not seen. The routers themselves are removed as soon as their dates
are done with; that which is never retrained stays.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.steps import step
from flows.then import Then
from registry import connect
from registry.backtest import log_backtest
from routellm.as_of import History, store_with_history
from routellm.backtest import Backtest, Votes, Window, dates, sides_of, votes_of
from routellm.embeddings import get_encoder
from routellm.errors import UsageError
from routellm.evaluation.two_policies import Answers, Comparison, compare
from routellm.settings import Settings
from routellm.training import COLUMNS


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a second backtest of the same home: it would clear away the first one's routers."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when its holder dies
        except BlockingIOError as error:
            raise UsageError(
                f"another backtest is under way in {folder}: wait for it, or set another --home"
            ) from error
        yield


def choose(name: str, then: Then) -> dict[str, float]:
    """Train all kinds on what was known; return by what the best is chosen."""
    with step(name) as line:
        apgr = {kind: then.heldout_apgr(kind, line) for kind in then.kinds}
        told = ", ".join(f"{kind} {value:.3f}" for kind, value in apgr.items())
        line.result = f"{then.known:,} battles known; held-out APGR {told}"
    return apgr


def answer(
    number: int,
    votes: Votes,
    span: tuple[datetime, datetime],
    retrained: tuple[Then, str],
    never: tuple[Then, str],
) -> tuple[Answers, int]:
    """Ask both policies' routers, and say how many battles were left out as seen in training."""
    then, best = retrained
    rows = votes.between(*span)
    if not len(rows):
        return Answers.join([]), 0
    used, where = np.unique(votes.prompt[rows], return_inverse=True)
    prompts = [votes.prompts[i] for i in used]
    with step("measure") as line:
        # what was known on the first date is known on every later one
        fresh = ~then.seen(best, prompts, line)[where]
        asked = [one.rates(kind, prompts, line)[where][fresh] for one, kind in (retrained, never)]
        excluded = int((~fresh).sum())
        line.result = f"{fresh.sum():,} votes by {span[1]:%Y-%m-%d}"
        line.result += f" ({excluded:,} more seen in training)" if excluded else ""
    said = Answers(
        asked[0],
        asked[1],
        votes.preference[rows][fresh],
        votes.prompt[rows][fresh],
        np.full(int(fresh.sum()), number),
    )
    return said, excluded


def replay(
    settings: Settings,
    start: datetime,
    end: datetime | None,
    every: timedelta,
    choose: Callable[[str, Then], dict[str, float]] = choose,
) -> Backtest:
    """Replay history, as `backtest` does; `choose` trains and measures the routers of a date."""
    history = History.of(store_with_history(settings), COLUMNS)
    end = end or history.last_voted
    if end is None:
        raise UsageError(
            f"no battle of snapshot {history.manifest.digest[:12]} says when it was voted: there "
            "is no history to replay; ingest a source whose rows bear a date"
        )
    spans = dates(start, end, every)
    encoder = get_encoder(settings.embedding, settings.embeddings_path, settings.storage)
    first = Then(start, history, encoder, settings)
    if not first.kinds:
        raise UsageError("no router kind but random is to be trained: name one with --routers")
    sides = sides_of(history, first.plan.pair, start, end)
    votes, undated = votes_of(history, sides, settings.training.augment)

    def compared(of: Answers) -> Comparison | None:
        rng = np.random.default_rng(settings.training.seed)
        return compare(of, resamples=settings.evaluation.bootstrap, rng=rng)

    windows: list[Window] = []
    answers: list[Answers] = []
    never = ""
    for begin, stop in spans:
        then = Then(begin, history, encoder, settings) if windows else first
        apgr = choose(f"{begin:%Y-%m-%d}", then)
        best = max(apgr, key=lambda kind: apgr[kind])
        never = never or best
        said, excluded = answer(len(windows), votes, (begin, stop), (then, best), (first, never))
        then.clear(keep=never if then is first else None)
        windows.append(Window(begin, stop, then.known, apgr, best, excluded, compared(said)))
        answers.append(said)
    return Backtest(
        snapshot=history.manifest.digest,
        simulated=history.manifest.simulated,
        pair=first.plan.pair,
        sides=sides,
        every=every,
        windows=tuple(windows),
        pooled=compared(Answers.join(answers)),
        undated=undated,
    )


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="train-as-of-{name}")
def train_as_of(name: str, then: Then) -> dict[str, float]:
    return choose(name, then)


@flow(name="backtest", persist_result=False, validate_parameters=False)
def backtest(
    settings: Settings, start: datetime, end: datetime | None, every: timedelta
) -> Backtest:
    """Replay history from `start` to `end` with a training every so often, and log how it went.

    At each date the kind with the highest APGR on the held-out battles known by then is served
    until the next, as the loop would choose its candidate; there is no gate, which would ask for
    certainty first. The never retrained policy serves the first date's. `end` is by default when
    the newest dated battle was voted.
    """
    registry = connect(settings)
    with alone(settings.home / "backtest"):
        result = replay(settings, start, end, every, train_as_of)
    log_backtest(registry, result)
    return result
