"""Which buffers an op names, and from which op to which each is needed: what backends plan their memory by."""

from __future__ import annotations

from truffula.kernels.program import Op, Program, Ref, Rope


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


def peak_bytes(program: Program, tokens: int, logit_rows: int, model_bytes: int) -> int:
    """The most bytes of buffers that are needed at the same time, with this many rows."""
    needed = [0] * len(program.ops)
    for buffer, (first, last) in zip(program.buffers, spans(program), strict=True):
        rows = tokens if buffer.rows == "T" else logit_rows
        nbytes = rows * buffer.width * (4 if buffer.dtype == "float32" else model_bytes)
        for index in range(first, min(last + 1, len(program.ops))):
            needed[index] += nbytes
    return max(needed, default=0)
