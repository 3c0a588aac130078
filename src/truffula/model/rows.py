"""``WeightRow``: one logical weight of a model; ``LayerRows``: how a part of a layer lists its own.

Shape letters: ``O`` output rows of a weight, ``I`` its input width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from truffula.kernels.program import BufferDtype, RowOrder, Transform, WeightPart

if TYPE_CHECKING:
    from truffula.model.spec import ModuleNames

RowKind = Literal["embed", "table", "linear", "vector", "conv", "head", "experts"]
RowPart = tuple[str, int] | tuple[str, int, RowOrder | None] | tuple[str, int, RowOrder | None, str]
"""A module, its rows, their order and its alias."""


@dataclass(frozen=True)
class NormSpec:
    """A norm and the module that holds its weight, named relative to its layer (the final norm: to the body).

    ``plus_one``: the file stores w, and 1 + w is applied, in float32 (Gemma) or, with ``rounded``, in the model's dtype
    (Nemotron). ``cast`` as in ``program.Norm``. Without ``weight`` the module has no tensors. ``per_head``, of norms of
    heads: each head has a weight of its own, a row of one tensor ("rows"), or a module of its own (its name with {h}).
    ``alias``: see ``RowSlice``.
    """

    module: str
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    cast: Literal["first", "last"] = "first"
    plus_one: bool = False
    rounded: bool = False
    weight: bool = True
    bias: bool = False
    per_head: str | None = None
    alias: str | None = None

    @property
    def module5(self) -> str:
        """The module's name in transformers 5."""
        return self.alias or self.module


@dataclass(frozen=True)
class RowSlice:
    """``rows`` output rows of a logical weight that are one module in checkpoints and one site for adapters.

    ``module`` is relative to the body: ``layers.3.self_attn.q_proj``; an expert's has ``{e}`` for its number.
    ``alias`` is its name in transformers 5, where that differs from the one in checkpoints, which may have either.
    ``order``: see ``program.WeightPart``.
    """

    module: str
    rows: int
    alias: str | None = None
    order: RowOrder | None = None


