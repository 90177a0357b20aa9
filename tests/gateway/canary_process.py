"""A gateway as a process of its own: ``python -m tests.gateway.canary_process HOME MODE``.

A champion and a challenger in memory, demo upstreams; prints its address, then serves until it is
told to stop or killed.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from routellm.gateway.app import create_app
from routellm.gateway.demo import demo_upstream
from routellm.gateway.server import running
from routellm.settings import GatewaySettings, Upstream
from tests.gateway.test_gateway import Versions, bundle

if __name__ == "__main__":
    home, mode = Path(sys.argv[1]), sys.argv[2]
    both = {"v1": bundle(1), "v2": bundle(2)}
    with running(demo_upstream()) as up:
        settings = GatewaySettings(
            strong=Upstream(base_url=f"{up}/v1", model="big"),
            weak=Upstream(base_url=f"{up}/v1", model="small"),
            challenger=mode,
            canary_fraction=0.5,
            poll_s=0.1,
        )
        challenger = Versions(**both)
        challenger.alias = "2"
        app = create_app(settings, Versions(**both), home=home, challenger=challenger)
        with running(app) as url:
            sys.stdout.write(f"{url}\n")
            sys.stdout.flush()
            stop = threading.Event()
            threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
            stop.wait()
