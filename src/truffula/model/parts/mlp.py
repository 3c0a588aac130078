"""``MlpSpec``: the dense feed-forward part, its weights and its operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from truffula.kernels.program import Activation, Epilogue, Ref
from truffula.model.rows import LayerRows

if TYPE_CHECKING:
    from truffula.model.builder import LayerBuilder
    from truffula.model.spec import ModuleNames


@dataclass(frozen=True)
class MlpSpec:
    """``gated``: down(activation(gate x) * up x); else down(activation(up x)). ``width`` is F."""

    width: int
    activation: Activation
    gated: bool = True
    in_bias: bool = False
    out_bias: bool = False

    @property
    def window(self) -> None:
        return None

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
        rows.linear("mlp_out", [(names.down, rows.hidden)], self.width, bias=self.out_bias)

    def write(self, build: LayerBuilder, x: Ref) -> None:
        inner = build.buffer("mlp", self.width)
        epilogue = Epilogue(activation=self.activation, glu=self.gated)
        build.linear("mlp_in", x, inner, build.probe(build.names.down, "in"), epilogue)
        build.output("mlp_out", inner)
