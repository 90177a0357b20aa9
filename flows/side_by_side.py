"""What of a retraining is done side by side: shards of prompts, router kinds, and trials.

It is done ahead: workers leave what they made where the run that asked looks for it before it makes
anything itself, in the home or in the storage (the cache of embeddings, ``trained/<key>``). So the
run goes on as if it had been done before, one router after the other, in the same order.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.settings import get_current_settings

from flows.device import device
from flows.dispatch import made_of, refuse_other_work
from flows.runner import Workers
from flows.steps import Step, step
from flows.trained import Trained, evaluate_router, train_router
from flows.trials import Trial, seeded, variants
from flows.work import Plan, plan_again, training_key
from flows.worker import reason
from routellm.embeddings import Encoder, Progress
from routellm.embeddings.cache import WRITE_EVERY, CachedEncoder
from routellm.errors import RouteLLMError, TrainingError
from routellm.settings import Settings

_PLANS: dict[str, Plan] = {}  # the one that this process works for


@dataclass(frozen=True)
class Recipe:
    """What it takes to make a run's plan again in another process: small, and nothing open in it.

    Attributes
    ----------
    id : str
        The run's own.
    asked : Settings
        Those of the run.
    server : bool
        Whether the run has a Prefect server that others use too.
    """

    id: str
    snapshot: str
    simulated: bool
    sources: tuple[str, ...]
    asked: Settings
    server: bool

    @classmethod
    def of(cls, plan: Plan, sources: Sequence[str], settings: Settings) -> Recipe:
        update: dict[str, Any] = {"home": settings.home.resolve()}  # workers start elsewhere
        benchmarks, model = settings.evaluation.benchmarks, settings.embedding.model
        if benchmarks and benchmarks != "routellm":
            there = {"benchmarks": str(Path(benchmarks).resolve())}
            update["evaluation"] = settings.evaluation.model_copy(update=there)
        if Path(model).is_dir():
            there = {"model": str(Path(model).resolve())}
            update["embedding"] = settings.embedding.model_copy(update=there)
        return cls(
            uuid.uuid4().hex,
            plan.manifest.digest,
            plan.manifest.simulated,
            tuple(str(Path(s).resolve()) if Path(s).exists() else s for s in sources),
            settings.model_copy(update=update),
            bool(get_current_settings().api.url),
        )

    @property
    def settings(self) -> Settings:
        """The run's settings; with a storage, a machine of Ray's may say where its home is."""
        home = os.environ.get("ROUTELLM_HOME")
        if not home or not self.asked.storage or self.asked.workers.runner != "ray":
            return self.asked
        return self.asked.model_copy(update={"home": Path(home).resolve()})

    def plan(self) -> Plan:
        """Return the run's plan, made once in a process."""
        if self.id not in _PLANS:
            plan = plan_again(
                self.snapshot,
                simulated=self.simulated,
                sources=self.sources,
                settings=self.settings,
            )
            _PLANS.clear()
            _PLANS[self.id] = plan
        return _PLANS[self.id]

    def node(self) -> str:
        """Return which node of a Ray cluster this is; "" in a thread."""
        if self.asked.workers.runner != "ray":
            return ""
        import ray

        return str(ray.get_runtime_context().get_node_id())


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="embed-{number}")
def embed(number: int, prompts: Sequence[str], recipe: Recipe) -> str:
    recipe.plan().encoder.encode(prompts)
    return recipe.node()


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="train-{wanted.label}")
def make(wanted: Trial, made_of: dict[str, str], recipe: Recipe, with_speed: bool) -> str:
    settings = seeded(recipe.settings, wanted.seed)
    plan = variants(recipe.plan(), settings, [wanted])[wanted.augmentation]
    if isinstance(plan, str):
        raise TrainingError(plan)
    refuse_other_work(made_of, wanted.kind, plan, settings)
    with (
        step(f"train {wanted.label}") as line,
        device(wanted.kind, plan, settings, server=recipe.server),
    ):
        trained = train_router(wanted.kind, plan, settings, line.advance)
        line.result = f"key {trained.key[:12]}"
    evaluate_router(trained, plan, settings, with_speed=with_speed)
    return recipe.node()


