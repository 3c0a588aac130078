"""What a method other than LoRA consists of: its fields, its tensors, and the parts that they become."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from truffula.errors import AdapterError
from truffula.kernels.adapters import SiteTensors, low_rank
from truffula.kernels.backend import Array
from truffula.kernels.program import ModuleSlice, Site
from truffula.lora.fields import FIELDS, Field, LoraSettings, is_empty, no_text_modules
from truffula.lora.image import NO_FACTS, AdapterFacts
from truffula.lora.keys import MAX_KEY_CHARS, PREFIX, KeyPlan, listed
from truffula.lora.matching import (
    BaseFacts,
    Pair,
    ParsedAdapter,
    Sites,
    check_modules,
    check_sites_once,
    check_values,
    cross_check,
    left_out_warnings,
)
from truffula.lora.patterns import Targets
from truffula.lora.roots import other_part
from truffula.weights.checkpoint import TensorInfo

Tensors = Mapping[str, Array]
"""Tensors by key."""
Parts = Sequence[tuple[Site, ModuleSlice]]
"""The sites of one module, with their rows of it."""

TRAINING = "affects only training"
COMMON = {
    name: FIELDS[name]
    for name in ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode")
}
TARGETS = {
    name: FIELDS[name] for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
}
SAVED = Field("refuse", "fully trained modules beside this method; train without it", harmless=no_text_modules)
ORIENTATION = FIELDS["fan_in_fan_out"]


def for_training(*names: str) -> dict[str, Field]:
    """Fields without effect on answers."""
    return dict.fromkeys(names, Field("ignore", TRAINING))


def refused(note: str, *names: str) -> dict[str, Field]:
    """Fields that are refused unless they are empty."""
    return dict.fromkeys(names, Field("refuse", note))


def no_bias(own: str) -> Field:
    """``bias`` of a method whose own value for trained biases is ``own``."""
    note = f"trained biases ('all', '{own}') beside this method; train with bias='none'"
    return Field("refuse", note, harmless=lambda value: is_empty(value) or value == "none")


@dataclass(frozen=True)
class PlannedModule:
    """A module and its tensors; ``make`` turns these into parts."""

    name: str
    infos: tuple[TensorInfo, ...]
    make: Callable[[Tensors], Iterable[SiteTensors]]


@dataclass(frozen=True)
class MethodPlan:
    """What an adapter's metadata says. ``shared`` are tensors of all modules."""

    modules: tuple[PlannedModule, ...]
    rank: int = 0
    shared: tuple[TensorInfo, ...] = ()
    facts: AdapterFacts = NO_FACTS
    warnings: tuple[str, ...] = ()

    @property
    def infos(self) -> list[TensorInfo]:
        """The tensors that are served."""
        return [*self.shared, *(info for module in self.modules for info in module.infos)]


@dataclass(frozen=True)
class AdapterSource:
    """The metadata of an adapter and of its base."""

    config: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]
    sites: Sequence[Site]
    base: BaseFacts


@dataclass(frozen=True)
class Method:
    """How adapters of one ``peft_type`` are served. ``fields`` has a verdict for each field of its configuration;
    ``how`` is what they become, for the docs."""

    fields: Mapping[str, Field]
    plan: Callable[[AdapterSource], MethodPlan]
    how: str


@dataclass
class Keys:
    """The tensors of a file by module and by their own names. ``alone`` belong to no module."""

    modules: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    alone: dict[str, TensorInfo] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def plan(self) -> KeyPlan:
        """The first key of each module, for messages and checks."""
        firsts = {module: min(info.name for info in infos.values()) for module, infos in self.modules.items()}
        return KeyPlan(a=firsts, b=firsts, left_out=self.left_out)


def group_keys(infos: Mapping[str, TensorInfo], leaves: Iterable[str], *, alone: Iterable[str] = ()) -> Keys:
    """The file's tensors by module. ``leaves`` are the names that a module's tensors have, ``alone`` whole keys.

    Raises:
        AdapterError: No tensor, or one with another name.
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
        else:
            keys.modules.setdefault(found["module"], {})[found["leaf"]] = info
    if unexpected or not (keys.modules or keys.alone):
        what = listed(unexpected) if unexpected else "no tensors"
        raise AdapterError(
            f"The file has {what[:2000]}; this method has {', '.join(sorted({*leaves, *singles}))}. It is of another "
            "method, or was not written by PEFT's save_pretrained.",
            param=min(unexpected, default="adapter_model.safetensors")[:80],
        )
    check_values(infos, keys.plan())
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


def match(source: AdapterSource, keys: Keys) -> tuple[dict[str, Parts], list[str]]:
    """The sites of each module that has tensors, and warnings.

    Raises ``AdapterError`` for modules that the base does not have, or that do not agree with the target fields.
    """
    config, plan = source.config, keys.plan()
    sites = Sites(source.sites, plan.a)
    check_modules(plan, sites, source.base, config)
    targets = {name: config.get(name) for name in TARGETS}
    parsed = ParsedAdapter(LoraSettings(r=1, lora_alpha=1.0, **targets))
    for module, infos in keys.modules.items():
        first = next(iter(infos.values()))
        parsed.pairs.append(Pair(module, first, first, 1.0, tuple(sites.by_name[module])))
    check_sites_once(parsed.pairs)
    cross_check(parsed, Targets(parsed.settings, sites.linear_names), sites, plan)
    return {pair.module: pair.parts for pair in parsed.pairs}, [*parsed.warnings, *left_out_warnings(plan)]


def as_float32(array: Array) -> Array:
    return np.asarray(array, np.float32)


def products(parts: Parts, a: Array, b: Array, scale: float) -> list[SiteTensors]:
    """Plain LoRA on a module: ``a [r, in]``, ``b [out, r]``."""
    return [low_rank(site.id, a, rows.rows(b), scale) for site, rows in parts]
