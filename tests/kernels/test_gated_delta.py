"""The gated delta rule, against its definition in float64 and against transformers' functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import BACKENDS, on_every_backend
from one_op import OneOp, close, exact
from spans import fill_spans, sequences
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from truffula.kernels.program import GatedDelta, RecurrentState

quick = settings(max_examples=20, deadline=None, derandomize=True)
# heads, key heads, dim_k, dim_v: odd widths, one key head, a state of more than one block of columns.
SHAPES = [(4, 2, 6, 10), (2, 2, 16, 16), (3, 1, 5, 33), (2, 1, 20, 70)]


class Inputs:
    """Random inputs of the op, which ``dtype`` holds exactly."""

    def __init__(self, rows: int, shape: tuple[int, int, int, int], by_row: bool, dtype: str, seed: int) -> None:
        self.heads, self.key_heads, self.dim_k, self.dim_v = shape
        rng = np.random.default_rng(seed)
        decays = self.heads * (self.dim_k if by_row else 1)

        def some(*size: int, dtype: str = dtype) -> np.ndarray:
            return exact(rng.standard_normal(size), dtype)

        self.q, self.k = (some(rows, self.key_heads * self.dim_k) for _ in range(2))
        self.v = some(rows, self.heads * self.dim_v)
        self.decay, self.beta, self.dt_bias = some(rows, decays), some(rows, self.heads), some(decays)
        self.rate = -np.exp(some(self.heads))

    def run(self, backend, dtype: str, fill) -> np.ndarray:
        case = OneOp(dtype, len(self.q), states=[RecurrentState(0, 0, self.heads * self.dim_k * self.dim_v)])
        columns = {name: case.input(getattr(self, name)) for name in ("q", "k", "v", "decay", "beta")}
        op = GatedDelta(
            name="delta", **columns, out=case.buffer(self.v.shape[1]), state=0, rate=case.exact_vector(self.rate),
            dt_bias=case.exact_vector(self.dt_bias), heads=self.heads, key_heads=self.key_heads, dim_k=self.dim_k,
            dim_v=self.dim_v, scale=self.dim_k**-0.5, beta_scale=2.0,
        )  # fmt: skip
        return case.run(backend, op, fill)

    def wanted(self, lo: int, hi: int) -> np.ndarray:
        """The definition, row by row, for a sequence of rows lo .. hi."""
        state = np.zeros((self.heads, self.dim_k, self.dim_v))
        rate = np.repeat(self.rate, self.decay.shape[1] // self.heads)
        out = []
        for row in range(lo, hi):
            q, k = (self._unit(x[row]) for x in (self.q, self.k))
            g = rate * np.log1p(np.exp(self.decay[row] + self.dt_bias))
            beta = 2 / (1 + np.exp(-self.beta[row]))
            state = state * np.exp(g).reshape(self.heads, -1, 1)
            error = self.v[row].reshape(self.heads, -1) - np.einsum("hk,hkv->hv", k, state)
            state = state + np.einsum("hk,hv->hkv", k, beta[:, None] * error)
            out.append(np.einsum("hk,hkv->hv", q * self.dim_k**-0.5, state).reshape(-1))
        return np.stack(out)

    def _unit(self, x: np.ndarray) -> np.ndarray:
        x = x.reshape(self.key_heads, -1)
        return np.repeat(x / np.sqrt((x * x).sum(1, keepdims=True) + 1e-6), self.heads // self.key_heads, 0)


@on_every_backend
@quick
@given(
    st.sampled_from(["float32", "bfloat16"]), sequences, st.sampled_from(SHAPES), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_gated_delta(backend, dtype, lengths, shape, by_row, in_place, seed):
    inputs = Inputs(sum(map(sum, lengths)), shape, by_row, dtype, seed)
    found = inputs.run(backend, dtype, lambda step: fill_spans(step, lengths, in_place=in_place))
    at = 0
    for spans in lengths:
        close(found[at : at + sum(spans)], inputs.wanted(at, at + sum(spans)), dtype)
        at += sum(spans)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("by_row", [False, True])
def test_a_sequence_of_several_chunks_as_transformers_computes_it(name, by_row):
    inputs = Inputs(64, (4, 4, 6, 6), by_row, "float32", 1)
    found = inputs.run(BACKENDS[name], "float32", lambda step: fill_spans(step, [[40, 24]], in_place=False))
    q, k, v, decay, beta = (
        torch.tensor(x, dtype=torch.float32).view(1, 64, 4, -1)
        for x in (inputs.q, inputs.k, inputs.v, inputs.decay, inputs.beta)
    )
    bias = torch.tensor(inputs.dt_bias, dtype=torch.float32).view(4, -1)
    g = torch.tensor(inputs.rate, dtype=torch.float32)[:, None] * torch.nn.functional.softplus(decay + bias)
    theirs = chunk_kimi_delta_attention if by_row else torch_chunk_gated_delta_rule
    g, beta = g if by_row else g[..., 0], 2 * torch.sigmoid(beta[..., 0])
    out, _ = theirs(q, k, v, g, beta, chunk_size=16, use_qk_l2norm_in_kernel=True)
    np.testing.assert_allclose(found, out.reshape(64, -1).numpy(), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_native_results_do_not_depend_on_how_a_prompt_is_cut(name):
    inputs = Inputs(60, (2, 1, 20, 70), False, "float32", 2)
    whole, cut = (
        inputs.run(BACKENDS[name], "float32", lambda step, spans=spans: fill_spans(step, [spans], in_place=False))
        for spans in ([60], [7, 16, 37])
    )
    np.testing.assert_array_equal(whole, cut)
