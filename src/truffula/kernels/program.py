"""A model as data: a flat list of typed operations over symbolic buffers.

``model/decoder.py`` writes a ``Program`` once per model; a backend loads it once and runs it each step. Nothing here
computes: it can be printed, checked for shapes, and compared op by op. A buffer has T rows (the tokens of a step) or
R rows (those with an output). Widths are columns. ``Ref`` is a range of a buffer's columns.

Rounding contract: a ``Linear`` (with its adapters and its epilogue), a ``Norm``, a ``Pointwise`` compute in float32 and
round once, to the dtype of the buffer they write. A backend without a mixed product may round the base product first
(the torch reference in bfloat16 does).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy.typing as npt

from truffula.errors import KernelError
from truffula.kernels.rope_tables import RopeRegime as RopeRegime
from truffula.kernels.rope_tables import RopeTable as RopeTable
from truffula.kernels.stacked import StackedSlice
from truffula.kernels.weight_decl import BufferDtype as BufferDtype
from truffula.kernels.weight_decl import RowOrder as RowOrder
from truffula.kernels.weight_decl import Transform as Transform
from truffula.kernels.weight_decl import WeightDecl as WeightDecl
from truffula.kernels.weight_decl import WeightId as WeightId
from truffula.kernels.weight_decl import WeightPart as WeightPart

Rows = Literal["T", "R"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu", "sigmoid", "softplus"]


@dataclass(frozen=True)
class Buffer:
    """``[T or R, width]``; ``dtype`` model means the dtype the executable was loaded with."""

    id: int
    name: str
    rows: Rows
    width: int
    dtype: BufferDtype = "model"


@dataclass(frozen=True)
class Ref:
    """Columns ``start .. start + width`` of a buffer."""

    buffer: int
    start: int
    width: int


# A model of many experts has tens of thousands of slices and sites. A struct is made ten times as fast as a frozen
# dataclass, and the garbage collector does not visit it; so are ``StackedSlice``, ``WeightPart`` and ``TensorInfo``.
class ModuleSlice(msgspec.Struct, frozen=True, gc=False):
    """PEFT module path ``name`` whose output rows ``lo .. hi`` (of ``of`` rows) are this site's output, sorted by
    ``order``."""

    name: str
    lo: int
    hi: int
    of: int
    order: RowOrder | None = None

    def rows(self, whole: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """This site's part of ``whole`` ``[of, ...]``."""
        part = whole[self.lo : self.hi]
        return part if self.order is None else self.order.sorted(part)


class Site(msgspec.Struct, frozen=True, gc=False):
    """A place where adapters act: one slice of a linear weight, a table, or the vectors of a norm.

    ``modules[0]`` is the site's own module path as PEFT names it without ``base_model.model.``, e.g.
    ``model.layers.3.self_attn.q_proj``; further entries are other names of it, and fused modules that cover it with
    some of their rows. ``stacked`` is the place of an expert's site in a parameter that holds all experts.
    ``transform`` takes the module's own tensor as files have it to the base's weight, as in ``WeightPart``: a weight
    that replaces the base's is given after it. A ``norm`` is as wide as its weight, from and to.
    ``virtual_scale``, of an embedding: what multiplies the embeddings that are given in place of token ids; None: they
    cannot be given.
    """

    id: int
    kind: Literal["linear", "embed", "head", "norm"]
    layer: int | None
    in_features: int
    out_features: int
    modules: tuple[ModuleSlice, ...]
    stacked: StackedSlice | None = None
    transform: Transform = "none"
    virtual_scale: float | None = 1.0

    @property
    def module(self) -> str:
        return self.modules[0].name


@dataclass(frozen=True)
class KvPlane:
    """One plane of cached values of one layer: ``width`` numbers per token (K: kv_heads x dim_k, V: kv_heads x
    dim_v)."""

    id: int
    layer: int
    width: int


@dataclass(frozen=True)
class KvGroup:
    """Planes that share block ids and block tables.

    With ``window`` None blocks are kept until the sequence ends. With a window w the query at position i reads keys
    j with i - w < j <= i only, so the engine frees blocks behind that, and their table entries are -1.
    """

    id: int
    planes: tuple[KvPlane, ...]
    window: int | None = None


@dataclass(frozen=True)
class RecurrentState:
    """The state of a recurrent layer: ``width`` numbers per sequence, whatever its length.

    The states of all layers of a sequence are one state row (``StepInputs.state_in``). ``dtype`` model: they are values
    of a buffer, such as the last inputs of a convolution; a backend may hold them in float32.
    """

    id: int
    layer: int
    width: int
    dtype: BufferDtype = "float32"


