"""Checks of an adapter's modules, shapes and configuration against a base: the tensors decide, and the configuration
must name exactly their modules. Each raises ``AdapterError`` naming the field or the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from truffula.errors import AdapterError
from truffula.lora.keys import KeyPlan, left_out_words, listed
from truffula.lora.parsed import BaseFacts, Pair, ParsedAdapter, Sites, leaf_of, names_in_use
from truffula.lora.patterns import Targets, is_named, tied_tables
from truffula.lora.roots import TEXT_ROOTS, tail_of
from truffula.lora.saved import is_whole
from truffula.lora.stacked import pair_shapes
from truffula.weights.checkpoint import TensorInfo

FLOATS = ("F32", "F16", "BF16")
_LAYER = re.compile(r"\.(\d+)\.")
_CONVOLUTION = re.compile(r"(^|[._])conv(1d)?$")


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
        if parts[0][0].kind == "norm":
            raise AdapterError(f"{plan.a[module]}: {module} is a norm, which has no LoRA.", param=plan.a[module])
        if (parts[0][0].kind == "embed") != (module in plan.embeddings):
            raise AdapterError(
                f"{plan.a[module]}: LoRA on an embedding is saved as lora_embedding_A and lora_embedding_B, on a "
                "linear layer as lora_A.weight and lora_B.weight. The adapter was made for another base.",
                param=plan.a[module],
            )
        if not is_whole(tuple(parts)):  # with a gap, or an overlap
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
            f"{listed({leaf_of(module) for module in unknown if _CONVOLUTION.search(module)})} out of target_modules.",
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


def check_shapes(pair: Pair, rank: int, base: BaseFacts, origin: str) -> None:
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
    fused = sites.fused_leaves & {leaf_of(pair.module) for pair in parsed.pairs}
    if isinstance(parsed.settings.target_modules, list):
        fused |= sites.fused_leaves & {leaf_of(entry) for entry in parsed.settings.target_modules}
    # For transformers 5 experts are no modules: then a name such as gate_proj does not mean theirs.
    as_modules = any(site.stacked is not None for pair in parsed.pairs if not pair.experts for site in pair.sites)
    missing = [
        sites.name_of(site, site.modules[0])
        for site in sites.all
        if site.id not in covered
        and site.kind != "norm"
        and (as_modules or site.stacked is None)
        and any(is_target(name) for name in names_in_use(site, fused, sites))
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
