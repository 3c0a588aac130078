"""validate() refuses broken programs before anything is loaded, naming the op and the field."""

from __future__ import annotations

from dataclasses import replace

import pytest
from llama_program import llama_program

from truffula.errors import KernelError
from truffula.kernels.program import (
    Attention,
    Embed,
    Epilogue,
    Linear,
    Logits,
    Norm,
    Op,
    Output,
    Pointwise,
    Program,
    RecurrentState,
    Ref,
    Rope,
    SiteSlice,
    TakeRows,
)
from truffula.kernels.reference import ReferenceBackend
from truffula.kernels.validate import validate
from truffula.testing.programs import pull_from, random_weights

PROGRAM = llama_program()


def first(kind) -> int:
    return next(i for i, op in enumerate(PROGRAM.ops) if isinstance(op, kind))


def with_op(kind, **changes) -> Program:
    index = first(kind)
    ops = list(PROGRAM.ops)
    ops[index] = replace(ops[index], **changes)
    return replace(PROGRAM, ops=tuple(ops))


def ref(name: str) -> Ref:
    buffer = next(b for b in PROGRAM.buffers if b.name == name)
    return Ref(buffer.id, 0, buffer.width)


def test_a_good_program_passes():
    validate(PROGRAM)


@pytest.mark.parametrize(
    ("kind", "changes", "field"),
    [
        (Embed, {"table": 99}, "table"),
        (Embed, {"table": 1}, "table"),
        (Embed, {"out": Ref(99, 0, 32)}, "out"),
        (Embed, {"out": ref("last")}, "out"),
        (Embed, {"add": ref("normed")}, "add"),
        (Norm, {"x": ref("mixed")}, "x"),
        (Norm, {"groups": 5}, "groups"),
        (Norm, {"x": Ref(ref("x").buffer, 0, 16), "out": Ref(ref("normed").buffer, 0, 16)}, "weight"),
        (Norm, {"plus": ref("rope")}, "plus"),
        (Linear, {"x": Ref(ref("normed").buffer, 16, 32)}, "x"),
        (Linear, {"x": Ref(ref("normed").buffer, 0, 31)}, "weight"),
        (Linear, {"weight": 1}, "weight"),
        (Linear, {"out": ref("x")}, "out"),
        (Linear, {"slices": (SiteSlice(0, 0, 32), SiteSlice(1, 31, 47))}, "slices"),
        (Linear, {"slices": (SiteSlice(0, 0, 31),)}, "slices"),
        (Linear, {"slices": (SiteSlice(99, 0, 32),)}, "slices"),
        (Linear, {"slices": (SiteSlice(0, 33, 65),)}, "slices"),
        (Linear, {"epilogue": Epilogue(bias=1)}, "epilogue.bias"),
        (Linear, {"epilogue": Epilogue(residual=ref("x"))}, "epilogue.residual"),
        (Linear, {"epilogue": Epilogue(glu=True)}, "out"),
        (Rope, {"dims": 7}, "dims"),
        (Rope, {"start": 1}, "dims"),
        (Rope, {"heads": 7}, "x"),
        (Rope, {"rows": ref("x")}, "rows"),
        (Attention, {"group": 1}, "group"),
        (Attention, {"planes": (0, 99)}, "planes"),
        (Attention, {"kv_heads": 3}, "kv_heads"),
        (Attention, {"dim_v": 4}, "v"),
        (Attention, {"window": 0}, "window"),
        (Attention, {"sinks": 1}, "sinks"),
        (TakeRows, {"out": ref("x")}, "out"),
        (Logits, {"x": ref("x")}, "x"),
        (Logits, {"weight": 1}, "weight"),
        (Logits, {"site": 0}, "site"),
    ],
)
def test_broken_programs_name_op_and_field(kind, changes, field):
    with pytest.raises(KernelError) as caught:
        validate(with_op(kind, **changes))
    assert caught.value.param == field
    assert repr(PROGRAM.ops[first(kind)].name) in str(caught.value)


