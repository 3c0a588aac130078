"""Matching an adapter's tensors and configuration with a base's sites, from metadata alone.

The tensors decide: each must be half of a pair on a module of the base, with the module's shape. The configuration
gives ranks and scales, and must name exactly those modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from truffula.errors import AdapterError
from truffula.kernels.program import Site
from truffula.lora.checks import (
    check_modules,
    check_shapes,
    check_sites_once,
    check_values,
    cross_check,
    left_out_warnings,
    trained_on,
)
from truffula.lora.exports import rename, renamed_settings
from truffula.lora.fields import LoraSettings, read_settings
from truffula.lora.image import AdapterFacts
from truffula.lora.keys import KeyPlan, listed, plan_keys
from truffula.lora.parsed import BaseFacts, Pair, ParsedAdapter, Sites
from truffula.lora.patterns import Ranks, Targets, is_named, matching_limit, tied_tables
from truffula.lora.saved import Parts, match_saved, own_vocabulary, table_shape, with_rows
from truffula.lora.stacked import check_stacked, parameters_of, stacked_by_expert
from truffula.lora.variants import PLAIN, form_of
from truffula.weights.checkpoint import TensorInfo


@matching_limit()
def parse_metadata(
    infos: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    all_sites: Sequence[Site],
    base: BaseFacts,
) -> ParsedAdapter:
    """Match the tensors ``infos`` and ``config`` of an adapter with a base's sites.

    Raises ``AdapterError`` (``param``: the field or the tensor) where they don't fit each other or the base.
    """
    settings = read_settings(config)
    invocation = tuple(settings.alora_invocation_tokens or ())
    plan = plan_keys(list(infos))
    check_values([infos[key] for key in plan.read()])
    sites = Sites(all_sites, plan.modules())
    if (vocabulary := own_vocabulary(plan, infos, sites, base.more_ids)) is not None:
        sites = Sites(with_rows(all_sites, vocabulary), plan.modules())
    renamed = rename(plan, sites, base.kv_heads)
    settings = renamed_settings(settings, renamed)
    parsed = ParsedAdapter(settings, facts=AdapterFacts(invocation, vocab_size=vocabulary or 0))
    if vocabulary is not None:
        parsed.warnings.append(f"Its tables have {vocabulary} rows, the base's {_table_rows(all_sites)}.")
    ranks = Ranks(settings)
    origin = trained_on(config)
    grouped = {
        name
        for name, key in plan.a.items()
        if name in sites.groups and stacked_by_expert(infos[key], infos[plan.b[name]], name, sites.parameters)
    }
    stacked = parameters_of(plan.a.keys() - grouped, sites.parameters, settings.target_parameters)
    check_modules(plan, sites, base, origin, stacked.keys() | grouped)
    if invocation:
        _check_invocation(max(invocation), plan, sites, base)
    targets = Targets(settings, sites.linear_names)
    for wrapper in plan.a:
        module = stacked.get(wrapper, wrapper)
        patterned = renamed.stored_name(module)
        if patterned == module:
            patterned = _parameter(module, targets, settings, sites) or module
        of_experts = sites.parameters[module] if wrapper in stacked else []
        if wrapper in grouped:
            of_experts = list(sites.groups[wrapper])
        rank, scale = ranks.of(patterned)
        parts = tuple((site, site.modules[0]) for site in of_experts) or tuple(sites.by_name[module])
        if parts[0][0].kind == "head" and plan.embeddings and base.tied and tied_tables(settings) == "targets":
            rank, _ = ranks.of(min(plan.embeddings))  # PEFT gives the head the embedding's tensors, not its rank
        experts = of_experts[0].stacked.experts if of_experts and of_experts[0].stacked is not None else 0
        pair = _make_pair(module, wrapper, parts, rank, scale, experts, plan, infos, settings)
        if module in renamed.orders:
            pair = replace(pair, form=replace(pair.form, order=renamed.orders[module]))
        if wrapper in grouped:
            check_stacked(pair.a, pair.b, of_experts, rank, module)
            pair = replace(pair, grouped=True)
        else:
            check_shapes(pair, rank, base, origin)
        parsed.pairs.append(pair)
    check_sites_once(parsed.pairs)
    parsed.saved = match_saved(plan, infos, settings, sites, tied=base.tied)
    cross_check(parsed, targets, sites, plan, tied=base.tied)
    if settings.bias not in (None, "none") and not plan.biases:
        parsed.warnings.append(f"bias is {settings.bias!r}, but the file has no biases: the base's are used.")
    parsed.warnings += left_out_warnings(plan)
    for table, name in ((ranks.ranks, "rank_pattern"), (ranks.alphas, "alpha_pattern")):
        for module, winner, loser in table.conflicts[:10]:
            parsed.warnings.append(
                f"{name}: {winner!r} and {loser!r} both match {module} with different values; the first in the file "
                "counts. PEFT sorts patterns when it saves, so training may have used the other."
            )
        if unused := table.unused(plan.left_out):
            parsed.warnings.append(f"{name}: matches no module of the adapter: {listed(unused)}.")
    if plan.unused:
        parsed.warnings.append(f"Tensors that PEFT does not compute with when generating: {listed(plan.unused)}.")
    return parsed


def _table_rows(sites: Sequence[Site]) -> int:
    return next((table_shape(site)[0] for site in sites if site.kind in ("embed", "head")), 0)


def _check_invocation(highest: int, plan: KeyPlan, sites: Sites, base: BaseFacts) -> None:
    """Raise ``AdapterError`` where an activated LoRA, ``highest`` the largest of its ids, cannot act from one token
    on."""
    rows = next((site.in_features for site in sites.all if site.kind == "embed"), None)
    source = None if base.weights is None else base.weights.source
    acting = {name: {site.id for site, _ in sites.by_name.get(name, ())} for name in plan.a}
    of_all = [] if source is None else [name for name, ids in acting.items() if ids.intersection(source.latent)]
    why = ""
    if source is not None and source.serial:
        why = (
            "transformers' code computes this model one sequence at a time, where an adapter acts on all tokens or "
            "none. Train plain LoRA."
        )
    elif rows is not None and highest >= rows:
        why = f"token {highest} is in no prompt, as the base's embedding has {rows} rows: the adapter would never act."
    elif plan.embeddings:
        why = f"PEFT has no activated LoRA on an embedding: {listed(plan.embeddings)}."
    elif of_all:
        why = (
            f"the keys and values that {listed(of_all)} makes are computed from cached latents when they are used, so "
            "that it would act on the tokens before the invocation, too. Train without it."
        )
    if why:
        raise AdapterError(f"alora_invocation_tokens: {why}", param="alora_invocation_tokens")


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
    magnitude, b_bias, diagonal = extra
    return Pair(module, a, b, scale, parts, rank, experts, form, magnitude, b_bias, diagonal)
