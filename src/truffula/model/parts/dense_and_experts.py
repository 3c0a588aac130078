"""``DenseAndExpertsSpec``: a dense MLP and experts side by side, each with norms of its own (Gemma 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from truffula.kernels.program import Pointwise, Ref
from truffula.model.parts.mlp import MlpSpec
from truffula.model.parts.moe import MoeSpec
from truffula.model.rows import LayerRows, NormSpec

if TYPE_CHECKING:
    from truffula.model.builder import LayerBuilder
    from truffula.model.spec import ModuleNames


@dataclass(frozen=True)
class DenseAndExpertsSpec:
    """after_mlp(mlp(x)) + after_experts(experts(before_experts(h))), of the part's input x and the residual stream h.

    The router reads norm(h) / sqrt(D), where ``router_norm`` has no module of its own: its weight is the tensor
    ``router_scale``.
    """

    mlp: MlpSpec
    experts: MoeSpec
    after_mlp: NormSpec
    before_experts: NormSpec
    after_experts: NormSpec
    router_norm: NormSpec
    router_scale: str

    @property
    def window(self) -> None:
        return None

    @property
    def kind(self) -> str:
        return f"{self.mlp.kind} beside {self.experts.kind}"

    @property
    def kv_widths(self) -> tuple[int, ...]:
        return ()

    def first_module(self, names: ModuleNames) -> str:
        return self.mlp.first_module(names)

    def last_module(self, _: ModuleNames) -> str:
        return self.experts.names.experts5

    def rows(self, rows: LayerRows) -> None:
        self.mlp.rows(rows)
        rows.norm("after_dense", self.after_mlp)
        rows.vector("router_norm", self.router_scale, rows.hidden)
        rows.norm("before_experts", self.before_experts)
        self.experts.rows(rows)
        rows.norm("after_experts", self.after_experts)

    def write(self, build: LayerBuilder, x: Ref) -> None:
        hidden, stream = build.spec.hidden, build.hidden
        dense, router_x = build.buffer("dense", hidden), build.buffer("router_input", hidden)
        build.linear("mlp_out", self.mlp.inner(build, x), dense, build.probe(build.names.down, "out"))
        build.norm("after_dense", self.after_mlp, dense, dense)
        build.norm("router_norm", self.router_norm, stream, router_x, compared=False)
        probe = build.probe(self.experts.names.router_names[1], "in")
        build.append(Pointwise(name="router_scale", probe=probe, kind="scale", x=router_x, out=router_x,
                               params=(hidden**-0.5,)))  # fmt: skip
        normed = build.buffer("normed", hidden)
        build.norm("before_experts", self.before_experts, stream, normed)
        branch = self.experts.branch(build, normed, router_x)
        build.norm("after_experts", self.after_experts, branch, branch, plus=dense, compared=False)
        build.add(branch)
