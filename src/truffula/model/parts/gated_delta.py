"""``GatedDeltaSpec``: linear attention by the gated delta rule, its weights and its operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from truffula.kernels.program import Activation, GatedDelta, Ref
from truffula.model.rows import LayerRows, NormSpec, RowPart

if TYPE_CHECKING:
    from truffula.model.builder import LayerBuilder
    from truffula.model.spec import ModuleNames


Inputs = tuple[RowPart, ...]


@dataclass(frozen=True)
class LowRank:
    """Decay and gate as products of two matrices: ``rank`` columns of the first, then these modules (Kimi).

    ``decay5``: the decay's in transformers 5.
    """

    rank: int
    decay: str
    gate: str
    decay5: str


@dataclass(frozen=True)
class GatedDeltaSpec:
    """One layer's linear attention: out(norm(delta rule of conv(q | k | v)) * gate). Modules are relative to the layer.

    ``inputs`` (module, rows, order) are the matrices on the part's input whose rows, stacked, are q, k, v, gate, beta
    and decay; with ``low_rank`` the first factors of gate and decay. Then the decay has a column for each of dim_k.
    ``convs`` (module, columns) are the short convolutions of q, k and v, or ``conv`` of all, over ``taps`` rows, with
    ``activation``. ``parameters`` is the module of A_log (of shape ``rate_shape``) and dt_bias. ``norm`` is per head.
    ``beta_scale`` 2 allows the state to change sign.
    """

    heads: int
    key_heads: int
    dim_k: int
    dim_v: int
    taps: int
    inputs: Inputs
    norm: NormSpec
    activation: Activation = "silu"
    parameters: str = "linear_attn"
    rate_shape: tuple[int, ...] = ()
    convs: tuple[tuple[str, int], ...] = ()
    conv: str = "linear_attn.conv1d"
    out: str = "linear_attn.out_proj"
    gate_activation: Activation = "silu"
    beta_scale: float = 1.0
    low_rank: LowRank | None = None

    @property
    def window(self) -> None:
        return None

    @property
    def kind(self) -> str:
        return "gated delta rule"

    @property
    def kv_widths(self) -> tuple[int, ...]:
        return ()

    @property
    def key_width(self) -> int:
        return self.key_heads * self.dim_k

    @property
    def value_width(self) -> int:
        return self.heads * self.dim_v

    @property
    def decay_width(self) -> int:
        return self.heads * (self.dim_k if self.low_rank else 1)

    def first_module(self, names: ModuleNames) -> str:
        return self.inputs[0][0]

    def last_module(self, names: ModuleNames) -> str:
        return self.out

    def rows(self, rows: LayerRows) -> None:
        rows.linear("delta_in", self.inputs, rows.hidden)
        if self.low_rank is not None:
            rows.linear("delta_gate", [(self.low_rank.gate, self.value_width)], self.low_rank.rank)
            rows.linear("delta_decay", [(self.low_rank.decay, self.decay_width)], self.low_rank.rank,
                        alias=self.low_rank.decay5)  # fmt: skip
        columns = 2 * self.key_width + self.value_width
        rows.conv("delta_conv", self.convs or [(self.conv, columns)], self.taps, fused=self.conv)
        rows.vector("delta_rate", f"{self.parameters}.A_log", self.heads, stored=self.rate_shape,
                    transform="minus_exp")  # fmt: skip
        rows.vector("delta_dt_bias", f"{self.parameters}.dt_bias", self.decay_width)
        rows.norm("delta_norm", self.norm, self.dim_v)
        rows.linear("out", [(self.out, rows.hidden)], self.value_width)

    def write(self, build: LayerBuilder, x: Ref) -> None:
        rank = self.low_rank.rank if self.low_rank is not None else None
        widths = self.key_width, self.key_width, self.value_width, rank or self.value_width, self.heads
        inner = build.buffer("delta_in", sum(widths) + (rank or self.decay_width))
        build.linear("delta_in", x, inner, build.probe(self.inputs[0][0], "out"))
        q, k, v, gate, beta, decay = _columns(inner, *widths)
        if self.low_rank is not None:
            gate_in, decay_in = gate, decay
            gate, decay = build.buffer("delta_gate", self.value_width), build.buffer("delta_decay", self.decay_width)
            build.linear("delta_gate", gate_in, gate, build.probe(self.low_rank.gate, "out"))
            build.linear("delta_decay", decay_in, decay, build.probe(self.low_rank.decay5, "out"))
        mixed = build.buffer("delta_qkv", q.width + k.width + v.width)
        build.conv("delta_conv", Ref(inner.buffer, 0, mixed.width), mixed, self.activation)
        q, k, v = _columns(mixed, q.width, k.width)
        out = build.buffer("delta_out", self.value_width)
        state = build.state(self.heads * self.dim_k * self.dim_v)
        build.append(GatedDelta(name="delta", q=q, k=k, v=v, decay=decay, beta=beta, out=out, state=state,
                                rate=build.weight("delta_rate"), dt_bias=build.weight("delta_dt_bias"),
                                heads=self.heads, key_heads=self.key_heads, dim_k=self.dim_k, dim_v=self.dim_v,
                                scale=self.dim_k**-0.5, beta_scale=self.beta_scale))  # fmt: skip
        build.norm("delta_norm", self.norm, out, out, probe=build.probe(self.out, "in"), groups=self.heads,
                   gate=(gate, self.gate_activation))  # fmt: skip
        build.output("out", out)


def _columns(whole: Ref, *widths: int) -> list[Ref]:
    """Runs of columns of these widths, one after the other, and then the rest."""
    starts = [sum(widths[:index]) for index in range(len(widths) + 1)]
    ends = [*starts[1:], whole.width]
    return [Ref(whole.buffer, whole.start + lo, hi - lo) for lo, hi in zip(starts, ends, strict=True)]
