"""An op is declared once, in kernels/program.py: the native list (native/ops.h) has the same fields and words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
from cpu_steps import CAPACITY
from kernel_backends import needs_native
from llama_program import llama_program

from truffula.errors import KernelError
from truffula.kernels.cpu import available
from truffula.kernels.cpu.lowering import add_ops, lower
from truffula.kernels.program import (
    Attention,
    CausalConv,
    Embed,
    Epilogue,
    ExpertLinear,
    GatedDelta,
    Linear,
    Logits,
    Mamba2,
    Mla,
    Norm,
    Op,
    Pointwise,
    Ref,
    Rope,
    RopeRows,
    Route,
    TakeRows,
)

if available():
    from truffula.kernels.cpu import _native

pytestmark = needs_native
ROWS = Ref(0, 0, 16)
ONE_OF_EACH: list[Op] = [
    Embed(name="embed", table=0, out=ROWS),
    Norm(name="norm", x=ROWS, out=ROWS, kind="rms", eps=1.0),
    Linear(name="linear", x=ROWS, weight=0, out=ROWS),
    Logits(name="logits", x=ROWS, weight=0, out=ROWS),
    Pointwise(name="pointwise", kind="scale", x=ROWS, out=ROWS, params=(2.0,)),
    RopeRows(name="rope rows", table=0, out=ROWS),
    Rope(name="rope", x=ROWS, rows=ROWS, heads=1, head_dim=16, start=0, dims=16),
    Attention(name="attention", q=ROWS, k=ROWS, v=ROWS, out=ROWS, group=0, planes=(0, 1), heads=1, kv_heads=1,
              dim_k=16, dim_v=16, scale=1.0),
    CausalConv(name="conv", x=ROWS, out=ROWS, weight=0, state=0),
    Mla(name="mla", q=ROWS, latent=ROWS, out=ROWS, kv_b=0, group=0, plane=0, heads=1, nope=8, rope=8, dim_v=16, rank=8,
        scale=1.0),
    Mamba2(name="scan", x=ROWS, b=ROWS, c=ROWS, dt=ROWS, out=ROWS, state=0, rate=0, dt_bias=0, skip=0, heads=1,
           head_dim=16, groups=1, state_size=16),
    GatedDelta(name="delta", q=ROWS, k=ROWS, v=ROWS, decay=ROWS, beta=ROWS, out=ROWS, state=0, rate=0, dt_bias=0,
               heads=1, key_heads=1, dim_k=16, dim_v=16, scale=1.0),
    Route(name="route", logits=ROWS, out=ROWS, k=8),
    ExpertLinear(name="experts", x=ROWS, routes=ROWS, weight=0, out=ROWS),
    TakeRows(name="take rows", x=ROWS, out=ROWS),
]  # fmt: skip


def test_every_op_is_in_this_test():
    assert {type(op) for op in ONE_OF_EACH} == set(Op.__subclasses__())


@pytest.mark.parametrize("op", ONE_OF_EACH, ids=lambda op: op.name)
def test_fields_have_the_same_names(op):
    kind, fields = lower(op, llama_program(), "float32")
    assert set(fields) == set(_native.op_fields()[kind])


def words_of(hint: Any) -> set[str]:
    """Strings of a ``Literal``, also inside ``| None``."""
    return {arg for arg in get_args(hint) if isinstance(arg, str)}.union(*map(words_of, get_args(hint)))


def test_words_are_the_same():
    classes = {kind.__name__: kind for kind in Op.__subclasses__()}
    compared = 0
    for name, fields in _native.op_fields().items():
        declared = {**get_type_hints(classes[name]), **(get_type_hints(Epilogue) if "Linear" in name else {})}
        for field, words in fields.items():
            if words is not None:
                assert set(words) - {"none"} == words_of(declared[field]) - {"none"}, (name, field)
                compared += 1
    assert compared == 13


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (Embed(name="rows", table=0, out=ROWS, source="extra"), "op 'rows': .*source is extra"),  # type: ignore[arg-type]
        (Rope(name="rope", x=ROWS, rows=ROWS, heads=1, head_dim=2**40, start=0, dims=16), "op 'rope': .*head_dim is"),
        (Linear(name="linear", x=ROWS, weight=None, out=ROWS), "op 'linear': .*weight is None"),  # type: ignore[arg-type]
        (Norm(name="norm", x=Ref(2**40, 0, 16), out=ROWS, kind="rms", eps=1.0), "op 'norm'"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_value_that_is_not_served_is_named(op, message):
    native = _native.Executable("auto", 1, CAPACITY, "float32", 1, False)
    with pytest.raises(KernelError, match=message):
        add_ops(native, replace(llama_program(), ops=(op,)), "float32")