@dataclass(frozen=True)
class ExpertLayout:
    """A form in which checkpoints hold the matrices [O, I] of all experts. Names are whole, relative to the body.

    ``tensors`` are one for each slice or one for all slices: with ``{e}`` in the name one per expert, else of all
    experts, [E, O, I]. ``columns``: matrices are stored [I, O]. ``alternating``: output rows of the two slices
    alternate. ``flat``: [E · O, I]. ``parameter``: transformers has one parameter of this form (``flat`` excepted),
    which PEFT adapts as such; ``peft_columns``: and takes to be stored [I, O].
    """

    tensors: tuple[str, ...]
    columns: bool = False
    alternating: bool = False
    flat: bool = False
    parameter: str | None = None
    peft_columns: bool = False

    def parts(self, row: WeightRow, prefix: str = "") -> Iterator[WeightPart]:
        """The tensors of ``row``, in this form, named with ``prefix``."""
        heights = [item.rows for item in row.slices] if len(self.tensors) > 1 else [row.rows]
        lo = 0
        for tensor, height in zip(self.tensors, heights, strict=True):
            name = prefix + tensor
            matrix: tuple[int, ...] = (row.width, height) if self.columns else (height, row.width)
            matrix = matrix if row.width else (height,)
            before, each, after = name.partition("{e}")
            if each:
                for expert in range(row.experts):
                    yield WeightPart(f"{before}{expert}{after}", row.transform, expert, lo, matrix)
            else:
                stored = (row.experts * matrix[0], *matrix[1:]) if self.flat else (row.experts, *matrix)
                if self.alternating and not row.width:
                    yield WeightPart(name, "alternating", stored=stored)
                elif self.alternating:
                    yield WeightPart(name, "even_columns", stored=stored)
                    yield WeightPart(name, "odd_columns", lo=height // 2, stored=stored)
                else:
                    yield WeightPart(name, "columns" if self.columns else "none", lo=lo, stored=stored)
            lo += height


@dataclass(frozen=True)
class WeightRow:
    """One logical weight of the model. Loading, adapter matching and slicing all use this row.

    ``slices`` stacked along axis 0 make the weight; the checkpoint holds either ``<slice module>.<param>`` for each or,
    when ``fused`` is given, one ``<fused>.<param>`` with all their rows in this order; LoRA addresses each slice by its
    module and all of them together by ``fused``. Without a ``param`` slices are named like tensors. ``width`` is the
    input width I (0 for a vector; the taps of a convolution). ``key`` is its name in the decoder. ``transform``:
    see ``program.WeightPart``. The tying decision assigns the tensors of embedding and head.

    A row of kind ``experts`` has such a matrix for each of ``experts`` experts, in one of ``layouts``; a token passes
    ``chosen`` of them.
    """

    key: str
    kind: RowKind
    slices: tuple[RowSlice, ...]
    width: int
    layer: int | None = None
    param: str = "weight"
    fused: str | None = None
    transform: Transform = "none"
    dtype: BufferDtype = "model"
    stored: tuple[int, ...] = ()
    experts: int = 0
    chosen: int = 0
    layouts: tuple[ExpertLayout, ...] = ()

    @property
    def name(self) -> str:
        """The weight's name in the program."""
        return self.tensor(self.slices[0].module if len(self.slices) == 1 else self.fused or self.key)

    @cached_property
    def rows(self) -> int:
        return sum(item.rows for item in self.slices)

    def tensor(self, module: str) -> str:
        """The name of the tensor of a module of the row."""
        return f"{module}.{self.param}" if self.param else module

    @property
    def shape(self) -> tuple[int, ...]:
        """``[O, I]`` or ``[O]``; of experts ``[E, O, I]`` or ``[E · O]``."""
        if self.experts:
            return (self.experts, self.rows, self.width) if self.width else (self.experts * self.rows,)
        return (self.rows, self.width) if self.width else (self.rows,)

    def stored_shape(self, rows: int) -> tuple[int, ...]:
        """The shape in files of a tensor with ``rows`` of the rows."""
        if self.stored:
            return self.stored
        if self.transform == "transpose":
            return (self.width, rows)
        return (rows, 1, self.width) if self.transform == "conv" else (rows, *self.shape[1:])


class LayerRows:
    """Collects the rows of one layer. Modules are given relative to the layer, or to the body outside layers.

    ``index`` is the layer's number, None outside layers; ``hidden`` is the width of the residual stream.
    """

    def __init__(self, names: ModuleNames, hidden: int, index: int | None = None) -> None:
        self.names, self.hidden, self.index = names, hidden, index
        self.prefix = "" if index is None else names.layer.format(i=index)
        self.found: list[WeightRow] = []

    def linear(
        self, key: str, parts: Sequence[RowPart], width: int, *, bias: bool = False, fused: str | None = None,
        alias: str | None = None,
    ) -> None:  # fmt: skip
        """A matrix ``[O, width]`` of stacked ``parts``, with its bias ``[O]``. ``alias``: see ``RowSlice``, of a matrix
        of one part."""
        alias = None if alias is None else self.prefix + alias
        found: list[RowSlice] = []
        for module, rows, *more in parts:
            order, other = (*more, None, None)[:2]
            name5 = alias if other is None else f"{self.prefix}{other}"
            found.append(RowSlice(self.prefix + module, rows, name5, order))
        slices = tuple(found)
        whole, key = None if fused is None else self.prefix + fused, self.prefix + key
        transform: Transform = "transpose" if self.names.transposed else "none"
        self.found.append(WeightRow(key, "linear", slices, width, self.index, fused=whole, transform=transform))
        if bias:
            self.found.append(WeightRow(f"{key}.bias", "linear", slices, 0, self.index, param="bias", fused=whole))

    def conv(
        self, key: str, parts: Sequence[tuple[str, int]], taps: int, *, bias: bool = False, fused: str | None = None
    ) -> None:
        """The weight of a depthwise convolution of the columns of ``parts`` (module, columns), with its bias."""
        slices = tuple(RowSlice(self.prefix + module, columns) for module, columns in parts)
        whole, key = None if fused is None else self.prefix + fused, self.prefix + key
        self.found.append(WeightRow(key, "conv", slices, taps, self.index, fused=whole, transform="conv"))
        if bias:
            self.found.append(WeightRow(f"{key}.bias", "vector", slices, 0, self.index, param="bias"))

    def table(self, key: str, module: str, rows: int, width: int | None = None) -> None:
        """A table ``[rows, width]`` (hidden by default)."""
        slices = (RowSlice(self.prefix + module, rows),)
        self.found.append(WeightRow(self.prefix + key, "table", slices, width or self.hidden, self.index))

    def norm(self, key: str, norm: NormSpec | None, width: int | None = None, heads: int = 1) -> None:
        """The vectors of a norm over ``width`` columns (all of the residual stream by default); none without a norm.

        ``heads`` is the number of heads that it norms, each over ``width`` columns.
        """
        if norm is None or not norm.weight:
            return
        key, module, width = self.prefix + key, self.prefix + norm.module, width or self.hidden
        alias = None if norm.alias is None else self.prefix + norm.alias
        slices: tuple[RowSlice, ...] = (RowSlice(module, width, alias),)
        stored: tuple[int, ...] = ()
        if norm.per_head == "rows":
            slices, stored = (RowSlice(module, heads * width),), (heads, width)
        elif norm.per_head is not None:
            slices = tuple(RowSlice(f"{module}.{norm.per_head.format(h=head)}", width) for head in range(heads))
        # 1 + w is kept in float32: rounding it to bfloat16 would lose the low bits of a small w.
        transform: Transform = "plus_one" if norm.plus_one else "none"
        dtype: BufferDtype = "float32" if norm.plus_one and not norm.rounded else "model"
        row = WeightRow(key, "vector", slices, 0, self.index, transform=transform, dtype=dtype, stored=stored)
        self.found.append(row)
        if norm.bias:
            self.found.append(replace(row, key=f"{key}.bias", param="bias", transform="none", dtype="model"))

    def numbers(self, key: str, names: Sequence[str]) -> None:
        """A vector of single numbers, kept in float32, each the tensor of a name."""
        slices = tuple(RowSlice(self.prefix + name, 1) for name in names)
        self.found.append(WeightRow(self.prefix + key, "vector", slices, 0, self.index, "", dtype="float32"))

    def vector(
        self, key: str, name: str, width: int, *, stored: tuple[int, ...] = (), transform: Transform = "none"
    ) -> None:
        """A vector of ``width`` numbers, kept in float32; ``name`` is that of its tensor."""
        module, _, param = (self.prefix + name).rpartition(".")
        self.found.append(WeightRow(self.prefix + key, "vector", (RowSlice(module, width),), 0, self.index, param,
                                    transform=transform, dtype="float32", stored=stored))  # fmt: skip

    def experts(
        self, key: str, parts: Sequence[tuple[str, int]], width: int, count: int, layouts: Sequence[ExpertLayout],
        biases: Sequence[ExpertLayout] = (), *, chosen: int,
    ) -> None:  # fmt: skip
        """A matrix ``[O, width]`` of stacked ``parts`` for each of ``count`` experts, in one of ``layouts``; with
        ``biases``, the forms of their biases, a bias for each. Layouts name tensors relative to the layer. ``chosen``:
        see ``WeightRow``."""
        slices = tuple(RowSlice(self.prefix + module, rows) for module, rows in parts)
        placed = tuple(self._placed(layout) for layout in layouts)
        self.found.append(WeightRow(self.prefix + key, "experts", slices, width, self.index, experts=count,
                                    chosen=chosen, layouts=placed))  # fmt: skip
        if biases:
            placed = tuple(self._placed(layout) for layout in biases)
            self.found.append(WeightRow(f"{self.prefix}{key}.bias", "experts", slices, 0, self.index, "bias",
                                        experts=count, chosen=chosen, layouts=placed))  # fmt: skip

    def _placed(self, layout: ExpertLayout) -> ExpertLayout:
        parameter = None if layout.parameter is None else self.prefix + layout.parameter
        return replace(layout, tensors=tuple(self.prefix + name for name in layout.tensors), parameter=parameter)