class SiteSlice(msgspec.Struct, frozen=True, gc=False):
    """Output columns ``lo .. hi`` of a linear (before any glu) belong to ``site``."""

    site: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Epilogue:
    """Applied after the adapters, in float32 and in this order.

    ``bias`` [O] · ``clip`` to ±clip · ``activation`` · ``glu``: the columns are [gate | up] halves and the result is
    activation(gate) * up, half as wide (then ``activation`` acts on the gate only) · times ``scale`` · plus
    ``residual``. With ``glu_limit`` c the gate is at most c and the up within ±c; ``glu_offset`` is added to the up.
    """

    bias: WeightId | None = None
    clip: float | None = None
    activation: Activation | None = None
    glu: bool = False
    scale: float = 1.0
    residual: Ref | None = None
    glu_limit: float | None = None
    glu_offset: float = 0.0


NO_EPILOGUE = Epilogue()


@dataclass(frozen=True)
class Probe:
    """The same value in transformers: the input or output of ``module``. ``verify`` compares the two."""

    module: str
    side: Literal["in", "out"]


@dataclass(frozen=True, kw_only=True)
class Op:
    """Base of all ops: the layer (None outside layers), a readable name, and the probe."""

    name: str
    layer: int | None = None
    probe: Probe | None = None


@dataclass(frozen=True, kw_only=True)
class Embed(Op):
    """``out = (table[ids] * scale) + add``. ``scale`` is first rounded to the table's serving dtype (Gemma).

    Adapters act on ``table[ids]``. Rows of an adapter's own tokens, whose ids are behind the table, are not scaled.
    """

    table: WeightId
    out: Ref
    source: Literal["token", "position"] = "token"
    offset: int = 0
    scale: float | None = None
    add: Ref | None = None
    site: int | None = None


@dataclass(frozen=True, kw_only=True)
class Norm(Op):
    """``rms``: x / sqrt(mean(x²) + eps); ``layer``: (x - mean) / sqrt(var + eps). In float32.

    ``cast`` first: weight * round(normed) (llama); last: round(weight * normed) (gemma, olmo2). ``groups`` norms over
    each of that many equal column groups (per-head q/k norms): ``weight`` and ``bias`` are as wide as a group, which
    shares them with the others, or as all columns.
    ``gate``: the result (with cast first: the rounded one) is multiplied by gate_activation(gate), then rounded.
    ``plus``: out = plus + round(result), a residual added after a post-norm.
    For the rows of segments whose adapters act at ``site``, ``weight`` and ``bias`` are those that the adapters make.
    """

    x: Ref
    out: Ref
    kind: Literal["rms", "layer"]
    eps: float
    weight: WeightId | None = None
    bias: WeightId | None = None
    cast: Literal["first", "last"] = "first"
    groups: int = 1
    gate: Ref | None = None
    gate_activation: Activation | None = None
    plus: Ref | None = None
    site: int | None = None


@dataclass(frozen=True, kw_only=True)
class Linear(Op):
    """``out = epilogue(x Wᵀ + adapters)`` (``kernels/adapters.py``); ``slices`` are the columns of each site."""

    x: Ref
    weight: WeightId
    out: Ref
    slices: tuple[SiteSlice, ...] = ()
    epilogue: Epilogue = NO_EPILOGUE
    compute: Literal["model", "float32"] = "model"


@dataclass(frozen=True, kw_only=True)
class Pointwise(Op):
    """``act``: activation(x) · ``add``: x + y · ``mul``: x * y, or x * activation(y) · ``scale``: x * params[0], or
    times the one number of ``weight`` · ``clip``, ``softcap``: params[0] · ``sigmoid_mul``: x * sigmoid(y) ·
    ``position_scale``: x * (1 + b * ln(1 + floor((p + o) / n))) with the row's position p and params (b, n, o) ·
    ``xielu``: its activation, whose numbers are ``weight``: alpha_p, alpha_n, beta and eps as checkpoints store them.
    A column of the products' ``y`` may be for several columns of x, one after the other: as many for each."""

    kind: Literal["act", "add", "scale", "clip", "softcap", "sigmoid_mul", "mul", "position_scale", "xielu"]
    x: Ref
    out: Ref
    y: Ref | None = None
    activation: Activation | None = None
    params: tuple[float, ...] = ()
    weight: WeightId | None = None


@dataclass(frozen=True, kw_only=True)
class RopeRows(Op):
    """Once a step: row t is [cos | sin] of ``rope_pos[0, t] * inv_freq`` times the table's factor, each half ``pairs``
    wide. See ``RopeTable`` for lengths beyond its border."""

    table: int
    out: Ref


@dataclass(frozen=True, kw_only=True)
class Rope(Op):
    """Rotate in place columns ``start .. start + dims`` of each of ``heads`` heads of width ``head_dim`` in ``x``.

    ``half`` pairs (i, i + dims/2), ``interleaved`` pairs (2i, 2i + 1). ``rows`` comes from ``RopeRows``.
    """

    x: Ref
    rows: Ref
    heads: int
    head_dim: int
    start: int
    dims: int
    layout: Literal["half", "interleaved"] = "half"


