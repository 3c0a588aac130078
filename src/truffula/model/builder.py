"""``ProgramBuilder`` collects buffers, weights, sites and ops; ``LayerBuilder`` is what a part of a layer writes with.

Each op has a probe, the place of the same value in transformers. The output of a fused linear is at the modules of its
slices; a gated product or a residual sum is the input of the next module; q and k after rope are the inputs of the
attention module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from truffula.kernels.program import (
    Activation,
    Buffer,
    BufferDtype,
    CausalConv,
    Epilogue,
    ExpertLinear,
    KvGroup,
    KvPlane,
    Linear,
    ModuleSlice,
    Norm,
    Op,
    Pointwise,
    Probe,
    RecurrentState,
    Ref,
    RopeRows,
    Rows,
    Site,
    SiteSlice,
    Transform,
    WeightDecl,
    WeightPart,
)
from truffula.kernels.stacked import StackedSlice
from truffula.model.names import WeightNames
from truffula.model.rows import NormSpec, WeightRow
from truffula.model.spec import Branch, ModelSpec, ModuleNames
from truffula.weights.tying import Tie, TyingDecision

_PLAIN = Epilogue()
Gate = tuple[Ref, Activation]
"""Columns, and the activation of them that a norm's result is multiplied by."""


class ProgramBuilder:
    """The pieces of a program. Buffers are shared by all layers and as wide as their widest use. Embedding and head
    have ``more_ids`` rows of zeros behind the file's."""

    def __init__(self, spec: ModelSpec, names: WeightNames, tie: TyingDecision, more_ids: int = 0) -> None:
        self.spec, self.names, self.tie, self.more_ids = spec, names, tie, more_ids
        self.vocab_size = spec.vocab_size + more_ids
        self.buffers: dict[str, Buffer] = {}
        self.weights: list[WeightDecl] = []
        self.sites: list[Site] = []
        self.ops: list[Op] = []
        self.rows = {row.key: row for row in spec.rows}
        self.weight_ids: dict[str, int] = {}
        self.site_slices: dict[str, tuple[SiteSlice, ...]] = {}
        self.kv_groups = _kv_groups(spec)
        self.states: list[RecurrentState] = []

    def buffer(self, name: str, width: int, rows: Rows = "T", dtype: BufferDtype = "model") -> Ref:
        """The first ``width`` columns of the buffer ``name``, which is created or widened where needed."""
        old = self.buffers.get(name)
        found = Buffer(len(self.buffers), name, rows, width, dtype) if old is None else old
        self.buffers[name] = replace(found, width=max(found.width, width))
        return Ref(found.id, 0, width)

    def rope_rows(self, table: int) -> Ref:
        """The buffer with cos and sin of a rope table."""
        return self.buffer(f"rope{table}", self.spec.ropes[table].dims)

    def write_rope_rows(self) -> None:
        """Append the ops that fill the rope buffers, once a step."""
        for table in range(len(self.spec.ropes)):
            self.ops.append(RopeRows(name=f"rope{table}", table=table, out=self.rope_rows(table)))

    def tables(self) -> tuple[int, int]:
        """The weight ids of embedding and head, which are equal when tied."""
        tied, shape = self.tie.tie is not Tie.SEPARATE, self.rows["embed"].shape
        if tied:
            source = self.names.head if self.tie.tie is Tie.REVERSED else self.names.embed
            both = self.declare("embed", shape, (WeightPart(source),), "rows", "matmul")
            return both, both
        embed = self.declare("embed", shape, (WeightPart(self.names.embed),), "rows")
        return embed, self.declare("head", shape, (WeightPart(self.names.head),), "matmul")

    def declare(self, key: str, shape: tuple[int, ...], parts: tuple[WeightPart, ...], *uses: str) -> int:
        """The id of a new weight with the row ``key``."""
        row = self.rows[key]
        if self.more_ids and key in ("embed", "head", "head.bias"):
            parts = (*parts, WeightPart("", stored=(self.more_ids, *shape[1:])))
            shape = (self.vocab_size, *shape[1:])
        decl = WeightDecl(len(self.weights), row.name, shape, parts, frozenset(uses), row.dtype)
        self.weights.append(decl)
        self.weight_ids[key] = decl.id
        return decl.id

    def weight(self, key: str) -> int:
        """The id of a row's weight, which is declared with its sites at the first use."""
        if key in self.weight_ids:
            return self.weight_ids[key]
        row = self.rows[key]
        matrix = row.kind in ("linear", "experts") and row.width > 0
        use = {"conv": "conv", "table": "rows"}.get(row.kind, "matmul" if matrix else "vector")
        weight = self.declare(key, row.shape, self.names.parts[key], use)
        if matrix:
            sites = self._expert_sites(row) if row.experts else self._linear_sites(row)
            self.site_slices[key] = tuple(sites)
        return weight

    def _linear_sites(self, row: WeightRow) -> Iterator[SiteSlice]:
        body, lo = self.spec.names.body, 0
        for item in row.slices:
            hi = lo + item.rows
            names = [name for name in (item.module, item.alias) if name is not None]
            modules = [ModuleSlice(body + name, 0, item.rows, item.rows, item.order) for name in names]
            if row.fused is not None:
                modules.append(ModuleSlice(body + row.fused, lo, hi, row.rows))
            site = self.site("linear", row.layer, row.width, item.rows, modules, transform=row.transform)
            yield SiteSlice(site, lo, hi)
            lo = hi

    def _expert_sites(self, row: WeightRow) -> Iterator[SiteSlice]:
        """A site for each slice of each expert. PEFT has them as modules or within a parameter of all experts."""
        body = self.spec.names.body
        stacked = next((layout for layout in row.layouts if layout.parameter is not None), None)
        parameter, count, height = f"{body}{stacked and stacked.parameter}", len(row.slices), row.rows
        names = [(body + item.module).partition("{e}") for item in row.slices]
        for expert in range(row.experts):
            lo = 0
            for number, (item, (before, _, after)) in enumerate(zip(row.slices, names, strict=True)):
                module, place = ModuleSlice(f"{before}{expert}{after}", 0, item.rows, item.rows), None
                if stacked is not None:
                    first, step = (number, count) if stacked.alternating else (lo, 1)
                    place = StackedSlice(parameter, expert, row.experts, first, step, height,
                                         stacked.columns, stacked.peft_columns)  # fmt: skip
                site = self.site("linear", row.layer, row.width, item.rows, [module], place)
                yield SiteSlice(site, expert * height + lo, expert * height + lo + item.rows)
                lo += item.rows

    def bias(self, key: str) -> int | None:
        """The id of the bias of the row ``key``; None without one."""
        return self.weight(f"{key}.bias") if f"{key}.bias" in self.rows else None

    def site(
        self, kind: Literal["linear", "embed", "head", "norm"], layer: int | None, width_in: int, width_out: int,
        modules: Sequence[ModuleSlice], stacked: StackedSlice | None = None, transform: Transform = "none",
        virtual_scale: float | None = 1.0,
    ) -> int:  # fmt: skip
        """The id of a new site. Tables are sites on each side even when they are one tensor: tying is of the base."""
        number, names = len(self.sites), tuple(modules)
        self.sites.append(Site(number, kind, layer, width_in, width_out, names, stacked, transform, virtual_scale))
        return number

    def add_norm_sites(self) -> None:
        """Give each norm whose weight is one module's a site, after all other sites: their ids stay as they are."""
        for index, op in enumerate(self.ops):
            row = self.rows.get(op.name)
            if not isinstance(op, Norm) or op.weight is None or row is None or len(row.slices) != 1:
                continue
            (item,), width = row.slices, row.rows
            if row.param != "weight":  # a tensor that is no module's weight
                continue
            names = [name for name in (item.module, item.alias) if name is not None]
            modules = [ModuleSlice(self.module(name), 0, width, width) for name in names]
            site = self.site("norm", row.layer, width, width, modules, transform=row.transform)
            self.ops[index] = replace(op, site=site)

    def module(self, path: str) -> str:
        """The path in transformers of a module that is named relative to the body."""
        return self.spec.names.body + path

    def linear(
        self, key: str, x: Ref, out: Ref, probe: Probe | None, epilogue: Epilogue = _PLAIN, *,
        layer: int | None = None, compute: Literal["model", "float32"] = "model",
    ) -> None:  # fmt: skip
        """Append the linear with the row ``key``, its bias and its sites."""
        weight, epilogue = self.weight(key), replace(epilogue, bias=self.bias(key))
        self.ops.append(Linear(name=key, layer=layer, probe=probe, x=x, weight=weight, out=out,
                               slices=self.site_slices[key], epilogue=epilogue, compute=compute))  # fmt: skip

    def norm(
        self, key: str, norm: NormSpec, x: Ref, out: Ref, probe: Probe | None, *,
        layer: int | None = None, groups: int = 1, gate: Gate | None = None, plus: Ref | None = None,
    ) -> None:  # fmt: skip
        """Append the norm with the row ``key``."""
        weight = self.weight(key) if norm.weight else None
        columns, activation = gate if gate is not None else (None, None)
        self.ops.append(Norm(name=key, layer=layer, probe=probe, x=x, out=out, kind=norm.kind, eps=norm.eps,
                             weight=weight, bias=self.bias(key), cast=norm.cast, groups=groups,
                             gate=columns, gate_activation=activation, plus=plus))  # fmt: skip

    def stream_after(self, layer: int, part: str | None = None) -> Probe | None:
        """The probe of the residual stream after ``part`` of a layer (None: its last): the input of the next module.

        Layer -1 is the embedding. None where transformers has no such value: between the two parts of a parallel layer,
        and before the stream is scaled.
        """
        spec = self.spec
        following: tuple[Branch, ...] = ()
        if part is not None:
            branches = spec.layers[layer].branches
            following = branches[[branch[0] for branch in branches].index(part) + 1 :]
            if spec.layers[layer].parallel if following else spec.layers[layer].scalar is not None:
                return None
        index = layer
        while not following and index + 1 < len(spec.layers):
            index += 1
            following = spec.layers[index].branches
        if following:
            _, item, before, _ = following[0]
            module = before.module5 if before is not None else item.first_module(spec.names)
            return Probe(self.module(spec.layer_prefix(index) + module), "in")
        return Probe(self.module(spec.final_norm.module5) if spec.final_norm is not None else spec.names.head, "in")


