"""Adapter parts (what an adapter does at a site), and ``AdapterImage``: its tensors as a backend's kernels read them.

    SiteTensors (as trained) ── pack(layout) ──► PackedPart ── place, write ──► AdapterImage ──► Executable.adapter

The loading worker packs; the engine maps the result and passes pointers. An image is one block of bytes and a table
with a row per part, so the cost of adding it does not depend on its size.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

from truffula.errors import KernelError
from truffula.kernels.inputs import Array
from truffula.kernels.program import Embed, ExpertLinear, Linear, Logits, Mla, Norm, Program, SiteSlice

ALIGN = 64
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "I32": np.dtype(np.int32),
    }
)
"""By the names of safetensors. A table refers to a dtype by its position here."""
_DTYPE_NAMES = tuple(DTYPES)
_NAMES = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})


# ---- parts: what an adapter does at one site, with the base's weight W [O, I] and input x.
#
# With the base product p = x Wᵀ and the weight w of a segment, a row of it becomes
#
#     y = p + Σ_segments w · [ c ⊙ (x' W'ᵀ + Σ s (x Aᵀ) Bᵀ) − p + b ]
#
# in float32: c is the ColumnScale, x' = x ⊙ u with the InputScale u, W' the Replace or W with Rows replaced, A, B and s
# are of each LowRank, b is the Bias; each defaults to what changes nothing. Then comes the op's epilogue, with the
# base's own bias. Rows of no segment are p, bit for bit. At a table x is a one-hot row. A norm is no product: its
# vectors become weight + Σ w (W' − weight) and bias + Σ w b.


@dataclass(frozen=True)
class LowRank:
    """Adds ``scale · (x Aᵀ) Bᵀ``: ``a [r, I]``, ``b [O, r]``; of experts ``[E, r, I]``, ``[E, O, r]``.

    On an embedding table x is a one-hot row: ``a [r, V]``, ``b [D, r]``.
    """

    kind: ClassVar[str] = "low_rank"
    a: Array
    b: Array
    scale: float


@dataclass(frozen=True)
class ColumnScale:
    """Multiplies the product, with that of A and B, by ``factor [O]``: DoRA's magnitude over its norm, IA3."""

    kind: ClassVar[str] = "column_scale"
    factor: Array


@dataclass(frozen=True)
class InputScale:
    """Multiplies x by ``factor [I]`` before the product with W, not before A: IA3 on a feed-forward module."""

    kind: ClassVar[str] = "input_scale"
    factor: Array


@dataclass(frozen=True)
class Bias:
    """Adds ``values [O]``: a trained bias minus the base's, or the scaled bias of B."""

    kind: ClassVar[str] = "bias"
    values: Array


@dataclass(frozen=True)
class Replace:
    """Replaces W by ``weight [O, I]``, a table by ``[V, D]``, a norm's weight by ``[width]``: a saved module, after the
    transform of its site."""

    kind: ClassVar[str] = "replace"
    weight: Array


@dataclass(frozen=True)
class Rows:
    """Replaces rows of a table: ``ids`` int32 ``[n]``, ``values [n, D]``, trained tokens. At the head, columns of the
    logits. An embedding may have ids behind the base's table: tokens that this adapter alone has."""

    kind: ClassVar[str] = "rows"
    ids: Array
    values: Array


Part = LowRank | ColumnScale | InputScale | Bias | Replace | Rows
KINDS: Mapping[str, type[Part]] = MappingProxyType(
    {kind.kind: kind for kind in (LowRank, ColumnScale, InputScale, Bias, Replace, Rows)}
)
"""Every kind of part by its name in an image. A table refers to a kind by its position here."""


@dataclass(frozen=True)
class SiteTensors:
    """The parts of one adapter at one site. Arrays have their stored dtype; sites of a fused module share one A."""

    site: int
    parts: tuple[Part, ...]


def low_rank(site: int, a: Array, b: Array, scale: float) -> SiteTensors:
    """Plain LoRA at a site."""
    return SiteTensors(site, (LowRank(a, b, scale),))


def tensors_of(part: Part) -> tuple[Array, ...]:
    """A part's arrays, in the order of its fields."""
    return (part.a, part.b) if isinstance(part, LowRank) else tuple(vars(part).values())


# ---- layouts: how a backend's kernels read parts

MAX_ID = 2**24
"""Ids of an adapter's own tokens are below."""


PlaceKind = Literal["linear", "embed", "head", "latent", "norm"]
SERVED_KINDS: Mapping[PlaceKind, frozenset[str]] = MappingProxyType(
    {
        "linear": frozenset({"low_rank", "column_scale", "input_scale", "bias", "replace"}),
        "embed": frozenset({"low_rank", "column_scale", "bias", "replace", "rows"}),
        "head": frozenset({"low_rank", "column_scale", "input_scale", "bias", "replace", "rows"}),
        "latent": frozenset({"low_rank", "column_scale", "bias"}),
        "norm": frozenset({"bias", "replace"}),
    }
)
"""The kinds of part that kernels serve, by what the op of a site does: ``linear`` a product, ``embed`` gathers rows,
``head`` a product of logits, ``latent`` that of latent attention's keys and values, ``norm``."""