@dataclass(frozen=True, kw_only=True)
class Attention(Op):
    """Write this step's K and V to their slots, then attend causally over the sequence's blocks.

    Scores are ``scale * q·k``; ``softcap`` c gives c * tanh(s / c); then the mask; softmax in float32. With a
    ``window`` w query i attends to keys j with i - w < j <= i or, if ``chunked``, to keys j <= i with j // w = i // w.
    Heads h use kv head ``h // (heads / kv_heads)``. ``alibi``: one slope per head, and slope * j is added to the score
    of key j. ``alibi_rounded``: j and the product are rounded to bfloat16, and the product is multiplied by ``scale``
    (Falcon).
    Without ``k`` and ``v`` nothing is written: the op attends to what an earlier op with the same planes wrote.
    """

    q: Ref
    k: Ref | None
    v: Ref | None
    out: Ref
    group: int
    planes: tuple[int, int]
    heads: int
    kv_heads: int
    dim_k: int
    dim_v: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: WeightId | None = None
    chunked: bool = False
    alibi: tuple[float, ...] = ()
    alibi_rounded: bool = False


@dataclass(frozen=True, kw_only=True)
class Mla(Op):
    """Multi-head latent attention: write this step's ``latent`` rows to their slots, then attend causally.

    A row of ``latent`` is [latent | rotated key], ``rank + rope`` numbers: all that is cached of a token. Heads of
    ``q`` are [nope | rope] columns, rotated. ``kv_b`` [heads · (nope + dim_v), rank] holds, head by head, the rows W_k,
    then W_v. A cached row [c | k] has the key [W_k c | k] and the value W_v c, which are not computed: scores are
    ``scale * ((q_nope W_k) · c + q_rope · k)``, and the output is W_v Σ p c, with softmax weights p. For the rows of a
    segment whose adapter acts on ``slices``, W is what the adapter makes of it; a bias acts on values alone, as one of
    keys adds the same to all scores of a row. Float32 until the one rounding of ``out``.
    """

    q: Ref
    latent: Ref
    out: Ref
    kv_b: WeightId
    group: int
    plane: int
    heads: int
    nope: int
    rope: int
    dim_v: int
    rank: int
    scale: float
    slices: tuple[SiteSlice, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GatedDelta(Op):
    """The gated delta rule: linear attention whose state replaces what it holds for a key.

    Per sequence and head a float32 state S ``[dim_k, dim_v]``, kept in ``state`` from step to step. For each row, with
    q and k divided by sqrt(|x|² + eps) and q multiplied by ``scale``:

    S = exp(g) S  ·  S = S + k (beta (v - Sᵀk))ᵀ  ·  out = Sᵀq

    where g = ``rate`` * softplus(``decay`` + ``dt_bias``) and beta = ``beta_scale`` * sigmoid(``beta``). ``rate``
    ``[heads]`` is below 0. ``decay`` has one column per head or, with a decay for each row of S (Kimi's delta
    attention), dim_k of them. Head h uses the q and k of key head ``h // (heads / key_heads)``.
    """

    q: Ref
    k: Ref
    v: Ref
    decay: Ref
    beta: Ref
    out: Ref
    state: int
    rate: WeightId
    dt_bias: WeightId
    heads: int
    key_heads: int
    dim_k: int
    dim_v: int
    scale: float
    eps: float = 1e-6
    beta_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CausalConv(Op):
    """A depthwise convolution along each sequence, ending at the row itself:
    ``out[t, c] = activation(bias[c] + Σ_k weight[c, k] · x[t - (K - 1) + k, c])``, in float32.

    ``weight`` is ``[C, K]`` for the C columns of ``x``. ``state`` holds the last K - 1 rows of ``x``, the oldest first:
    width (K - 1) · C.
    """

    x: Ref
    out: Ref
    weight: WeightId
    state: int
    bias: WeightId | None = None
    activation: Activation | None = None


@dataclass(frozen=True, kw_only=True)
class Route(Op):
    """Chooses ``k`` experts per row: ``out`` is their numbers in descending order of preference, then their weights.

    ``logits`` and ``out`` are float32. Scores are ``softmax`` or ``sigmoid`` of the logits. The experts with the best
    logits are chosen; with ``correction`` [E], those with the best score + correction. With ``groups`` > 1 only experts
    of the best ``topk_groups`` groups (equal runs of experts) are chosen from; a group counts as its best expert
    (``max``) or its two best (``top2``). The weights are the chosen scores, divided by max(their ``norm``-norm +
    ``plus``, ``floor``) unless ``norm`` is None, times ``scale`` and the expert's number of ``expert_scale`` [E]. Equal
    values: the lower number first.

    ``sparsemixer``: expert after expert, the one with the best logit m among those left; its weight is its softmax
    among those left whose logit s is near: (m - s) / max(abs(s), m) <= 2 * ``jitter``, s of the logits.
    """

    logits: Ref
    out: Ref
    k: int
    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    correction: WeightId | None = None
    groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2"] = "top2"
    norm: float | None = None
    plus: float = 0.0
    floor: float = 1e-20
    scale: float = 1.0
    expert_scale: WeightId | None = None
    jitter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ExpertLinear(Op):
    """Each row's products with the matrices of its k experts: ``epilogue(x W[e]ᵀ + adapters)``. ``routes`` is as
    ``Route`` writes it; experts that no row has chosen are not read.

    ``weight`` is [E, O, I], ``epilogue.bias`` [E · O]. ``x`` is I wide, or k · I: then the product of the j-th expert
    takes the j-th I columns. ``out`` has the k results side by side; or their sum (``sum``), each times its weight
    (``weighted``), to which a ``residual`` is added. ``slices`` are ranges of E · O columns: those of expert e begin at
    e · O.
    """

    x: Ref
    routes: Ref
    weight: WeightId
    out: Ref
    combine: Literal["none", "sum", "weighted"] = "none"
    slices: tuple[SiteSlice, ...] = ()
    epilogue: Epilogue = NO_EPILOGUE


@dataclass(frozen=True, kw_only=True)
class Mamba2(Op):
    """The selective state space of Mamba-2 and, with heads that are one column wide, of Mamba.

    Per sequence and head a float32 state h ``[head_dim, state_size]``, kept in ``state`` from step to step. For each
    row and head, with dt = softplus(``dt`` + ``dt_bias``) clipped to ``dt_limit``:

    h = exp(rate * dt) h + (dt * x) bᵀ  ·  out = h c + skip * x

    ``rate`` (below 0), ``dt_bias`` and ``skip`` are ``[heads]``; or ``rate`` is ``[heads · state_size]``, one for each
    column of a head's state. Head i uses the b and c of group ``i // (heads / groups)``.
    """

    x: Ref
    b: Ref
    c: Ref
    dt: Ref
    out: Ref
    state: int
    rate: WeightId
    dt_bias: WeightId
    skip: WeightId
    heads: int
    head_dim: int
    groups: int
    state_size: int
    dt_limit: tuple[float, float] = (0.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class TakeRows(Op):
    """``out[r] = x[logit_rows[r]]``: from T rows to R rows."""

    x: Ref
    out: Ref


@dataclass(frozen=True, kw_only=True)
class Logits(Op):
    """``out = softcap(scale * (x Wᵀ + bias + adapters))`` in float32 over R rows."""

    x: Ref
    weight: WeightId
    out: Ref
    bias: WeightId | None = None
    scale: float = 1.0
    softcap: float | None = None
    site: int | None = None


@dataclass(frozen=True)
class Output:
    """The result of a step, float32: ``logits`` ``[R, V]``, which are sampled or scored, or a ``vector`` ``[R, width]``
    (an embedding, class scores), which is returned."""

    kind: Literal["logits", "vector"]
    width: int


@dataclass(frozen=True, kw_only=True)
class ModelInterface:
    """A model as the engine and the adapters see it: sites, vocabulary, KV groups, states and output, without ops.

    ``max_positions`` is the model's longest sequence in tokens. Ids are positions in their tuples. The last
    ``more_ids`` of the ``vocab_size`` ids are adapters' own: the model's rows of them are zero.
    """

    name: str
    vocab_size: int
    max_positions: int
    sites: tuple[Site, ...]
    kv_groups: tuple[KvGroup, ...]
    output: Output
    states: tuple[RecurrentState, ...] = ()
    rope_regime: RopeRegime | None = None
    more_ids: int = 0

    def __post_init__(self) -> None:
        _require_ids_in_order(self, "sites", "kv_groups", "states")

    def state_bytes(self, model_itemsize: int) -> int:
        """Bytes of one state row. ``model_itemsize``: of a number with the model's dtype."""
        return sum(state.width * (4 if state.dtype == "float32" else model_itemsize) for state in self.states)


@dataclass(frozen=True, kw_only=True)
class Program(ModelInterface):
    """A model as ops, which a backend computes. The last op writes ``result``, a buffer of R rows."""

    buffers: tuple[Buffer, ...]
    weights: tuple[WeightDecl, ...]
    rope_tables: tuple[RopeTable, ...]
    ops: tuple[Op, ...]
    result: Ref
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_ids_in_order(self, "buffers", "weights", "rope_tables")


def _require_ids_in_order(owner: ModelInterface, *names: str) -> None:
    for name in names:
        for position, item in enumerate(getattr(owner, name)):
            if item.id != position:
                raise KernelError(f"{name}[{position}] has id {item.id}; ids are positions.")
