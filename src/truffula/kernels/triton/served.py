"""Which ops kernels compute. Needs neither torch nor triton."""

from __future__ import annotations

from collections import Counter

from truffula.kernels.program import (
    Attention,
    Embed,
    Linear,
    Logits,
    Norm,
    Op,
    Pointwise,
    Program,
    Rope,
    RopeRows,
    TakeRows,
)


def has_kernel(program: Program, op: Op) -> bool:
    """Whether kernels compute ``op``; else torch does."""
    match op:
        case Pointwise():
            return op.kind != "xielu"
        case RopeRows():
            return program.rope_tables[op.table].border == 0
    return isinstance(op, Embed | Norm | Linear | Rope | Attention | TakeRows | Logits)


def ops_without_kernels(program: Program) -> str:
    """Those that torch computes on a GPU, with their number, the most frequent first; empty: none."""
    found = Counter(type(op).__name__ for op in program.ops if not has_kernel(program, op))
    return ", ".join(f"{count} {name}" for name, count in found.most_common())
