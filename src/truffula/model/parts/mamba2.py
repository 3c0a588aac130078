"""``Mamba2Spec``: a selective state space in the place of attention (Mamba-2), its weights and its operations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from truffula.kernels.program import Activation, Mamba2, Pointwise, Ref
from truffula.model.rows import LayerRows, NormSpec

if TYPE_CHECKING:
    from truffula.model.builder import LayerBuilder
    from truffula.model.spec import ModuleNames


@dataclass(frozen=True)
class Mamba2Spec:
    """out(norm(scan(conv(x | b | c), dt) * silu(gate))) where in(h) is [gate | x | b | c | dt].

    ``module`` is relative to the layer. ``scales`` multiply these five. The convolution of x, b and c has ``taps`` and
    ``activation``. The norm, if any, is over each of ``groups`` equal parts, with a weight of its own for each column;
    ``norm_before_gate``: before the product with the gate. ``dt_limit``: see ``program.Mamba2``.
    """

    heads: int
    head_dim: int
    groups: int
    state_size: int
    taps: int
    norm: NormSpec | None
    activation: Activation = "silu"
    in_bias: bool = False
    out_bias: bool = False
    conv_bias: bool = True
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    module: str = "mamba"
    norm_before_gate: bool = False
    scales: tuple[float, ...] = ()

    @property
    def window(self) -> None:
        return None

    @property
    def kind(self) -> str:
        return "Mamba-2"

    @property
    def kv_widths(self) -> tuple[int, ...]:
        return ()

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_width(self) -> int:
        return self.width + 2 * self.groups * self.state_size

    def first_module(self, names: ModuleNames) -> str:
        return f"{self.module}.in_proj"

    def last_module(self, names: ModuleNames) -> str:
        return f"{self.module}.out_proj"

    def rows(self, rows: LayerRows) -> None:
        at, hidden, inner = f"{self.module}.", rows.hidden, self.width + self.conv_width + self.heads
        rows.linear("mamba_in", [(at + "in_proj", inner)], hidden, bias=self.in_bias)
        rows.conv("mamba_conv", [(at + "conv1d", self.conv_width)], self.taps, bias=self.conv_bias)
        rows.vector("mamba_rate", at + "A_log", self.heads, transform="minus_exp")
        rows.vector("mamba_dt_bias", at + "dt_bias", self.heads)
        rows.vector("mamba_skip", at + "D", self.heads)
        rows.norm("mamba_norm", self.norm, self.width)
        rows.linear("mamba_out", [(at + "out_proj", hidden)], self.width, bias=self.out_bias)

    def write(self, build: LayerBuilder, x: Ref) -> None:
        width, shared, at = self.width, self.groups * self.state_size, f"{self.module}."
        inner, mixed = (
            build.buffer("mamba_in", width + self.conv_width + self.heads),
            build.buffer("mamba", self.conv_width),
        )
        build.linear("mamba_in", x, inner, build.probe(at + "in_proj", "out"))
        starts = (0, width, 2 * width, 2 * width + shared, width + self.conv_width, inner.width)
        for scale, lo, hi in zip(self.scales, starts[:-1], starts[1:], strict=False):
            section = Ref(inner.buffer, lo, hi - lo)
            build.append(Pointwise(name="mamba_scale", kind="scale", x=section, out=section, params=(scale,)))
        build.conv("mamba_conv", Ref(inner.buffer, width, self.conv_width), mixed, self.activation)
        # In float32 up to the norm, as in transformers.
        out = build.buffer("mamba_out", width, dtype="float32")
        build.append(Mamba2(name="mamba", x=Ref(mixed.buffer, 0, width), b=Ref(mixed.buffer, width, shared),
                            c=Ref(mixed.buffer, width + shared, shared),
                            dt=Ref(inner.buffer, width + self.conv_width, self.heads), out=out,
                            state=build.state(width * self.state_size), rate=build.weight("mamba_rate"),
                            dt_bias=build.weight("mamba_dt_bias"), skip=build.weight("mamba_skip"), heads=self.heads,
                            head_dim=self.head_dim, groups=self.groups, state_size=self.state_size,
                            dt_limit=self.dt_limit))  # fmt: skip
        normed, gate, probe = (
            build.buffer("mamba_normed", width), Ref(inner.buffer, 0, width), build.probe(at + "out_proj", "in")
        )  # fmt: skip
        if self.norm is None or not self.norm_before_gate:
            gated = Pointwise(name="mamba_gate", kind="mul", x=out, y=gate, out=out, activation="silu")
            build.append(gated if self.norm is not None else replace(gated, out=normed, probe=probe))
        if self.norm is not None:
            build.norm("mamba_norm", self.norm, out, normed, probe=probe, groups=self.groups,
                       gate=(gate, "silu") if self.norm_before_gate else None)  # fmt: skip
        build.output("mamba_out", normed)
