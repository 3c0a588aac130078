"""Merges the files of several adapters into one: the sum of their products, or peft's ``add_weighted_adapter`` on A, B.

    linear            Σ w s B A: A and B stacked (peft's ``cat``), exact; with a rank, its best approximation (``svd``)
    ties, dare_…, magnitude_prune    prune and combine A and B, each by sqrt(|w s|) with the sign on A; equal ranks

The result has scale 1 and is float32. It depends on the adapters' bytes, weights and method only, neither on their
order nor on the machine: what DARE drops is drawn by a generator keyed by all of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from truffula.errors import AdapterError, InvalidRequest
from truffula.kernels.backend import Array
from truffula.kernels.inputs import Float32
from truffula.lora.checks import check_values, left_out_warnings
from truffula.lora.fields import LoraSettings, is_empty, parse_config, read_settings
from truffula.lora.folder import AdapterFiles
from truffula.lora.keys import PREFIX, KeyPlan, listed, plan_keys
from truffula.lora.paths import CONFIG, TENSORS
from truffula.lora.patterns import Ranks, matching_limit
from truffula.types import MergeMethod
from truffula.weights.safetensors import write_tensors

_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class MergePart:
    """One of the adapters that are merged, its files open, with its weight. ``name`` is for messages."""

    name: str
    files: AdapterFiles
    weight: float

    @cached_property
    def config(self) -> dict[str, Any]:
        return parse_config(self.files.config_bytes)

    @cached_property
    def settings(self) -> LoraSettings:
        return read_settings(self.config)

    @cached_property
    def keys(self) -> KeyPlan:
        return plan_keys(list(self.files.tensors.tensors))

    @cached_property
    def generation(self) -> str:
        return self.files.generation()

    def read(self, key: str) -> Float32:
        return self.files.tensors.read(key).astype(np.float32)

    @cached_property
    def scales(self) -> Mapping[str, float]:
        """Its scale times its weight, by module."""
        ranks = Ranks(self.settings)
        found: dict[str, float] = {}
        for module, key in self.keys.a.items():
            (rank, scale), real = ranks.of(module), self.files.tensors.tensors[key].shape[0]
            if rank != real:
                raise AdapterError(
                    f"{key} has rank {real}, but adapter_config.json says {rank}: its scale is not known.", param=key
                )
            found[module] = scale * self.weight
        return found


@dataclass
class Merged:
    """A merged adapter before it is written: the rank of each module, and what makes its A and B."""

    ranks: dict[str, int]
    shapes: dict[str, tuple[int, int]]  # in, out
    tables: set[str]
    make: Callable[[str], tuple[Float32, Float32]]
    copies: dict[str, Array] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        pairs = sum(4 * rank * sum(self.shapes[module]) for module, rank in self.ranks.items())
        return pairs + sum(array.nbytes for array in self.copies.values())

    def write(self, folder: Path) -> None:
        """Write both files into ``folder``."""
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        declared: dict[str, tuple[str, tuple[int, ...]]] = {}
        for module, rank in self.ranks.items():
            inputs, outputs = self.shapes[module]
            a, b = _keys(module, table=module in self.tables)
            declared[a], declared[b] = ("F32", (rank, inputs)), ("F32", (outputs, rank))
        names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
        for key, copy in self.copies.items():
            declared[key] = names.get(copy.dtype, "BF16"), copy.shape
        write_tensors(folder / TENSORS, declared, self._arrays(), _METADATA)

    def _arrays(self) -> Iterator[Array]:
        for module in self.ranks:
            yield from self.make(module)
        yield from self.copies.values()


@matching_limit()
def merge_adapters(parts: Sequence[MergePart], method: MergeMethod | None = None, rank: int | None = None) -> Merged:
    """The merged adapter of ``parts``; ``method`` None is linear, of which ``rank`` limits the rank.

    Raises ``AdapterError`` (``param``: field or tensor) for an adapter that is not plain LoRA, or is no adapter;
    ``InvalidRequest`` for ranks that differ under a method that needs equal ones.
    """
    for part in parts:
        _check_plain(part)
    shapes = _shapes(parts)
    ordered = sorted(parts, key=lambda part: (part.generation, part.weight))
    acting = {module: [part for part in ordered if module in part.keys.a] for module in shapes}
    ranks: dict[str, int] = {}
    for module, those in acting.items():
        each = [part.files.tensors.tensors[part.keys.a[module]].shape[0] for part in those]
        if method is not None and len(set(each)) > 1:
            found = ", ".join(f"{part.name} {n}" for part, n in zip(those, each, strict=True))
            raise InvalidRequest(
                f"{method.strategy} merges A and B value by value, so that the adapters need equal ranks; of {module} "
                f"they are: {found}. The strategy linear merges any ranks.",
                param="merge_strategy",
            )
        ranks[module] = each[0] if method is not None else sum(each)
        if rank is not None:
            ranks[module] = min(rank, ranks[module], *shapes[module])

    def make(module: str) -> tuple[Float32, Float32]:
        those = acting[module]
        if method is None:
            a, b = _stack(module, those)
            return (a, b) if len(a) == ranks[module] else _truncate(a, b, ranks[module])
        seed = [part.generation + repr(part.weight) for part in ordered] + [repr(method), module]
        return _combine(module, those, method, "\0".join(seed))

    tables = set().union(*(part.keys.embeddings for part in parts))
    merged = Merged(ranks, shapes, tables, make, _copies(parts), warnings=_warnings(parts))
    merged.config = _config(parts[0].config, ranks)
    return merged


# ---- formulas


def _stack(module: str, parts: Sequence[MergePart]) -> tuple[Float32, Float32]:
    """A ``[Σr, in]`` and B ``[out, Σr]`` whose product is Σ w s B A."""
    a = [part.read(part.keys.a[module]) * np.float32(part.scales[module]) for part in parts]
    return np.concatenate(a), np.concatenate([part.read(part.keys.b[module]) for part in parts], axis=1)


def _truncate(a: Float32, b: Float32, rank: int) -> tuple[Float32, Float32]:
    """The product of rank ``rank`` that is nearest to B A: singular values of the small matrix R_b R_aᵀ."""
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.astype(np.float64).T)
    u, s, vt = np.linalg.svd(r_b @ r_a.T)
    left, right = q_b @ (u[:, :rank] * s[:rank]), vt[:rank] @ q_a.T
    return right.astype(np.float32), left.astype(np.float32)


def _combine(module: str, parts: Sequence[MergePart], method: MergeMethod, seed: str) -> tuple[Float32, Float32]:
    factors = [part.scales[module] for part in parts]
    of_a = [math.copysign(math.sqrt(abs(f)), f) if f else 0.0 for f in factors]
    of_b = [math.sqrt(abs(f)) for f in factors]
    a = combined([part.read(part.keys.a[module]) for part in parts], of_a, method, f"{seed}\0A")
    b = combined([part.read(part.keys.b[module]) for part in parts], of_b, method, f"{seed}\0B")
    return a, b


def combined(tensors: Sequence[Float32], weights: Sequence[float], method: MergeMethod, seed: str) -> Float32:
    """peft's merge of ``tensors`` (one shape) by ``method``; ``seed`` decides what DARE drops."""
    random = method.strategy.startswith("dare")
    kept: list[Float32] = []
    for index, tensor in enumerate(tensors):
        if method.density >= 1:
            kept.append(tensor)
        elif random:
            mask = drawn(tensor.shape, method.density, f"{seed}\0{index}")
            kept.append(tensor * mask / np.float32(method.density))
        else:
            kept.append(_largest(tensor, method.density))
    weighted = [tensor * np.float32(weight) for tensor, weight in zip(kept, weights, strict=True)]
    if method.strategy not in ("ties", "dare_ties"):
        return np.asarray(sum(weighted), np.float32)
    votes = sum(kept if method.sign == "total" else [np.sign(tensor) for tensor in kept])
    majority = np.where(np.asarray(votes) >= 0, np.float32(1), np.float32(-1))
    agree = [np.sign(tensor) == majority for tensor in kept]
    total = sum(np.where(mask, tensor, np.float32(0)) for mask, tensor in zip(agree, weighted, strict=True))
    count = sum(mask.astype(np.float32) for mask in agree)
    return np.asarray(total / np.maximum(count, np.float32(1)), np.float32)


