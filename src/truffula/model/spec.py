"""``ModelSpec``: the structure of a model, independent of its architecture's name, its tensors and the backend.

An architecture (``model/architectures/``) reads a config into a ``ModelSpec``; ``model/decoder.py`` builds a
``Program`` from it. Later stages do not depend on the architecture. The parts of a layer are in ``model/parts/``.

Shape letters: ``D`` hidden, ``F`` feed-forward, ``V`` vocabulary, ``H`` query heads, ``K`` KV heads, ``E`` head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

from truffula.model.rows import LayerRows, NormSpec, RowSlice, WeightRow

if TYPE_CHECKING:
    from truffula.kernels.program import Ref
    from truffula.model.builder import LayerBuilder
    from truffula.model.parts.per_layer import PerLayerInputs


@dataclass(frozen=True)
class RopeSpec:
    """A rotary table: ``inv_freq`` one float32 value per rotated pair; cos and sin are multiplied by ``factor``.

    ``border``, ``long_freq`` and ``growth``: for longer sequences, as in ``program.RopeTable``.
    """

    inv_freq: tuple[float, ...]
    factor: float = 1.0
    border: int = 0
    long_freq: tuple[float, ...] = ()
    growth: float = 0.0

    @property
    def dims(self) -> int:
        """The number of columns of a head that are rotated."""
        return 2 * len(self.inv_freq)


class Part(Protocol):
    """A mixer or an MLP: what it caches, its modules, its weights and its operations.

    ``kv_widths`` are the widths of its cached planes, () without a cache; ``window`` is the window of that cache.
    """

    @property
    def window(self) -> int | None: ...
    @property
    def kv_widths(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> str:
        """What the part is, in the words of reports: ``sliding attention of 512 tokens``."""

    def first_module(self, names: ModuleNames) -> str:
        """The module whose input is the part's input, relative to the layer. Probes are read there."""

    def last_module(self, names: ModuleNames) -> str:
        """The module whose output is the part's output, before a norm after it."""

    def rows(self, rows: LayerRows) -> None:
        """Lists the part's weights."""

    def write(self, build: LayerBuilder, x: Ref) -> None:
        """Appends the part's operations on ``x``, and adds their result to the residual stream (``build.output``)."""


Branch = tuple[str, Part, NormSpec | None, NormSpec | None]


