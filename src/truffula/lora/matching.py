"""Matching an adapter's tensors and configuration with a base's sites, from metadata alone.

The tensors decide: each must be half of a pair on a module of the base, with the module's shape. The configuration
gives ranks and scales, and must name exactly those modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from truffula.errors import AdapterError
from truffula.kernels.adapters import SiteTensors
from truffula.kernels.backend import Array
from truffula.kernels.inputs import Float32
from truffula.kernels.program import ModuleSlice, Site
from truffula.kernels.stacked import StackedSlice
from truffula.lora.base import BaseWeights
from truffula.lora.exports import rename, renamed_settings
from truffula.lora.extra_files import extra_file_warnings
from truffula.lora.fields import LoraSettings, read_settings
from truffula.lora.image import NO_FACTS, AdapterFacts
from truffula.lora.keys import KeyPlan, left_out_words, listed, plan_keys
from truffula.lora.paths import OpenFolder
from truffula.lora.patterns import PatternTable, Targets, is_named, matching_limit, tied_tables
from truffula.lora.roots import TEXT_ROOTS, root_used, tail_of, text_root_of
from truffula.lora.saved import Parts, Saved, match_saved
from truffula.lora.stacked import check_stacked, groups_of, pair_shapes, parameters_of, stacked_by_expert
from truffula.lora.variants import PLAIN, Form, form_of
from truffula.weights.checkpoint import TensorInfo

FLOATS = ("F32", "F16", "BF16")
_LAYER = re.compile(r"\.(\d+)\.")
_CONVOLUTION = re.compile(r"(^|[._])conv(1d)?$")


@dataclass(frozen=True)
class BaseFacts:
    """The base's name, for messages, and its weights, which some kinds of adapter need."""

    model: str = "the base model"
    weights: BaseWeights | None = None

    @property
    def tied(self) -> bool:
        return self.weights is not None and self.weights.tied

    @property
    def kv_heads(self) -> Mapping[int, int]:
        """The number of KV heads of each layer."""
        return {} if self.weights is None else self.weights.source.kv_heads

    def need(self, what: str) -> BaseWeights:
        """The weights. Raises ``AdapterError`` when they are not given."""
        if self.weights is None:
            raise AdapterError(f"{what} needs the base's weights, which are not given here.", param="base")
        return self.weights


@dataclass(frozen=True)
class Pair:
    """A and B of one module, and the sites that B's rows belong to; or of a parameter of ``experts`` experts,
    ``grouped``: stacked by expert.

    ``form``: how A and B are stored. ``magnitude`` [O] (DoRA), ``b_bias`` [O] and ``diagonal`` [r] (KaSA): tensors of
    variants.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    parts: Parts
    rank: int
    experts: int = 0
    form: Form = PLAIN
    magnitude: TensorInfo | None = None
    b_bias: TensorInfo | None = None
    diagonal: TensorInfo | None = None
    grouped: bool = False

    @property
    def sites(self) -> list[Site]:
        return [site for site, _ in self.parts]

    @property
    def tensors(self) -> list[TensorInfo]:
        return [info for info in (self.a, self.b, self.magnitude, self.b_bias, self.diagonal) if info is not None]


@dataclass(frozen=True)
class Computed:
    """A module of a method other than LoRA: ``make`` computes its parts from ``infos``, by key. With ``make_prefix`` it
    is no module, but the values of ``KvPrefix``."""

    module: str
    infos: tuple[TensorInfo, ...]
    make: Callable[[Mapping[str, Array]], Iterable[SiteTensors]]
    rank: int = 0
    make_prefix: Callable[[Mapping[str, Array]], Float32] | None = None


@dataclass
class ParsedAdapter:
    """An adapter's pairs and the tensors that take the place of the base's, matched with it from metadata alone."""

    settings: LoraSettings
    pairs: list[Pair] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    computed: list[Computed] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: AdapterFacts = NO_FACTS

    @property
    def rank(self) -> int:
        ranks = [pair.rank for pair in self.pairs] + [item.rank for item in self.computed]
        return max(ranks, default=0)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor that is read."""
        infos = [*(info for pair in self.pairs for info in pair.tensors), *(saved.info for saved in self.saved)]
        infos += [info for item in self.computed for info in item.infos]
        return {info.name: info for info in infos}


