"""Route and ExpertLinear against float64: every choice of experts, any grouping of rows, adapters per expert."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import BEST, on_every_backend
from one_op import OneOp, close, exact

from truffula.errors import KernelError
from truffula.kernels.adapters import low_rank
from truffula.kernels.program import Epilogue, ExpertLinear, ModuleSlice, Pointwise, Ref, Route, Site, SiteSlice
from truffula.kernels.validate import validate
from truffula.testing.programs import AdapterTensors, decoder_program
from truffula.testing.tiny import tiny_config


def float32_input(case: OneOp, value: np.ndarray) -> Ref:
    return case.input(value, case.buffer(value.shape[1], dtype="float32"))


def chosen(
    op: Route, logits: np.ndarray, correction: np.ndarray | None, expert_scale: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Experts and weights [T, k] by the words of ``Route``, row by row."""
    experts, weights = [], []
    for row in logits:
        powers = np.exp(row - row.max())
        scores = 1 / (1 + np.exp(-row)) if op.score == "sigmoid" else powers / powers.sum()
        preference = row if correction is None else scores + correction
        if op.groups > 1:
            groups = (scores if correction is None else preference).reshape(op.groups, -1)
            best = groups.max(1) if op.group_score == "max" else np.sort(groups, 1)[:, -2:].sum(1)
            lost = np.argsort(-best, kind="stable")[op.topk_groups :]
            preference = preference.copy().reshape(op.groups, -1)
            preference[lost] = -np.inf
            preference = preference.reshape(-1)
        order = np.argsort(-preference, kind="stable")[: op.k]
        found = scores[order]
        if op.norm is not None:
            found = found / max((found**op.norm).sum() ** (1 / op.norm) + op.plus, op.floor)
        experts.append(order)
        weights.append(found * op.scale * (1.0 if expert_scale is None else expert_scale[order]))
    return np.array(experts), np.array(weights)


ROUTES = {
    "softmax": {"k": 3},
    "softmax normalised": {"k": 3, "norm": 1.0},
    "softmax 2-norm": {"k": 2, "norm": 2.0},
    "softmax corrected": {"k": 3, "norm": 1.0, "floor": 0.4, "correction": True},
    "groups by their best": {"k": 4, "groups": 4, "topk_groups": 2, "group_score": "max", "scale": 2.5},
    "sigmoid corrected groups": {"k": 3, "score": "sigmoid", "groups": 3, "topk_groups": 2, "norm": 1.0,
                                 "correction": True},
    "sigmoid": {"k": 1, "score": "sigmoid"},
    "sigmoid, a number added": {"k": 3, "score": "sigmoid", "norm": 1.0, "plus": 0.3},
    "softmax normalised, scaled by expert": {"k": 3, "norm": 1.0, "scale": 1.5, "expert_scale": True},
    "all": {"k": 12, "norm": 1.0},
}  # fmt: skip


@on_every_backend
@pytest.mark.parametrize("name", ROUTES)
def test_choices(backend, name):
    rng = np.random.default_rng(3)
    fields = dict(ROUTES[name])
    logits = exact(2 * rng.standard_normal((17, 12)), "float32")
    correction = exact(rng.standard_normal(12), "float32") if fields.pop("correction", False) else None
    case = OneOp("float32", 17)
    weight = None if correction is None else case.weight(correction, "vector")
    scale = exact(rng.standard_normal(12), "float32") if fields.pop("expert_scale", False) else None
    scales = None if scale is None else case.weight(scale, "vector")
    x, out = float32_input(case, logits), case.buffer(2 * fields["k"], dtype="float32")
    op = Route(name="r", logits=x, out=out, correction=weight, expert_scale=scales, **fields)
    experts, weights = chosen(op, logits, correction, scale)
    found = case.run(backend, op)
    np.testing.assert_array_equal(found[:, : op.k], experts)
    close(found[:, op.k :], weights, "float32")


@on_every_backend
def test_equal_logits_take_the_lower_number(backend):
    case = OneOp("float32", 2)
    logits, out = float32_input(case, np.zeros((2, 5))), case.buffer(6, dtype="float32")
    op = Route(name="r", logits=logits, out=out, k=3, norm=1.0)
    np.testing.assert_allclose(case.run(backend, op), [[0, 1, 2, 1 / 3, 1 / 3, 1 / 3]] * 2, rtol=1e-6)


