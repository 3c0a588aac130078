"""Checks a program before it is loaded, so that no step fails because of shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from truffula.errors import KernelError
from truffula.kernels.arena import written_by
from truffula.kernels.program import (
    Attention,
    CausalConv,
    Embed,
    ExpertLinear,
    GatedDelta,
    Linear,
    Logits,
    Mamba2,
    Mla,
    Norm,
    Op,
    Pointwise,
    Program,
    Ref,
    Rope,
    RopeRows,
    Route,
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


def _require(field: str, holds: bool, why: str) -> None:
    if not holds:
        raise KernelError(why, param=field)


def _check_tables(program: Program) -> None:
    for decl in program.weights:
        shaped = 1 <= len(decl.shape) <= 3 and min(decl.shape) >= 1
        _require("shape", shaped, f"weight {decl.name}: shape {decl.shape} is not [width], [O, I] or [E, O, I].")
        _require("parts", bool(decl.parts), f"weight {decl.name} has no parts.")
        unknown = sorted(decl.uses - {"rows", "matmul", "vector", "conv"})
        _require("uses", not unknown, f"weight {decl.name}: unknown uses {unknown}.")
    for site in program.sites:
        wide = bool(site.modules) and min(site.in_features, site.out_features) >= 1
        _require("sites", wide, f"site {site.id} has no module or no width.")
    _check_states(program)
    seen: set[int] = set()
    for group in program.kv_groups:
        usable = bool(group.planes) and (group.window is None or group.window >= 1)
        _require("kv_groups", usable, f"KV group {group.id} has no planes or the window {group.window}.")
        for plane in group.planes:
            new = plane.id not in seen and plane.width >= 1
            _require("planes", new, f"KV plane {plane.id} is declared twice or has width {plane.width}.")
            seen.add(plane.id)


def _check_states(program: Program) -> None:
    owners = Counter(getattr(op, "state", None) for op in program.ops)
    for state in program.states:
        _require("states", state.width >= 1, f"state {state.id} has width {state.width}.")
        _require("states", owners[state.id] == 1, f"state {state.id} is used by {owners[state.id]} ops instead of one.")


def _check_result(program: Program) -> None:
    last, output = program.ops[-1] if program.ops else None, program.output
    if last is None or written_by(last) != program.result:
        raise KernelError("the last op must write program.result.", param="result")
    fits = isinstance(last, Logits) == (output.kind == "logits")
    _require("output", fits, f"output is {output.kind}, but the last op is {type(last).__name__}.")
    width = program.vocab_size if output.kind == "logits" else program.result.width
    _require(
        "output", output.width == program.result.width == width,
        f"the result is {program.result.width} wide and output says {output.width}; {width} are needed.",
    )  # fmt: skip
    buffer = program.buffers[program.result.buffer]
    served = (buffer.rows, buffer.dtype) == ("R", "float32")
    _require("result", served, f"the result {buffer.name!r} is not float32 with R rows.")


@dataclass(frozen=True)
class _Check:
    """Checks of one op's fields. Each raises an error that names the op and the field; an absent operand passes."""

    program: Program
    index: int
    op: Op
    written: set[int]

    def require(self, field: str, holds: bool, why: str) -> None:
        if not holds:
            kind = type(self.op).__name__
            raise KernelError(f"op {self.index} ({kind} {self.op.name!r}), {field}: {why}", param=field, op=self.index)

    def read(self, field: str, ref: Ref | None, rows: Rows | None = None, width: int | None = None) -> Rows | None:
        """The kind of rows of the buffer, which must have been written."""
        found = self._columns(field, ref, rows, width)
        self.require(field, ref is None or ref.buffer in self.written, "is read before an op writes it.")
        return found

    def write(self, field: str, ref: Ref, rows: Rows | None = None, width: int | None = None) -> None:
        self._columns(field, ref, rows, width)
        self.written.add(ref.buffer)

    def _columns(self, field: str, ref: Ref | None, rows: Rows | None, width: int | None) -> Rows | None:
        if ref is None:
            return None
        self.require(field, 0 <= ref.buffer < len(self.program.buffers), f"buffer {ref.buffer} does not exist.")
        buffer, end = self.program.buffers[ref.buffer], ref.start + ref.width
        inside = 0 <= ref.start < end <= buffer.width
        self.require(field, inside, f"columns {ref.start}..{end} are outside {buffer.name!r} ({buffer.width} wide).")
        self.require(field, rows in (None, buffer.rows), f"{buffer.name!r} has {buffer.rows} rows; {rows} needed.")
        self.require(field, width in (None, ref.width), f"is {ref.width} wide; {width} needed.")
        return buffer.rows

    def vector(self, field: str, weight: int | None, width: int) -> None:
        if weight is not None:
            self.weight(field, weight, "vector", (width,))

    def weight(self, field: str, weight: int, use: str, shape: tuple[int | None, ...]) -> tuple[int, ...]:
        self.require(field, 0 <= weight < len(self.program.weights), f"weight {weight} does not exist.")
        decl = self.program.weights[weight]
        declared = f"{decl.name} is not declared for {use!r} (uses {sorted(decl.uses)})."
        self.require(field, use in decl.uses, declared)
        wanted = [have if want is None else want for have, want in zip(decl.shape, shape, strict=False)]
        fits = len(decl.shape) == len(shape) and list(decl.shape) == wanted
        self.require(field, fits, f"{decl.name} has shape {list(decl.shape)}; {list(shape)} needed (None: any).")
        return decl.shape

    def state(self, field: str, state: int, width: int) -> None:
        self.require(field, 0 <= state < len(self.program.states), f"state {state} does not exist.")
        found = self.program.states[state].width
        self.require(field, found == width, f"state {state} is {found} wide; {width} needed.")

    def site(self, field: str, site: int | None, kinds: tuple[str, ...], inputs: int, outputs: int) -> None:
        if site is None:
            return
        self.require(field, 0 <= site < len(self.program.sites), f"site {site} does not exist.")
        found = self.program.sites[site]
        kind = f"site {found.module} is of kind {found.kind!r}, not {' or '.join(kinds)}."
        self.require(field, found.kind in kinds, kind)
        have = found.in_features, found.out_features
        widths = f"site {found.module} is {have[0]} -> {have[1]}; {inputs} -> {outputs} needed."
        self.require(field, have == (inputs, outputs), widths)


