"""The base's weights in the loading worker: what a site's weight and bias are, as the engine holds them.

DoRA's norms, PiSSA's residual, trained biases and copies of tables are computed from or compared with the base's
weights. ``BaseSource`` is data that the engine sends to the worker; ``BaseWeights`` opens the same files when a weight
is first needed, and reads blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import numpy.typing as npt

from truffula.errors import AdapterError, TruffulaError
from truffula.kernels.backend import Array, ComputedArray, Part, QuantisedArray, expert_matrices
from truffula.kernels.cpu.formats import BLOCK_KINDS, WeightOptions
from truffula.kernels.mapped import release_pages
from truffula.kernels.program import Attention, Embed, ExpertLinear, Linear, Logits, Mla, Norm, Program, Site, SiteSlice
from truffula.kernels.weight_decl import WeightDecl, WeightPart
from truffula.types import FileStamp
from truffula.weights.tying import Tie

if TYPE_CHECKING:
    from truffula.model.plan import ModelPlan
    from truffula.weights.checkpoint import Checkpoint

Float32 = npt.NDArray[np.float32]
_BLOCK_BYTES = 8 << 20
_Q8_0_WIDTH = 32


@dataclass(frozen=True)
class SiteWeight:
    """Rows ``lo .. hi`` of the weight number ``weight``; of experts the rows of all, one expert after the other.

    ``bias``: the number of the vector whose entries ``lo .. hi`` are the biases of these rows.
    """

    weight: int
    lo: int
    hi: int
    bias: int | None = None


@dataclass(frozen=True)
class KvLayer:
    """An attention, op number ``op``, that writes ``heads`` keys and values of ``dim`` numbers of every token."""

    op: int
    heads: int
    dim: int


@dataclass(frozen=True)
class BaseSource:
    """Where the base's weights are. ``files`` as they were when the engine opened them; ``sites`` by site.

    ``kv``: its attention in the order of layers, where all of them keep keys and values of all tokens and nothing else
    is kept; otherwise why not. ``serial``: it is computed one sequence at a time.
    ``dtype`` and ``quantize`` are the engine's, which rounds matrices accordingly; it does not round ``exact`` ones,
    and does not quantise those in ``unquantised``. ``latent`` sites act where cached latents are read, on those of all
    tokens. Of its ``vocab_size`` + ``more_ids`` ids the last are adapters' own. ``tied``: embedding and head are one
    tensor; ``kv_heads`` by layer. ``no_adapters``: see ``Checkpoint``.
    """

    path: str
    files: tuple[FileStamp, ...]
    weights: dict[int, WeightDecl]
    sites: dict[int, SiteWeight]
    vocab_size: int = 0
    more_ids: int = 0
    tied: bool = False
    kv: tuple[KvLayer, ...] | str = ()
    serial: bool = False
    latent: tuple[int, ...] = ()
    kv_heads: dict[int, int] = field(default_factory=dict)
    dtype: str = "float32"
    quantize: str = "none"
    exact: tuple[int, ...] = ()
    unquantised: tuple[int, ...] = ()
    no_adapters: str = ""


def base_source(
    plan: ModelPlan, checkpoint: Checkpoint, *, dtype: str = "float32", quantize: str = "none"
) -> BaseSource:
    """The source of a model's weights. Of one that transformers computes, only the tables are known by their site."""
    program = plan.program
    sites = dict(_sites(program)) if plan.transformers is None else dict(_tables(program, plan.tables))
    used = {place.weight for place in sites.values()} | {place.bias for place in sites.values()}
    float32 = {op.weight for op in program.ops if isinstance(op, Linear) and op.compute == "float32"}
    return BaseSource(
        path=str(checkpoint.path),
        files=tuple(file.opened for file in checkpoint.files),
        weights={decl.id: decl for decl in program.weights if decl.id in used},
        sites=sites,
        vocab_size=plan.interface.vocab_size - plan.interface.more_ids,
        more_ids=plan.interface.more_ids,
        tied=plan.tying.tie is not Tie.SEPARATE,
        kv=_kv_layers(program) if plan.transformers is None else "transformers' code computes it",
        serial=plan.implementation.kind == "serial",
        kv_heads={op.layer: op.kv_heads for op in program.ops if isinstance(op, Attention) and op.layer is not None},
        dtype=dtype,
        quantize=quantize,
        exact=tuple(float32 | {decl.id for decl in program.weights if decl.dtype == "float32"}),
        unquantised=tuple(op.kv_b for op in program.ops if isinstance(op, Mla)),
        latent=tuple(item.site for op in program.ops if isinstance(op, Mla) for item in op.slices),
        no_adapters=checkpoint.no_adapters,
    )


