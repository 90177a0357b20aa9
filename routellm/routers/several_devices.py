"""One training on several GPUs of a machine: a process for each, and each step's rows shared out.

Data parallel. Every process holds the whole model and computes the gradient of its own part of a
step; all of them step by the sum, so that their weights stay the same. Validations and checkpoints
are the first process's. ``accelerate`` puts each process on its GPU and lets them find each other
(NCCL between GPUs, Gloo without). A kind needs to know nothing of it: its `fit` is the same in
every process, and the loop in `routellm.routers.finetune` shares the rows out.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from routellm.embeddings.base import Progress
from routellm.errors import RouteLLMError, TrainingError
from routellm.model_folder import read_model, write_model
from routellm.routers.base import FitReport, Router, TrainingBattles, make_router
from routellm.routers.device import trains_on_cuda

log = logging.getLogger(__name__)

_DOCUMENT = "trained.json"
_PATIENCE = timedelta(hours=2)  # of the others, while the first validates or writes
_LOOK_S = 0.2


# --- within a step -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The processes of a training.

    Attributes
    ----------
    rank, size : int
        Which one this is, from 0, and how many there are.
    device : torch.device
        What it computes on.
    """

    rank: int
    size: int
    device: Any

    @classmethod
    def here(cls) -> Group | None:
        """Return the group that this process is in; None where it trains alone."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return None
        from accelerate import PartialState

        return cls(dist.get_rank(), dist.get_world_size(), PartialState().device)

    def add(self, parameters: Mapping[str, Any], value: float) -> float:
        """Add up the gradients of all processes in each, and return the sum of `value`."""
        import torch
        import torch.distributed as dist

        for parameter in parameters.values():
            if parameter.grad is not None:  # in one process as in all: the model is the same
                dist.all_reduce(parameter.grad)
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def from_first(self, value: Callable[[], float]) -> float:
        """Return what the first process finds; the others wait for it."""
        import torch
        import torch.distributed as dist

        found = torch.tensor(
            value() if self.rank == 0 else 0.0, dtype=torch.float64, device=self.device
        )
        dist.broadcast(found, 0)
        return float(found)


# --- around a training ---------------------------------------------------------------------------


def devices_of(options: Any, kind: str) -> int:
    """Return how many GPUs of this machine a training with these options takes; 0 on a CPU.

    As many as its option ``devices`` says, or as there are; a device that is named by its number
    is taken alone.
    """
    if not trains_on_cuda(options, kind):
        return 0
    import torch

    wanted: int = getattr(options, "devices", 1)
    if ":" in options.device:
        return 1
    found = torch.cuda.device_count()
    if wanted > found:
        log.warning(
            "training.options.%s.devices is %d, and this machine has %d: these are taken",
            kind, wanted, found,
        )  # fmt: skip
    return min(wanted, found)


def fit(
    router: Router,
    battles: TrainingBattles,
    *,
    rng: np.random.Generator,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    processes: int | None = None,
) -> FitReport:
    """Do as ``router.fit``, on as many GPUs of this machine as its options say.

    Parameters
    ----------
    processes : int, optional
        So many, whatever the options say; without a GPU they share the processors.
    """
    n = devices_of(router.options, router.kind) if processes is None else processes
    if n <= 1:
        return router.fit(battles, rng=rng, progress=progress, checkpoint=checkpoint)
    from torch import multiprocessing as mp
    from torch.multiprocessing.spawn import ProcessException, spawn

    with tempfile.TemporaryDirectory(prefix="routellm-training-") as folder:
        told: Any = mp.get_context("spawn").SimpleQueue()
        job = _Job(
            kind=router.kind,
            options=router.options.model_dump(mode="json"),
            battles=battles,
            rng=rng,
            checkpoint=checkpoint,
            folder=Path(folder),
            processes=n,
            port=_free_port(),
            cuda=trains_on_cuda(router.options, router.kind),
        )
        try:
            running: Any = spawn(  # type: ignore[no-untyped-call]
                _part, (job, told), nprocs=n, join=False, daemon=True
            )
            try:
                while not running.join(timeout=_LOOK_S):
                    _tell(told, progress)
                _tell(told, progress)
            finally:
                for process in running.processes:
                    if process.is_alive():
                        process.kill()
        except ProcessException as error:
            said = Path(folder) / "error"
            if said.exists():
                raise TrainingError(said.read_text()) from error
            raise TrainingError(
                f"{router.kind} was trained by {n} processes, and one of them ended: {error}"
            ) from error
        arrays, doc = read_model(Path(folder) / "trained", _DOCUMENT, again="train it again")
    router.options = router.Options(**doc["options"])  # a kind may note there what it found
    router.load_state(arrays, doc["state"])
    return FitReport(**doc["report"])


@dataclass(frozen=True)
class _Job:
    kind: str
    options: dict[str, Any]
    battles: TrainingBattles
    rng: np.random.Generator
    checkpoint: Path | None
    folder: Path
    processes: int
    port: int
    cuda: bool


def _part(rank: int, job: _Job, told: Any) -> None:
    """Train as one of the processes; the first one leaves what was learnt in the folder."""
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    _end_with_parent()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.processes),
        "LOCAL_WORLD_SIZE": str(job.processes),
    }  # fmt: skip
    threads = max(1, (os.cpu_count() or 1) // job.processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)
    PartialState(cpu=not job.cuda, timeout=_PATIENCE)
    try:
        # these kinds read texts, and no vectors of an encoder
        router = make_router(job.kind, None, job.battles.pair, job.options)  # type: ignore[arg-type]
        report = router.fit(
            job.battles,
            rng=job.rng,
            progress=(lambda *at: told.put(at)) if rank == 0 else None,
            checkpoint=job.checkpoint,
        )
        if rank == 0:
            arrays, state = router.state()
            document = {
                "options": router.options.model_dump(mode="json"),
                "state": state,
                "report": asdict(report),
            }
            write_model(job.folder / "trained", arrays, document, _DOCUMENT)
    except RouteLLMError as error:
        (job.folder / "error").write_text(str(error))
        raise
    dist.destroy_process_group()


def _tell(told: Any, progress: Progress | None) -> None:
    while not told.empty():
        at = told.get()
        if progress:
            progress(*at)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however it went."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