class Sites:
    """The base's sites, by the module paths of the class that the adapter with these ``modules`` was saved from."""

    def __init__(self, sites: Sequence[Site], modules: Collection[str]) -> None:
        self.all = sites
        linear = [site for site in sites if site.kind == "linear"]
        self._own_root = text_root_of(site.module for site in linear)
        tails = {m.name.removeprefix(self._own_root) for site in sites if site.kind != "head" for m in site.modules}
        places = {site.stacked.name for site in linear if site.stacked is not None}
        owners = {name.removeprefix(self._own_root).rpartition(".")[0] for name in places}
        self.tails = frozenset(tails | owners | {f"{owner}.base_layer" for owner in owners})
        self.root = root_used(modules, self.tails, self._own_root)
        self.by_name: dict[str, list[tuple[Site, ModuleSlice]]] = {}
        for site in sites:
            for module in site.modules:
                self.by_name.setdefault(self.name_of(site, module), []).append((site, module))
        self.parameters: dict[str, list[Site]] = {}  # of all experts
        for site in linear:
            if site.stacked is not None:
                self.parameters.setdefault(self.name_of(site, site.stacked), []).append(site)
        self.groups = groups_of(linear, self.name_of)
        for parts in self.by_name.values():
            parts.sort(key=lambda part: part[1].lo)
        self.head_name = TEXT_ROOTS[self.root]
        self.names = frozenset(self.by_name)
        self.linear_names = frozenset(self.name_of(site, module) for site in linear for module in site.modules)
        self.layers = 1 + max((site.layer for site in linear if site.layer is not None), default=0)
        self.fused_leaves = {_leaf(m.name) for site in linear for m in site.modules if not _is_own(site, m)}

    def name_of(self, site: Site, module: ModuleSlice | StackedSlice) -> str:
        """A module of a site by the adapter's names."""
        return TEXT_ROOTS[self.root] if site.kind == "head" else self.root + module.name.removeprefix(self._own_root)


