"""Runs a single op through a backend: Embed ops over tables that hold its inputs feed it, ``tap`` reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np

from truffula.kernels.backend import Backend
from truffula.kernels.inputs import Capacity, StepInputs
from truffula.kernels.program import (
    Buffer,
    Embed,
    KvGroup,
    Logits,
    Op,
    Output,
    Program,
    RecurrentState,
    Ref,
    RopeRegime,
    RopeTable,
    Site,
    TakeRows,
    WeightDecl,
    WeightPart,
)
from truffula.testing.programs import AdapterTensors, as_dtype, attach, pull_from

CAPACITY = Capacity(
    max_tokens=64,
    max_seqs=8,
    max_logit_rows=64,
    max_segments=16,
    num_blocks=40,
    block_size=4,
    max_blocks_per_seq=16,
    num_states=12,
)


def exact(array: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values that ``dtype`` holds exactly: what the oracle computes with."""
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32).astype(np.float64)


def close(actual: np.ndarray, wanted: np.ndarray, dtype: str, roundings: int = 1) -> None:
    """float32: within 1e-5 of the largest value. bfloat16: within ``roundings`` of its last places (2^-8)."""
    unit = 1e-5 if dtype == "float32" else roundings * 2.0**-8
    scale = max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(actual, wanted, rtol=unit, atol=unit * scale)


@dataclass
class OneOp:
    """Collects inputs and weights, then ``run`` gives the op's output as float32."""

    dtype: str
    rows: int
    buffers: list[Buffer] = field(default_factory=list)
    weights: list[WeightDecl] = field(default_factory=list)
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    tables: list[RopeTable] = field(default_factory=list)
    regime: RopeRegime | None = None
    groups: list[KvGroup] = field(default_factory=list)
    states: list[RecurrentState] = field(default_factory=list)
    adapters: list[AdapterTensors] = field(default_factory=list)
    capacity: Capacity = CAPACITY

    def buffer(self, width: int, rows: str = "T", dtype: str = "model") -> Ref:
        self.buffers.append(Buffer(len(self.buffers), f"b{len(self.buffers)}", rows, width, dtype))
        return Ref(self.buffers[-1].id, 0, width)

    def weight(self, value: np.ndarray, uses: str, parts: list[int] | None = None) -> int:
        name = f"w{len(self.weights)}"
        pieces = np.split(value, parts) if parts else [value]
        decl = WeightDecl(
            len(self.weights), name, value.shape, tuple(WeightPart(f"{name}.{i}") for i in range(len(pieces))),
            frozenset(uses.split()),
        )  # fmt: skip
        self.weights.append(decl)
        self.values[name] = [as_dtype(piece, self.dtype) for piece in pieces]
        return decl.id

    def exact_vector(self, value: np.ndarray) -> int:
        """A vector that is kept in float32 whatever the dtype."""
        made = self.weight(value, "vector")
        self.weights[made] = replace(self.weights[made], dtype="float32")
        self.values[self.weights[made].name] = [value.astype(np.float32)]
        return made

    def input(self, value: np.ndarray, into: Ref | None = None) -> Ref:
        """``value [rows, width]`` in a buffer (or in the columns ``into``)."""
        table = self.weight(np.concatenate([value, np.zeros((1, value.shape[1]))]), "rows")
        ref = into or self.buffer(value.shape[1])
        self.ops.append(Embed(name=f"input{table}", table=table, out=ref))
        return ref

    def run(self, backend: Backend, op: Op, fill: Callable[[StepInputs], None] | None = None) -> np.ndarray:
        position = len(self.ops)
        x = self.input(np.ones((self.rows, 2)))
        self.ops.insert(position, self.ops.pop())
        self.ops.append(op)
        taken, logits = self.buffer(2, "R"), self.buffer(3, "R", "float32")
        head = self.weight(np.ones((3, 2)), "matmul")
        index = len(self.ops) - 1
        self.ops += [TakeRows(name="take", x=x, out=taken), Logits(name="logits", x=taken, weight=head, out=logits)]
        program = Program(
            name="one", vocab_size=3, buffers=tuple(self.buffers), weights=tuple(self.weights), sites=tuple(self.sites),
            rope_tables=tuple(self.tables), kv_groups=tuple(self.groups), states=tuple(self.states),
            ops=tuple(self.ops), result=logits, output=Output("logits", 3), max_positions=1000,
            rope_regime=self.regime,
        )  # fmt: skip
        executable = backend.load(program, self.dtype, pull_from(self.values), self.capacity, debug=True)
        for adapter in self.adapters:
            attach(executable, adapter)
        inputs = executable.inputs
        inputs.T, inputs.N, inputs.R = self.rows, 1, 1
        inputs.token_ids[: self.rows] = np.arange(self.rows)
        inputs.q_start[1] = inputs.kv_len[0] = self.rows
        if fill is not None:
            fill(inputs)
        executable.run()
        out = executable.tap(index)
        executable.close()
        return out