@dataclass(frozen=True)
class Place:
    """Where a site acts in a program: columns ``first ..`` of what op number ``op`` computes, before any glu.

    ``half`` > 0: these columns are gates ``0 .. half``, then ups. ``kind`` is what the op does (``SERVED_KINDS``). Of
    an op with experts, columns are those of ``expert``. ``heads`` (count, key rows, value rows): the columns of
    ``Mla``'s kv_b, head by head.
    """

    module: str
    op: int
    inputs: int
    outputs: int
    first: int = 0
    half: int = 0
    kind: PlaceKind = "linear"
    expert: int = 0
    heads: tuple[int, int, int] | None = None


Storage = Literal["stored", "float32", "panels"]


@dataclass(frozen=True)
class AdapterLayout:
    """How a program's kernels read adapters: data that the engine sends to the loading worker.

    ``places`` has one entry per site, None where no op serves it. ``stored``: tensors as they are. ``float32``: the
    same in float32, and ids. ``panels``: as ``kernels/cpu/pack.py`` says.
    """

    storage: Storage
    places: tuple[Place | None, ...] = ()

    @cached_property
    def name(self) -> str:
        """The storage and a hash of the places: identifies what an image is packed for."""
        return f"{self.storage}:{hashlib.sha256(repr(self.places).encode()).hexdigest()[:16]}"


STORED = AdapterLayout("stored")


def layout_of(program: Program, storage: Storage) -> AdapterLayout:
    """The layout of ``program``'s sites."""
    places: list[Place | None] = [None] * len(program.sites)
    for index, op in enumerate(program.ops):
        half, heads = 0, None
        kind: PlaceKind = "linear"
        if isinstance(op, Mla):
            slices: tuple[SiteSlice, ...] = op.slices
            columns, heads, kind = program.weights[op.kv_b].shape[0], (op.heads, op.nope, op.dim_v), "latent"
        elif isinstance(op, Linear | ExpertLinear):
            slices = op.slices
            columns = program.weights[op.weight].shape[-2]
            half = columns // 2 if op.epilogue.glu else 0
        elif isinstance(op, Embed | Logits | Norm) and op.site is not None:
            kind = "embed" if isinstance(op, Embed) else "head" if isinstance(op, Logits) else "norm"
            columns = program.sites[op.site].out_features
            slices = (SiteSlice(op.site, 0, columns),)
        else:
            continue
        for item in slices:
            site, (expert, first) = program.sites[item.site], divmod(item.lo, columns)
            places[item.site] = Place(
                site.module,
                index,
                site.in_features,
                site.out_features,
                first,
                half,
                kind,
                expert,
                heads,
            )
    return AdapterLayout(storage, tuple(places))


