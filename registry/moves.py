"""How an alias is moved, whatever for: written down, done, checked, and mended if it was cut short.

Every move is written into the history first (`registry.history`), then ``previous`` and
``champion`` are set in that order, so that readers never see no champion, then the entry is marked
applied. One move at a time: nobody writes an entry after one that is not applied. Its writer has
``promotion.lease_s`` seconds to itself; after that the next command, whoever's, finishes it, which
two can do at once. Whoever sets an alias looks right before it whether the history went on after
the entry, and again after it, and puts things right if so.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from registry.calls import patient
from registry.chain import Chain
from registry.history import (
    ALIASES,
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Action,
    Entry,
    Standing,
    advance,
    now_utc,
    replay,
)
from routellm.errors import RegistryError

if TYPE_CHECKING:
    from registry.client import Registry, VersionInfo

Smoke = Callable[[str], str | None]  # a model URI -> None, or why it does not work
Plan = Callable[["Now"], Entry | None]

_PATIENCE_S = 120.0  # how long a move gives way to others before it gives up
_GIVE_WAY_S = 3.2  # longest wait of a writer that was not the fastest, before it tries again
_POLL_S = 0.2  # between looks at a move that is under way
_SMOKE_S = 300.0  # a smoke check that has not answered after this was cut short
_JUDGED = ("promote", "rollback", "revert", "reject", "inconclusive")
_MENDED = 20  # youngest entries whose artifact and tags are made up for


def step(name: str) -> None:
    """Do nothing: called between any two writes, so that tests can stop a process there."""


@dataclass(frozen=True)
class Now:
    """How things stand, with nothing unfinished: what a move is planned on."""

    chain: Chain
    standing: Standing
    aliases: Mapping[str, str]
    versions: Mapping[str, VersionInfo]

    @property
    def champion(self) -> str | None:
        return self.standing.champion

    def entry(self, action: Action, version: str | None, to: str | None, **more: Any) -> Entry:
        """Return the entry of a move that makes `to` champion, with the aliases it sets."""
        made = Entry(action, version, self.champion, to, prev=self.chain.head, **more)
        then = advance(self.standing, made)
        aliases: dict[str, str | None] = dict(made.aliases)
        if (then.champion, then.before) != (self.champion, self.standing.before):
            back = then.before[0] if then.before else None
            aliases[PREVIOUS] = back if back in self.versions else None
        if then.champion != self.champion:
            aliases[CHAMPION] = to
            if to is not None and self.aliases.get(CHALLENGER) == to:
                aliases[CHALLENGER] = None
        about = self.versions.get(version or "")
        snapshot = about.tags.get("snapshot") if about else None
        marks = {} if aliases else {"applied": made.at}
        return replace(made, aliases=aliases, snapshot=snapshot, marks=marks)


# --- what `Registry` offers ----------------------------------------------------------------------


def repair(registry: Registry, smoke: Smoke | None = None) -> str | None:
    """Mend what was cut short or moved by others, and return what in words, or None."""
    said_before = len(registry.notices)
    _settled(registry, smoke)
    return "; ".join(registry.notices[said_before:]) or None


def unsettled(registry: Registry) -> str | None:
    """Return what `repair` would mend of the champion, in words, or None; it changes nothing."""
    while True:
        chain, aliases = registry.entries.read(), registry.aliases()
        last = chain.last
        if last is not None and not last.applied:
            return f"entry {last.n} of the history is not finished: {last.told()}"
        champion = replay(chain.entries).champion
        if aliases.get(CHAMPION) == champion:
            return None
        if registry.entries.read().head == chain.head:  # else it moved while we looked
            return _moved_outside(chain, aliases.get(CHAMPION))


# --- one move ------------------------------------------------------------------------------------


def moved(registry: Registry, plan: Plan, smoke: Smoke | None) -> Entry:
    """Plan a move on how things stand, write it, do it, and check it."""
    entry = _written(registry, plan, smoke)
    assert entry is not None
    try:
        entry = _apply(registry, entry)
    except _Overtaken:
        raise
    except RegistryError as error:
        raise RegistryError(
            f"it is written in the history (entry {entry.n}) and not finished, the next command "
            f"finishes it: {error}"
        ) from error
    _look_again(registry, entry)
    if entry.smoke_due:
        entry = _checked(registry, entry, smoke)
    _leave_evidence(registry, entry)
    return entry


def _look_again(registry: Registry, entry: Entry) -> None:
    """Make sure that the champion is what the entry says: anybody may move it in the MLflow UI."""
    try:
        found = registry.aliases().get(CHAMPION) if CHAMPION in entry.aliases else entry.to
        if found == entry.to or registry.entries.overtaken(entry):
            return
    except RegistryError as error:  # the move is made: whether it holds is not known, no more
        registry.notices.append(f"the champion could not be looked at after the move: {error}")
        return
    raise RegistryError(
        f"version {entry.to} is not champion, {found or 'none'} is: it was deleted, or the alias "
        "was moved by something else at the same time; see `routellm status`"
    )


def _written(
    registry: Registry, plan: Plan, smoke: Smoke | None = None, *, recheck: bool = True
) -> Entry | None:
    """Write the entry of a move after the last one; None if the plan has nothing to do.

    `recheck` is off for the way back from a failed smoke check, which is what rechecking does.

    Raises
    ------
    RegistryError
        If others were faster for minutes.
    """
    end = time.monotonic() + _PATIENCE_S + _lease(registry)
    wait_s = _POLL_S
    while True:
        now = _settled(registry, smoke, recheck=recheck)
        entry = plan(now)
        if entry is None:
            return None
        step("before the entry")
        mine = registry.entries.append(entry)
        if mine is not None:
            step("entry")
            return mine
        if time.monotonic() > end:
            raise RegistryError("other processes kept moving aliases for minutes: try again")
        time.sleep(random.uniform(0, wait_s))
        wait_s = min(2 * wait_s, _GIVE_WAY_S)


class _Overtaken(RegistryError):
    """Another process finished this move, because it took too long, and the history went on."""


def _apply(registry: Registry, entry: Entry) -> Entry:
    """Set the aliases of an entry and mark it applied; doing it twice does no harm."""
    if entry.applied:  # it sets none
        return entry
    there = registry.aliases()
    changes = CHAMPION in entry.aliases
    since = entry.at if changes and there.get(CHAMPION) == entry.to else None
    for alias in ALIASES:
        if alias not in entry.aliases:
            continue
        _still_ours(registry, entry)
        step(f"before {alias}")
        _set_alias(registry, alias, entry.aliases[alias])
        step(alias)
    _still_ours(registry, entry)
    entry = registry.entries.mark(entry, "applied", since or now_utc())
    step("applied")
    return entry


def _still_ours(registry: Registry, entry: Entry) -> None:
    """Put the aliases where the history has them now, if it went on after this entry."""
    if not registry.entries.overtaken(entry):
        return
    while True:
        chain = _finished(registry)
        standing = replay(chain.entries)
        aliases = registry.aliases()
        back = standing.before[0] if standing.before else None
        for alias, version in ((PREVIOUS, back), (CHAMPION, standing.champion)):
            if aliases.get(alias) != version:
                _set_alias(registry, alias, version)
        if registry.entries.read().head == chain.head:
            break
    raise _Overtaken(
        f"the move to version {entry.to or 'none'} (entry {entry.n}) took longer than "
        "promotion.lease_s: another process finished it, and the champion is "
        f"{standing.champion or 'none'} by now"
    )


def _set_alias(registry: Registry, alias: str, version: str | None) -> None:
    """Point an alias at a version; at none, if that version was deleted meanwhile.

    The champion is never taken away for that: it stays, and is found to be elsewhere than the
    history says.
    """
    from mlflow.exceptions import MlflowException

    client, model = registry.client, registry.model

    def point() -> None:
        try:
            if version is not None:
                client.set_registered_model_alias(model, alias, version)
                return
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            registry.notices.append(f"{alias} was not set: version {version} was deleted")
            if alias == CHAMPION:
                return
        client.delete_registered_model_alias(model, alias)

    patient(registry.settings, point)


# --- after a move: the smoke check, and what is left on the version -------------------------------


def _checked(registry: Registry, entry: Entry, smoke: Smoke | None) -> Entry:
    """Check the new champion, and go back if it does not work.

    Raises
    ------
    RegistryError
        If it does not work: says why, and who is champion now.
    """
    check = smoke or registry.smoke
    try:
        why = check(f"models:/{registry.model}/{entry.to}")
    except Exception as error:  # a check that breaks off is no check that passes
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    step("checked")
    if why is None:
        return _noted(registry, entry, "smoke", "passed")
    raise RegistryError(_taken_back(registry, entry, why)[1])


def _taken_back(registry: Registry, entry: Entry, why: str) -> tuple[bool, str]:
    """Go back from a champion that failed its smoke check; returns whether, and what to say."""
    failed = f"version {entry.to} failed its smoke check ({why})"
    entry = _noted(registry, entry, "smoke", f"failed: {why}")

    def plan(now: Now) -> Entry | None:
        later = [e for e in now.chain.entries if e.n > entry.n]
        if any(e.action == "revert" and e.version == entry.to for e in later):
            return None  # another process took it back already
        in_force = now.standing.entry is not None and now.standing.entry.id == entry.id
        back = now.champion
        if in_force:  # to where it was, or the first before that which is still there
            ways = (entry.from_, *now.standing.before)
            back = next((v for v in ways if v in now.versions), None)
        return now.entry("revert", entry.to, back, reason=f"smoke check failed: {why}")

    try:
        revert = _written(registry, plan, recheck=False)
        if revert is not None:
            revert = _apply(registry, revert)
            _leave_evidence(registry, entry)
            _leave_evidence(registry, revert)
        champion = registry.aliases().get(CHAMPION)
    except RegistryError as error:
        return False, f"{failed} and is not taken back yet, the next command does it: {error}"
    if revert is not None and revert.from_ == revert.to:
        return True, f"{failed}; the champion moved on meanwhile, it is {champion or 'none'}"
    return True, f"{failed} and was taken back: the champion is {champion or 'none'} again"


def _leave_evidence(registry: Registry, entry: Entry) -> None:
    """Leave the entry as an artifact of the version's run, and tags on the version.

    Neither undoes a move: what cannot be written is said, and tried again by the next command.
    """
    if entry.action not in _JUDGED or entry.version is None or "written" in entry.marks:
        return
    client, model, number = registry.client, registry.model, entry.version
    tags = {
        "routellm.decision": entry.action,
        "routellm.decision_reason": entry.reason,
        "routellm.decided_at": entry.at,
        "routellm.decided_by": entry.by,
        "routellm.history_entry": str(entry.n),
    }
    try:
        version = next((v for v in registry.versions() if v.version == number), None)
        if version is None:
            _noted(registry, entry, "written", f"no: version {number} was deleted")
            return
        if version.run_id:
            client.log_dict(version.run_id, entry.to_dict(), f"decisions/{entry.n}.json")
            step("artifact")
        for key, value in tags.items():
            patient(
                registry.settings,
                partial(client.set_model_version_tag, model, number, key, value[:5000]),
            )
            step(key)
    except Exception as error:  # artifact stores raise what they like
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        registry.notices.append(
            f"entry {entry.n} of the history is not on version {number} as an artifact and tags "
            f"yet ({first}): the next command tries again"
        )
        return
    _noted(registry, entry, "written", now_utc())


def _noted(registry: Registry, entry: Entry, name: str, value: str) -> Entry:
    """Mark an entry; what cannot be noted is said, for the move itself is done."""
    try:
        entry = registry.entries.mark(entry, name, value)
    except RegistryError as error:
        registry.notices.append(f"entry {entry.n} of the history lacks its mark {name}: {error}")
    step(f"noted {name}")
    return entry


# --- before a move: nothing unfinished, nothing unexplained ---------------------------------------


def _settled(registry: Registry, smoke: Smoke | None = None, *, recheck: bool = True) -> Now:
    """Finish what was cut short, write down what others moved, and return how things stand."""
    while True:
        chain = _finished(registry)
        standing = replay(chain.entries)
        aliases = registry.aliases()
        versions = {v.version: v for v in registry.versions()}
        now = Now(chain, standing, aliases, versions)
        found = aliases.get(CHAMPION)
        if found != standing.champion:
            why = _moved_outside(chain, found)
            if standing.champion is not None and standing.champion not in versions:
                why = f"version {standing.champion}, the champion, was deleted in MLflow"
            entry = now.entry("outside", found, found, reason=why, by="unknown")
            entry = replace(
                entry, aliases={k: v for k, v in entry.aliases.items() if k != CHAMPION}
            )
            mine = registry.entries.append(entry)
            # None too if the alias had moved because the history had: then we look again
            if mine is not None:
                step("outside")
                _apply(registry, mine)
                registry.notices.append(f"{why}; it is written in the history")
            continue
        if recheck and _recheck(registry, now, smoke):
            continue
        _make_up(registry, chain)
        return now


def _finished(registry: Registry) -> Chain:
    """Wait until the last entry is applied, or finish it once its writer's time is up."""
    lease_s = _lease(registry)
    waited_for, since = "", time.monotonic()
    while True:
        chain = registry.entries.read()
        last = chain.last
        if last is None or last.applied:
            return chain
        if last.id != waited_for:
            waited_for, since = last.id, time.monotonic()
        if time.time() - last.created_s < lease_s and time.monotonic() - since < lease_s:
            time.sleep(random.uniform(_POLL_S / 4, _POLL_S))
            continue
        try:
            _apply(registry, last)
        except _Overtaken:
            continue
        registry.notices.append(f"finished what was cut short, entry {last.n}: {last.told()}")