@matching_limit()
def parse_metadata(
    folder: OpenFolder,
    infos: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    all_sites: Sequence[Site],
    base: BaseFacts,
) -> ParsedAdapter:
    """Match the tensors ``infos`` and ``config`` of the adapter in ``folder`` with a base's sites.

    Raises ``AdapterError`` (``param``: the field or the tensor) where they don't fit each other or the base.
    """
    settings = read_settings(config)
    invocation = tuple(settings.alora_invocation_tokens or ())
    plan = plan_keys(list(infos))
    check_values([infos[key] for key in plan.read()])
    sites = Sites(all_sites, plan.modules())
    renamed = rename(plan, sites, base.kv_heads)
    settings = renamed_settings(settings, renamed)
    parsed = ParsedAdapter(settings, facts=AdapterFacts(invocation=invocation))
    ranks = PatternTable(settings.rank_pattern or {}, "rank_pattern")
    alphas = PatternTable(settings.alpha_pattern or {}, "alpha_pattern")
    origin = trained_on(config)
    grouped = {
        name
        for name, key in plan.a.items()
        if name in sites.groups and stacked_by_expert(infos[key], infos[plan.b[name]], name, sites.parameters)
    }
    stacked = parameters_of(plan.a.keys() - grouped, sites.parameters, settings.target_parameters)
    check_modules(plan, sites, base, origin, stacked.keys() | grouped)
    if invocation and base.weights is not None and base.weights.source.serial:
        raise AdapterError(
            "alora_invocation_tokens: transformers' code computes this model one sequence at a time, where an adapter "
            "acts on all tokens or none. Train plain LoRA.",
            param="alora_invocation_tokens",
        )
    if invocation and plan.embeddings:
        raise AdapterError(
            f"alora_invocation_tokens is set, but PEFT has no activated LoRA on an embedding: "
            f"{listed(plan.embeddings)}.",
            param="alora_invocation_tokens",
        )
    targets = Targets(settings, sites.linear_names)
    for wrapper in plan.a:
        module = stacked.get(wrapper, wrapper)
        patterned = _parameter(module, targets, settings, sites) or module
        of_experts = sites.parameters[module] if wrapper in stacked else []
        if wrapper in grouped:
            of_experts = list(sites.groups[wrapper])
        rank = ranks.value(patterned, settings.r)
        alpha = alphas.value(patterned, settings.lora_alpha)
        scale = float(np.float32(alpha / (math.sqrt(rank) if settings.use_rslora else rank)))
        parts = tuple((site, site.modules[0]) for site in of_experts) or tuple(sites.by_name[module])
        experts = of_experts[0].stacked.experts if of_experts and of_experts[0].stacked is not None else 0
        pair = _make_pair(module, wrapper, parts, rank, scale, experts, plan, infos, settings)
        if module in renamed.orders:
            pair = replace(pair, form=replace(pair.form, order=renamed.orders[module]))
        if wrapper in grouped:
            check_stacked(pair.a, pair.b, of_experts, rank, module)
            pair = replace(pair, grouped=True)
        else:
            _check_shapes(pair, rank, base, origin)
        parsed.pairs.append(pair)
    check_sites_once(parsed.pairs)
    parsed.saved = match_saved(plan, infos, settings, sites, tied=base.tied)
    cross_check(parsed, targets, sites, plan, tied=base.tied)
    if settings.bias not in (None, "none") and not plan.biases:
        parsed.warnings.append(f"bias is {settings.bias!r}, but the file has no biases: the base's are used.")
    parsed.warnings += left_out_warnings(plan)
    for table, name in ((ranks, "rank_pattern"), (alphas, "alpha_pattern")):
        for module, winner, loser in table.conflicts[:10]:
            parsed.warnings.append(
                f"{name}: {winner!r} and {loser!r} both match {module} with different values; the first in the file "
                "counts. PEFT sorts patterns when it saves, so training may have used the other."
            )
        if unused := table.unused(plan.left_out):
            parsed.warnings.append(f"{name}: matches no module of the adapter: {listed(unused)}.")
    if plan.unused:
        parsed.warnings.append(f"Buffers that are used only in training: {listed(plan.unused)}.")
    parsed.warnings += extra_file_warnings(folder, config, sites=sites.all, model=base.model)
    return parsed


def _parameter(module: str, targets: Targets, settings: LoraSettings, sites: Sites) -> str | None:
    """The parameter of a linear module that ``target_parameters`` names, by which patterns call it."""
    name = f"{module}.weight"
    if not is_named(name, settings.target_parameters or ()) or targets.targeted(module):
        return None
    if any(site.transform == "transpose" for site, _ in sites.by_name.get(module, ())):
        raise AdapterError(
            f"target_parameters names {name}, which is stored transposed (Conv1D): PEFT takes its columns for rows. "
            "Name the module in target_modules.", param="target_parameters",
        )  # fmt: skip
    return name