class PackedTensor(msgspec.Struct, frozen=True):
    """One tensor as a layout stores it: ``write`` fills ``nbytes`` zeroed bytes. An object used twice is stored once.

    ``shape`` is that of the unpacked tensor; the bytes may be more, and in another order.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    write: Callable[[npt.NDArray[np.uint8]], None]


class PackedPart(msgspec.Struct, frozen=True):
    """A part with its tensors in a layout."""

    site: int
    kind: str
    scale: float
    tensors: tuple[PackedTensor, ...]


def pack(layout: AdapterLayout, sites: Iterable[SiteTensors]) -> list[PackedPart]:
    """``sites`` as ``layout`` stores them, ascending by site. Bytes are copied by ``PackedTensor.write`` only.

    Raises:
        KernelError: A site that does not exist or that no op serves, a kind of part that no kernel of the layout
            serves (``param``: the kind), two parts that exclude each other, a shape that does not fit its site, or a
            dtype that is not stored.
    """
    ordered = sorted(sites, key=lambda s: s.site)
    if layout.storage != "stored":
        for tensors in ordered:
            check_served(check_place(layout, tensors.site), tensors.parts)
    if layout.storage == "panels":
        packer = importlib.import_module("truffula.kernels.cpu.pack")
        packed: list[PackedPart] = packer.pack_panels(layout, ordered)
        return packed
    copies: dict[int, PackedTensor] = {}  # by the id of the array, so that one used twice is stored once

    def copy(array: Array) -> PackedTensor:
        if id(array) not in copies:
            dtype = dtype_name(array)
            copies[id(array)] = copied(array, "F32" if layout.storage == "float32" and dtype != "I32" else dtype)
        return copies[id(array)]

    return [
        PackedPart(tensors.site, part.kind, getattr(part, "scale", 1.0), tuple(map(copy, tensors_of(part))))
        for tensors in ordered
        for part in tensors.parts
    ]


def copied(array: Array, dtype: str) -> PackedTensor:
    """A tensor as it is, converted to ``dtype``."""

    def write(to: npt.NDArray[np.uint8]) -> None:
        to.view(DTYPES[dtype]).reshape(array.shape)[...] = array

    return PackedTensor(dtype, array.shape, array.size * DTYPES[dtype].itemsize, write)


def check_place(layout: AdapterLayout, site: int) -> Place:
    """The place of ``site``. Raises ``KernelError`` when it does not exist or no op serves it."""
    if not 0 <= site < len(layout.places):
        raise KernelError(f"the adapter names site {site}; the program has {len(layout.places)}.", param="site")
    place = layout.places[site]
    if place is None:
        raise KernelError(f"no op serves site {site}.", param="site")
    return place


def check_served(place: Place, parts: Sequence[Part]) -> None:
    """Raise ``KernelError`` (``param``: the kind or the module) unless kernels serve the parts of a site together, and
    their shapes fit."""
    for part in parts:
        by_expert = isinstance(part, LowRank) and part.a.ndim == 3
        if by_expert or part.kind not in SERVED_KINDS[place.kind]:
            what = f"{part.kind} with an expert axis" if by_expert else part.kind
            raise KernelError(f"site {place.module}: no kernel serves the adapter part {what!r}.", param=what)
        _check_shapes(place, part)
    kinds = [part.kind for part in parts if part.kind != LowRank.kind]
    for kind in kinds:
        if kinds.count(kind) > 1 or (kind == Rows.kind and {Replace.kind, InputScale.kind} & {*kinds}):
            raise KernelError(f"site {place.module}: no kernel serves {' and '.join(kinds)} together.", param=kind)


def _check_shapes(place: Place, part: Part) -> None:
    arrays = tensors_of(part)
    shapes = [array.shape for array in arrays]
    n = shapes[0][0] if shapes[0] else 0  # the rank, or the number of ids
    wanted = _shapes(place, part, n)
    if shapes != wanted or n < 1:
        raise KernelError(
            f"site {place.module}: {part.kind} has tensors of shape {[*map(list, shapes)]}; "
            f"the site needs {[*map(list, wanted)]}.",
            param=place.module,
        )
    ids = part.ids if isinstance(part, Rows) else None
    for array in arrays:
        if (dtype_name(array) == "I32") != (array is ids):
            raise KernelError(f"site {place.module}: a tensor of {part.kind} is {array.dtype}.", param="dtype")
    if ids is not None:
        known = np.unique(ids)
        end = place.outputs if place.kind == "head" else MAX_ID
        if len(known) < len(ids) or known[0] < 0 or known[-1] >= end:
            raise KernelError(f"site {place.module}: ids are not distinct or not in 0..{end - 1}.", param="ids")


def _shapes(place: Place, part: Part, n: int) -> list[tuple[int, ...]]:
    """The shapes of a part's tensors at a place; ``n``: the rank, or the number of ids."""
    inputs, outputs, of_table = place.inputs, place.outputs, place.kind == "embed"
    match part:
        case LowRank():
            return [(n, inputs), (outputs, n)]
        case ColumnScale() | Bias():
            return [(outputs,)]
        case InputScale():
            return [(inputs,)]
        case Replace():
            return [(outputs,) if place.kind == "norm" else (inputs, outputs) if of_table else (outputs, inputs)]
        case Rows():
            return [(n,), (n, outputs if of_table else inputs)]


def dtype_name(array: Array) -> str:
    """``F32``, ``F16``, ``BF16`` or ``I32``; ``KernelError`` for any other dtype."""
    if (name := _NAMES.get(array.dtype)) is not None:
        return name
    raise KernelError(f"an adapter image holds {', '.join(DTYPES)}, not {array.dtype}.", param="dtype")


# ---- images: one block of bytes and a table

SITE, KIND, SCALE, TENSORS = range(4)
DTYPE, OFFSET, NBYTES, SHAPE = range(4)
MAX_TENSORS, MAX_AXES = 2, 3
TENSOR_COLUMNS = SHAPE + MAX_AXES
COLUMNS = TENSORS + MAX_TENSORS * TENSOR_COLUMNS
"""A row of a table, int64: site, kind, scale (the bits of a float64), then per tensor dtype, offset from the start of
the data, bytes, and its axes (0: none). ``native/adapters.h`` reads the same columns."""


