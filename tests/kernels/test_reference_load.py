"""Loading: what is viewed, what converted, what memory is planned, taps, and how backend and dtype are chosen."""

from __future__ import annotations

import importlib.util
import mmap
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from kernel_backends import on_every_backend
from llama_program import llama_program

from truffula.errors import ConfigError, KernelError, MissingDependency
from truffula.kernels.cpu import available
from truffula.kernels.inputs import Capacity
from truffula.kernels.mapped import release_pages
from truffula.kernels.program import RecurrentState
from truffula.kernels.reference import ReferenceBackend
from truffula.kernels.reference.weights import load_weights, view
from truffula.kernels.select import BACKENDS, choose_dtype, select_backend
from truffula.testing.programs import Part, as_dtype, fill_step, pull_from, random_weights

CAPACITY = Capacity(
    max_tokens=64, max_seqs=8, max_logit_rows=16, max_segments=8, num_blocks=40, block_size=4, max_blocks_per_seq=16
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stored_in_the_compute_dtype_are_views(dtype):
    program = llama_program()
    stored = random_weights(program, dtype=dtype)
    executable = ReferenceBackend().load(program, dtype, pull_from(stored), CAPACITY)
    fill_step(executable.inputs, [Part((1, 2), 0, (1,))], 4)
    executable.run()
    before = executable.logits()
    for parts in stored.values():
        for part in parts:
            if part.ndim == 2:
                part[:] = 0
    executable.run()
    assert before.any() and not executable.logits().any()


@on_every_backend
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_stored_dtype_serves_in_any_compute_dtype(backend, stored, dtype):
    """Converted weights give what weights converted beforehand give."""
    program = llama_program()
    weights = random_weights(program, dtype=stored)
    converted = {name: [as_dtype(part, dtype) for part in parts] for name, parts in weights.items()}
    logits = []
    for source in (weights, converted):
        executable = backend.load(program, dtype, pull_from(source), CAPACITY)
        fill_step(executable.inputs, [Part((1, 2, 3), 0, (1,), logits="all")], 4)
        executable.run()
        logits.append(executable.logits())
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5 if dtype == "float32" else 0.05)


def test_float32_vectors_stay_exact_in_a_bfloat16_program():
    import torch

    program = llama_program()
    norm = next(w for w in program.weights if w.shape == (32,))
    exact = replace(norm, dtype="float32")
    program = replace(program, weights=tuple(exact if w.id == norm.id else w for w in program.weights))
    stored = random_weights(program)
    loaded = load_weights(program, torch.bfloat16, pull_from(stored), torch.device("cpu"))
    assert np.array_equal(loaded[norm.id].whole.numpy(), stored[norm.name][0])


def test_views_of_read_only_arrays_need_no_copy_and_keep_their_owner():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    array.flags.writeable = False
    tensor = view(array)
    assert tensor.data_ptr() == array.ctypes.data
    halves = view(array.astype(ml_dtypes.bfloat16))
    assert halves.tolist() == array.tolist()
    with pytest.raises(KernelError, match="int64"):
        view(np.zeros((2, 2), np.int64))


def test_release_drops_only_pages_that_can_be_read_again(tmp_path):
    path = tmp_path / "weights"
    data = np.arange(10 * mmap.PAGESIZE // 4, dtype=np.float32)
    path.write_bytes(data.tobytes())
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    array = np.frombuffer(mapped, np.float32)[100:-100]
    release_pages(array)
    assert np.array_equal(array, data[100:-100])
    own = np.ones(5000, np.float32)
    release_pages(own)
    assert own.all()


def test_the_plan_counts_what_is_declared():
    program = llama_program()
    backend = ReferenceBackend()
    matrices = sum(int(np.prod(w.shape)) for w in program.weights if len(w.shape) == 2)
    vectors = sum(w.shape[0] for w in program.weights if len(w.shape) == 1)
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        plan = backend.plan(program, dtype, CAPACITY)
        assert plan.weight_bytes == matrices * width + vectors * 4
        assert plan.kv_block_bytes == (2 * 2 * 16 * 4 * width,)  # two layers, K and V, 2 heads of 8, 4 tokens a block
        assert plan.logits_bytes >= 16 * 61 * 4
        assert plan.arena_bytes >= 64 * (32 + 64) * width
        assert plan.fixed_bytes == plan.weight_bytes + plan.arena_bytes + plan.logits_bytes + plan.kv_block_bytes[0]


@on_every_backend
def test_the_plan_counts_one_state_row(backend):
    program = llama_program()
    states = RecurrentState(0, 0, 100), RecurrentState(1, 1, 10, "model")
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        without = backend.plan(program, dtype, CAPACITY)
        plan = backend.plan(replace(program, states=states), dtype, CAPACITY)
        assert plan.state_bytes == (512 if backend.name == "cpu" else 400 + 10 * width)  # whole cache lines
        assert plan.fixed_bytes - without.fixed_bytes == plan.state_bytes


@on_every_backend
def test_taps_show_every_op_and_only_in_debug(backend):
    program = llama_program()
    weights = random_weights(program)
    executable = backend.load(program, "float32", pull_from(weights), CAPACITY, debug=True)
    assert executable.depth == backend.plan(program, "float32", CAPACITY).depth
    with pytest.raises(KernelError, match="has not run"):
        executable.tap(1)
    fill_step(executable.inputs, [Part((1, 2, 3), 0, (1,))], 4)
    executable.run()
    assert np.array_equal(executable.tap(1), weights["embed"][0][[1, 2, 3]])
    assert np.array_equal(executable.tap(len(program.ops) - 1), executable.logits())
    for index in range(len(program.ops)):
        assert executable.tap(index).dtype == np.float32
    plain = backend.load(program, "float32", pull_from(weights), CAPACITY)
    with pytest.raises(KernelError, match="debug"):
        plain.tap(0)


def test_select_backend():
    assert select_backend("auto", "cpu").name == ("cpu" if available() else "reference")
    assert select_backend("reference", "auto").name == "reference"
    assert BACKENDS == ("auto", "cpu", "reference", "triton")
    with pytest.raises(ConfigError, match="auto, cpu, reference, triton") as caught:
        select_backend("cuda-graphs", "cpu")
    assert caught.value.param == "backend"
    with pytest.raises(ConfigError) as caught:
        select_backend("reference", "cuda")
    assert caught.value.param == "device"


def test_a_missing_torch_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"\[torch\]"):
        select_backend("reference", "cpu")


def test_choose_dtype():
    backend = ReferenceBackend()
    assert choose_dtype(backend, "bfloat16", "float32").dtype == "bfloat16"
    assert choose_dtype(backend, "bf16", "F32").dtype == "bfloat16"
    assert choose_dtype(backend, "auto", "float32").dtype == "float32"
    assert choose_dtype(backend, "auto", "F32").reason == "the checkpoint is float32"
    for stored in ("bfloat16", "float16", "BF16"):
        choice = choose_dtype(backend, "auto", stored)
        assert choice.dtype in ("float32", "bfloat16") and "times as fast" in choice.reason
    for wrong in ("float16", "int8"):
        with pytest.raises(ConfigError, match="bfloat16") as caught:
            choose_dtype(backend, wrong, "float16")
        assert caught.value.param == "dtype"
