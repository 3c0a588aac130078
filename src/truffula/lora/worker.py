"""``python -m truffula.lora.worker FD NICENESS SPOOL…``: where a loading worker starts; its work is in ``work.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    fd, nice, *spools = arguments
    # Before the imports: a third of a second of computing that must not slow anybody's tokens or the engine's start.
    os.nice(int(nice))
    from truffula.lora.work import serve

    return serve(int(fd), [Path(spool) for spool in spools])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
