"""Checks a program before it is loaded, so that no step fails because of shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from truffula.errors import KernelError
from truffula.kernels.liveness import written_by
from truffula.kernels.program import (
    Attention,
    Embed,
    Epilogue,
    Linear,
    Logits,
    Norm,
    Op,
    Pointwise,
    Program,
    Ref,
    Rope,
    RopeRows,
    Rows,
    TakeRows,
)


def validate(program: Program) -> None:
    """Raise ``KernelError`` naming the op and the field when the program cannot run.

    Checked: ids and column ranges, row kinds (T or R), widths against weights, weight uses, sites against the slices
    that name them, planes against their group, and that each buffer is written before it is read. No tensor is touched.
    """
    _check_tables(program)
    written: set[int] = set()
    for index, op in enumerate(program.ops):
        checker = _CHECKS.get(type(op))
        if checker is None:
            raise KernelError(f"op {index} ({op.name!r}): {type(op).__name__} is unknown to validate().", param="ops")
        checker(op, _Check(program, index, op, written))
    _check_result(program)


def _check_result(program: Program) -> None:
    last = program.ops[-1] if program.ops else None
    if last is None or written_by(last) != program.result:
        raise KernelError("the last op must write program.result.", param="result")
    if isinstance(last, Logits) != (program.output.kind == "logits"):
        raise KernelError(f"output is {program.output.kind}, but the last op is {type(last).__name__}.", param="output")
    width = program.vocab_size if program.output.kind == "logits" else program.result.width
    if not program.output.width == program.result.width == width:
        raise KernelError(
            f"the result is {program.result.width} wide and output says {program.output.width}; {width} are needed.",
            param="output",
        )
    buffer = program.buffers[program.result.buffer]
    if (buffer.rows, buffer.dtype) != ("R", "float32"):
        raise KernelError(f"the result {buffer.name!r} is not float32 with R rows.", param="result")


def _check_tables(program: Program) -> None:
    for decl in program.weights:
        if not decl.shape or min(decl.shape) < 1 or len(decl.shape) > 2:
            raise KernelError(f"weight {decl.name}: shape {decl.shape} is not [width] or [O, I].", param="shape")
        if not decl.parts:
            raise KernelError(f"weight {decl.name} has no parts.", param="parts")
        if unknown := decl.uses - {"rows", "matmul", "vector"}:
            raise KernelError(f"weight {decl.name}: unknown uses {sorted(unknown)}.", param="uses")
    for site in program.sites:
        if not site.modules or min(site.in_features, site.out_features) < 1:
            raise KernelError(f"site {site.id} has no module or no width.", param="sites")
    if program.states:
        raise KernelError("states of recurrent layers are not computed yet.", param="states")
    for group in program.kv_groups:
        if not group.planes or (group.window is not None and group.window < 1):
            raise KernelError(f"KV group {group.id} has no planes or the window {group.window}.", param="kv_groups")
    seen: set[int] = set()
    for plane in (plane for group in program.kv_groups for plane in group.planes):
        if plane.id in seen or plane.width < 1:
            raise KernelError(f"KV plane {plane.id} is declared twice or has width {plane.width}.", param="planes")
        seen.add(plane.id)


@dataclass(frozen=True)
class _Check:
    """The context of one op's checks. ``fail`` raises an error that names the op and the field."""

    program: Program
    index: int
    op: Op
    written: set[int]

    def fail(self, field: str, why: str) -> NoReturn:
        kind = type(self.op).__name__
        raise KernelError(f"op {self.index} ({kind} {self.op.name!r}), {field}: {why}", param=field, op=self.index)

    def ref(self, field: str, ref: Ref, rows: Rows | None = None, width: int | None = None) -> Rows:
        if not 0 <= ref.buffer < len(self.program.buffers):
            self.fail(field, f"buffer {ref.buffer} does not exist.")
        buffer = self.program.buffers[ref.buffer]
        if ref.start < 0 or ref.width < 1 or ref.start + ref.width > buffer.width:
            end = ref.start + ref.width
            self.fail(field, f"columns {ref.start}..{end} are outside {buffer.name!r} ({buffer.width} wide).")
        if rows is not None and buffer.rows != rows:
            self.fail(field, f"{buffer.name!r} has {buffer.rows} rows; {rows} needed.")
        if width is not None and ref.width != width:
            self.fail(field, f"is {ref.width} wide; {width} needed.")
        return buffer.rows

    def read(self, field: str, ref: Ref, rows: Rows | None = None, width: int | None = None) -> Rows:
        found = self.ref(field, ref, rows, width)
        if ref.buffer not in self.written:
            self.fail(field, f"{self.program.buffers[ref.buffer].name!r} is read before anything writes it.")
        return found

    def write(self, field: str, ref: Ref, rows: Rows | None = None, width: int | None = None) -> Rows:
        found = self.ref(field, ref, rows, width)
        self.written.add(ref.buffer)
        return found

    def weight(self, field: str, weight: int, use: str, shape: tuple[int | None, ...]) -> tuple[int, ...]:
        if not 0 <= weight < len(self.program.weights):
            self.fail(field, f"weight {weight} does not exist.")
        decl = self.program.weights[weight]
        if use not in decl.uses:
            self.fail(field, f"{decl.name} is not declared for {use!r} (uses {sorted(decl.uses)}).")
        fits = len(decl.shape) == len(shape) and all(
            want in (None, have) for have, want in zip(decl.shape, shape, strict=True)
        )
        if not fits:
            wanted = ["?" if n is None else n for n in shape]
            self.fail(field, f"{decl.name} has shape {list(decl.shape)}; {wanted} needed.")
        return decl.shape

    def site(self, field: str, site: int, kinds: tuple[str, ...], inputs: int, outputs: int) -> None:
        if not 0 <= site < len(self.program.sites):
            self.fail(field, f"site {site} does not exist.")
        found = self.program.sites[site]
        if found.kind not in kinds:
            self.fail(field, f"site {found.module} is of kind {found.kind!r}, not {' or '.join(kinds)}.")
        if (found.in_features, found.out_features) != (inputs, outputs):
            have = f"{found.in_features} -> {found.out_features}"
            self.fail(field, f"site {found.module} is {have}; {inputs} -> {outputs} needed.")


