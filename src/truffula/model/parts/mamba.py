"""``MambaSpec``: a selective state space in the place of attention (Mamba), its weights and its operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from truffula.kernels.program import Activation, Mamba2, Pointwise, Ref
from truffula.model.rows import LayerRows, NormSpec

if TYPE_CHECKING:
    from truffula.model.builder import LayerBuilder
    from truffula.model.spec import ModuleNames


@dataclass(frozen=True)
class MambaSpec:
    """out(scan(x, b, c, dt_proj(dt)) * silu(gate)) where in(h) is [x | gate], x is convolved with ``taps`` and
    ``activation``, and x_proj(x) is [dt | b | c], each with a norm of ``eps``.

    Modules are in ``mamba``. x is ``width`` wide, dt ``rank``, b and c ``state_size``; ``bias`` is of in and out.
    """

    width: int
    rank: int
    state_size: int
    taps: int
    eps: float
    activation: Activation = "silu"
    bias: bool = False
    conv_bias: bool = True

    @property
    def window(self) -> None:
        return None

    @property
    def kind(self) -> str:
        return "Mamba"

    @property
    def kv_widths(self) -> tuple[int, ...]:
        return ()

    @property
    def selected(self) -> tuple[tuple[str, int, int], ...]:
        """Name, first column and width of what x_proj returns."""
        rank, size = self.rank, self.state_size
        return ("dt", 0, rank), ("b", rank, size), ("c", rank + size, size)

    def first_module(self, names: ModuleNames) -> str:
        return "mamba.in_proj"

    def last_module(self, names: ModuleNames) -> str:
        return "mamba.out_proj"

    def rows(self, rows: LayerRows) -> None:
        hidden, width, size = rows.hidden, self.width, self.state_size
        rows.linear("mamba_in", [("mamba.in_proj", 2 * width)], hidden, bias=self.bias)
        rows.conv("mamba_conv", [("mamba.conv1d", width)], self.taps, bias=self.conv_bias)
        rows.linear("mamba_select", [("mamba.x_proj", self.rank + 2 * size)], width)
        for name, _, columns in self.selected:
            rows.norm(f"mamba_{name}_norm", self._norm(name), columns)
        # Its bias is added in float32, by the scan.
        rows.linear("mamba_dt", [("mamba.dt_proj", width)], self.rank)
        rows.vector("mamba_dt_bias", "mamba.dt_proj.bias", width)
        rows.vector("mamba_rate", "mamba.A_log", width * size, stored=(width, size), transform="minus_exp")
        rows.vector("mamba_skip", "mamba.D", width)
        rows.linear("mamba_out", [("mamba.out_proj", hidden)], width, bias=self.bias)

    def write(self, build: LayerBuilder, x: Ref) -> None:
        width, size = self.width, self.state_size
        inner, mixed = build.buffer("mamba_in", 2 * width), build.buffer("mamba", width)
        build.linear("mamba_in", x, inner, build.probe("mamba.in_proj", "out"))
        build.conv("mamba_conv", Ref(inner.buffer, 0, width), mixed, self.activation)
        selected = build.buffer("mamba_select", self.rank + 2 * size)
        build.linear("mamba_select", mixed, selected, build.probe("mamba.x_proj", "out"))
        dt, b, c = (Ref(selected.buffer, start, columns) for _, start, columns in self.selected)
        for (name, _, _), columns in zip(self.selected, (dt, b, c), strict=True):
            build.norm(f"mamba_{name}_norm", self._norm(name), columns, columns)
        steps, out = build.buffer("mamba_dt", width), build.buffer("mamba_out", width, dtype="float32")
        build.linear("mamba_dt", dt, steps, None)
        build.append(Mamba2(name="mamba", x=mixed, b=b, c=c, dt=steps, out=out, state=build.state(width * size),
                            rate=build.weight("mamba_rate"), dt_bias=build.weight("mamba_dt_bias"),
                            skip=build.weight("mamba_skip"), heads=width, head_dim=1, groups=1,
                            state_size=size))  # fmt: skip
        gated, gate = build.buffer("mamba_normed", width), Ref(inner.buffer, width, width)
        build.append(Pointwise(name="mamba_gate", kind="mul", x=out, y=gate, out=gated, activation="silu",
                               probe=build.probe("mamba.out_proj", "in")))  # fmt: skip
        build.output("mamba_out", gated)

    def _norm(self, name: str) -> NormSpec:
        return NormSpec(f"mamba.{name}_layernorm", self.eps)
