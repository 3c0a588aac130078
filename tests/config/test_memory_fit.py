"""How the memory limit is found and divided, before anything is loaded."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truffula.config import EngineConfig
from truffula.engine.build import find_settings
from truffula.engine.kv_layout import KvLayout
from truffula.engine.memory import memory_limit, plan_memory
from truffula.errors import InsufficientMemory
from truffula.kernels.backend import MemoryLimit, MemoryPlan
from truffula.kernels.host import free_memory, usable_cpus
from truffula.kernels.inputs import Capacity
from truffula.kernels.reference import ReferenceBackend
from truffula.kernels.select import select_backend
from truffula.model.load import plan_model
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint

GIB = 2**30
PLAN = MemoryPlan(weight_bytes=2 * GIB, arena_bytes=2**26, logits_bytes=2**24, kv_block_bytes=(2**20,))
LAYOUT = KvLayout(16, 512, (None,), PLAN.kv_block_bytes)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**34), st.integers(1, 40_000), st.none() | st.integers(1, 40_000), st.integers(1, 64),
    st.sampled_from([1, 4, 16]), st.sampled_from([(None,), (None, 100), (500, 20), (4096,)]),
)  # fmt: skip
def test_what_fits_keeps_every_bound_or_is_refused(
    limit: int, model_len: int, asked, running: int, block_size, windows
):
    plan = replace(PLAN, kv_block_bytes=tuple(2 ** (20 - g) for g in range(len(windows))))
    layout = KvLayout(block_size, 64, windows, plan.kv_block_bytes)
    try:
        got = plan_memory(
            plan, MemoryLimit(limit, "x"), layout, model_len=model_len, asked_len=asked, max_running=running
        )
    except InsufficientMemory as error:
        assert error.data["needed_bytes"] > limit
        return
    usable = got.num_blocks - 1
    assert got.fixed_bytes == plan.fixed_bytes and got.fixed_bytes + got.pool_bytes == limit
    peaks = layout.peak_blocks(got.max_model_len)
    assert layout.nbytes(peaks) <= got.pool_bytes and max(peaks) <= usable, "one sequence of the stated length fits"
    assert usable * block_size <= running * (got.max_model_len + block_size), "no more than can be used"
    assert got.max_model_len <= got.kv_tokens <= running * got.max_model_len
    if windows == (None,):
        assert plan.kv_block_bytes[0] * usable <= got.pool_bytes
        assert got.kv_tokens <= usable * block_size < got.kv_tokens + (running + 1) * block_size
    assert got.max_model_len == asked or (asked is None and got.max_model_len <= model_len)
    assert bool(got.warnings) == (got.max_model_len < (asked or model_len))


def test_the_refusal_names_every_number_and_a_way_out():
    with pytest.raises(InsufficientMemory) as caught:
        plan_memory(
            PLAN, MemoryLimit(2 * GIB + 2**27, "--memory"), LAYOUT, model_len=8192, asked_len=4096, max_running=8
        )
    text = str(caught.value)
    for words in ("2 GiB", "64 MiB", "16 MiB", "4096 tokens", "256 MiB", "--memory", "--max-model-len"):
        assert words in text
    longest = caught.value.data["longest_that_fits"]
    limit = MemoryLimit(2 * GIB + 2**27, "--memory")
    assert plan_memory(PLAN, limit, LAYOUT, model_len=8192, asked_len=longest, max_running=8).warnings == ()


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(InsufficientMemory, match="Weights 2 GiB"):
        plan_memory(PLAN, MemoryLimit(GIB, "--memory"), LAYOUT, model_len=8192, asked_len=None, max_running=8)


def machine(root: Path, *, free_kib: int, groups: str = "0::/\n") -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:  99999999 kB\nMemAvailable: {free_kib} kB\nHugePages_Total: 0\n")
    (root / "proc/self/cgroup").write_text(groups)
    (root / "sys/fs/cgroup").mkdir(parents=True)
    return root


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_without_a_group_the_machine_counts(tmp_path: Path):
    assert free_memory(machine(tmp_path, free_kib=1000)).nbytes == 1000 * 1024


def test_a_group_of_version_2_counts_where_it_is_tighter_its_parents_too(tmp_path: Path):
    root = machine(tmp_path, free_kib=8 * 2**20, groups="0::/outer/inner\n")
    put(root / "sys/fs/cgroup/outer/inner", memory__max="max\n", memory__current="5\n")
    put(
        root / "sys/fs/cgroup/outer", memory__max=str(4 * GIB), memory__current=str(3 * GIB),
        memory__stat=f"anon 7\ninactive_file {GIB}\nactive_file {GIB // 2}\n",
    )  # fmt: skip
    assert free_memory(root).nbytes == 4 * GIB - (3 * GIB - GIB - GIB // 2)


def test_a_group_of_version_1_counts_and_its_no_limit_does_not(tmp_path: Path):
    root = machine(tmp_path, free_kib=8 * 2**20, groups="5:memory:/a\n4:cpu,cpuacct:/a\n")
    mount = root / "sys/fs/cgroup/memory"
    put(mount, memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="1")
    assert free_memory(root).nbytes == 8 * GIB
    put(mount / "a", memory__limit_in_bytes=str(GIB), memory__usage_in_bytes=str(GIB // 4), memory__stat="x 1\n")
    assert free_memory(root).nbytes == GIB - GIB // 4


def test_the_operators_number_is_taken_as_it_is():
    assert memory_limit(12345, select_backend()).nbytes == 12345


def test_without_a_number_the_limit_is_a_share_of_what_is_free():
    limit = memory_limit(None, select_backend())
    assert 0 < limit.nbytes < free_memory().nbytes * 1.5
    assert "free on this machine" in limit.reason or "control group" in limit.reason


def test_a_sequence_has_the_state_rows_and_blocks_of_all_unfinished_steps(tmp_path: Path):
    class Deep(ReferenceBackend):
        def plan(self, *given, **more):
            return replace(super().plan(*given, **more), depth=3)

    folder = write_tiny_checkpoint(tmp_path, tiny_config("qwen3_5_text"))
    with closing(open_checkpoint(folder)) as checkpoint:
        plan = plan_model(checkpoint)
        for backend, depth in ((ReferenceBackend(), 1), (Deep(), 3)):
            planned = backend.plan(plan.program, "float32", Capacity(64, 1, 1, 1, 1, 16, 4))
            least = planned.fixed_bytes + planned.kv_block_bytes[0] + (depth + 1) * planned.state_bytes
            config = EngineConfig(
                model=str(folder),
                dtype="float32",
                max_model_len=16,
                max_running=1,
                step_tokens=64,
                memory_bytes=2 * least,
            )
            found = find_settings(config, folder, plan, backend)
            assert found.limits.num_states == depth + 3  # row 0, and a snapshot for each block of which there is one


def test_quotas_bound_the_threads(tmp_path: Path):
    mine = len(os.sched_getaffinity(0))
    root = machine(tmp_path, free_kib=1, groups="0::/a\n")
    assert usable_cpus(root) == mine
    put(root / "sys/fs/cgroup/a", cpu__max="50000 100000\n")
    assert usable_cpus(root) == 1
    put(root / "sys/fs/cgroup/a", cpu__max="max 100000\n")
    assert usable_cpus(root) == mine


def test_this_machine_offers_something():
    assert free_memory().nbytes > 0 and usable_cpus() >= 1
