"""Logits: float32, softcap(scale * (x Wᵀ + bias + adapters)) over the rows that want them."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_backends import on_every_backend

from truffula.kernels.adapters import low_rank
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import (
    Buffer,
    Embed,
    Logits,
    ModuleSlice,
    Output,
    Program,
    Ref,
    Site,
    TakeRows,
    WeightDecl,
    WeightPart,
)
from truffula.testing.programs import AdapterTensors, Part, as_dtype, attach, fill_step, pull_from

CAPACITY = Capacity(
    max_tokens=16, max_seqs=4, max_logit_rows=16, max_segments=4, num_blocks=8, block_size=4, max_blocks_per_seq=4
)
V, D = 11, 6


@on_every_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (1.0, 3.0), (0.5, 3.0)])
def test_tied_logits(backend, dtype, biased, scale, softcap):
    """A tied head with an adapter of its own: the gathered rows stay the table's, the logits get the delta."""
    rng = np.random.default_rng(0)
    table = as_dtype(rng.standard_normal((V, D)), dtype)
    bias = as_dtype(rng.standard_normal(V), dtype)
    program = Program(
        name="head", vocab_size=V,
        buffers=(Buffer(0, "x", "T", D), Buffer(1, "last", "R", D), Buffer(2, "logits", "R", V, "float32")),
        weights=(
            WeightDecl(0, "table", (V, D), (WeightPart("t"),), frozenset({"rows", "matmul"})),
            WeightDecl(1, "bias", (V,), (WeightPart("b"),), frozenset({"vector"})),
        ),
        sites=(Site(0, "head", None, D, V, (ModuleSlice("lm_head", 0, V, V),)),),
        rope_tables=(), kv_groups=(),
        ops=(
            Embed(name="embed", table=0, out=Ref(0, 0, D)),
            TakeRows(name="take", x=Ref(0, 0, D), out=Ref(1, 0, D)),
            Logits(
                name="logits", x=Ref(1, 0, D), weight=0, out=Ref(2, 0, V), bias=1 if biased else None, scale=scale,
                softcap=softcap, site=0,
            ),
        ),
        result=Ref(2, 0, V), output=Output("logits", V), max_positions=8,
    )  # fmt: skip
    executable = backend.load(program, dtype, pull_from({"table": [table], "bias": [bias]}), CAPACITY)
    a, b = as_dtype(rng.standard_normal((2, D)), "float32"), as_dtype(rng.standard_normal((V, 2)), "float32")
    slot = attach(executable, AdapterTensors("g", 2, (low_rank(0, a, b, 0.25),)))
    inputs = executable.inputs
    fill_step(inputs, [Part((3, 4, 5), 0, (1,), slot), Part((7,), 0, (2,)), Part((8, 9), 0, (3,), logits="all")], 4)
    executable.run()
    t, w = table.astype(np.float64), table.astype(np.float64)
    folded = w + 0.25 * b.astype(np.float64) @ a.astype(np.float64)
    wanted = np.stack([t[5] @ folded.T, t[7] @ w.T, t[8] @ w.T, t[9] @ w.T])
    wanted = scale * (wanted + (bias.astype(np.float64) if biased else 0))
    if softcap is not None:
        wanted = softcap * np.tanh(wanted / softcap)
    got = executable.logits()
    assert got.dtype == np.float32
    unit = 1e-5 if dtype == "float32" else 2.0**-8
    np.testing.assert_allclose(got, wanted, atol=unit * np.abs(wanted).max(), rtol=unit)
