"""Places a program's buffers in one block of memory; buffers that are never needed at the same time share bytes."""

from __future__ import annotations

from dataclasses import dataclass

from truffula.kernels.inputs import Capacity
from truffula.kernels.liveness import spans
from truffula.kernels.program import Program

_ALIGN = 16
"""Floats of a cache line: every row begins on a cache line."""


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