class SideBySide:
    """A run's workers, and what they work on. Without workers, nothing is done ahead.

    Attributes
    ----------
    embedded : str
        What of the prompts workers encoded, in words.
    """

    def __init__(
        self, workers: Workers, plan: Plan, sources: Sequence[str], settings: Settings
    ) -> None:
        self.workers, self.plan, self.settings = workers, plan, settings
        self.embedded = ""
        self.recipe = Recipe.of(plan, sources, settings)
        if not workers.on_ray:
            _PLANS.clear()
            _PLANS[self.recipe.id] = plan

    @property
    def encoder(self) -> Encoder:
        """The plan's encoder, before which workers encode what nobody has encoded yet."""
        return self.plan.encoder if self.workers.alone else _SpreadEncoder(self)

    def embed(self, prompts: Sequence[str], progress: Progress | None = None) -> None:
        """Have prompts encoded, each shard as this process would encode it at once.

        So the vectors are the same, bit by bit, wherever the processors are.

        Raises
        ------
        RouteLLMError
            The first that a worker ended with.
        """
        running = [
            self.workers.submit(
                embed,
                number=start // WRITE_EVERY,
                prompts=tuple(prompts[start : start + WRITE_EVERY]),
                recipe=self.recipe,
            )
            for start in range(0, len(prompts), WRITE_EVERY)
        ]
        nodes = set()
        for number, one in enumerate(running):
            if error := _error(one):
                raise error
            nodes.add(one.result())
            if progress:
                progress(min((number + 1) * WRITE_EVERY, len(prompts)), len(prompts))
        self.embedded = f"{len(prompts):,} prompts embedded by {self._who(nodes)}"

    def make(self, wanted: Sequence[Trial], *, with_speed: bool = True) -> dict[Trial, Exception]:
        """Have routers trained and measured ahead; returns what came in the way, by router."""
        if self.workers.alone or not wanted:
            return {}
        with step("train") as line:
            failed, nodes = self._make(wanted, with_speed, line)
            made = len(wanted) - len(failed)
            line.result = f"{made} of {len(wanted)} routers by {self._who(nodes)}"
        return failed

    def _make(
        self, wanted: Sequence[Trial], with_speed: bool, line: Step
    ) -> tuple[dict[Trial, Exception], set[str]]:
        gpu_kinds = self.settings.workers.gpu_kinds
        if self.workers.on_ray and not self.workers.has_gpu():
            asking = dict.fromkeys(one.kind for one in wanted if one.kind in gpu_kinds)
            if asking:
                line.note(f"{', '.join(asking)} trained without a GPU: the Ray cluster has none")
        running = {}
        for one in wanted:
            plan, settings = self._as(one)
            running[one] = self.workers.submit(
                make,
                on_gpu=one.kind in gpu_kinds,
                wanted=one,
                made_of=made_of(one.kind, plan, settings),
                recipe=self.recipe,
                with_speed=with_speed,
            )
        failed, nodes = {}, set()
        for done, (one, future) in enumerate(running.items()):
            if error := _error(future) or self._missing(one):
                failed[one] = error
                line.note(f"{one.label} was not trained: {error}")
            else:
                nodes.add(future.result())
            line.advance(done + 1, len(running))
        return failed, nodes

    def _who(self, nodes: set[str]) -> str:
        how = self.settings.workers
        if not self.workers.on_ray:
            return f"{how.at_once} threads"
        where = f" of the cluster at {how.ray_address}" if how.ray_address else ""
        return f"{len(nodes)} Ray node{'s'[: len(nodes) != 1]}{where}"

    def _as(self, one: Trial) -> tuple[Plan, Settings]:
        plan = replace(self.plan, augmentation=one.augmentation)
        return plan, seeded(self.settings, one.seed)

    def _missing(self, one: Trial) -> Exception | None:
        trained = Trained.of(one.kind, training_key(one.kind, *self._as(one)), self.settings)
        try:
            trained.fetch(self.settings)
        except RouteLLMError as error:
            return error
        if trained.figures.exists():
            return None
        return RouteLLMError(
            f"a worker made it and left nothing in {trained.folder}: all machines must share "
            "`home`, or `storage`"
        )


class _SpreadEncoder:
    def __init__(self, ahead: SideBySide) -> None:
        self.ahead = ahead
        self.cached = cast(CachedEncoder, ahead.plan.encoder)

    @property
    def identity(self) -> str:
        return self.cached.identity

    @property
    def dimensions(self) -> int:
        return self.cached.dimensions

    def encode(
        self, prompts: Sequence[str], *, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        missing = self.cached.missing(prompts)
        if len(missing) > WRITE_EVERY:  # there is something to share out
            self.ahead.embed(missing, progress)
        return self.cached.encode(prompts, progress=progress)


def _error(future: PrefectFuture[Any]) -> Exception | None:
    """Wait for a task, and return what it ended with; None if it ended well."""
    future.wait()
    state = future.state
    if state.is_completed():
        return None
    error = state.result(raise_on_failure=False)
    if state.is_failed() and isinstance(error, Exception):
        return error
    return RouteLLMError(f"a worker was lost: {reason(state).rstrip('.')}")
