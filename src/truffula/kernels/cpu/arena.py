"""Where a program's buffers lie: one stretch of memory, shared by buffers that are never needed at once."""

from __future__ import annotations

from dataclasses import dataclass

from truffula.kernels.inputs import Capacity
from truffula.kernels.liveness import refs
from truffula.kernels.program import Program

_ALIGN = 16
"""Floats of a cache line: rows begin on one."""


@dataclass(frozen=True)
class ArenaPlan:
    """Per buffer its first float and the floats from row to row; ``floats`` is the whole."""

    offsets: tuple[int, ...]
    strides: tuple[int, ...]
    floats: int


def plan_arena(program: Program, capacity: Capacity, *, reuse: bool) -> ArenaPlan:
    """First fit over the ops between a buffer's first and last use. The logits stay until the next step.

    ``reuse`` False gives every buffer its own place (for taps and for looking at).
    """
    spans = _spans(program)
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
            if not reuse or _meet(spans[buffer], spans[other])
        )
        at = 0
        for lo, hi in taken:
            if at + sizes[buffer] <= lo:
                break
            at = max(at, hi)
        offsets[buffer] = at
        placed.append(buffer)
    return ArenaPlan(tuple(offsets), strides, max((o + s for o, s in zip(offsets, sizes, strict=True)), default=0))


def _spans(program: Program) -> list[tuple[int, int]]:
    spans = [(len(program.ops), -1)] * len(program.buffers)
    for index, op in enumerate(program.ops):
        for ref in refs(op):
            lo, hi = spans[ref.buffer]
            spans[ref.buffer] = (min(lo, index), max(hi, index))
    spans[program.result.buffer] = (spans[program.result.buffer][0], len(program.ops))
    return spans


def _meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]
