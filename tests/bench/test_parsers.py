"""What other programs and the kernel say, read."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from comparison.memory import resident
from comparison.peers import parse_llama_bench, parse_llama_log, written_bytes
from truffula.errors import ConfigError
from truffula.metrics import Metrics
from truffula.types import EngineStats

TEST = {
    "model_filename": "m.gguf", "model_size": 143025408, "n_threads": 2, "n_prompt": 0, "n_gen": 64,
    "avg_ts": 110.0, "samples_ts": [100.5, 119.5],
}  # fmt: skip
LOG = """
0.01 I load_tensors:   CPU_Mapped model buffer size =   136.40 MiB
0.01 I load_tensors:   CPU_REPACK model buffer size =    60.50 MiB
0.01 I llama_context:        CPU  output buffer size =     0.19 MiB
0.01 I llama_kv_cache:        CPU KV buffer size =    45.00 MiB
0.01 I sched_reserve:        CPU compute buffer size =    16.64 MiB
"""


def test_llama_bench_json() -> None:
    found = parse_llama_bench(json.dumps([TEST]))
    assert found == {"tok_s": [100.5, 119.5], "weight_bytes": 143025408, "threads": 2, "tokens": 64}


@pytest.mark.parametrize("text", ["", "[]", json.dumps([TEST, TEST]), '[{"samples_ts": [1]}]', "error: no model"])
def test_llama_bench_that_says_something_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="llama-bench did not answer"):
        parse_llama_bench(text)


def test_llama_log_counts_repacked_weights_and_not_mapped_ones() -> None:
    assert parse_llama_log(LOG) == (int(60.5 * 2**20), 45 * 2**20)


def test_llama_log_without_buffers_is_refused() -> None:
    with pytest.raises(ConfigError, match="-lv 4"):
        parse_llama_log("main: server is listening")


def test_kv_blocks_of_our_metrics() -> None:
    """As the server writes them; what is free was perhaps never written."""
    stats = EngineStats(monotonic=1.0, kv_used_bytes=3, kv_cached_bytes=40, free_blocks=5, num_blocks=49)
    assert written_bytes(Metrics(lambda: stats).text().decode()) == 43


def test_metrics_without_kv_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="KV blocks"):
        written_bytes("truffula_kv_used_bytes 3.0\n")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what processes hold in /proc")
def test_a_child_that_has_ended_holds_no_memory(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.read() == b""  # closed at its end; it is not waited for yet
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert resident(os.getpid(), tmp_path).pss > 0


def test_memory_of_this_process_grows_by_what_it_touches(tmp_path: Path) -> None:
    model = tmp_path / "my model"
    model.mkdir()
    before = resident(os.getpid(), model)
    held = bytearray(os.urandom(1 << 16) * (1 << 9))  # 32 MiB
    (model / "weights").write_bytes(held)
    with (model / "weights").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == held
        after = resident(os.getpid(), model)
    assert after.anonymous - before.anonymous == pytest.approx(len(held), rel=0.25)
    assert after.pss - before.pss == pytest.approx(2 * len(held), rel=0.25)
    assert (before.model_file, after.model_file) == (0, pytest.approx(len(held), rel=0.05))