def _largest(tensor: Float32, density: float) -> Float32:
    """The largest values of ``tensor`` by magnitude, a share of ``density``; the others are 0."""
    sizes = np.abs(tensor).ravel()
    count = int(density * sizes.size)
    if not count:
        return np.zeros_like(tensor)
    kept = np.argsort(-sizes, kind="stable")[:count]
    mask = np.zeros(sizes.size, np.float32)
    mask[kept] = 1
    return tensor * mask.reshape(tensor.shape)


def drawn(shape: tuple[int, ...], density: float, seed: str) -> Float32:
    """Ones with probability ``density``, else zeros, by a generator whose output no version of numpy changes."""
    key = np.frombuffer(hashlib.blake2b(seed.encode(), digest_size=16).digest(), np.uint64)
    raw = np.random.Philox(key=key).random_raw(math.prod(shape))
    return ((raw >> np.uint64(11)) * 2.0**-53 < density).astype(np.float32).reshape(shape)


# ---- files


def _check_plain(part: MergePart) -> None:
    """Raise ``AdapterError`` unless ``part`` consists of pairs of A and B on modules of their own."""
    found = next((name for name, harmless in _NOT_PLAIN.items() if not harmless(part.config.get(name))), None)
    if found is None:
        keys = part.keys
        others = set(keys.read()) - {*keys.a.values(), *keys.b.values(), *keys.copies.values()}
        others |= {key for module, key in keys.copies.items() if module not in keys.a}
        if not others:
            check_values([part.files.tensors.tensors[key] for key in keys.read()])
            return
        found = f"the tensors {listed(others)}"
    raise AdapterError(
        f"Adapter {part.name!r} is more than plain LoRA ({found}), and only the A and B of plain LoRA can be merged. A "
        "request can add it to others as it is (a linear merge), if it replaces no weights.",
        param=found if found in _NOT_PLAIN else min(others),
        adapter=part.name,
    )