@on_every_backend
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 3), st.sampled_from([(7, 6), (32, 20), (64, 34)]),
    st.sampled_from(["none", "sum", "weighted"]), st.booleans(), st.booleans(),
    st.sampled_from(["float32", "bfloat16"]), st.integers(0, 3), st.integers(0, 99),
)  # fmt: skip
def test_products(backend, rows, experts, k, shape, combine, own, glu, dtype, adapters, seed):
    """Rows choose experts at random, some more than once; segments of adapters overlap; experts may lack an adapter."""
    rng = np.random.default_rng(seed)
    inputs, outputs = shape
    width = outputs // 2 if glu else outputs
    x = exact(rng.standard_normal((rows, k * inputs if own else inputs)), dtype)
    w = exact(rng.standard_normal((experts, outputs, inputs)) * inputs**-0.5, dtype)
    bias = exact(rng.standard_normal(experts * outputs), dtype)
    routes = np.concatenate([rng.integers(0, experts, (rows, k)), exact(rng.uniform(0, 1, (rows, k)), "bfloat16")], 1)
    residual = exact(rng.standard_normal((rows, width)), dtype)
    case = OneOp(dtype, rows)
    case.sites += [
        Site(e, "linear", 0, inputs, outputs, (ModuleSlice(f"experts.{e}", 0, outputs, outputs),))
        for e in range(experts)
    ]
    segments, deltas = [], np.zeros((rows, experts, outputs, inputs))
    for number in range(adapters):
        lo, hi = sorted(rng.integers(0, rows + 1, 2).tolist())
        segments.append((lo, hi, number, float(rng.choice([1.0, -0.5]))))
        tensors = []
        for site in rng.permutation(experts)[: rng.integers(1, experts + 1)].tolist():
            a, b = rng.standard_normal((3, inputs)), rng.standard_normal((outputs, 3))
            a, b = (exact(m, "bfloat16").astype(np.float32) for m in (a, b))
            tensors.append(low_rank(site, a, b, 0.25))
            deltas[lo:hi, site] += 0.25 * segments[-1][3] * (b.astype(np.float64) @ a.astype(np.float64))
        case.adapters.append(AdapterTensors(f"a{number}", 3, tuple(tensors)))
    op = ExpertLinear(
        name="e", x=case.input(x), routes=float32_input(case, routes), weight=case.weight(w, "matmul"),
        out=case.buffer(width if combine != "none" else k * width), combine=combine,
        slices=tuple(SiteSlice(e, e * outputs, (e + 1) * outputs) for e in range(experts)),
        epilogue=Epilogue(bias=case.weight(bias, "vector"), glu=glu, activation="relu" if glu else None,
                          residual=case.input(residual) if combine != "none" else None),
    )  # fmt: skip

    def fill(step):
        step.G = adapters
        for g, (lo, hi, adapter, weight) in enumerate(segments):
            step.seg[g], step.seg_r[g], step.seg_weight[g] = (lo, hi, adapter), (0, 0), weight

    wanted = np.zeros((rows, k, width))
    for t in range(rows):
        for j in range(k):
            e = int(routes[t, j])
            y = (w[e] + deltas[t, e]) @ (x[t, j * inputs : (j + 1) * inputs] if own else x[t])
            y = y + bias[e * outputs : (e + 1) * outputs]
            wanted[t, j] = np.maximum(y[:width], 0) * y[width:] if glu else y
    if combine == "weighted":
        wanted = wanted * routes[:, k:, None]
    wanted = wanted.reshape(rows, -1) if combine == "none" else wanted.sum(1) + residual
    close(case.run(backend, op, fill), wanted, dtype, roundings=4)


@on_every_backend
@pytest.mark.parametrize("columns", [1, 3, 14])
@pytest.mark.parametrize("kind", ["mul", "sigmoid_mul", "softplus"])
def test_a_column_for_several(backend, kind, columns):
    rng = np.random.default_rng(0)
    x, y = exact(rng.standard_normal((5, 42)), "float32"), exact(rng.standard_normal((5, columns)), "float32")
    case = OneOp("float32", 5)
    op = Pointwise(name="p", kind="mul" if kind == "softplus" else kind, x=case.input(x), y=case.input(y),
                   activation="softplus" if kind == "softplus" else None, out=case.buffer(42))  # fmt: skip
    factor = {"mul": y, "sigmoid_mul": 1 / (1 + np.exp(-y)), "softplus": np.log1p(np.exp(y))}[kind]
    close(case.run(backend, op), x * np.repeat(factor, 42 // columns, 1), "float32")


@on_every_backend
def test_a_residual_in_other_columns_of_the_results_buffer(backend):
    case = OneOp("float32", 3)
    both = case.input(np.arange(24.0).reshape(3, 8))
    routes, x = float32_input(case, np.array([[0.0, 1.0]] * 3)), case.input(np.ones((3, 2)))
    w = case.weight(np.full((1, 4, 2), 0.25), "matmul")
    residual, out = Ref(both.buffer, 0, 4), Ref(both.buffer, 4, 4)
    op = ExpertLinear(name="e", x=x, routes=routes, weight=w, out=out, combine="sum",
                      epilogue=Epilogue(residual=residual))  # fmt: skip
    np.testing.assert_array_equal(case.run(backend, op), np.arange(24.0).reshape(3, 8)[:, :4] + 0.5)


def test_a_step_of_one_row_reads_chosen_experts_alone():
    """A NaN in another expert's matrix would spoil any product that reads it."""
    for backend in BEST.values():
        case = OneOp("float32", 1)
        w = np.full((4, 3, 2), np.nan)
        w[2] = 1.0
        x, routes = case.input(np.ones((1, 2))), float32_input(case, np.array([[2.0, 1.0]]))
        op = ExpertLinear(
            name="e", x=x, routes=routes, weight=case.weight(w, "matmul"), out=case.buffer(3), combine="weighted"
        )
        assert case.run(backend, op).tolist() == [[2.0, 2.0, 2.0]]


@pytest.mark.parametrize(
    ("field", "change"),
    [("k", {"k": 9}), ("groups", {"groups": 4}), ("topk_groups", {"groups": 3, "topk_groups": 4})],
)
def test_a_wrong_choice_is_refused(field, change):
    program = decoder_program(tiny_config("qwen3_moe"))
    ops = [type(op)(**{**vars(op), **change}) if isinstance(op, Route) else op for op in program.ops]
    with pytest.raises(KernelError, match=r"Route 'layers.0.route'\), (k|groups|out)"):
        validate(type(program)(**{**vars(program), "ops": tuple(ops)}))
