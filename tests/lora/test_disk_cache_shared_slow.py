"""Several processes share one disk cache, evict from it, damage it and are killed: what is read is always whole."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from truffula.lora.disk_cache import DiskCache

WORK = """
import fcntl, os, random, sys, time
from pathlib import Path
from truffula.lora.disk_cache import DiskCache, Stamp, content_id
folder, seed, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng, cache, read = random.Random(seed), DiskCache(folder, limit), 0
end = time.monotonic() + float(sys.argv[4])
while time.monotonic() < end:
    key = str(rng.randrange(30))
    known = cache.find(key)
    body = (key * 3000).encode()
    if known is not None:
        with cache.open(known.entry) as found:
            if found is not None:
                assert (found / "a").read_bytes() == body, key
                time.sleep(rng.random() / 500)
                assert content_id(found) == known.entry
                read += 1
        if found is not None:
            if rng.random() < 0.02:  # while no process reads it
                try:
                    fd = os.open(found, os.O_RDONLY)
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    (found / "b").write_bytes(b"damage")
                except OSError:
                    pass
                else:
                    os.close(fd)
            continue
    with cache.scratch() as scratch:
        (scratch.folder / "a").write_bytes(body)
        (scratch.folder / "b").write_bytes(b"x" * rng.randrange(3))
        entry, where = cache.store(key, {"a": Stamp(key)}, "", scratch)
        assert (where / "a").read_bytes() == body
print(read)
"""


@pytest.mark.slow
def test_what_several_processes_read_is_whole(tmp_path: Path) -> None:
    limit = 60_000
    command = [sys.executable, "-c", WORK, str(tmp_path)]
    running = [
        subprocess.Popen(
            [*command, str(seed), str(limit), "4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for seed in range(4)
    ]
    rng = random.Random(0)
    for seed in range(3):
        victim = subprocess.Popen([*command, str(10 + seed), str(limit), "60"], stderr=subprocess.DEVNULL)
        time.sleep(0.5 + rng.random() / 2)
        victim.kill()
        victim.wait()
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert int(out) > 0
    cache = DiskCache(tmp_path, limit)
    with cache.scratch():
        pass
    assert list((tmp_path / "scratch").iterdir()) == []
    assert cache.nbytes() <= limit + 4 * 6000  # those that were being read stayed
