"""The buffers that each op names, from which op to which each is needed, and their places in one block of memory."""

from __future__ import annotations

from dataclasses import dataclass

from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Op, Program, Ref, Rope

_ALIGN = 16
"""Floats of a cache line: every row begins on a cache line."""


def refs(op: Op) -> list[Ref]:
    """Every buffer range an op names, read or written."""
    values = list(vars(op).values())
    if (epilogue := getattr(op, "epilogue", None)) is not None:
        values.append(epilogue.residual)
    return [value for value in values if isinstance(value, Ref)]


def written_by(op: Op) -> Ref:
    """The range an op writes; ``Rope`` works in place."""
    out: Ref = op.x if isinstance(op, Rope) else op.out  # type: ignore[attr-defined]  # every other op has an out
    return out


def spans(program: Program) -> list[tuple[int, int]]:
    """Per buffer the first and the last op that names it. The result's last is ``len(ops)``: it outlives the step.

    A buffer that no op names has the empty span ``(len(ops), -1)``.
    """
    found = [(len(program.ops), -1)] * len(program.buffers)
    for index, op in enumerate(program.ops):
        for ref in refs(op):
            first, last = found[ref.buffer]
            found[ref.buffer] = (min(first, index), max(last, index))
    found[program.result.buffer] = (found[program.result.buffer][0], len(program.ops))
    return found


def dead_after(program: Program) -> list[tuple[int, ...]]:
    """Per op the buffers that no later op names."""
    last = [last for _, last in spans(program)]
    return [tuple(b for b, at in enumerate(last) if at == index) for index in range(len(program.ops))]


@dataclass(frozen=True)
class ArenaPlan:
    """Per buffer the offset of its first row and the distance of its rows; ``floats`` is the size of the arena. All in
    floats."""

    offsets: tuple[int, ...]
    strides: tuple[int, ...]
    floats: int


def plan_arena(program: Program, capacity: Capacity, *, reuse: bool) -> ArenaPlan:
    """Place buffers by first fit, the largest first. Those whose spans of ops meet do not overlap.

    ``reuse`` False gives every buffer bytes of its own, for taps.
    """
    needed = spans(program)
    strides = tuple(-(-b.width // _ALIGN) * _ALIGN for b in program.buffers)
    sizes = [
        stride * (capacity.max_tokens if b.rows == "T" else capacity.max_logit_rows)
        for b, stride in zip(program.buffers, strides, strict=True)
    ]
    offsets = [0] * len(sizes)
    placed: list[int] = []
    for buffer in sorted(range(len(sizes)), key=lambda b: -sizes[b]):
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in placed
            if not reuse or (needed[buffer][0] <= needed[other][1] and needed[other][0] <= needed[buffer][1])
        )
        at = 0
        for lo, hi in taken:
            if at + sizes[buffer] <= lo:
                break
            at = max(at, hi)
        offsets[buffer] = at
        placed.append(buffer)
    return ArenaPlan(tuple(offsets), strides, max((o + s for o, s in zip(offsets, sizes, strict=True)), default=0))
