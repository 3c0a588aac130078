"""The real model, real text: float32 logits within 1e-4 of transformers', both on the values of the embedded file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kernel_backends import needs_native

from truffula.kernels.backend import Backend
from truffula.kernels.cpu.backend import CpuBackend
from truffula.kernels.reference import ReferenceBackend
from truffula.model.load import WeightReader, plan_model
from truffula.testing.oracle import Oracle
from truffula.testing.programs import Driver, Float32, capacity_for
from truffula.text.tokenizer import load_tokenizer
from truffula.weights.checkpoint import Checkpoint
from truffula.weights.open import open_checkpoint
from truffula.weights.sources import resolve_source
from truffula.weights.texts import read_texts
from truffula.weights.tying import Tie

pytestmark = pytest.mark.slow

TEXT = Path(__file__).parents[2] / "benchmarks" / "texts" / "written_here.txt"
POSITIONS = 400


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(resolve_source("smollm2", cache_dir=None, offline=False).resolve())


@pytest.fixture(scope="module")
def ids(checkpoint: Checkpoint) -> list[int]:
    tokenizer = load_tokenizer(read_texts(checkpoint.path).tokenizer)
    assert tokenizer is not None
    found = tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:POSITIONS]
    assert len(found) == POSITIONS
    return found


@pytest.fixture(scope="module")
def wanted(checkpoint: Checkpoint, ids: list[int]) -> Float32:
    tied = plan_model(checkpoint).tying.tie is not Tie.SEPARATE
    return Oracle(checkpoint.path, tied=tied).logits(ids)


@pytest.mark.parametrize("name", [pytest.param("cpu", marks=needs_native), "reference"])
def test_every_logit_is_within_1e_4(name: str, checkpoint: Checkpoint, ids: list[int], wanted: Float32) -> None:
    # Made here, not where tests are collected: without the native module there is no such backend.
    backend: Backend = CpuBackend(threads=2, exact=True) if name == "cpu" else ReferenceBackend()
    plan, capacity = plan_model(checkpoint), capacity_for(POSITIONS)
    executable = backend.load(
        plan.program, "float32", WeightReader(checkpoint, plan, block_kinds=backend.block_kinds), capacity
    )
    found = Driver(executable, capacity).feed(ids)
    executable.close()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