def _plain_init(value: Any) -> bool:
    return not isinstance(value, str) or value in ("gaussian", "eva", "orthogonal", "mica")


_NOT_PLAIN: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "peft_type": lambda value: value in (None, "LORA"),
        "init_lora_weights": _plain_init,
        "bias": lambda value: value in (None, "none"),
        **dict.fromkeys(
            (
                *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
                *("target_parameters", "use_qalora", "kasa_config", "use_bdlora"),
            ),
            is_empty,
        ),
        "alora_invocation_tokens": lambda value: value is None,
    }
)
"""Fields by which an adapter does more than add products of A and B, and whether a value asks for that not."""


def _shapes(parts: Sequence[MergePart]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every module that some part adapts, in the order of their names."""
    found: dict[str, tuple[int, int]] = {}
    owner: dict[str, str] = {}
    for part in parts:
        infos = part.files.tensors.tensors
        for module in part.scales:
            a, b = infos[part.keys.a[module]].shape, infos[part.keys.b[module]].shape
            if not len(a) == len(b) == 2 or a[0] != b[1]:
                raise AdapterError(
                    f"{part.keys.b[module]} has shape {list(b)}, which does not fit A {list(a)}.",
                    param=part.keys.b[module],
                )
            shape = found.setdefault(module, (a[1], b[0]))
            if shape != (a[1], b[0]):
                raise AdapterError(
                    f"{part.name!r} and {owner[module]!r} were trained on different bases: {module} has "
                    f"{a[1]} inputs and {b[0]} outputs in one, {shape[0]} and {shape[1]} in the other.",
                    param=part.keys.a[module],
                )
            owner.setdefault(module, part.name)
    return dict(sorted(found.items()))


def _copies(parts: Sequence[MergePart]) -> dict[str, Array]:
    """Copies of base tables: they must be equal where several adapters have them."""
    found: dict[str, Array] = {}
    for part in parts:
        for key in part.keys.copies.values():
            array = part.files.tensors.read(key)
            name = PREFIX + key.removeprefix(PREFIX)
            if not np.array_equal(found.setdefault(name, array), array):
                raise AdapterError(f"{key} differs between the adapters: their bases differ.", param=key)
    return found


def _config(first: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter of scale 1 with these ranks."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": first.get("task_type"),
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "r": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "use_dora": False,
        "use_rslora": False,
    }


def _keys(module: str, *, table: bool) -> tuple[str, str]:
    halves = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
    return f"{PREFIX}{module}.{halves[0]}", f"{PREFIX}{module}.{halves[1]}"


def _warnings(parts: Sequence[MergePart]) -> list[str]:
    found = [f"{part.name}: {text}" for part in parts for text in left_out_warnings(part.keys)]
    modules = {part.name: set(part.keys.a) for part in parts}
    every = set().union(*modules.values())
    for name, own in modules.items():
        if len(parts) > 1 and own != every:
            found.append(f"{name} does not adapt {listed(every - own)}: there the others act alone.")
    return found
