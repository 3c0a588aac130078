"""What a method other than LoRA consists of: its fields, its tensors, and the parts that they become."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from truffula.errors import AdapterError
from truffula.kernels.adapters import SiteTensors, low_rank
from truffula.kernels.backend import Array
from truffula.kernels.program import Site
from truffula.lora.checks import (
    check_modules,
    check_sites_once,
    check_values,
    cross_check,
    left_out_warnings,
    trained_on,
)
from truffula.lora.fields import LoraSettings
from truffula.lora.keys import MAX_KEY_CHARS, PREFIX, KeyPlan, listed
from truffula.lora.method_fields import TARGETS
from truffula.lora.parsed import BaseFacts, Pair, ParsedAdapter, Sites
from truffula.lora.patterns import Targets
from truffula.lora.roots import other_part
from truffula.lora.saved import Parts
from truffula.weights.checkpoint import TensorInfo

Tensors = Mapping[str, Array]
"""Tensors by key."""


@dataclass(frozen=True)
class Metadata:
    """What is known of an adapter and of its base before a tensor is read."""

    config: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]
    sites: Sequence[Site]
    base: BaseFacts


@dataclass(frozen=True)
class Method:
    """How adapters of one ``peft_type`` are served, whose fields are in ``method_fields.TABLES``. ``parse`` raises
    ``AdapterError``; ``becomes`` is for the docs."""

    parse: Callable[[Metadata], ParsedAdapter]
    becomes: str


def own_settings(**targets: Any) -> LoraSettings:
    """The target fields as those of LoRA."""
    return LoraSettings(r=1, lora_alpha=1.0, **targets)


@dataclass
class Keys:
    """The tensors of a file by module and by their own names. ``alone`` belong to no module."""

    modules: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    alone: dict[str, TensorInfo] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def plan(self) -> KeyPlan:
        """The first key of each module, for messages and checks."""
        firsts = {module: min(info.name for info in infos.values()) for module, infos in self.modules.items()}
        return KeyPlan(a=firsts, left_out=self.left_out)


def group_keys(
    infos: Mapping[str, TensorInfo], leaves: Sequence[str], *, alone: Sequence[str] = (), may_be_empty: bool = False
) -> Keys:
    """The file's tensors by module. ``leaves`` are the names that a module's tensors have, ``alone`` whole keys.
    ``may_be_empty``: tensors may have no values.

    Raises:
        AdapterError: No tensor, one with another name, or two of one name.
    """
    last = re.compile(rf"(?P<module>.+)\.(?P<leaf>{'|'.join(map(re.escape, leaves))})\Z")
    keys, unexpected, singles = Keys(), [], set(alone)
    for key, info in infos.items():
        found = last.match(key[:MAX_KEY_CHARS].removeprefix(PREFIX))
        if key in singles:
            keys.alone[key] = info
        elif other_part(key.removeprefix(PREFIX)) is not None:
            keys.left_out[found["module"] if found else key] = key
        elif found is None:
            unexpected.append(key)
        elif (other := keys.modules.setdefault(found["module"], {}).setdefault(found["leaf"], info)) is not info:
            raise AdapterError(f"{key} and {other.name} are the same tensor of one module.", param=key)
    if unexpected or not (keys.modules or keys.alone):
        what = listed(unexpected) if unexpected else "no tensors"
        raise AdapterError(
            f"The file has {what[:2000]}; this method has {', '.join(sorted({*leaves, *singles}))}. It is of another "
            "method, or was not written by PEFT's save_pretrained.",
            param=min(unexpected, default="adapter_model.safetensors")[:80],
        )
    served = [*keys.alone.values(), *(info for each in keys.modules.values() for info in each.values())]
    check_values(served, may_be_empty=may_be_empty)
    return keys


def require(module: str, infos: Mapping[str, TensorInfo], *leaves: str) -> tuple[TensorInfo, ...]:
    """The tensors of a module. Raises ``AdapterError`` unless it has exactly these."""
    if infos.keys() != set(leaves):
        raise AdapterError(
            f"{module} has {', '.join(sorted(infos))}; expected {', '.join(leaves)}. The file is incomplete; save it "
            "again.",
            param=min(info.name for info in infos.values()),
        )
    return tuple(infos[leaf] for leaf in leaves)


def check_shape(info: TensorInfo, expected: tuple[int, ...], base: BaseFacts) -> None:
    """Raise ``AdapterError`` unless a tensor has the shape that the base and the configuration say."""
    if info.shape != expected:
        raise AdapterError(
            f"{info.name} has shape {list(info.shape)}, but the configuration and {base.model} need {list(expected)}: "
            "the adapter was made for another base, or one of its two files is of another adapter.",
            param=info.name,
            found=list(info.shape),
            expected=list(expected),
        )


def match(source: Metadata, keys: Keys) -> tuple[dict[str, Parts], ParsedAdapter]:
    """The sites of each module that has tensors, and an adapter without any yet.

    Raises ``AdapterError`` for modules that the base does not have, or that do not agree with the target fields.
    """
    plan = keys.plan()
    sites = Sites(source.sites, plan.a)
    check_modules(plan, sites, source.base, trained_on(source.config), ())
    parsed = ParsedAdapter(own_settings(**{name: source.config.get(name) for name in TARGETS}))
    matched = [
        Pair(module, first, first, 1.0, tuple(sites.by_name[module]), 0)
        for module, infos in keys.modules.items()
        for first in [next(iter(infos.values()))]
    ]
    check_sites_once(matched)
    cross_check(replace(parsed, pairs=matched), Targets(parsed.settings, sites.linear_names), sites, plan, tied=False)
    parsed.warnings += left_out_warnings(plan)
    return {pair.module: pair.parts for pair in matched}, parsed


def as_float32(array: Array) -> Array:
    return np.asarray(array, np.float32)


def products(parts: Parts, a: Array, b: Array, scale: float) -> list[SiteTensors]:
    """Plain LoRA on a module: ``a [r, in]``, ``b [out, r]``."""
    return [low_rank(site.id, a, rows.rows(b), scale) for site, rows in parts]