def _kv_layers(program: Program) -> tuple[KvLayer, ...] | str:
    """See ``BaseSource``."""
    if program.states:
        return "it has recurrent layers"
    if any(isinstance(op, Mla) for op in program.ops):
        return "it has latent attention (MLA)"
    if any(group.window is not None for group in program.kv_groups):
        return "it has layers with an attention window"
    every = [(number, op) for number, op in enumerate(program.ops) if isinstance(op, Attention)]
    if any(op.k is None or op.dim_k != op.dim_v for _, op in every) or len({op.layer for _, op in every}) < len(every):
        return "layers share their keys and values, or these differ in width"
    if any(op.alibi for _, op in every):
        return "its attention depends on positions by ALiBi"
    return tuple(KvLayer(number, op.kv_heads, op.dim_k) for number, op in every)


def _sites(program: Program) -> Iterator[tuple[int, SiteWeight]]:
    for op in program.ops:
        slices: Sequence[SiteSlice] = ()
        bias: int | None = None
        if isinstance(op, Mla):
            slices, weight = op.slices, op.kv_b
        elif isinstance(op, Linear | ExpertLinear):
            slices, weight, bias = op.slices, op.weight, op.epilogue.bias
        elif isinstance(op, Embed) and op.site is not None:
            slices, weight = (SiteSlice(op.site, 0, program.weights[op.table].shape[0]),), op.table
        elif isinstance(op, Logits) and op.site is not None:
            slices, weight, bias = (SiteSlice(op.site, 0, program.weights[op.weight].shape[0]),), op.weight, op.bias
        elif isinstance(op, Norm) and op.weight is not None and (site := getattr(op, "site", None)) is not None:
            slices, weight, bias = (SiteSlice(site, 0, program.weights[op.weight].shape[0]),), op.weight, op.bias
        for item in slices:
            yield item.site, SiteWeight(weight, item.lo, item.hi, bias)


def _tables(program: Program, names: Mapping[str, str]) -> Iterator[tuple[int, SiteWeight]]:
    weights = {decl.name: decl for decl in program.weights}
    for site in program.sites:
        if (name := names.get(site.kind)) in weights:
            decl = weights[name]
            yield site.id, SiteWeight(decl.id, 0, decl.shape[0])