@pytest.mark.parametrize(
    ("op", "field"),
    [
        (Pointwise(name="p", kind="add", x=ref("x"), out=ref("x")), "y"),
        (Pointwise(name="p", kind="scale", x=ref("x"), y=ref("x"), out=ref("x"), params=(1.0,)), "y"),
        (Pointwise(name="p", kind="softcap", x=ref("x"), out=ref("x")), "params"),
        (Pointwise(name="p", kind="act", x=ref("x"), out=ref("x")), "activation"),
        (Pointwise(name="p", kind="act", activation="silu", x=ref("x"), out=ref("qkv")), "out"),
        (Op(name="p"), "ops"),
    ],
)
def test_broken_pointwise_and_unknown_ops(op, field):
    ops = list(PROGRAM.ops)
    ops.insert(2, op)
    with pytest.raises(KernelError) as caught:
        validate(replace(PROGRAM, ops=tuple(ops)))
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ops": PROGRAM.ops[:-1]}, "result"),
        ({"ops": ()}, "result"),
        ({"vocab_size": 60}, "output"),
        ({"output": Output("logits", 60)}, "output"),
        ({"output": Output("vector", PROGRAM.vocab_size)}, "output"),
        ({"ops": PROGRAM.ops[:-1], "result": ref("final"), "output": Output("vector", 32)}, "result"),
        ({"weights": (replace(PROGRAM.weights[0], parts=()), *PROGRAM.weights[1:])}, "parts"),
        ({"weights": (replace(PROGRAM.weights[0], shape=()), *PROGRAM.weights[1:])}, "shape"),
        ({"weights": (replace(PROGRAM.weights[0], uses=frozenset({"mul"})), *PROGRAM.weights[1:])}, "uses"),
        ({"states": (RecurrentState(0, 0, 8),)}, "states"),
        ({"kv_groups": (replace(PROGRAM.kv_groups[0], window=0),)}, "kv_groups"),
        ({"kv_groups": (replace(PROGRAM.kv_groups[0], planes=()),)}, "kv_groups"),
        ({"kv_groups": (replace(PROGRAM.kv_groups[0], window=9),)}, "window"),
        ({"kv_groups": (replace(PROGRAM.kv_groups[0], planes=PROGRAM.kv_groups[0].planes[:1] * 2),)}, "planes"),
    ],
)
def test_broken_tables(changes, field):
    with pytest.raises(KernelError) as caught:
        validate(replace(PROGRAM, **changes))
    assert caught.value.param == field


def vector_program() -> Program:
    """PROGRAM without its head: what each row that wants a result gets is its last norm."""
    result = ref("final")
    buffers = tuple(replace(b, dtype="float32") if b.id == result.buffer else b for b in PROGRAM.buffers)
    output = Output("vector", result.width)
    return replace(PROGRAM, buffers=buffers, ops=PROGRAM.ops[:-1], result=result, output=output)


def test_a_program_may_end_with_vectors():
    validate(vector_program())
    with pytest.raises(KernelError) as caught:
        validate(replace(vector_program(), output=Output("vector", 31)))
    assert caught.value.param == "output"


def test_load_validates_and_checks_what_is_pulled():
    from test_linear_adapters import CAPACITY

    backend = ReferenceBackend()
    with pytest.raises(KernelError):
        backend.load(with_op(Norm, groups=5), "float32", pull_from({}), CAPACITY)
    weights = random_weights(PROGRAM)
    weights["layers.1.o"] = [weights["layers.1.o"][0][:-1]]
    with pytest.raises(KernelError, match=r"layers\.1\.o"):
        backend.load(PROGRAM, "float32", pull_from(weights), CAPACITY)
    with pytest.raises(KernelError, match="float16"):
        backend.load(PROGRAM, "float16", pull_from(weights), CAPACITY)
