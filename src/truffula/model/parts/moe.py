"""``MoeSpec``: a router and experts of which each row uses a few, with its weights and its operations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from truffula.kernels.program import Activation, Epilogue, Pointwise, Ref, Route
from truffula.model.rows import ExpertLayout, LayerRows, RowPart

if TYPE_CHECKING:
    from truffula.model.builder import LayerBuilder
    from truffula.model.spec import ModuleNames


@dataclass(frozen=True)
class RouterSpec:
    """How ``top_k`` of ``experts`` are chosen and weighted; the other fields are those of ``program.Route``.

    ``bias``: the router's linear has one. ``correction``: a vector [E] counts for the choice, not for the weights.
    ``expert_scale``: a vector [E] multiplies the weights. ``softcap`` c makes logits c * tanh(l / c).
    """

    experts: int
    top_k: int
    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    bias: bool = False
    correction: bool = False
    groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2"] = "top2"
    norm: float | None = None
    plus: float = 0.0
    floor: float = 1e-20
    scale: float = 1.0
    jitter: float = 0.0
    expert_scale: bool = False
    softcap: float | None = None


@dataclass(frozen=True)
class SharedSpec:
    """An MLP of the experts' form that every row passes. ``gated``: times sigmoid(shared_gate x). Its result is
    multiplied by ``scale``."""

    width: int
    gated: bool = False
    bias: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class MoeNames:
    """Modules and tensors relative to the layer, as checkpoints name them. An expert is ``<experts>.<number>``.

    ``block`` and ``block5`` are the module of the whole part in checkpoints and in transformers 5, which differ in some
    families; so are ``router`` and ``router5``. An empty ``block``: router and experts are modules of the layer.
    ``in_layouts`` and ``out_layouts`` are forms of the experts' matrices besides those that every family has
    (``MoeSpec.rows``); the first is the one that transformers writes.
    ``correction_shape``: see ``WeightRow.stored``.
    ``shared`` and ``shared_gate`` are modules of the layer, ``shared_in`` those of gate and up, or of both together;
    ``shared5`` is ``shared`` in transformers 5, where that differs.
    """

    block: str = "mlp"
    block5: str = "mlp"
    router: str = "gate"
    router5: str = "gate"
    correction: str = "gate.e_score_correction_bias"
    correction_shape: tuple[int, ...] = ()
    expert_scale: str = ""
    experts: str = "experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    in_layouts: tuple[ExpertLayout, ...] = ()
    out_layouts: tuple[ExpertLayout, ...] = ()
    in_biases: tuple[ExpertLayout, ...] = ()
    out_biases: tuple[ExpertLayout, ...] = ()
    shared: str = "mlp.shared_expert"
    shared5: str | None = None
    shared_in: tuple[str, ...] = ("gate_proj", "up_proj")
    shared_down: str = "down_proj"
    shared_gate: str = "mlp.shared_expert_gate"
    latent_in: str = "fc1_latent_proj"
    latent_out: str = "fc2_latent_proj"

    @property
    def router_names(self) -> tuple[str, str]:
        """The router in checkpoints and in transformers 5."""
        return f"{_under(self.block)}{self.router}", f"{_under(self.block5)}{self.router5}"

    @property
    def experts5(self) -> str:
        """The module of all experts in transformers 5."""
        return f"{_under(self.block5)}experts"

    def shared_part(self, name: str, rows: int) -> RowPart:
        """The part of a weight that is the module ``name`` of the shared expert."""
        if self.shared5 is None:
            return f"{self.shared}.{name}", rows
        return f"{self.shared}.{name}", rows, None, f"{self.shared5}.{name}"


@dataclass(frozen=True)
class MoeSpec:
    """The sum of each row's chosen experts, down(activation(gate x) * up x), and of the shared expert.

    ``width`` is F of an expert. Without ``gated`` an expert is down(activation(up x)). ``latent``: the experts read
    latent_in(x), of that width, and latent_out of their sum counts; both with a bias if ``latent_bias``. ``limit`` and
    ``offset`` are the ``glu_limit`` and ``glu_offset`` of the experts' ``program.Epilogue``. ``weigh`` input: x is
    multiplied by the expert's weight, instead of the result; one expert per row. ``scaled_sum``: transformers
    multiplies the sum by the router's scale, not each weight, so ``verify`` does not compare the sum.
    """

    router: RouterSpec
    width: int
    activation: Activation
    shared: SharedSpec | None = None
    gated: bool = True
    latent: int | None = None
    latent_bias: bool = False
    limit: float | None = None
    offset: float = 0.0
    weigh: Literal["output", "input"] = "output"
    scaled_sum: bool = False
    names: MoeNames = MoeNames()

    @property
    def window(self) -> None:
        return None

    @property
    def kind(self) -> str:
        shared = "" if self.shared is None else " and a shared one"
        return f"{self.router.top_k} of {self.router.experts} experts{shared}"

    @property
    def kv_widths(self) -> tuple[int, ...]:
        return ()

    def first_module(self, names: ModuleNames) -> str:
        return self.names.block5

    def last_module(self, names: ModuleNames) -> str:
        return self.names.block5

    def rows(self, rows: LayerRows) -> None:
        names, router, hidden, width = self.names, self.router, rows.hidden, self.width
        inputs, at = self.latent or hidden, _under(names.block)
        module, alias = names.router_names
        rows.linear("router", [(module, router.experts)], hidden, bias=router.bias,
                    alias=None if alias == module else alias)  # fmt: skip
        if router.correction:
            rows.vector("correction", at + names.correction, router.experts, stored=names.correction_shape)
        if router.expert_scale:
            rows.vector("expert_scale", at + names.expert_scale, router.experts)
        each, stacked, module5 = f"{at}{names.experts}.{{e}}.", f"{at}{names.experts}.", f"{names.experts5}."
        gate, up, down = names.gate, names.up, names.down
        taken = (gate, up) if self.gated else (up,)
        if self.latent is not None:
            rows.linear("latent_in", [(at + names.latent_in, inputs)], hidden, bias=self.latent_bias)
        rows.experts(
            "experts_in", [(each + name, width) for name in taken], inputs, router.experts,
            (*names.in_layouts, ExpertLayout(tuple(f"{each}{name}.weight" for name in taken)),
             *_stacked(stacked, "gate_up_proj" if self.gated else "up_proj", module5),
             ExpertLayout(tuple(f"{stacked}{name}.weight" for name in taken))),
            names.in_biases, chosen=router.top_k,
        )  # fmt: skip
        rows.experts(
            "experts_out", [(each + down, inputs)], width, router.experts,
            (*names.out_layouts, ExpertLayout((f"{each}{down}.weight",)), *_stacked(stacked, "down_proj", module5),
             ExpertLayout((f"{stacked}{down}.weight",))),
            names.out_biases, chosen=router.top_k,
        )  # fmt: skip
        if self.latent is not None:
            rows.linear("latent_out", [(at + names.latent_out, hidden)], inputs, bias=self.latent_bias)
        if self.shared is None:
            return
        each_in, bias = (1 + self.gated) * self.shared.width // len(names.shared_in), self.shared.bias
        rows.linear("shared_in", [names.shared_part(name, each_in) for name in names.shared_in], hidden, bias=bias)
        if self.shared.gated:
            rows.linear("shared_gate", [(names.shared_gate, 1)], hidden)
        rows.linear("shared_out", [names.shared_part(names.shared_down, hidden)], self.shared.width, bias=bias)

    def write(self, build: LayerBuilder, x: Ref) -> None:
        build.add(self.branch(build, x, x))

    def branch(self, build: LayerBuilder, x: Ref, router_x: Ref) -> Ref:
        """Append the operations but for the sum with the residual stream; return the result. The router reads
        ``router_x``."""
        names, router, glu = self.names, self.router, Epilogue(activation=self.activation, glu=self.gated)
        limited = replace(glu, glu_limit=self.limit, glu_offset=self.offset)
        logits = build.buffer("router_logits", router.experts, dtype="float32")
        build.linear("router", router_x, logits, None, compute="float32")
        if router.softcap is not None:
            build.append(Pointwise(name="router_softcap", kind="softcap", x=logits, out=logits,
                                   params=(router.softcap,)))  # fmt: skip
        routes = build.buffer("routes", 2 * router.top_k, dtype="float32")
        correction = build.weight("correction") if router.correction else None
        expert_scale = build.weight("expert_scale") if router.expert_scale else None
        build.append(Route(name="route", logits=logits, out=routes, k=router.top_k, score=router.score,
                           correction=correction, groups=router.groups, topk_groups=router.topk_groups,
                           group_score=router.group_score, norm=router.norm, plus=router.plus, floor=router.floor,
                           scale=router.scale, expert_scale=expert_scale, jitter=router.jitter))  # fmt: skip
        branch = build.buffer("branch", build.spec.hidden)
        summed = branch
        inner, taken = build.buffer("experts", router.top_k * self.width), x
        if self.weigh == "input":
            taken, weight = build.buffer("weighed", build.spec.hidden), Ref(routes.buffer, 1, 1)
            build.append(Pointwise(name="weigh", kind="mul", x=x, y=weight, out=taken))
        if self.latent is not None:
            latent, summed = build.buffer("latent", self.latent), build.buffer("latent_out", self.latent)
            build.linear("latent_in", taken, latent, build.probe(_under(names.block) + names.latent_in, "out"))
            taken = latent
        build.experts("experts_in", taken, routes, inner, None, limited)
        if self.weigh == "output":
            probe = None if self.scaled_sum else build.probe(names.experts5, "out")
            build.experts("experts_out", inner, routes, summed, probe, combine="weighted")
        else:
            build.experts("experts_out", inner, routes, summed, None, combine="sum")
        if self.latent is not None:
            build.linear("latent_out", summed, branch, build.probe(_under(names.block) + names.latent_out, "out"))
        if self.shared is not None:
            inner = build.buffer("mlp", self.shared.width)
            build.linear("shared_in", x, inner, None, glu)
            if self.shared.gated:
                gate = build.buffer("shared_gate", 1)
                build.linear("shared_gate", x, gate, build.probe(names.shared_gate, "out"))
                build.append(Pointwise(name="shared_gated", kind="sigmoid_mul", x=inner, y=gate, out=inner))
            build.linear("shared_out", inner, branch, None,
                         Epilogue(scale=self.shared.scale, residual=branch))  # fmt: skip
        return branch


def _under(block: str) -> str:
    return f"{block}." if block else ""


def _stacked(prefix: str, name: str, module: str) -> tuple[ExpertLayout, ExpertLayout]:
    """The parameter of all experts, [E, O, I], as transformers 5 has it; and the same as a tensor of a module."""
    parameter = module + name
    return ExpertLayout((prefix + name,), parameter=parameter), ExpertLayout((f"{prefix}{name}.weight",))