@dataclass
class BaseWeights:
    """Reads the weights of ``source`` in the loading worker. The files are opened at the first read; ``close`` closes
    them.

    Every read raises ``AdapterError`` (``param``: base) when the files were replaced or cannot be read, or when the
    weight of a site is not known.
    """

    source: BaseSource
    _opened: Checkpoint | None = field(default=None, repr=False)

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one tensor."""
        return self.source.tied

    def has_bias(self, site: Site) -> bool:
        return self._place(site).bias is not None

    def bias(self, site: Site) -> Float32 | None:
        """``[O]`` float32 as stored; None without one."""
        place = self._place(site)
        if place.bias is None:
            return None
        return self._vector(self._decl(place.bias))[place.lo : min(place.hi, place.lo + site.out_features)]

    def vector(self, site: Site) -> Float32:
        """The weight of a norm, as its op multiplies by it: ``[width]`` float32."""
        return self._vector(self._decl(self._place(site).weight))

    def gather(self, site: Site, ids: npt.NDArray[np.int32]) -> Float32:
        """Rows ``ids`` of a table as stored, dequantised: ``[n, D]`` float32."""
        decl = self._decl(self._place(site).weight)
        made = np.empty((len(ids), decl.shape[-1]), np.float32)
        for first, part in self._parts(decl, None):
            for number, row in enumerate(ids - first):
                if 0 <= row < part.shape[0]:
                    made[number] = _slice(part, row, row + 1)[0][0]
        return made

    def rows(self, site: Site, *, stored: bool = False) -> Iterator[tuple[int, Array]]:
        """Blocks of the site's weight [O, I] (of a table [V, D]): the number of the first row, and float32 values as
        the engine holds them; of a table as many as ``site`` has. ``stored``: in the file's dtype, or dequantised."""
        place = self._place(site)
        decl = self._decl(place.weight)
        lo, expert = place.lo, None
        hi = min(place.hi, lo + (site.in_features if site.kind == "embed" else site.out_features))
        if len(decl.shape) == 3:
            expert, lo = divmod(lo, decl.shape[1])
            hi = lo + place.hi - place.lo
        for first, part in self._parts(decl, expert):
            step = max(1, _BLOCK_BYTES // (4 * part.shape[1]))
            for at in range(max(lo, first), min(hi, first + part.shape[0]), step):
                end = min(at + step, hi, first + part.shape[0])
                values, blocks = _slice(part, at - first, end - first)
                yield at - lo, values if stored else self._held(decl, values, blocks=blocks)
                release_pages(values)

    def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def _place(self, site: Site) -> SiteWeight:
        if site.id not in self.source.sites:
            raise _unavailable(f"that of {site.module} is not known: transformers' code computes this model")
        return self.source.sites[site.id]

    def _decl(self, weight: int) -> WeightDecl:
        return self.source.weights[weight]

    def _parts(self, decl: WeightDecl, expert: int | None) -> Iterator[tuple[int, Part]]:
        """First row and matrix of each part of ``decl``, of an expert's matrix if it has experts."""
        if expert is not None:
            decl = replace(decl, parts=tuple(part for part in decl.parts if part.expert in (None, expert)))
        parts = (_read(self._checkpoint(), part, decl.shape) for part in decl.parts)
        if expert is not None:
            yield from ((first, part) for number, first, part in expert_matrices(decl, list(parts)) if number == expert)
            return
        first = 0
        for part in parts:
            yield first, part
            first += part.shape[0]

    def _vector(self, decl: WeightDecl) -> Float32:
        from truffula.model.load import joined

        values = joined(decl, [_read(self._checkpoint(), part, decl.shape) for part in decl.parts])
        return np.concatenate([np.asarray(part, np.float32).reshape(-1) for part in values])

    def _held(self, decl: WeightDecl, values: Array, *, blocks: str) -> Float32:
        """``values`` as the engine rounds them when it loads them. ``blocks``: the kind that they were stored in."""
        exact = decl.id in self.source.exact
        quantisable = "matmul" in decl.uses and decl.shape[-1] % _Q8_0_WIDTH == 0
        quantisable = quantisable and not exact and decl.id not in self.source.unquantised
        options = WeightOptions(self.source.dtype, self.source.quantize)
        form, kept = options.matrix_format({blocks or values.dtype.name}, exact=exact, quantisable=quantisable)
        numbers = np.asarray(values, np.float32)
        if kept or form == "float32":
            return numbers
        if form == "q8_0":
            return q8_0(numbers)
        if form != "bfloat16":
            raise _unavailable(f"how {form} rounds {decl.name} is not known here")
        return np.asarray(numbers.astype(ml_dtypes.bfloat16), np.float32)

    def _checkpoint(self) -> Checkpoint:
        if self._opened is None:
            from truffula.weights.open import open_checkpoint

            try:
                opened = open_checkpoint(Path(self.source.path))
            except TruffulaError as error:
                raise _unavailable(f"the base's files cannot be read ({error.message.rstrip('.')})") from error
            if tuple(file.opened for file in opened.files) != self.source.files:
                opened.close()
                raise _unavailable("the base's file was replaced since it was loaded")
            for file in opened.files:
                file.map_shared()  # of the worker's memory only what it allocates is limited
            self._opened = opened
        return self._opened


def _read(checkpoint: Checkpoint, part: WeightPart, shape: tuple[int, ...]) -> Part:
    from truffula.model.load import read_part  # imports the architectures

    return read_part(checkpoint, part, shape, frozenset(BLOCK_KINDS), checked=False)


def q8_0(values: Float32) -> Float32:
    """``values [N, I]`` rounded to Q8_0 as the native kernels round, dequantised."""
    blocks = values.reshape(-1, _Q8_0_WIDTH)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(scale == 0, 0, blocks * (1 / scale))
    whole = np.copysign(np.floor(np.abs(ratio) + np.float32(0.5)), ratio)
    return np.asarray(whole * scale.astype(np.float16), np.float32).reshape(values.shape)


def _slice(part: Part, lo: int, hi: int) -> tuple[Array, str]:
    """Rows of a part, and the kind of blocks that they were stored in."""
    if isinstance(part, QuantisedArray):
        return part.rows(lo, hi).dequantise(), part.kind
    return (part.read(lo, hi) if isinstance(part, ComputedArray) else part[lo:hi]), ""


def _unavailable(why: str) -> AdapterError:
    return AdapterError(f"The adapter needs the base's weights, and {why}.", param="base")
