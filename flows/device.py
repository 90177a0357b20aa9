"""Whoever trains on a CUDA device takes it under a limit that the whole Prefect server shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.settings import get_current_settings

from flows.work import Plan
from routellm.errors import UsageError
from routellm.routers.base import make_router
from routellm.routers.several_devices import devices_of
from routellm.settings import Settings

LIMIT = "routellm-gpu"


@contextmanager
def device(
    kind: str, plan: Plan, settings: Settings, *, server: bool | None = None
) -> Iterator[None]:
    """Hold the slots of the CUDA devices that a router is trained on; on a CPU, hold nothing.

    Without a Prefect server nobody else is there to share a device with. `server` says whether
    there is one; by default, whether Prefect's settings name one.

    Raises
    ------
    UsageError
        If the server has no such limit, or fewer slots than are asked for.
    """
    router = make_router(kind, plan.encoder, plan.pair, settings.training.options.get(kind))
    if server is None:
        server = bool(get_current_settings().api.url)
    devices = devices_of(router.options, kind) if server else 0
    if not devices:
        yield
        return
    if devices > settings.workers.gpus:
        raise UsageError(
            f"training.options.{kind}.devices is {devices}, and workers.gpus lets trainings hold "
            f"{settings.workers.gpus} at once: lower the one, or raise the other and run "
            "`routellm deploy`"
        )
    with lease(devices):
        yield


@contextmanager
def lease(devices: int = 1) -> Iterator[None]:
    """Hold some of the slots that the Prefect server has for CUDA devices.

    Raises
    ------
    UsageError
        If the server has no such limit.
    """
    try:
        # a server that is away for minutes shall not end a training of hours
        with concurrency(LIMIT, occupy=devices, strict=True, raise_on_lease_renewal_failure=False):
            yield
    except ConcurrencySlotAcquisitionError as error:
        raise UsageError(
            f"no CUDA device could be taken under the limit {LIMIT} of the Prefect server at "
            f"{get_current_settings().api.url}: run `routellm deploy`, which makes it"
        ) from error
