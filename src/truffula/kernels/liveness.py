"""Which buffers an op names, and how long each is needed: what backends plan their memory by."""

from __future__ import annotations

from truffula.kernels.program import Op, Program, Ref, Rope


def refs(op: Op) -> list[Ref]:
    """Every buffer range an op names, read or written."""
    values = list(vars(op).values())
    if (epilogue := getattr(op, "epilogue", None)) is not None:
        values.append(epilogue.residual)
    return [value for value in values if isinstance(value, Ref)]


def dead_after(program: Program) -> list[tuple[int, ...]]:
    """Per op, the buffers nobody touches behind it; the logits stay."""
    last = {ref.buffer: index for index, op in enumerate(program.ops) for ref in refs(op)}
    last.pop(program.result.buffer, None)
    return [tuple(b for b, at in last.items() if at == index) for index in range(len(program.ops))]


def peak_bytes(program: Program, tokens: int, logit_rows: int, model_bytes: int) -> int:
    """Bytes of buffers alive at once at full capacity."""
    dead = dead_after(program)
    alive: dict[int, int] = {}
    peak = 0
    for index, op in enumerate(program.ops):
        for ref in refs(op):
            buffer = program.buffers[ref.buffer]
            rows = tokens if buffer.rows == "T" else logit_rows
            alive[ref.buffer] = rows * buffer.width * (4 if buffer.dtype == "float32" else model_bytes)
        peak = max(peak, sum(alive.values()))
        for gone in dead[index]:
            alive.pop(gone, None)
    return peak


def written_by(op: Op) -> Ref:
    """The range an op writes; ``Rope`` works in place."""
    out: Ref = op.x if isinstance(op, Rope) else op.out  # type: ignore[attr-defined]  # every other op has an out
    return out
