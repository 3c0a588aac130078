"""Inputs of each layer beside the residual stream (Gemma 3n and 4): a table of them, and the part that adds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from truffula.kernels.program import Activation, Embed, Epilogue, Pointwise, Probe, Ref
from truffula.model.rows import LayerRows, NormSpec

if TYPE_CHECKING:
    from truffula.model.builder import LayerBuilder, ProgramBuilder
    from truffula.model.spec import ModuleNames

_BUFFER = "per_layer_inputs"


@dataclass(frozen=True)
class PerLayerInputs:
    """``width`` numbers of each token for each of ``layers`` layers: a row of a table with ``ids`` rows, and the normed
    projection of the input row; their sum is divided by the root of two. ``norm`` acts per layer."""

    ids: int
    layers: int
    width: int
    norm: NormSpec
    table: str = "embed_tokens_per_layer"
    projection: str = "per_layer_model_projection"

    @property
    def total(self) -> int:
        return self.layers * self.width

    def rows(self, rows: LayerRows) -> None:
        rows.table("per_layer.table", self.table, self.ids, self.total)
        rows.linear("per_layer.projection", [(self.projection, self.total)], rows.hidden)
        rows.norm("per_layer.norm", self.norm, self.width)

    def write(self, build: ProgramBuilder, hidden: Ref) -> None:
        """Append the ops that fill the buffer of all layers' inputs."""
        out, projected = build.buffer(_BUFFER, self.total), build.buffer("per_layer_projected", self.total)
        build.ops.append(Embed(name="per_layer.table", table=build.weight("per_layer.table"), out=out,
                               scale=self.width**0.5, probe=Probe(build.module(self.table), "out")))  # fmt: skip
        build.linear("per_layer.projection", hidden, projected, None, Epilogue(scale=hidden.width**-0.5))
        build.norm("per_layer.norm", self.norm, projected, out, None, groups=self.layers, plus=out)
        build.ops.append(Pointwise(name="per_layer.scale", kind="scale", x=out, out=out, params=(2.0**-0.5,)))


@dataclass(frozen=True)
class PerLayerSpec:
    """The part that adds a layer's input: project(activation(gate x) * input). ``width`` is that of the input."""

    width: int
    activation: Activation
    gate: str = "per_layer_input_gate"
    project: str = "per_layer_projection"

    @property
    def window(self) -> None:
        return None

    @property
    def kind(self) -> str:
        return "per-layer embedding"

    @property
    def kv_widths(self) -> tuple[int, ...]:
        return ()

    def first_module(self, _: ModuleNames) -> str:
        return self.gate

    def last_module(self, _: ModuleNames) -> str:
        return self.project

    def rows(self, rows: LayerRows) -> None:
        rows.linear("per_layer_in", [(self.gate, self.width)], rows.hidden)
        rows.linear("per_layer_out", [(self.project, rows.hidden)], self.width)

    def write(self, build: LayerBuilder, x: Ref) -> None:
        inner, inputs = build.buffer("per_layer", self.width), build.buffer(_BUFFER, self.width)
        own = Ref(inputs.buffer, build.index * self.width, self.width)
        build.linear("per_layer_in", x, inner, None, Epilogue(activation=self.activation))
        build.append(Pointwise(name="per_layer_mul", probe=build.probe(self.project, "in"), kind="mul", x=inner, y=own,
                               out=inner))  # fmt: skip
        build.output("per_layer_out", inner)