def _recheck(registry: Registry, now: Now, smoke: Smoke | None) -> bool:
    """See to a champion whose smoke check was cut short; returns whether anything changed."""
    entry = now.standing.entry
    if entry is None or not entry.smoke_due:
        return False
    came = entry.marks.get("smoke")
    age_s = time.time() - entry.created_s
    if came is not None and came.startswith("failed") and age_s > _lease(registry):
        done, told = _taken_back(registry, entry, came.removeprefix("failed: "))
        registry.notices.append(told)
        return done
    if came is not None or age_s < _lease(registry) + _SMOKE_S:
        return False
    try:
        _checked(registry, entry, smoke)
        registry.notices.append(
            f"the smoke check of version {entry.to} had been cut short: it passes"
        )
    except RegistryError as error:
        registry.notices.append(str(error))
        return registry.aliases().get(CHAMPION) != entry.to
    return True


def _make_up(registry: Registry, chain: Chain) -> None:
    """Leave the evidence of entries whose writer did not get that far."""
    for entry in chain.entries[-_MENDED:]:
        due = entry.action in _JUDGED and "written" not in entry.marks and entry.version is not None
        if due and time.time() - entry.created_s > _lease(registry):
            said_before = len(registry.notices)
            _leave_evidence(registry, entry)
            if len(registry.notices) > said_before:
                return  # the store is away: others would fail just so


def _lease(registry: Registry) -> float:
    return float(registry.settings.promotion.lease_s)


def _moved_outside(chain: Chain, found: str | None) -> str:
    if not chain.entries:
        return f"version {found} was champion before the history began"
    return (
        f"the champion alias was moved from {replay(chain.entries).champion or 'none'} to "
        f"{found or 'none'} by something other than routellm"
    )
