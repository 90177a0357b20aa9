"""What of a run is done side by side, and where: Prefect's task runner that `workers.runner` names.

A task gets what is small and can be pickled, and finds the rest in the home, or in the storage.
"""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import ExitStack, nullcontext
from typing import Any
from urllib.parse import urlsplit

from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from routellm.errors import RouteLLMError, UsageError
from routellm.settings import Settings

CONNECT_S = 5.0  # in which a cluster has to answer at all; Ray itself would wait for minutes
_OBJECTS_BYTES = 1 << 27  # of memory for what travels between a run and its workers


class Workers:
    """Threads of this process, or a Ray cluster; neither is started before the first task.

    Attributes
    ----------
    alone : bool
        Whether there are none: everything is done one after the other, by who asks for it.

    Raises
    ------
    UsageError
        If the cluster that `workers.ray_address` names cannot do a run's work.
    RouteLLMError
        If it cannot be reached.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.how = settings.workers
        self.on_ray = self.how.runner == "ray"
        self.alone = not self.on_ray and self.how.at_once in (None, 1)
        self._stack = ExitStack()
        self._runner: TaskRunner[Any] | None = None
        if self.on_ray:
            _ray_runner()
            if self.how.ray_address:
                host, port = _host_and_port(self.how.ray_address)
                self._refuse_strangers({host})
                self._knock(host, port)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._runner = None

    def submit(self, task: Any, *, on_gpu: bool = False, **parameters: Any) -> PrefectFuture[Any]:
        """Start a task, on a GPU if that is asked for and the Ray cluster has one.

        Not to be called in a task: what that one was given would travel along.

        Raises
        ------
        UsageError, RouteLLMError
            If the Ray cluster cannot be reached, or cannot do a run's work.
        """
        runner = self._started()
        if not self.on_ray:
            return runner.submit(task, parameters)
        from prefect_ray.context import remote_options

        device = remote_options(num_gpus=1) if on_gpu and self.has_gpu() else nullcontext()
        # who has no server of its own tells its workers of the temporary one
        with temporary_settings({PREFECT_API_URL: self._server()}), device:
            try:
                return runner.submit(task, parameters)
            except TypeError:  # its message would hold all of it, prompts too
                raise RouteLLMError(f"what {task.name} needs cannot be sent to Ray") from None

    def has_gpu(self) -> bool:
        """Say whether the Ray cluster has a GPU; threads take what torch finds."""
        self._started()
        import ray

        return bool(ray.cluster_resources().get("GPU"))

    def _started(self) -> TaskRunner[Any]:
        if self._runner is None:
            if self.on_ray:
                self._runner = self._start_ray()
            else:
                threads: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=self.how.at_once)
                self._runner = self._stack.enter_context(threads)
        return self._runner

    def _start_ray(self) -> TaskRunner[Any]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = self.how.ray_address
        how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            # it listens on all of the machine's addresses: who has not its token is not heard
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            how |= {
                "num_cpus": self.how.at_once,
                "include_dashboard": False,
                "object_store_memory": _OBJECTS_BYTES,
            }
        import ray

        try:
            # "local" is one of its own, whatever else runs on this machine
            runner = self._stack.enter_context(_ray_runner()(address or "local", how))
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            if address:
                raise self._unreachable(error) from error
            why = str(error).strip().split("\n")[0].rstrip(".")
            raise RouteLLMError(f"no Ray cluster could be started here: {why}") from error
        self._refuse_strangers({n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]})
        return runner

    def _knock(self, host: str, port: int) -> None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_S).close()
        except OSError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> RouteLLMError:
        why = str(error).strip().split("\n")[0].rstrip(".")
        return RouteLLMError(
            f"the Ray cluster at {self.how.ray_address} (`workers.ray_address`) cannot be reached "
            f"({why}): see that it runs, with this machine's versions of Python and Ray, and its "
            "RAY_AUTH_TOKEN"
        )

    def _refuse_strangers(self, hosts: set[str]) -> None:
        """Make sure that workers on other machines would find data, and Prefect's server."""
        others = sorted(hosts - _own_addresses())
        if not others:
            return
        if self.settings.storage is None:
            raise UsageError(
                f"the Ray cluster at {self.how.ray_address} works on other machines ({others[0]}), "
                "which cannot read this home: set `storage` to what all of them reach, "
                "s3://bucket/prefix or file:///folder, or leave `workers.ray_address` unset"
            )
        if not get_current_settings().api.url:
            raise UsageError(
                f"the Ray cluster at {self.how.ray_address} works on other machines ({others[0]}), "
                "which have no Prefect server to tell how they are doing: set PREFECT_API_URL to "
                "one that all of them reach"
            )

    def _server(self) -> str:
        with get_client(sync_client=True) as client:
            return str(client.api_url)


def _ray_runner() -> Any:
    try:
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise UsageError(
            "`workers.runner` is ray, which needs prefect-ray: pip install 'routellm-mlops[ray]', "
            "or set it to threads"
        ) from error
    return RayTaskRunner


def _host_and_port(address: str) -> tuple[str, int]:
    """Return those of ``ray://host:port`` or ``host:port``."""
    url = urlsplit(address if "//" in address else f"//{address}")
    try:
        if url.scheme in ("", "ray") and url.hostname and url.port:
            return url.hostname, url.port
    except ValueError:  # a port that is no number
        pass
    raise UsageError(
        f"`workers.ray_address` is {address!r}, which is not where a cluster is: set it to "
        "host:6379, or to ray://host:10001"
    )


def _own_addresses() -> set[str]:
    import psutil

    found = {one.address for many in psutil.net_if_addrs().values() for one in many}
    return {"localhost", socket.gethostname(), *found}
