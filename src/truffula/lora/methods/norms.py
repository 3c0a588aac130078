"""LN_TUNING: trained weights and biases take the place of those of norms, or of other layers that it names."""

from __future__ import annotations

from truffula.errors import AdapterError
from truffula.lora.checks import check_known, trained_on
from truffula.lora.keys import listed
from truffula.lora.methods.method import (
    Metadata,
    Method,
    check_shape,
    group_keys,
    own_settings,
)
from truffula.lora.parsed import ParsedAdapter, Sites
from truffula.lora.patterns import Targets
from truffula.lora.saved import Saved, check_weight

_WEIGHT, _BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


def _parse(source: Metadata) -> ParsedAdapter:
    keys = group_keys(source.infos, (_WEIGHT, _BIAS))
    plan = keys.plan()
    sites = Sites(source.sites, plan.a)
    check_known(plan, sites, source.base, trained_on(source.config))
    settings = own_settings(
        target_modules=source.config.get("target_modules"), exclude_modules=source.config.get("exclude_modules")
    )
    targets, saved = Targets(settings, sites.linear_names), []
    for module, infos in keys.modules.items():
        parts = tuple(sites.by_name[module])
        if _WEIGHT in infos:
            check_weight(infos[_WEIGHT], parts)
            saved.append(Saved("weight", module, infos[_WEIGHT], parts, by="target_modules"))
        if _BIAS in infos:
            check_shape(infos[_BIAS], (parts[0][1].of,), source.base)
            saved.append(Saved("bias", module, infos[_BIAS], parts, by="target_modules"))
    if source.config.get("target_modules") is not None:
        own = {sites.name_of(site, site.modules[0]) for site in source.sites}
        stray = [module for module in keys.modules if not targets.targeted(module)]
        missing = [name for name in own if targets.targeted(name) and name not in keys.modules]
        if stray or missing:
            raise AdapterError(
                f"target_modules does not agree with the tensors: {listed(stray or missing)} "
                f"{'is not named by it' if stray else 'has none'}. One of the two files is of another adapter, or was "
                "edited.",
                param="target_modules",
            )
    return ParsedAdapter(settings, saved=saved)


LN_TUNING = Method(_parse, "replaced weights of norms")