def _make_pair(
    module: str, wrapper: str, parts: Parts, rank: int, scale: float, experts: int, plan: KeyPlan,
    infos: Mapping[str, TensorInfo], settings: LoraSettings,
) -> Pair:  # fmt: skip
    """The pair of ``module``, whose tensors are named by ``wrapper``, with those of its variant."""
    asked = {
        "use_dora": (plan.magnitudes, settings.use_dora, "lora_magnitude_vector"),
        "lora_bias": (plan.b_biases, settings.lora_bias and wrapper not in plan.embeddings, "bias of lora_B"),
        "kasa_config": (plan.diagonals, settings.kasa_config is not None, "lora_diag"),
    }
    extra = []
    for name, (group, expected, what) in asked.items():
        if bool(expected) != (wrapper in group):
            key = group.get(wrapper, plan.a[wrapper])
            found = f"the file has a {what} of {module}" if wrapper in group else f"the file has no {what} of {module}"
            raise AdapterError(
                f"{name} is {'set' if expected else 'not set'}, but {found}. The two files are of different adapters, "
                "or the file is incomplete.", param=name, key=key,
            )  # fmt: skip
        extra.append(infos[group[wrapper]] if wrapper in group else None)
    if experts and any(extra):
        raise AdapterError(
            f"{module}: PEFT has no DoRA, lora_bias or KaSA on parameters of experts.", param="target_parameters"
        )
    a, b = infos[plan.a[wrapper]], infos[plan.b[wrapper]]
    form = form_of(settings, module, rank, parts[0][0].in_features, parts[0][1].of) if not experts else PLAIN
    return Pair(module, a, b, scale, parts, rank, experts, form, *extra)


def left_out_warnings(plan: KeyPlan) -> list[str]:
    """The modules of ``plan`` that are not served, named by part and counted."""
    if not plan.left_out:
        return []
    return [
        f"Left out, because text does not pass through them: {left_out_words(plan)}. "
        f"The {len(plan.modules())} modules of the text model are served."
    ]


def check_values(infos: Sequence[TensorInfo], *, may_be_empty: bool = False) -> None:
    """Every tensor that is read must have values, unless it ``may_be_empty``, of a dtype that is served. Raises
    ``AdapterError`` naming it."""
    if not may_be_empty and (empty := [info.name for info in infos if 0 in info.shape]):
        raise AdapterError(
            f"{len(empty)} of {len(infos)} tensors hold no values: {listed(empty)}. DeepSpeed ZeRO-3 leaves such "
            "placeholders when the weights are not gathered before saving. Save again with "
            "stage3_gather_16bit_weights_on_model_save=true, or run zero_to_fp32.py on the checkpoint.",
            param=min(empty),
            count=len(empty),
        )
    for info in infos:
        if info.dtype not in FLOATS:
            raise AdapterError(
                f"{info.name} is {info.dtype}; supported are F32, F16 and BF16. Save the adapter in one of these.",
                param=info.name,
                dtype=info.dtype,
            )


def trained_on(config: Mapping[str, Any]) -> str:
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named.strip():
        return "base_model_name_or_path does not name the base that it was trained on."
    return f"It was trained on {named[:200]!r} (base_model_name_or_path)."


def check_modules(plan: KeyPlan, sites: Sites, base: BaseFacts, origin: str, stacked: Collection[str]) -> None:
    """Every module of the file must be a linear layer or a table of the base, or ``stacked``."""
    check_known(plan, sites, base, origin, stacked)
    for module in plan.a:
        if module in stacked:
            continue
        parts = sites.by_name[module]
        if (parts[0][0].kind == "embed") != (module in plan.embeddings):
            raise AdapterError(
                f"{plan.a[module]}: LoRA on an embedding is saved as lora_embedding_A and lora_embedding_B, on a "
                "linear layer as lora_A.weight and lora_B.weight. The adapter was made for another base.",
                param=plan.a[module],
            )
        starts, ends = [part.lo for _, part in parts], [part.hi for _, part in parts]
        if [*starts, parts[0][1].of] != [0, *ends]:  # with a gap, or an overlap
            raise AdapterError(f"{module} cannot be adapted as one module in {base.model}.", param=plan.a[module])


def check_known(plan: KeyPlan, sites: Sites, base: BaseFacts, origin: str, stacked: Collection[str] = ()) -> None:
    """Every module of the file must be in the base, or ``stacked``."""
    if unknown := [module for module in plan.a if module not in stacked and module not in sites.by_name]:
        raise _unknown(unknown, plan, sites, base, origin)


