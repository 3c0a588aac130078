"""``truffula`` with a measured event loop: ``python watched_server.py FILE serve …``. For ``test_large_bodies_slow``.

FILE gets a line for each callback of the loop and each garbage collection that took long: its name and the seconds of
processor time that its thread used. Unlike a clock's seconds, they do not depend on what else the machine computes.
"""

import asyncio
import gc
import sys
import time
from pathlib import Path

from truffula.cli import main

LONG_S = 0.01


def watch(report):
    def note(what, began):
        took = time.thread_time() - began
        if took > LONG_S:
            report.write(f"{took:.3f} {str(what)[:200]}\n")

    run = asyncio.Handle._run

    def timed_run(handle):
        began = time.thread_time()
        run(handle)
        note(handle, began)

    collecting = [0.0]

    def timed_collection(phase, info):
        if phase == "start":
            collecting[0] = time.thread_time()
        else:
            note(f"collection of generation {info['generation']}", collecting[0])

    asyncio.Handle._run = timed_run
    gc.callbacks.append(timed_collection)


if __name__ == "__main__":
    with Path(sys.argv.pop(1)).open("a", buffering=1) as report:
        watch(report)
        main()