@dataclass(frozen=True)
class LayerBuilder:
    """Writes the part ``part`` (mixer or mlp) of layer ``index``. Keys and modules are relative to the layer.

    ``after`` is the norm of the part's result, ``scale`` multiplies it. ``last`` False: another result is added to the
    stream before the next part reads it.
    """

    program: ProgramBuilder
    index: int
    part: str
    after: NormSpec | None
    scale: float
    last: bool = True

    @property
    def spec(self) -> ModelSpec:
        return self.program.spec

    @property
    def names(self) -> ModuleNames:
        return self.spec.names

    @property
    def prefix(self) -> str:
        return self.spec.layer_prefix(self.index)

    @property
    def hidden(self) -> Ref:
        """The residual stream."""
        return self.program.buffer("hidden", self.spec.hidden)

    def buffer(self, name: str, width: int, rows: Rows = "T", dtype: BufferDtype = "model") -> Ref:
        return self.program.buffer(name, width, rows, dtype)

    def rope_rows(self, table: int) -> Ref:
        return self.program.rope_rows(table)

    def probe(self, module: str, side: Literal["in", "out"]) -> Probe:
        return Probe(self.program.module(self.prefix + module), side)

    def append(self, op: Op) -> None:
        """Append an op, whose key becomes its name with the layer's prefix."""
        self.program.ops.append(replace(op, name=self.prefix + op.name, layer=self.index))

    def weight(self, key: str) -> int:
        return self.program.weight(self.prefix + key)

    def state(self, width: int, dtype: BufferDtype = "float32") -> int:
        """The id of a new state of this layer, of ``width`` numbers."""
        states = self.program.states
        states.append(RecurrentState(len(states), self.index, width, dtype))
        return states[-1].id

    def conv(self, key: str, x: Ref, out: Ref, activation: Activation | None = None) -> None:
        """Append the causal convolution with the row ``key``, its bias and its state."""
        row = self.program.rows[self.prefix + key]
        state = self.state((row.width - 1) * row.rows, "model")
        self.append(CausalConv(name=key, x=x, out=out, weight=self.weight(key), state=state, activation=activation,
                               bias=self.program.bias(self.prefix + key)))  # fmt: skip

    def linear(
        self, key: str, x: Ref, out: Ref, probe: Probe | None, epilogue: Epilogue = _PLAIN, *,
        compute: Literal["model", "float32"] = "model",
    ) -> None:  # fmt: skip
        """Append the linear with the row ``key``, its bias and its sites."""
        self.program.linear(self.prefix + key, x, out, probe, epilogue, layer=self.index, compute=compute)

    def experts(
        self, key: str, x: Ref, routes: Ref, out: Ref, probe: Probe | None, epilogue: Epilogue = _PLAIN, *,
        combine: Literal["none", "sum", "weighted"] = "none",
    ) -> None:  # fmt: skip
        """Append the products with the experts of the row ``key``, their biases and their sites."""
        weight, name = self.weight(key), self.prefix + key
        epilogue = replace(epilogue, bias=self.program.bias(name))
        self.append(ExpertLinear(name=key, probe=probe, x=x, routes=routes, weight=weight, out=out, combine=combine,
                                 slices=self.program.site_slices[name], epilogue=epilogue))  # fmt: skip

    def norm(
        self, key: str, norm: NormSpec, x: Ref, out: Ref, *,
        probe: Probe | None = None, groups: int = 1, gate: Gate | None = None, plus: Ref | None = None,
        compared: bool = True,
    ) -> None:  # fmt: skip
        """Append the norm with the row ``key``. ``compared`` False: it has no value in transformers."""
        probe = probe or (self.probe(norm.module5, "out") if compared else None)
        self.program.norm(self.prefix + key, norm, x, out, probe, layer=self.index, groups=groups, gate=gate, plus=plus)

    def kv_planes(self, layer: int | None = None) -> tuple[int, tuple[int, ...]]:
        """The KV group and the planes of ``layer``, by default of this one."""
        layer = self.index if layer is None else layer
        for group in self.program.kv_groups:
            if planes := tuple(plane.id for plane in group.planes if plane.layer == layer):
                return group.id, planes
        raise AssertionError(f"layer {layer} caches nothing")

    @property
    def norms_stream(self) -> bool:
        return self.spec.layers[self.index].norm_stream

    def input(self, before: NormSpec | None, buffer: str = "normed") -> Ref:
        """The input of the part: the normed residual stream in ``buffer``, or the stream itself without a norm."""
        if before is None:
            return self.hidden
        normed = self.hidden if self.norms_stream else self.buffer(buffer, self.spec.hidden)
        self.norm(f"before_{self.part}", before, self.hidden, normed)
        return normed

    def output(self, key: str, x: Ref) -> None:
        """Append the last linear of the part; its result is added to the residual stream."""
        after = self._stream_after()
        if self.after is None or self.norms_stream:
            probe = after if self.after is None else self.probe(self.after.module, "in")
            self.linear(key, x, self.hidden, probe, Epilogue(scale=self.scale, residual=self.hidden))
            self._norm_stream()
            return
        branch = self.buffer("branch", self.spec.hidden)
        rows = self.program.rows[self.prefix + key]
        self.linear(key, x, branch, Probe(self.program.module(rows.slices[0].module), "out"))
        self.add(branch)

    def add(self, branch: Ref) -> None:
        """Append the norm after the part, if any, and the sum with the residual stream."""
        after = self._stream_after()
        norm = None if self.norms_stream else self.after
        if norm is not None and self.scale == 1.0:
            key = f"{self.prefix}after_{self.part}"
            self.program.norm(key, norm, branch, self.hidden, after, layer=self.index, plus=self.hidden)
            return
        if norm is not None:
            self.norm(f"after_{self.part}", norm, branch, branch)
        name = f"after_{self.part}"
        if self.scale != 1.0:
            self.append(Pointwise(name=f"{name}.scale", kind="scale", x=branch, out=branch, params=(self.scale,)))
        self.append(Pointwise(name=f"{name}.add", probe=after, kind="add", x=self.hidden, y=branch, out=self.hidden))
        self._norm_stream()

    def _stream_after(self) -> Probe | None:
        return self.program.stream_after(self.index, self.part) if self.last else None

    def _norm_stream(self) -> None:
        if self.after is not None and self.norms_stream:
            self.norm(f"after_{self.part}", self.after, self.hidden, self.hidden)


def _kv_groups(spec: ModelSpec) -> tuple[KvGroup, ...]:
    """One group per distinct window, full attention first. A window that no sequence exceeds is full attention."""
    planes: dict[int | None, list[KvPlane]] = {}
    count = 0
    for index, layer in enumerate(spec.layers):
        if layer.mixer is None or not layer.mixer.kv_widths:
            continue
        window = layer.mixer.window
        window = None if window is None or window >= spec.max_positions else window
        for width in layer.mixer.kv_widths:
            planes.setdefault(window, []).append(KvPlane(count, index, width))
            count += 1
    order = sorted(planes, key=lambda window: (window is not None, window or 0))
    return tuple(KvGroup(i, tuple(planes[window]), window) for i, window in enumerate(order))