@dataclass(frozen=True)
class AdapterImage:
    """An adapter as an executable reads it.

    ``generation`` is the content hash, ``nbytes`` what the budget is charged, ``layout`` the name of the layout it was
    packed for. ``table`` is int64 ``[parts, COLUMNS]`` over ``data``, uint8, aligned to 64 bytes. The memory is
    released with the last reference to ``data``.
    """

    generation: str
    rank: int
    nbytes: int
    layout: str
    table: npt.NDArray[np.int64]
    data: npt.NDArray[np.uint8]

    def sites(self) -> tuple[SiteTensors, ...]:
        """Its parts as views of ``data``: of an image whose layout keeps tensors as they are (not ``panels``).

        Raises:
            KernelError: A row of the table is inconsistent.
        """
        if self.layout.startswith("panels"):
            raise KernelError("an image in panels has no tensors to show.", param="layout")
        made: dict[int, list[Part]] = {}
        for row in self.table.tolist():
            made.setdefault(row[SITE], []).append(self._part(row))
        return tuple(SiteTensors(site, tuple(parts)) for site, parts in made.items())

    def _part(self, row: list[int]) -> Part:
        kind = tuple(KINDS.values())[row[KIND]]
        arrays = [self._array(row[at : at + TENSOR_COLUMNS]) for at in range(TENSORS, COLUMNS, TENSOR_COLUMNS)]
        values: list[Any] = [array for array in arrays if array is not None]
        if kind is LowRank:
            values.append(float(np.int64(row[SCALE]).view(np.float64)))
        if len(values) != len(fields(kind)):
            raise KernelError(
                f"site {row[SITE]}: a part has {len(values)} of {len(fields(kind))} values.", param="table"
            )
        return kind(*values)

    def _array(self, columns: list[int]) -> Array | None:
        shape = tuple(n for n in columns[SHAPE:] if n)
        if not shape:
            return None
        dtype = DTYPES[_DTYPE_NAMES[columns[DTYPE]]]
        count, nbytes, offset = int(np.prod(shape, dtype=object)), columns[NBYTES], columns[OFFSET]
        if count * dtype.itemsize != nbytes:
            raise KernelError(f"a tensor of shape {list(shape)} in {nbytes} bytes.", param="table")
        return self.data[offset : offset + nbytes].view(dtype).reshape(shape)


@dataclass(frozen=True)
class PlacedParts:
    """Packed parts with their offsets in an image."""

    table: npt.NDArray[np.int64]
    data_bytes: int
    tensors: tuple[tuple[int, PackedTensor], ...]

    def write(self, data: npt.NDArray[np.uint8]) -> None:
        """Fill ``data``, uint8 ``[data_bytes]`` of zeros."""
        for offset, tensor in self.tensors:
            tensor.write(data[offset : offset + tensor.nbytes])


def place(parts: Sequence[PackedPart]) -> PlacedParts:
    """Assign an offset to every distinct tensor, in the order of the parts."""
    kinds = {kind: number for number, kind in enumerate(KINDS)}
    rows: list[list[int]] = []
    offsets: dict[int, int] = {}
    tensors: list[tuple[int, PackedTensor]] = []
    end = 0
    for part in parts:
        row = [part.site, kinds[part.kind], 0]  # the scales come last, all at once
        for tensor in part.tensors:
            if id(tensor) not in offsets:
                offsets[id(tensor)] = end
                tensors.append((end, tensor))
                end += -(-tensor.nbytes // ALIGN) * ALIGN
            row += _DTYPE_NAMES.index(tensor.dtype), offsets[id(tensor)], tensor.nbytes
            row += tensor.shape + (0,) * (MAX_AXES - len(tensor.shape))
        rows.append(row + [0] * (COLUMNS - len(row)))
    table = np.array(rows, np.int64).reshape(len(rows), COLUMNS)
    table[:, SCALE] = np.array([part.scale for part in parts], np.float32).astype(np.float64).view(np.int64)
    return PlacedParts(table, end, tuple(tensors))


def make_image(layout: AdapterLayout, sites: Iterable[SiteTensors], *, generation: str) -> AdapterImage:
    """An image in memory (``lora/image.py`` makes files). Raises ``KernelError``: see ``pack``."""
    parts = pack(layout, sites)
    placed = place(parts)
    memory = np.zeros(placed.data_bytes + ALIGN, np.uint8)
    start = -memory.ctypes.data % ALIGN
    data = memory[start : start + placed.data_bytes]
    placed.write(data)
    rank = max((part.tensors[0].shape[0] for part in parts if part.kind == LowRank.kind), default=0)
    return AdapterImage(generation, rank, placed.data_bytes, layout.name, placed.table, data)


def require_served(image: AdapterImage, layout: AdapterLayout) -> None:
    """Raise ``KernelError`` unless ``image`` was packed for ``layout``."""
    if image.layout != layout.name:
        raise KernelError(
            f"the adapter was packed for {image.layout!r}; this executable reads {layout.name!r}. Load it again.",
            param="layout",
        )
