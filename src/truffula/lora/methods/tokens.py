"""TRAINABLE_TOKENS: trained rows take the place of rows of the embedding, on a tied base of the head, too.

PEFT writes the rows of a tied head as well, which are the embedding's.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from truffula.errors import AdapterError
from truffula.kernels.program import Site
from truffula.lora.fields import Field, LoraSettings
from truffula.lora.keys import listed
from truffula.lora.matching import Sites, check_known
from truffula.lora.methods.method import (
    COMMON,
    AdapterSource,
    Keys,
    Method,
    MethodPlan,
    check_shape,
    for_training,
    group_keys,
)
from truffula.lora.patterns import Targets
from truffula.lora.saved import RESIZED, Saved, table_shape

_LEAF = "trainable_tokens_delta"
_Id = Annotated[int, msgspec.Meta(ge=0)]

FIELDS_OF = {
    **COMMON,
    "token_indices": Field("serve", "rows of the table that are replaced", list[_Id]),
    "target_modules": Field("check", "must name the tables that have rows", str | list[str] | None),
    **for_training("init_weights"),
}


def _plan(source: AdapterSource) -> MethodPlan:
    keys = group_keys(source.infos, (_LEAF,))
    plan = keys.plan()
    sites = Sites(source.sites, plan.a)
    check_known(plan, sites, source.base, source.config)
    _check_targets(source, keys, sites)
    ids = tuple(source.config["token_indices"])
    if len(set(ids)) < len(ids):
        raise AdapterError("token_indices names a token twice.", param="token_indices")
    saved = []
    for module, infos in keys.modules.items():
        info, parts = infos[_LEAF], tuple(sites.by_name[module])
        rows, width = table_shape(parts[0][0])
        if highest := [one for one in ids if one >= rows]:
            raise AdapterError(
                f"token_indices names token {max(highest)}, but {module} has {rows} rows. {RESIZED}.",
                param="token_indices", found=max(highest), limit=rows,
            )  # fmt: skip
        check_shape(info, (len(ids), width), source.base)
        saved.append(Saved("rows", module, info, parts, ids))
    tables = {one.parts[0][0].kind for one in saved}
    head = [parts for parts in sites.by_name.values() if parts[0][0].kind == "head"]
    if source.base.tied and tables == {"embed"} and head:
        saved.append(Saved("rows", saved[0].module, saved[0].info, tuple(head[0]), ids, shared=True))
    equal = tuple(one.info.name for one in saved) if source.base.tied and len(tables) > 1 else ()
    return MethodPlan((), saved=tuple(saved), equal=equal)


def _check_targets(source: AdapterSource, keys: Keys, sites: Sites) -> None:
    """The tables with rows are those that ``target_modules`` names, and on a tied base the head."""
    named = source.config.get("target_modules")
    settings = LoraSettings(r=1, lora_alpha=1.0, target_modules=["embed_tokens"] if named is None else named)
    targets = Targets(settings, sites.linear_names)
    tables: dict[str, Site] = {
        name: site for name, parts in sites.by_name.items() for site, _ in parts if site.kind in ("embed", "head")
    }
    follows = {name for name, site in tables.items() if site.kind == "head" and source.base.tied}
    stray = [m for m in keys.modules if m not in tables or not (targets.targeted(m) or m in follows or named is None)]
    missing = [name for name in tables if targets.targeted(name) and name not in keys.modules and name not in follows]
    if stray or (missing and named is not None):
        raise AdapterError(
            f"target_modules is {named!r}, and the file has rows of {listed(keys.modules)}: it must have those of the "
            "embedding or head that are named, and of no other module.",
            param="target_modules",
        )


TRAINABLE_TOKENS = Method(FIELDS_OF, _plan, "replaced rows of embedding and head")
