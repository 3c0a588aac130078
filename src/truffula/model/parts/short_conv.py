"""``ShortConvSpec``: a gated short convolution in the place of attention (LFM2), its weights and its operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from truffula.kernels.program import Pointwise, Ref
from truffula.model.rows import LayerRows

if TYPE_CHECKING:
    from truffula.model.builder import LayerBuilder
    from truffula.model.spec import ModuleNames


@dataclass(frozen=True)
class ShortConvSpec:
    """out(c * conv(b * x)) where in(h) is [b | c | x], each as wide as the residual stream; the convolution has
    ``taps``. ``bias`` is of all three."""

    taps: int
    bias: bool = False

    @property
    def window(self) -> None:
        return None

    @property
    def kind(self) -> str:
        return "short convolution"

    @property
    def kv_widths(self) -> tuple[int, ...]:
        return ()

    def first_module(self, names: ModuleNames) -> str:
        return "conv.in_proj"

    def last_module(self, names: ModuleNames) -> str:
        return "conv.out_proj"

    def rows(self, rows: LayerRows) -> None:
        width = rows.hidden
        rows.linear("conv_in", [("conv.in_proj", 3 * width)], width, bias=self.bias)
        rows.conv("conv", [("conv.conv", width)], self.taps, bias=self.bias)
        rows.linear("conv_out", [("conv.out_proj", width)], width, bias=self.bias)

    def write(self, build: LayerBuilder, x: Ref) -> None:
        width = x.width
        inner, mixed = build.buffer("conv_in", 3 * width), build.buffer("conv", width)
        gated = build.buffer("gated", width)
        build.linear("conv_in", x, inner, build.probe("conv.in_proj", "out"))
        before, after, values = (Ref(inner.buffer, index * width, width) for index in range(3))
        build.append(Pointwise(name="conv_gate", kind="mul", x=before, y=values, out=gated))
        build.conv("conv", gated, mixed)
        probe = build.probe("conv.out_proj", "in")
        build.append(Pointwise(name="conv_out_gate", probe=probe, kind="mul", x=mixed, y=after, out=mixed))
        build.output("conv_out", mixed)
