"""A gateway's writer alone in a process: says which records it has queued, and when.

On SIGTERM it stops its writer and says how many records were written, as the gateway does.
"""

from __future__ import annotations

import itertools
import signal
import sys
import time

from routellm.feedback.store import FeedbackStore
from routellm.feedback.writer import Writer
from tests.feedback.records import decided, judged


def main(url: str, who: str) -> None:
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    writer = Writer(FeedbackStore(url), redact=str.upper)
    writer.start()
    for i in itertools.count():
        if told:
            break
        name = f"{who}-{i}"
        if writer.put(decided(name)) and writer.put(judged(f"j-{name}", of=name)):
            sys.stdout.write(f"{name} {time.time()}\n")
            sys.stdout.flush()
        time.sleep(0.001)
    writer.stop()
    sys.stdout.write(f"written {writer.written} dropped {writer.dropped}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