def _unknown(unknown: list[str], plan: KeyPlan, sites: Sites, base: BaseFacts, origin: str) -> AdapterError:
    """Why these modules are not in the base: another prefix, more layers, or another architecture."""
    keys = [plan.a[module] for module in unknown]
    if convolutions := [plan.a[module] for module in unknown if _CONVOLUTION.search(module)]:
        return AdapterError(
            f"LoRA on a convolution is not supported: {listed(convolutions)}. Train without it: leave "
            f"{listed({_leaf(module) for module in unknown if _CONVOLUTION.search(module)})} out of target_modules.",
            param=min(convolutions),
        )
    some = "is" if len(unknown) == 1 else "are"
    every = "None of its modules is" if len(unknown) == len(plan.a) else f"{len(unknown)} of {len(plan.a)} {some} not"
    what = f"{every} in {base.model}: {listed(keys)}."
    prefixes = {found[0] for module in unknown if (found := tail_of(module, sites.tails))}
    highest = max((int(index[1]) for module in unknown if (index := _LAYER.search(module))), default=0)
    if prefixes and len(unknown) < len(plan.a):
        seen = listed(map(repr, {*prefixes, sites.root}))
        why = (
            f"Its names have several prefixes ({seen}), as if two adapters were in one file; save each in its own file."
        )
    elif prefixes:
        known = ", ".join(repr(root) for root in TEXT_ROOTS if root)
        why = (
            f"They begin with {listed(map(repr, prefixes))}, which is none of the prefixes known for the text model of "
            f"a class ({known}). If it is the same text model, rename the tensors to begin with {sites.root!r}."
        )
    elif highest >= sites.layers:
        depth = f"The adapter has a layer {highest}, the base only {sites.layers} layers"
        why = f"{depth}: it was made for another base. {origin}"
    elif len(unknown) == len(plan.a):
        example = min(sites.linear_names, default="none")
        why = f"The base has modules such as {example}: the adapter was made for another base. {origin}"
    else:
        why = f"The base has no such layers. {origin}"
    return AdapterError(f"{what} {why}", param=min(keys))


def _check_shapes(pair: Pair, rank: int, base: BaseFacts, origin: str) -> None:
    site, part = pair.parts[0]
    times = max(1, pair.experts)
    a, b = pair.a.shape, pair.b.shape
    found_rank = a[0] // times if a else 0
    if len(a) == len(b) == 2 and found_rank != rank and b[1] * pair.form.b_blocks == found_rank * times:
        raise AdapterError(
            f"{pair.a.name} has rank {found_rank}, but adapter_config.json says {rank} (r, rank_pattern). The scale "
            "depends on the rank, so it is not known which is right; correct the configuration or save the adapter "
            "again.",
            param=pair.a.name,
            found=found_rank,
            expected=rank,
        )
    of_a, of_b = pair.form.shapes(rank, site.in_features, part.of)
    if pair.experts and site.stacked is not None:
        of_a, of_b = pair_shapes(site, site.stacked, rank)
    expected = [(pair.a, of_a), (pair.b, of_b), (pair.magnitude, (part.of,)), (pair.b_bias, (part.of,)),
                (pair.diagonal, (rank,))]  # fmt: skip
    for info, shape in expected:
        if info is not None and info.shape != shape:
            raise AdapterError(
                f"{info.name} has shape {list(info.shape)}, but {pair.module} of {base.model} needs {list(shape)}: "
                f"the adapter was made for another base. {origin}",
                param=info.name,
                found=list(info.shape),
                expected=list(shape),
            )


def check_sites_once(pairs: Sequence[Pair]) -> None:
    """Each site is adapted by one pair: its own name and a fused one would be ambiguous."""
    owner: dict[int, Pair] = {}
    for pair in pairs:
        for site, _ in pair.parts:
            other = owner.setdefault(site.id, pair)
            if other is not pair:
                raise AdapterError(
                    f"{pair.a.name} and {other.a.name} both adapt {site.module}; keep one.", param=pair.a.name
                )


