"""A SIMULATED fleet of gateways that follow one alias at one MLflow: requests, queues, versions.

A server process shares its core evenly among at most 40 requests (MLflow's threads, which hold one
interpreter lock); others wait in line. A replica asks, waits `poll_s` from the answer, and asks
again, as `Follower` does; one that sees the new version loads it, request after request. Networks
take no time. A request that takes over 10 s, which a real client would give up and repeat, is
counted and waited for.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

REPLICAS = 1000
THREADS = 40  # of a process: anyio's limit, in which MLflow's server runs its handlers
HEAR_S = 0.1  # a follower hears of a nudge within this
GIVES_UP_S = 10.0  # `MLFLOW_HTTP_REQUEST_TIMEOUT` in registry.client


@dataclass(frozen=True)
class Costs:
    """Seconds of a server's core, and of a replica's own.

    Attributes
    ----------
    lookup_s : ndarray of float (k,)
        What lookups take where there is nothing else to do; drawn from.
    load_requests, load_s : int, float
        Requests that a new version costs each replica, and the server's time for all of them.
    own_s : float
        What the replica needs before it serves.
    """

    lookup_s: Floats
    load_requests: int = 0
    load_s: float = 0.0
    own_s: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A fleet and how it follows.

    Attributes
    ----------
    processes : int
        Of MLflow's server, each with a core; a replica's connection stays with one.
    nudge_per_s : float, optional
        Replicas that are posted to a second once the alias has moved; by default none.
    jitter_s : float
        Longest random wait of a nudged replica.
    cache_s : float
        Seconds for which a read-through in front gives the same answer to all; 0 is without one.
        It keeps what a load asks for too: one replica's load fills it.
    """

    poll_s: float
    replicas: int = REPLICAS
    processes: int = 1
    nudge_per_s: float | None = None
    jitter_s: float = 0.0
    cache_s: float = 0.0


@dataclass(frozen=True)
class Result:
    """What a simulation saw.

    Attributes
    ----------
    per_s, utilisation : float
        Requests a second at MLflow before the move, and the share of its cores' time they take.
    response_s, wait_s : ndarray of float (m,)
        Of lookups before the move: until the answer, and how much of that was not service.
    serving_s : ndarray of float (replicas,)
        From the move until each replica serves the new version.
    longest_s : float
        Longest answer of any request after the move.
    given_up : int
        Requests after the move that took over `GIVES_UP_S`.
    """

    per_s: float
    utilisation: float
    response_s: Floats
    wait_s: Floats
    serving_s: Floats
    longest_s: float
    given_up: int


@dataclass(frozen=True)
class Request:
    """One request at MLflow: the replica's (-1: the read-through's), and what is left to load."""

    replica: int
    sent: float
    service_s: float
    left: int = 0  # requests of the load, this one included; 0 is a lookup


