"""Whether a version works where it will be used: loaded from the registry in a clean process.

``python -m registry.smoke models:/router@champion`` loads the model as anybody would
(``mlflow.pyfunc.load_model``), asks it for its golden predictions, times one query, and prints one
line of JSON. `smoke` runs that in a fresh interpreter and reads the line.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from registry.calls import redacted
from routellm.errors import RouteLLMError
from routellm.settings import Settings

TIMEOUT_S = 300.0  # a process loads libraries and an encoder in about ten seconds
TIMED = 15  # queries; the median is taken


@dataclass(frozen=True)
class Smoke:
    """What came of loading and asking a version.

    Attributes
    ----------
    ok : bool
    why : str or None
        Why not, in one line.
    worst : float or None
        Largest difference of a golden prediction to the one that was logged.
    latency_ms : float or None
        Median time of one query, encoder included, nothing cached.
    """

    ok: bool
    why: str | None = None
    worst: float | None = None
    latency_ms: float | None = None


def smoke(settings: Settings, uri: str, *, timeout_s: float = TIMEOUT_S) -> Smoke:
    """Load `uri` (such as ``models:/router/3``) in a fresh process and ask it."""
    tracking = settings.resolved_tracking_uri
    with tempfile.TemporaryDirectory() as downloads:  # else every smoke leaves a copy behind
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": tracking,
            "MLFLOW_REGISTRY_URI": tracking,
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "TMPDIR": downloads,
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", "registry.smoke", uri],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return Smoke(False, f"it did not load and answer within {timeout_s:g} s")
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    try:
        return Smoke(**json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        return Smoke(
            False,
            f"the process that loads it ended with status {done.returncode} and no answer: run "
            f"`python -m registry.smoke {uri}` to see why",
        )


def failure(settings: Settings) -> Callable[[str], str | None]:
    """Return a check of a model URI that says why it fails, or None."""

    def check(uri: str) -> str | None:
        found = smoke(settings, uri)
        return None if found.ok else found.why

    return check


def _loaded(uri: str) -> Any:
    import mlflow

    return mlflow.pyfunc.load_model(uri)


def _asked(model: Any) -> Smoke:
    import numpy as np
    import pandas as pd

    bundle = model.unwrap_python_model().bundle
    if not bundle.golden:
        return Smoke(False, "it carries no golden predictions to be held to")
    prompts = [prompt for prompt, _ in bundle.golden]
    logged = np.array([rate for _, rate in bundle.golden])
    now = model.predict(pd.DataFrame({"prompt": prompts}))["win_rate"].to_numpy()
    worst = float(np.abs(now - logged).max())
    latency_ms = _latency_ms(bundle.router, prompts)
    if not worst <= bundle.router.golden_tolerance:  # a NaN fails too
        why = f"its golden predictions come out {worst:.4f} off from what was logged"
        return Smoke(False, why, worst if np.isfinite(worst) else None, latency_ms)
    return Smoke(True, None, worst, latency_ms)


def _latency_ms(router: Any, prompts: Sequence[str]) -> float:
    taken = []
    for i in range(TIMED):
        started = time.perf_counter()
        router.win_rate([prompts[i % len(prompts)]])
        taken.append(time.perf_counter() - started)
    return statistics.median(taken) * 1000.0


def _line(error: Exception) -> str:
    """Return an error in one line, without passwords and the signatures of addresses."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"(\w+://[^\s?]+)\?\S+", r"\1?***", redacted(first))[:300]


def main(uri: str) -> Smoke:
    """Load and ask a model in this very process."""
    with contextlib.redirect_stdout(sys.stderr):  # the answer is all that stdout gets
        try:
            model = _loaded(uri)
        except Exception as error:
            return Smoke(False, f"it does not load: {_line(error)}")
        try:
            return _asked(model)
        except RouteLLMError as error:
            return Smoke(False, f"it does not answer: {_line(error)}")
        except Exception as error:  # its message may quote a prompt
            return Smoke(False, f"it does not answer: {type(error).__name__}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m registry.smoke models:/NAME/VERSION")
    found = main(sys.argv[1])
    print(json.dumps(asdict(found)))  # noqa: T201
    sys.exit(0 if found.ok else 1)
