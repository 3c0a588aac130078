"""TRAINABLE_TOKENS: trained rows take the place of rows of the embedding, on a tied base of the head, too.

PEFT writes the rows of a tied head as well, which are the embedding's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import msgspec

from truffula.errors import AdapterError
from truffula.kernels.program import Site
from truffula.lora.checks import check_known, trained_on
from truffula.lora.keys import listed
from truffula.lora.methods.method import (
    Keys,
    Metadata,
    Method,
    check_shape,
    group_keys,
    own_settings,
)
from truffula.lora.parsed import ParsedAdapter, Sites
from truffula.lora.patterns import Targets
from truffula.lora.saved import RESIZED, Saved, table_shape

_LEAF = "trainable_tokens_delta"
_Id = Annotated[int, msgspec.Meta(ge=0)]


def _parse(source: Metadata) -> ParsedAdapter:
    keys = group_keys(source.infos, (_LEAF,))
    plan = keys.plan()
    sites = Sites(source.sites, plan.a)
    check_known(plan, sites, source.base, trained_on(source.config))
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
        saved.append(Saved("rows", module, info, parts, ids, shared=source.base.tied, by="token_indices"))
    tables = {one.parts[0][0].kind for one in saved}
    head = [tuple(parts) for parts in sites.by_name.values() if parts[0][0].kind == "head"]
    if source.base.tied and tables == {"embed"}:
        saved += [replace(saved[0], parts=parts) for parts in head]
    return ParsedAdapter(own_settings(), saved=saved)


def _check_targets(source: Metadata, keys: Keys, sites: Sites) -> None:
    """The tables with rows are those that ``target_modules`` names, and on a tied base the head."""
    named = source.config.get("target_modules")
    settings = own_settings(target_modules=["embed_tokens"] if named is None else named)
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


TRAINABLE_TOKENS = Method(_parse, "replaced rows of embedding and head")
