"""``MlpSpec``: the dense feed-forward part, its weights and its operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from truffula.kernels.program import Activation, Epilogue, Pointwise, Ref
from truffula.model.rows import LayerRows

if TYPE_CHECKING:
    from truffula.model.builder import LayerBuilder
    from truffula.model.spec import ModuleNames


@dataclass(frozen=True)
class MlpSpec:
    """``gated``: down(activation(gate x) * up x); else down(activation(up x)). ``width`` is F.

    The activation ``xielu`` has numbers of its own, under ``names.activation``, and no gate. ``gate_scale`` multiplies
    gate x.
    """

    width: int
    activation: Activation | Literal["xielu"]
    gated: bool = True
    in_bias: bool = False
    out_bias: bool = False
    gate_scale: float = 1.0

    @property
    def window(self) -> None:
        return None

    @property
    def kind(self) -> str:
        return "gated MLP" if self.gated else "MLP"

    @property
    def kv_widths(self) -> tuple[int, ...]:
        return ()

    def first_module(self, names: ModuleNames) -> str:
        if self.gated and names.gate_up_fused:
            return str(names.gate_up)
        return names.gate if self.gated else names.up

    def last_module(self, names: ModuleNames) -> str:
        return names.down

    def rows(self, rows: LayerRows) -> None:
        names, fused = rows.names, None
        parts = [(names.up, self.width)]
        if self.gated and names.gate_up_fused:
            parts = [(str(names.gate_up), 2 * self.width)]
        elif self.gated:
            parts, fused = [(names.gate, self.width), *parts], names.gate_up
        rows.linear("mlp_in", parts, rows.hidden, bias=self.in_bias, fused=fused)
        if self.activation == "xielu":
            rows.numbers("xielu", [f"{names.activation}.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")])
        rows.linear("mlp_out", [(names.down, rows.hidden)], self.width, bias=self.out_bias)

    def write(self, build: LayerBuilder, x: Ref) -> None:
        build.output("mlp_out", self.inner(build, x))

    def inner(self, build: LayerBuilder, x: Ref) -> Ref:
        """Append the operations up to the last linear, whose input is returned."""
        inner = build.buffer("mlp", self.width)
        probe = build.probe(build.names.down, "in")
        if self.activation == "xielu":
            build.linear("mlp_in", x, inner, build.probe(build.names.up, "out"))
            weight = build.weight("xielu")
            build.append(Pointwise(name="xielu", probe=probe, kind="xielu", x=inner, out=inner, weight=weight))
        elif self.gate_scale != 1.0:
            both = build.buffer("gate_up", 2 * self.width)
            gate, up = Ref(both.buffer, 0, self.width), Ref(both.buffer, self.width, self.width)
            build.linear("mlp_in", x, both, None)
            build.append(Pointwise(name="gate_scale", kind="scale", x=gate, out=gate, params=(self.gate_scale,)))
            build.append(Pointwise(name="gated", probe=probe, kind="mul", x=up, y=gate, out=inner,
                                   activation=self.activation))  # fmt: skip
        else:
            build.linear("mlp_in", x, inner, probe, Epilogue(activation=self.activation, glu=self.gated))
        return inner
