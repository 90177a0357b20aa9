"""A gateway as a process of its own, served as `routellm serve` does.

``python -m tests.support.gateway_process HOME [JSON]``: routers in memory behind demo upstreams;
JSON adds to its settings. Prints its address, then serves until it is told to stop or killed.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY

SECRET = "sk-planted-upstream-secret"


@contextmanager
def gateway_process(home: Path, **settings: Any) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a gateway; yields its address and its process, whose stderr goes to HOME/stderr."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(home), json.dumps(settings)],
            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, (home / "stderr").read_text()
        yield url, process
    finally:
        process.kill()
        process.wait()


def main(home: Path, settings: dict[str, Any]) -> None:
    import uvicorn

    from routellm.gateway.demo import demo_upstream
    from routellm.gateway.logs import write_logs
    from routellm.gateway.server import app_of, config_of, running
    from routellm.settings import GatewaySettings, Settings
    from tests.gateway.test_gateway import Versions, bundle

    with running(demo_upstream()) as up, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        one = {"base_url": f"{up}/v1", "api_key": SECRET}
        both = {"strong": {**one, "model": "big"}, "weak": {**one, "model": "small"}}
        gateway = GatewaySettings.model_validate({**both, "poll_s": 0.1, **settings})
        write_logs(gateway.log_format)
        app = app_of(Settings(home=home, gateway=gateway), Versions(v1=bundle(1)), None)

        class Server(uvicorn.Server):
            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets)
                sys.stdout.write(f"http://127.0.0.1:{listener.getsockname()[1]}\n")
                sys.stdout.flush()

        Server(config_of(app, gateway)).run(sockets=[listener])


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