def _embed(op: Embed, check: _Check) -> None:
    rows, width = check.weight("table", op.table, "rows", (None, op.out.width))
    check.read("add", op.add, "T", width)
    check.site("site", op.site, ("embed",), rows, width)
    check.write("out", op.out, "T")


def _norm(op: Norm, check: _Check) -> None:
    rows = check.read("x", op.x)
    divided = op.groups >= 1 and op.x.width % op.groups == 0
    check.require("groups", divided, f"{op.groups} groups do not divide {op.x.width} columns.")
    shared = op.weight is None or check.program.weights[op.weight].shape[0] * op.groups == op.x.width
    for name, vector in (("weight", op.weight), ("bias", op.bias)):
        check.vector(name, vector, op.x.width // op.groups if shared else op.x.width)
    check.read("gate", op.gate, rows, op.x.width)
    needed = "must be set exactly where a gate is."
    check.require("gate_activation", (op.gate is None) == (op.gate_activation is None), needed)
    check.read("plus", op.plus, rows, op.x.width)
    check.require("site", op.site is None or op.weight is not None, "a norm without a weight has no site.")
    if op.weight is not None:
        width = check.program.weights[op.weight].shape[0]
        check.site("site", op.site, ("norm",), width, width)
    check.write("out", op.out, rows, op.x.width)


def _linear(op: Linear, check: _Check) -> None:
    rows = check.read("x", op.x)
    outputs, _ = check.weight("weight", op.weight, "matmul", (None, op.x.width))
    end = 0
    for item in op.slices:
        why = f"{item.lo}..{item.hi} overlaps, is empty or is outside {outputs} columns."
        check.require("slices", end <= item.lo < item.hi <= outputs, why)
        check.site("slices", item.site, ("linear",), op.x.width, item.hi - item.lo)
        end = item.hi
    check.require("x", not op.slices or rows == "T", "a Linear with sites works on T rows.")
    check.vector("epilogue.bias", op.epilogue.bias, outputs)
    if op.epilogue.glu:
        check.require("epilogue.glu", outputs % 2 == 0, f"{outputs} columns cannot be halved.")
        outputs //= 2
    check.read("epilogue.residual", op.epilogue.residual, rows, outputs)
    check.write("out", op.out, rows, outputs)


def _pointwise(op: Pointwise, check: _Check) -> None:
    rows = check.read("x", op.x)
    needs = f"kind {op.kind!r} {'does not take' if op.y else 'needs'} a second operand."
    check.require("y", (op.y is not None) == (op.kind in ("add", "mul", "sigmoid_mul")), needs)
    shared = op.y is not None and op.kind != "add" and op.y.width > 0 and op.x.width % op.y.width == 0
    check.read("y", op.y, rows, None if shared else op.x.width)
    only = f"must be set exactly for kind 'act'; the kind is {op.kind!r}."
    check.require("activation", op.kind == "mul" or (op.activation is not None) == (op.kind == "act"), only)
    count = {"scale": 1, "clip": 1, "softcap": 1, "position_scale": 3}.get(op.kind, 0)
    count = 0 if op.kind == "scale" and op.weight is not None else count
    check.require("params", len(op.params) == count, f"kind {op.kind!r} got {len(op.params)} of them.")
    stored = op.kind == "xielu" if op.weight is None else op.kind not in ("scale", "xielu")
    check.require("weight", not stored, f"kind {op.kind!r} has {op.weight}.")
    check.vector("weight", op.weight, 4 if op.kind == "xielu" else 1)
    check.require("x", op.kind != "position_scale" or rows == "T", "rows without tokens have no position.")
    check.write("out", op.out, rows, op.x.width)


def _rope_rows(op: RopeRows, check: _Check) -> None:
    tables = check.program.rope_tables
    check.require("table", 0 <= op.table < len(tables), f"rope table {op.table} does not exist.")
    table = tables[op.table]
    pairs = len(table.inv_freq)
    long = len(table.long_freq) == pairs if table.long_freq else pairs > 1 and table.growth >= 1
    check.require("table", table.border == 0 or (table.border > 0 and long), "no table for lengths above its border.")
    regime = check.program.rope_regime
    known = table.border == 0 or (regime is not None and regime.border == table.border)
    check.require("table", known, f"its border {table.border} is not that of the program's rope_regime.")
    check.write("out", op.out, "T", 2 * pairs)


def _rope(op: Rope, check: _Check) -> None:
    check.read("x", op.x, "T", op.heads * op.head_dim)
    fits = op.dims >= 2 and op.dims % 2 == 0 and 0 <= op.start <= op.head_dim - op.dims
    columns = f"columns {op.start}..{op.start + op.dims} of heads {op.head_dim} wide cannot be rotated."
    check.require("dims", fits, columns)
    check.read("rows", op.rows, "T", op.dims)


def _attention(op: Attention, check: _Check) -> None:
    shared = op.heads >= 1 and op.kv_heads >= 1 and op.heads % op.kv_heads == 0
    check.require("kv_heads", shared, f"{op.heads} heads cannot share {op.kv_heads} KV heads.")
    check.read("q", op.q, "T", op.heads * op.dim_k)
    check.read("k", op.k, "T", op.kv_heads * op.dim_k)
    check.read("v", op.v, "T", op.kv_heads * op.dim_v)
    groups = check.program.kv_groups
    check.require("group", 0 <= op.group < len(groups), f"KV group {op.group} does not exist.")
    group = groups[op.group]
    widths = {plane.id: plane.width for plane in group.planes}
    check.require("v", (op.k is None) == (op.v is None), "k and v are written together.")
    for plane, width in zip(op.planes, (op.kv_heads * op.dim_k, op.kv_heads * op.dim_v), strict=True):
        why = f"plane {plane} has width {widths.get(plane)} in group {op.group}; {width} needed."
        check.require("planes", widths.get(plane) == width, why)
    check.require("window", op.window is None or op.window >= 1, f"{op.window} lets a query see nothing.")
    kept = group.window is None or (op.window is not None and op.window <= group.window)
    behind = f"the op reads keys behind the window of its KV group ({op.window} > {group.window})."
    check.require("window", kept, behind)
    check.require("chunked", not op.chunked or op.window is not None, "needs a window, the length of a chunk.")
    check.vector("sinks", op.sinks, op.heads)
    check.require("alibi", len(op.alibi) in (0, op.heads), f"{len(op.alibi)} slopes for {op.heads} heads.")
    check.write("out", op.out, "T", op.heads * op.dim_v)


def _mla(op: Mla, check: _Check) -> None:
    sizes = min(op.heads, op.nope, op.rope, op.dim_v, op.rank) >= 1
    check.require("heads", sizes, "a count or a width is below 1.")
    check.read("q", op.q, "T", op.heads * (op.nope + op.rope))
    check.read("latent", op.latent, "T", op.rank + op.rope)
    outputs = op.heads * (op.nope + op.dim_v)
    check.weight("kv_b", op.kv_b, "matmul", (outputs, op.rank))
    check.require("slices", len(op.slices) <= 1, "kv_b has one site.")
    for item in op.slices:
        check.require("slices", (item.lo, item.hi) == (0, outputs), f"a site has all {outputs} columns.")
        check.site("slices", item.site, ("linear",), op.rank, outputs)
    groups = check.program.kv_groups
    check.require("group", 0 <= op.group < len(groups), f"KV group {op.group} does not exist.")
    check.require("group", groups[op.group].window is None, "the op reads all keys; the group has a window.")
    width = {plane.id: plane.width for plane in groups[op.group].planes}.get(op.plane)
    why = f"plane {op.plane} has width {width} in group {op.group}; {op.latent.width} needed."
    check.require("plane", width == op.latent.width, why)
    check.write("out", op.out, "T", op.heads * op.dim_v)


def _gated_delta(op: GatedDelta, check: _Check) -> None:
    shared = op.heads >= 1 and op.key_heads >= 1 and op.heads % op.key_heads == 0
    check.require("key_heads", shared, f"{op.heads} heads cannot share {op.key_heads} key heads.")
    check.read("q", op.q, "T", op.key_heads * op.dim_k)
    check.read("k", op.k, "T", op.key_heads * op.dim_k)
    check.read("v", op.v, "T", op.heads * op.dim_v)
    widths = (op.heads, op.heads * op.dim_k)
    check.require("decay", op.decay.width in widths, f"is {op.decay.width} wide; {widths[0]} or {widths[1]} needed.")
    check.read("decay", op.decay, "T")
    check.read("beta", op.beta, "T", op.heads)
    check.vector("rate", op.rate, op.heads)
    check.vector("dt_bias", op.dt_bias, op.decay.width)
    check.state("state", op.state, op.heads * op.dim_k * op.dim_v)
    check.write("out", op.out, "T", op.heads * op.dim_v)


def _route(op: Route, check: _Check) -> None:
    check.read("logits", op.logits, "T")
    experts, groups = op.logits.width, op.groups
    divided = groups >= 1 and experts % groups == 0 and 1 <= op.topk_groups <= groups
    check.require("groups", divided, f"{op.topk_groups} of {groups} groups of {experts} experts.")
    of_each = experts // groups
    check.require("k", 1 <= op.k <= of_each * op.topk_groups, f"{op.k} of {of_each * op.topk_groups} experts.")
    check.require("group_score", groups == 1 or op.group_score == "max" or of_each >= 2, "a group has one expert.")
    check.vector("correction", op.correction, experts)
    check.vector("expert_scale", op.expert_scale, experts)
    mixes = op.score == "sparsemixer" and (op.correction, op.expert_scale) != (None, None)
    check.require("score", not mixes, "sparsemixer takes neither a correction nor an expert_scale.")
    check.write("out", op.out, "T", 2 * op.k)
    for field, ref in (("logits", op.logits), ("out", op.out)):
        check.require(field, check.program.buffers[ref.buffer].dtype == "float32", "must be float32.")


def _expert_linear(op: ExpertLinear, check: _Check) -> None:
    check.read("x", op.x, "T")
    check.read("routes", op.routes, "T")
    check.require("routes", op.routes.width % 2 == 0, "are numbers of experts and as many weights.")
    k = op.routes.width // 2
    experts, outputs, inputs = check.weight("weight", op.weight, "matmul", (None, None, None))
    check.require("x", op.x.width in (inputs, k * inputs), f"is {op.x.width} wide; {inputs} or {k * inputs} needed.")
    end = 0
    for item in op.slices:
        one = item.lo // outputs == (item.hi - 1) // outputs
        why = f"{item.lo}..{item.hi} overlaps, is empty or is not within the {outputs} columns of one expert."
        check.require("slices", end <= item.lo < item.hi <= experts * outputs and one, why)
        check.site("slices", item.site, ("linear",), inputs, item.hi - item.lo)
        end = item.hi
    check.vector("epilogue.bias", op.epilogue.bias, experts * outputs)
    if op.epilogue.glu:
        check.require("epilogue.glu", outputs % 2 == 0, f"{outputs} columns cannot be halved.")
        outputs //= 2
    alone = op.epilogue.residual is None or op.combine != "none"
    check.require("epilogue.residual", alone, "is added to a sum; combine is 'none'.")
    check.read("epilogue.residual", op.epilogue.residual, "T", outputs)
    check.write("out", op.out, "T", outputs if op.combine != "none" else k * outputs)


def _causal_conv(op: CausalConv, check: _Check) -> None:
    check.read("x", op.x, "T")
    _, taps = check.weight("weight", op.weight, "conv", (op.x.width, None))
    check.vector("bias", op.bias, op.x.width)
    check.state("state", op.state, (taps - 1) * op.x.width)
    check.write("out", op.out, "T", op.x.width)


def _mamba2(op: Mamba2, check: _Check) -> None:
    shared = min(op.heads, op.groups, op.head_dim, op.state_size) >= 1 and op.heads % op.groups == 0
    check.require("groups", shared, f"{op.heads} heads cannot share {op.groups} groups.")
    check.read("x", op.x, "T", op.heads * op.head_dim)
    check.read("b", op.b, "T", op.groups * op.state_size)
    check.read("c", op.c, "T", op.groups * op.state_size)
    check.read("dt", op.dt, "T", op.heads)
    check.vector("dt_bias", op.dt_bias, op.heads)
    check.vector("skip", op.skip, op.heads)
    one = check.weight("rate", op.rate, "vector", (None,)) == (op.heads,)
    check.vector("rate", op.rate, op.heads if one else op.heads * op.state_size)
    check.require("dt_limit", 0 <= op.dt_limit[0] < op.dt_limit[1], f"{op.dt_limit} is empty or below 0.")
    check.state("state", op.state, op.heads * op.head_dim * op.state_size)
    check.write("out", op.out, "T", op.x.width)


def _take_rows(op: TakeRows, check: _Check) -> None:
    check.read("x", op.x, "T")
    check.write("out", op.out, "R", op.x.width)


def _logits(op: Logits, check: _Check) -> None:
    check.read("x", op.x, "R")
    outputs, _ = check.weight("weight", op.weight, "matmul", (None, op.x.width))
    check.vector("bias", op.bias, outputs)
    check.site("site", op.site, ("head", "linear"), op.x.width, outputs)
    check.write("out", op.out, "R", outputs)
    check.require("out", check.program.buffers[op.out.buffer].dtype == "float32", "logits are float32.")


_CHECKS: dict[type[Op], Callable[..., None]] = {
    Embed: _embed,
    Norm: _norm,
    Linear: _linear,
    Pointwise: _pointwise,
    RopeRows: _rope_rows,
    Rope: _rope,
    Attention: _attention,
    Mla: _mla,
    GatedDelta: _gated_delta,
    CausalConv: _causal_conv,
    Mamba2: _mamba2,
    Route: _route,
    ExpertLinear: _expert_linear,
    TakeRows: _take_rows,
    Logits: _logits,
}