def _embed(op: Embed, check: _Check) -> None:
    if op.source == "extra":
        check.fail("source", "rows from the extra arena are not built yet.")
    check.weight("table", op.table, "rows", (None, op.out.width))
    if op.add is not None:
        check.read("add", op.add, "T", op.out.width)
    if op.site is not None:
        rows = check.program.weights[op.table].shape[0]
        check.site("site", op.site, ("embed",), rows, op.out.width)
    check.write("out", op.out, "T")


def _norm(op: Norm, check: _Check) -> None:
    rows = check.read("x", op.x)
    if op.groups < 1 or op.x.width % op.groups:
        check.fail("groups", f"{op.groups} groups do not divide {op.x.width} columns.")
    width = op.x.width // op.groups
    if op.weight is not None:
        check.weight("weight", op.weight, "vector", (width,))
    if op.bias is not None:
        check.weight("bias", op.bias, "vector", (width,))
    if op.plus is not None:
        check.read("plus", op.plus, rows, op.x.width)
    if op.site is not None:
        check.fail("site", "adapters on norms are not built yet.")
    check.write("out", op.out, rows, op.x.width)


def _epilogue(epilogue: Epilogue, outputs: int, rows: Rows, check: _Check) -> int:
    if epilogue.bias is not None:
        check.weight("epilogue.bias", epilogue.bias, "vector", (outputs,))
    if epilogue.glu:
        if outputs % 2:
            check.fail("epilogue.glu", f"{outputs} columns cannot be halved.")
        outputs //= 2
    if epilogue.residual is not None:
        check.read("epilogue.residual", epilogue.residual, rows, outputs)
    return outputs


def _linear(op: Linear, check: _Check) -> None:
    rows = check.read("x", op.x)
    outputs, _ = check.weight("weight", op.weight, "matmul", (None, op.x.width))
    end = 0
    for item in op.slices:
        if item.lo < end or item.hi <= item.lo or item.hi > outputs:
            check.fail("slices", f"{item.lo}..{item.hi} overlaps, is empty or is outside {outputs} columns.")
        check.site("slices", item.site, ("linear",), op.x.width, item.hi - item.lo)
        end = item.hi
    if op.slices and rows != "T":
        check.fail("x", "a Linear with sites works on T rows.")
    check.write("out", op.out, rows, _epilogue(op.epilogue, outputs, rows, check))