class Process:
    """One server process: `threads` requests share its core evenly, the rest wait in line.

    With one thread it serves in the order of arrival. It keeps `shared`, the seconds of service
    that a request has had which was there from the start: who arrives at `shared` s and needs x
    leaves at s + x.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self.threads = threads
        self.busy_s = 0.0
        self._shared, self._at = 0.0, 0.0
        self._active: list[tuple[float, int, float, Request]] = []
        self._line: deque[Request] = deque()
        self._count = itertools.count()

    def arrive(self, at: float, request: Request) -> None:
        self._advance(at)
        self._line.append(request)
        self._fill()

    def next_s(self) -> float:
        """Return when the next request leaves, if none arrives before; infinity without any."""
        if not self._active:
            return np.inf
        return self._at + max(0.0, self._active[0][0] - self._shared) * len(self._active)

    def leave(self) -> tuple[float, float, Request]:
        """Let the next one leave: the time, when its service began, and the request."""
        at = self.next_s()
        self._advance(at)
        _, _, began, request = heapq.heappop(self._active)
        self._fill()
        return at, began, request

    def _advance(self, at: float) -> None:
        if self._active:
            self._shared += (at - self._at) / len(self._active)
            self.busy_s += at - self._at
        self._at = at

    def _fill(self) -> None:
        while self._line and len(self._active) < self.threads:
            one = self._line.popleft()
            leaves = self._shared + one.service_s
            heapq.heappush(self._active, (leaves, next(self._count), self._at, one))


class Fleet:
    """One run: replicas poll, the alias moves at `moved_s`, and it ends once all serve.

    Attributes
    ----------
    asked, answered : int
        Requests that MLflow got and answered, in all.
    """

    def __init__(self, plan: Plan, costs: Costs, seed: int = 0) -> None:
        self.plan, self.costs, self.rng = plan, costs, np.random.default_rng(seed)
        self.processes = [Process() for _ in range(plan.processes)]
        self.asked = self.answered = 0
        polls = max(30.0, 20.0 * plan.poll_s, 3.0 * plan.replicas * float(costs.lookup_s.mean()))
        self.counted_s, self.moved_s = polls / 2, polls
        n = plan.replicas
        self._heap: list[tuple[float, int, int, int]] = []  # when, tie, replica, turn
        self._ties = itertools.count()
        self._turn = [0] * n  # a look with an older turn was put off or brought forward
        self._free_s = [0.0] * n  # when the look under way ends; infinity until that is known
        self._nudged = [False] * n
        self._new = [False] * n
        self.serving_s = np.full(n, np.inf)
        self._copy_s, self._copy_new, self._waiting = -np.inf, False, list[int]()
        self._filled = False  # whether the read-through has what a load asks for
        self._lookups: list[tuple[float, float]] = []  # response, wait; before the move
        self._after = [0.0, 0.0]  # longest response, and how many were given up

    def run(self) -> Result:
        plan, busy_s, before = self.plan, 0.0, 0
        for r, phase in enumerate(self.rng.uniform(0.0, plan.poll_s, plan.replicas)):
            self._look_at(r, phase)
        for r, at in zip(self.rng.permutation(plan.replicas), self._nudges(), strict=False):
            heapq.heappush(self._heap, (at, next(self._ties), int(r), -1))
        marks = deque([self.counted_s, self.moved_s])
        while np.isinf(self.serving_s).any():
            first = min(self.processes, key=Process.next_s)
            due = self._heap[0][0] if self._heap else np.inf
            now = min(due, first.next_s())
            if marks and now >= marks[0]:
                if marks.popleft() == self.counted_s:
                    busy_s, before = -sum(p.busy_s for p in self.processes), self.asked
                else:
                    busy_s += sum(p.busy_s for p in self.processes)
                    before = self.asked - before
            if due <= first.next_s():
                self._event(*heapq.heappop(self._heap))
            else:
                self._answer(*first.leave())
        counted = self.moved_s - self.counted_s
        response, wait = np.array(self._lookups).T
        return Result(
            before / counted, busy_s / counted / plan.processes, response, wait,
            self.serving_s - self.moved_s, self._after[0], int(self._after[1]),
        )  # fmt: skip

    def _nudges(self) -> Iterator[float]:
        if self.plan.nudge_per_s is not None:
            for i in range(self.plan.replicas):
                yield self.moved_s + i / self.plan.nudge_per_s

    def _look_at(self, replica: int, at: float) -> None:
        self._turn[replica] += 1
        heapq.heappush(self._heap, (at, next(self._ties), replica, self._turn[replica]))

    def _event(self, now: float, _: int, replica: int, turn: int) -> None:
        if turn == -1:
            if np.isinf(self._free_s[replica]):
                self._nudged[replica] = True  # looks again once it is done
            else:
                self._look_at(replica, now + self._heard_s())
        elif turn == self._turn[replica]:
            self._free_s[replica] = np.inf
            self._look(now, replica)

    def _heard_s(self) -> float:
        return float(self.rng.uniform(0.0, HEAR_S) + self.rng.uniform(0.0, self.plan.jitter_s))

    def _look(self, now: float, replica: int) -> None:
        service_s = float(self.rng.choice(self.costs.lookup_s))
        if self.plan.cache_s == 0.0:
            self._ask(now, Request(replica, now, service_s))
        elif now < self._copy_s + self.plan.cache_s:
            self._seen(now, replica, self._copy_new)
        else:  # all who come while it asks wait for the one answer
            self._waiting.append(replica)
            if len(self._waiting) == 1:
                self._ask(now, Request(-1, now, service_s))

    def _ask(self, now: float, request: Request) -> None:
        self.asked += 1
        self.processes[request.replica % len(self.processes)].arrive(now, request)

    def _answer(self, now: float, began: float, request: Request) -> None:
        self.answered += 1
        took = now - request.sent
        if request.sent > self.moved_s:
            self._after = [max(self._after[0], took), self._after[1] + (took > GIVES_UP_S)]
        elif request.sent > self.counted_s and now <= self.moved_s:
            self._lookups.append((took, max(0.0, took - request.service_s)))
        if request.left:
            self._loaded(now, request.replica, request.left - 1)
        elif request.replica >= 0:
            self._seen(now, request.replica, began >= self.moved_s)
        else:
            self._copy_s, self._copy_new = now, began >= self.moved_s
            waiting, self._waiting = self._waiting, []
            for replica in waiting:
                self._seen(now, replica, self._copy_new)

    def _seen(self, now: float, replica: int, new: bool) -> None:
        """Have a replica go on from what a look told it."""
        if new and not self._new[replica]:
            self._new[replica] = True
            cached = self.plan.cache_s > 0.0 and self._filled
            self._filled = True
            self._loaded(now, replica, 0 if cached else self.costs.load_requests)
        else:
            self._done(now, replica)

    def _loaded(self, now: float, replica: int, left: int) -> None:
        if left:
            service_s = self.costs.load_s / self.costs.load_requests
            self._ask(now, Request(replica, now, service_s, left))
        else:
            self.serving_s[replica] = now + self.costs.own_s
            self._done(now + self.costs.own_s, replica)

    def _done(self, at: float, replica: int) -> None:
        self._free_s[replica] = at
        wait_s = self._heard_s() if self._nudged[replica] else self.plan.poll_s
        self._nudged[replica] = False
        self._look_at(replica, at + wait_s)