def cross_check(parsed: ParsedAdapter, targets: Targets, sites: Sites, plan: KeyPlan, *, tied: bool) -> None:
    """Every module of the file is targeted by the configuration, and every targeted module is in the file."""
    covered = {site.id for pair in parsed.pairs for site in pair.sites}
    if parsed.settings.target_modules is None and not parsed.settings.target_parameters and parsed.pairs:
        parsed.warnings.append("target_modules is null; the tensors alone determine which modules are adapted.")
        return
    parameters = parsed.settings.target_parameters or ()

    def is_target(module: str) -> bool:
        return targets.targeted(module) or is_named(module, parameters) or is_named(f"{module}.weight", parameters)

    tables = {site.kind: name for name, parts in sites.by_name.items() for site, _ in parts if site.kind != "linear"}
    tied_head = tables.get("head") if tied and tied_tables(parsed.settings) == "targets" else None
    # Tinker writes all-linear, whatever it has trained, and means the head, too.
    by_tensors = parsed.settings.target_modules == "all-linear" and any(
        pair.grouped or pair.a.name.endswith("unembed_tokens.lora_A.weight") for pair in parsed.pairs
    )
    stray = [
        pair.a.name for pair in parsed.pairs if not (by_tensors or is_target(pair.module) or pair.module == tied_head)
    ]
    if stray:
        raise AdapterError(
            f"Tensors for modules that the configuration does not target (target_modules, target_parameters, "
            f"exclude_modules, layers_to_transform): {listed(stray)}. One of the two files is of another adapter, or "
            "was edited.",
            param="target_modules",
            key=stray[0],
        )
    fused = sites.fused_leaves & {_leaf(pair.module) for pair in parsed.pairs}
    if isinstance(parsed.settings.target_modules, list):
        fused |= sites.fused_leaves & {_leaf(entry) for entry in parsed.settings.target_modules}
    # For transformers 5 experts are no modules: then a name such as gate_proj does not mean theirs.
    as_modules = any(site.stacked is not None for pair in parsed.pairs if not pair.experts for site in pair.sites)
    missing = [
        sites.name_of(site, site.modules[0])
        for site in sites.all
        if site.id not in covered
        and site.kind != "norm"
        and (as_modules or site.stacked is None)
        and any(is_target(name) for name in _names_in_use(site, fused, sites))
    ]
    missing += [
        name
        for name, of_all in sites.parameters.items()
        if is_named(name, parameters) and not covered.issuperset(site.id for site in of_all)
    ]
    if missing and by_tensors:
        parsed.warnings.append(f"target_modules is all-linear, but these have no tensors: {listed(missing)}.")
    elif missing:
        raise AdapterError(
            f"Modules that target_modules names have no tensors in the file: {listed(missing)}. "
            "The file is incomplete, or of another adapter.",
            param="target_modules",
            modules=sorted(missing)[:10],
        )
    if unused := targets.unused_entries(sites.names | plan.left_out.keys()):
        parsed.warnings.append(f"target_modules names no module of the base: {listed(unused)}.")


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _is_own(site: Site, module: ModuleSlice) -> bool:
    """Whether this name means the whole site, rather than a fused module that holds it."""
    return module.lo == 0 and module.hi == module.of == site.out_features


def _names_in_use(site: Site, fused: set[str], sites: Sites) -> list[str]:
    """The names by which PEFT may know this site. A base has either a fused module or its parts, never both, and only
    the adapter shows which: a pattern like ``.*up_proj`` does not mean ``gate_up_proj`` where no such module is in use.
    """
    whole = [m for m in site.modules if not _is_own(site, m) and _leaf(m.name) in fused]
    return [sites.name_of(site, m) for m in whole or [m for m in site.modules if _is_own(site, m)]]
