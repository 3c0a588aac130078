"""Whole programs on the triton backend under the interpreter: the torch backend's logits, and bits that a row's
company, the cut of its prompt and the number of rows do not change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_backends import interpreted, needs_triton

from truffula.errors import DeviceLost, KernelError
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Linear, Norm, Program, Rope
from truffula.kernels.reference import ReferenceBackend
from truffula.kernels.triton import check
from truffula.kernels.triton.check import wrong_kernels
from truffula.testing.parity import verify_model
from truffula.testing.programs import (
    Part,
    attach,
    decoder_program,
    fill_step,
    pull_from,
    random_adapter,
    random_weights,
)
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint

pytestmark = needs_triton
CAPACITY = Capacity(
    max_tokens=64, max_seqs=8, max_logit_rows=64, max_segments=8, num_blocks=40, block_size=16, max_blocks_per_seq=8
)
MODELS = {
    "llama": tiny_config("llama", num_hidden_layers=1),
    "gemma3": tiny_config("gemma3_text", num_hidden_layers=2),
    "gemma2": tiny_config("gemma2", num_hidden_layers=2),
    "qwen3_moe": tiny_config("qwen3_moe", num_hidden_layers=1),
    "deepseek_v3": tiny_config("deepseek_v3", num_hidden_layers=2),
    "gpt_oss": tiny_config("gpt_oss", num_hidden_layers=2),
}
IDS = tuple(int(i) for i in np.random.default_rng(0).integers(0, 90, 45))
# Attention of the first sequence has two splits: in one item in the first step, apart in the second.
STEPS = (
    [Part(IDS[:39], 0, (3, 7, 9), 0, "all"), Part(IDS[21:26], 0, (5,), 1, "all"), Part(IDS[26:29], 0, (11,), 2, "all"),
     Part(IDS[29:38], 0, (4,), None, "all")],
    [Part((7,), 39, (3, 7, 9), 0), Part((8,), 5, (5,), 1), Part((9,), 3, (11,), 2), Part((10,), 9, (4,), None)],
)  # fmt: skip


def load(backend: Any, program: Program, dtype: str) -> Any:
    """With the adapters 0, 1 and 2, of other ranks and dtypes."""
    executable = backend.load(program, dtype, pull_from(random_weights(program, seed=1)), CAPACITY)
    for rank, adapter in ((4, "float32"), (1, "bfloat16"), (7, "float16")):
        attach(executable, random_adapter(program, rank=rank, seed=rank, dtype=adapter))
    return executable


def logits(executable: Any, *steps: Sequence[Part]) -> np.ndarray:
    """Of the last of ``steps``."""
    for parts in steps:
        fill_step(executable.inputs, list(parts), CAPACITY.block_size)
        executable.run()
    return executable.logits()


def distance(some: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(some - wanted) / np.linalg.norm(wanted))


def test_a_step_gives_torchs_logits() -> None:
    """The one whole step of the fast suite."""
    program = decoder_program(MODELS["llama"])
    exact, kernels = (load(backend, program, "float32") for backend in (ReferenceBackend(), interpreted()))
    step = [Part(IDS[:5], 0, (3,), 1), Part(IDS[5:8], 0, (4,))]
    assert distance(logits(kernels, step), logits(exact, step)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_mixed_adapters_are_those_of_torch(name: str) -> None:
    program = decoder_program(MODELS[name])
    exact, kernels = (load(backend, program, "float32") for backend in (ReferenceBackend(), interpreted()))
    for parts in STEPS:
        assert distance(logits(kernels, parts), logits(exact, parts)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_in_sixteen_bits_logits_are_as_near_as_those_of_torch(name: str, dtype: str) -> None:
    program = decoder_program(MODELS[name])
    half = type("Half", (ReferenceBackend,), {"dtypes": (dtype,)})()
    exact, torch_, kernels = (
        load(backend, program, of)
        for backend, of in ((ReferenceBackend(), "float32"), (half, dtype), (interpreted(), dtype))
    )
    ours, torchs = [], []
    for parts in STEPS:
        wanted = logits(exact, parts)
        for executable, found in ((kernels, ours), (torch_, torchs)):
            found += map(distance, logits(executable, parts), wanted)
    # Of the median of the rows: where a rounding changes a row's experts, either may be far away.
    assert np.median(ours) < 1.1 * np.median(torchs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gemma3", "bfloat16")])
def test_a_rows_bits_depend_on_its_sequence_alone(name: str, dtype: str) -> None:
    program = decoder_program(MODELS[name])
    executable = load(interpreted(), program, dtype)
    alone = logits(executable, [Part(IDS, 0, (3, 7, 9), 2)])
    company = [Part(IDS[:3], 0, (5,), 0), Part(IDS, 0, (6, 8, 10), 2), Part(IDS[:9], 0, (4,), None)]
    assert np.array_equal(logits(executable, company)[1], alone[0])
    cuts = [[Part(IDS[lo:hi], lo, (12, 14, 16), 2)] for lo, hi in ((0, 9), (9, 29), (29, 44))]
    last = [Part((1,), 9, (4,), None), Part(IDS[44:], 44, (12, 14, 16), 2)]
    assert np.array_equal(logits(executable, *cuts, sorted(last, key=lambda part: part.slot is None))[0], alone[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, tiny_config(name, num_hidden_layers=2))
    report = verify_model(tmp_path, prompts=[IDS[:11]], backend=interpreted(), new_tokens=3)
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shared", [False, True])
def test_splits_in_one_item_and_apart_have_equal_bits(dtype: str, shared: bool) -> None:
    """One long decode has its splits apart; beside enough other sequences one item has all."""
    program = decoder_program(MODELS["llama"])
    executable = load(interpreted(), program, dtype)
    others = [Part((n,), 0, (20 + n,), None) for n in range(7)] if shared else []
    prompt, last = Part(IDS * 2, 0, (1, 2, 3, 4, 5, 6), 1), Part((3,), 90, (1, 2, 3, 4, 5, 6), 1)
    executable.inputs.R = 0
    whole = [Part(prompt.ids[:45], 0, prompt.blocks, 1)], [Part(prompt.ids[45:], 45, prompt.blocks, 1)]
    first = logits(executable, *whole, [last])
    assert np.array_equal(logits(executable, [last, *others])[0], first[0])


def test_a_device_that_fails_is_lost_and_other_errors_are_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    program = decoder_program(MODELS["llama"])
    executable = load(interpreted(), program, "float32")
    fill_step(executable.inputs, STEPS[0], CAPACITY.block_size)
    executable.inputs.block_tables[0, 0, 0] = -1
    with pytest.raises(KernelError, match="block_tables"):
        executable.run()
    fill_step(executable.inputs, STEPS[0], CAPACITY.block_size)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(executable.where, "launch", fail)
    executable.launches = [launch and fail for launch in executable.launches]
    pending = executable.submit()
    with pytest.raises(DeviceLost, match="illegal memory access"):
        pending.result()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_kernel_that_is_wrong_on_a_device_is_found_and_replaced_by_torch(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = decoder_program(MODELS[name])
    monkeypatch.setattr(check, "ROWS", (3, 30))
    monkeypatch.setattr(check, "KEYS", 40)
    executable = load(interpreted(), program, "float32")
    assert wrong_kernels(executable) == {}
    norms = [index for index, op in enumerate(program.ops) if isinstance(op, Norm)]
    for index in norms:
        launch, out = executable.launches[index], executable.fixed.whole(program.ops[index].out)
        executable.launches[index] = lambda launch=launch, out=out: (launch(), out.mul_(1.01))
    products = [index for index, op in enumerate(program.ops) if isinstance(op, Linear)][:2]
    for index in products:  # whose adapters torch then computes, too
        executable.launches[index] = fail_to_compile
    rotations = [index for index, op in enumerate(program.ops) if isinstance(op, Rope)]
    for index in rotations:
        executable.launches[index] = fail_to_compile
    monkeypatch.setattr(executable.where, "tried", False, raising=False)
    executable.prepare()
    assert [index for index in norms + products + rotations if executable.launches[index] is not None] == []
    assert "ops Norm instead of a kernel: the result differs" in caplog.text
    assert "ops Rope instead of a kernel: ValueError: too many registers" in caplog.text
    exact = load(ReferenceBackend(), program, "float32")
    for parts in STEPS:
        assert distance(logits(executable, parts), logits(exact, parts)) < 1e-4


def fail_to_compile() -> None:
    raise ValueError("too many registers")