def _pointwise(op: Pointwise, check: _Check) -> None:
    rows = check.read("x", op.x)
    if (op.y is not None) != (op.kind in ("add", "sigmoid_mul")):
        check.fail("y", f"kind {op.kind!r} {'does not take' if op.y else 'needs'} a second operand.")
    if op.y is not None:
        check.read("y", op.y, rows, op.x.width)
    if (op.activation is not None) != (op.kind == "act"):
        check.fail("activation", f"must be set exactly for kind 'act'; the kind is {op.kind!r}.")
    if len(op.params) != (1 if op.kind in ("scale", "clip", "softcap") else 0):
        check.fail("params", f"kind {op.kind!r} got {len(op.params)} of them.")
    check.write("out", op.out, rows, op.x.width)


def _rope_rows(op: RopeRows, check: _Check) -> None:
    if not 0 <= op.table < len(check.program.rope_tables):
        check.fail("table", f"rope table {op.table} does not exist.")
    check.write("out", op.out, "T", 2 * len(check.program.rope_tables[op.table].inv_freq))


def _rope(op: Rope, check: _Check) -> None:
    check.read("x", op.x, "T", op.heads * op.head_dim)
    if op.dims < 2 or op.dims % 2 or op.start < 0 or op.start + op.dims > op.head_dim:
        check.fail("dims", f"columns {op.start}..{op.start + op.dims} of heads {op.head_dim} wide cannot be rotated.")
    check.read("rows", op.rows, "T", op.dims)


def _attention(op: Attention, check: _Check) -> None:
    if op.heads < 1 or op.kv_heads < 1 or op.heads % op.kv_heads:
        check.fail("kv_heads", f"{op.heads} heads cannot share {op.kv_heads} KV heads.")
    check.read("q", op.q, "T", op.heads * op.dim_k)
    check.read("k", op.k, "T", op.kv_heads * op.dim_k)
    check.read("v", op.v, "T", op.kv_heads * op.dim_v)
    if not 0 <= op.group < len(check.program.kv_groups):
        check.fail("group", f"KV group {op.group} does not exist.")
    group = check.program.kv_groups[op.group]
    if group.window is not None and (op.window is None or op.window > group.window):
        check.fail("window", f"the op reads keys behind the window of its KV group ({op.window} > {group.window}).")
    widths = {plane.id: plane.width for plane in group.planes}
    for plane, width in zip(op.planes, (op.k.width, op.v.width), strict=True):
        if widths.get(plane) != width:
            check.fail("planes", f"plane {plane} has width {widths.get(plane)} in group {op.group}; {width} needed.")
    if op.window is not None and op.window < 1:
        check.fail("window", f"{op.window} lets a query see nothing.")
    if op.sinks is not None:
        check.weight("sinks", op.sinks, "vector", (op.heads,))
    check.write("out", op.out, "T", op.heads * op.dim_v)


def _take_rows(op: TakeRows, check: _Check) -> None:
    check.read("x", op.x, "T")
    check.write("out", op.out, "R", op.x.width)


def _logits(op: Logits, check: _Check) -> None:
    check.read("x", op.x, "R")
    outputs, _ = check.weight("weight", op.weight, "matmul", (None, op.x.width))
    if op.bias is not None:
        check.weight("bias", op.bias, "vector", (outputs,))
    if op.site is not None:
        check.site("site", op.site, ("head", "linear"), op.x.width, outputs)
    if check.program.buffers[op.out.buffer].dtype != "float32":
        check.fail("out", "logits are float32.")
    check.write("out", op.out, "R", outputs)


_CHECKS: dict[type[Op], Callable[..., None]] = {
    Embed: _embed,
    Norm: _norm,
    Linear: _linear,
    Pointwise: _pointwise,
    RopeRows: _rope_rows,
    Rope: _rope,
    Attention: _attention,
    TakeRows: _take_rows,
    Logits: _logits,
}