@dataclass(frozen=True)
class LayerSpec:
    """One block: h += m * after(mixer(before(h))), then the same with the MLP. A part or a norm may be absent.

    ``parallel``: both parts read the stream from before the block; an MLP without a norm of its own reads the mixer's
    normed input. ``norm_stream``: the norms replace the stream, as in the first transformers: h = before(h), then
    h = after(h + mixer(h)). ``extra`` is a third part, without a norm before it. ``scalar`` is a stored number by which
    the stream is multiplied at last.
    """

    mixer: Part | None
    mlp: Part | None
    before_mixer: NormSpec | None
    before_mlp: NormSpec | None
    after_mixer: NormSpec | None = None
    after_mlp: NormSpec | None = None
    residual_multiplier: float = 1.0
    parallel: bool = False
    norm_stream: bool = False
    extra: Part | None = None
    after_extra: NormSpec | None = None
    scalar: str | None = None

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The parts in their order: name, part, norm before, norm after."""
        every = (
            ("mixer", self.mixer, self.before_mixer, self.after_mixer),
            ("mlp", self.mlp, self.before_mlp, self.after_mlp),
            ("extra", self.extra, None, self.after_extra),
        )
        return tuple((name, part, before, after) for name, part, before, after in every if part is not None)


def body_prefixes(*prefixes: str, old_head: bool = False) -> tuple[tuple[str, str], ...]:
    """``ModuleNames.prefixes``. ``old_head``: files have the head under its old name, too."""
    heads = ("embed_out", "lm_head") if old_head else ("lm_head",)
    return tuple((prefix, head) for prefix in prefixes for head in heads)


@dataclass(frozen=True)
class ModuleNames:
    """The paths of a model's modules. ``layer`` contains ``{i}``; names inside a layer are relative to it.

    ``body`` is the body's path in transformers, with the dot, as probes and PEFT use it (``lora/roots.py`` has those
    of other classes that adapters are trained on). ``gate_up_fused``: gate and up are the one module ``gate_up``.
    ``prefixes`` are the prefixes of the body's names in checkpoints,
    most common first, each with the module of the head. ``skip`` are prefixes of parts that are not served, such as an
    image encoder; ``unused`` those of parts without effect on generation, such as a layer that predicts further tokens,
    named from the body or from the top.

    ``qkv_order``: ``split`` are three modules; the others are the one module ``qkv``, whose rows are all q, all k and
    all v (``flat``), or the q, k and v of each KV head in turn (``grouped``). ``gate_up_fused``: gate and up are the
    one module ``gate_up``. ``transposed``: matrices of layers are stored as [I, O]. ``buffers`` are tensors of a layer
    that are not weights, such as masks. ``attention`` None: transformers computes attention within its module, and q
    and k after the rotation cannot be observed.
    """

    embed: str = "embed_tokens"
    positions: str = "embed_positions"
    project_in: str = "project_in"
    project_out: str = "project_out"
    layer: str = "layers.{i}."
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str | None = "self_attn.qkv_proj"
    qkv_order: Literal["split", "flat", "grouped"] = "split"
    out: str = "self_attn.o_proj"
    attention: str | None = "self_attn"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str | None = "mlp.gate_up_proj"
    gate_up_fused: bool = False
    down: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    head: str = "lm_head"
    body: str = "model."
    prefixes: tuple[tuple[str, str], ...] = (
        ("model.", "lm_head"),
        ("", "lm_head"),
        ("language_model.model.", "language_model.lm_head"),
        ("model.language_model.", "lm_head"),
    )
    skip: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    transposed: bool = False
    unused: tuple[str, ...] = ()


LLAMA_NAMES = ModuleNames()


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only language model. ``max_positions`` is the maximum length of a sequence.

    ``position_offset``: learned positions are added to the input rows, and position p is row p + offset of their table;
    None: no such table. ``embed_norm`` comes after that; it is within the module of the embedding where that has no
    ``embed_adapters``: they would act after it, which is not supported. ``embed_width``: the width of embedding and
    head where it is not that of the stream; two projections lie between.
    ``embed_scale`` multiplies the input rows (rounded to the table's dtype first), never the head. transformers applies
    it in the embedding (``embed_scaled`` module), also to embeddings that are given in place of ids (inputs), or to the
    rows of ids alone (ids). ``logit_scale`` multiplies logits, then ``logit_softcap``. ``per_layer``: inputs of the
    layers' third parts.
    ``notes`` are for the operator.
    """

    model_type: str
    vocab_size: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    final_norm: NormSpec | None
    max_positions: int
    position_offset: int | None = None
    embed_norm: NormSpec | None = None
    embed_adapters: bool = True
    embed_width: int | None = None
    embed_scale: float | None = None
    embed_scaled: Literal["module", "inputs", "ids"] = "inputs"
    per_layer: PerLayerInputs | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head_bias: bool = False
    names: ModuleNames = LLAMA_NAMES
    notes: tuple[str, ...] = ()

    def layer_prefix(self, index: int) -> str:
        """Path of layer ``index`` relative to the body, with its dot."""
        return self.names.layer.format(i=index)

    @cached_property
    def rows(self) -> tuple[WeightRow, ...]:
        """The table of weights, in the order the program uses them."""
        embed, head = RowSlice(self.names.embed, self.vocab_size), RowSlice(self.names.head, self.vocab_size)
        table_width = self.embed_width or self.hidden
        found = [WeightRow("embed", "embed", (embed,), table_width)]
        outer = LayerRows(self.names, self.hidden)
        if self.position_offset is not None:
            outer.table("positions", self.names.positions, self.max_positions + self.position_offset)
        if self.embed_width is not None:
            outer.linear("project_in", [(self.names.project_in, self.hidden)], table_width)
        outer.norm("embed_norm", self.embed_norm)
        if self.per_layer is not None:
            self.per_layer.rows(outer)
        found += outer.found
        for index, layer in enumerate(self.layers):
            rows = LayerRows(self.names, self.hidden, index)
            for name, part, before, after in layer.branches:
                rows.norm(f"before_{name}", before)
                part.rows(rows)
                rows.norm(f"after_{name}", after)
            if layer.scalar is not None:
                rows.numbers("scalar", [layer.scalar])
            found += rows.found
        final = LayerRows(self.names, self.hidden)
        final.norm("final_norm", self.final_norm)
        if self.embed_width is not None:
            final.linear("project_out", [(self.names.project_out, table_width)], self.hidden)
        found += [*final.found, WeightRow("head", "head", (head,), table_width)]
        if self.head_bias:
            found.append(WeightRow("head.bias", "head", (head,), 0, param="bias"))
        return tuple(found)
