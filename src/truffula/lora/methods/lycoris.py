"""LOHA and LOKR: products of two small matrices that expand to LoRA exactly, at a larger rank.

LOHA: ``(w1_a w1_b) ⊙ (w2_a w2_b)`` is B A with the columns of B all products of a column of w1_a and one of w2_a, and
the rows of A those of w1_b and w2_b: rank r².

LOKR: ``w1 ⊗ w2``. With w1 = a1 b1 and w2 = a2 b2 it is ``(a1 ⊗ a2)(b1 ⊗ b2)``; a matrix that is stored whole is its own
product with the identity of its smaller side.

A module whose rank would be more than the weight's has the weight with the matrix added instead (``Replace``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec
import numpy as np

from truffula.errors import AdapterError
from truffula.kernels.adapters import Replace, SiteTensors
from truffula.kernels.backend import Array
from truffula.lora.base import BaseWeights
from truffula.lora.methods.method import (
    Metadata,
    Method,
    Tensors,
    as_float32,
    check_shape,
    group_keys,
    match,
    products,
    require,
)
from truffula.lora.parsed import Computed, ParsedAdapter
from truffula.lora.patterns import PatternTable
from truffula.lora.saved import Parts
from truffula.weights.checkpoint import TensorInfo

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


class _Settings(msgspec.Struct, frozen=True):
    r: int
    alpha: float
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


_Infos = Mapping[str, TensorInfo]
_Expand = Callable[[Tensors, _Infos], tuple[Array, Array]]
_Dense = Callable[[Tensors, _Infos], Array]


def _parse(
    source: Metadata, leaves: tuple[str, ...], check: Callable[[str, _Infos, Parts, int, Metadata], int],
    expand: _Expand, dense: _Dense,
) -> ParsedAdapter:  # fmt: skip
    """``check`` returns the expanded rank of a module, after it has checked its tensors; ``expand`` its A and B, and
    ``dense`` their product."""
    settings = msgspec.convert(source.config, _Settings)
    keys = group_keys(source.infos, leaves)
    found, parsed = match(source, keys)
    ranks, alphas = (PatternTable(getattr(settings, name) or {}, name) for name in ("rank_pattern", "alpha_pattern"))
    for module, parts in found.items():
        r = ranks.value(module, settings.r)
        scale = float(np.float32(alphas.value(module, settings.alpha) / r))
        infos = keys.modules[module]
        expanded = check(module, infos, parts, r, source)
        most = min(parts[0][0].in_features, parts[0][1].of)
        make = _maker(parts, infos, scale, expand)
        if expanded > most:
            what = f"{module}: of rank {expanded} as LoRA, more than its weight's {most}, it"
            make = _replacer(parts, infos, scale, dense, source.base.need(what))
        parsed.computed.append(Computed(module, tuple(infos.values()), make, min(expanded, most)))
    return parsed


def _replacer(
    parts: Parts, infos: _Infos, scale: float, dense: _Dense, base: BaseWeights
) -> Callable[[Tensors], Iterable[SiteTensors]]:
    def make(tensors: Tensors) -> Iterable[SiteTensors]:
        delta = dense(tensors, infos) * np.float32(scale)
        for site, part in parts if delta.any() else ():
            weight = part.rows(delta).copy()
            for lo, values in base.rows(site):
                weight[lo : lo + len(values)] += np.asarray(values, np.float32)
            yield SiteTensors(site.id, (Replace(weight),))

    return make


def _maker(parts: Parts, infos: _Infos, scale: float, expand: _Expand) -> Callable[[Tensors], Iterable[SiteTensors]]:
    def make(tensors: Tensors) -> Iterable[SiteTensors]:
        a, b = expand(tensors, infos)
        return products(parts, a, b, scale)

    return make


def _check_loha(module: str, infos: _Infos, parts: Parts, r: int, source: Metadata) -> int:
    inputs, outputs = parts[0][0].in_features, parts[0][1].of
    for info, shape in zip(require(module, infos, *_LOHA), [(outputs, r), (r, inputs)] * 2, strict=True):
        check_shape(info, shape, source.base)
    return r * r


def _expand_loha(tensors: Tensors, infos: _Infos) -> tuple[Array, Array]:
    a1, b1, a2, b2 = (as_float32(tensors[infos[leaf].name]) for leaf in _LOHA)
    a = b1[:, None, :] * b2[None, :, :]
    b = a1[:, :, None] * a2[:, None, :]
    return a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)


def _dense_loha(tensors: Tensors, infos: _Infos) -> Array:
    a1, b1, a2, b2 = (as_float32(tensors[infos[leaf].name]) for leaf in _LOHA)
    return np.asarray((a1 @ b1) * (a2 @ b2))


def _check_lokr(module: str, infos: _Infos, parts: Parts, r: int, source: Metadata) -> int:
    leaves = []
    for name in ("lokr_w1", "lokr_w2"):
        leaves += [name] if name in infos else [f"{name}_a", f"{name}_b"]
    require(module, infos, *leaves)
    for info in infos.values():
        if len(info.shape) != 2:
            raise AdapterError(f"{info.name} has shape {list(info.shape)}: not of a linear layer.", param=info.name)
    sides, rank = [], 1
    for name in ("lokr_w1", "lokr_w2"):
        if name in infos:
            sides.append(infos[name].shape)
            rank *= min(infos[name].shape)
            continue
        first, second = infos[f"{name}_a"], infos[f"{name}_b"]
        check_shape(first, (first.shape[0], r), source.base)
        check_shape(second, (r, second.shape[1]), source.base)
        sides.append((first.shape[0], second.shape[1]))
        rank *= r
    (left_out, left_in), (right_out, right_in) = sides
    whole, expected = (left_out * right_out, left_in * right_in), (parts[0][1].of, parts[0][0].in_features)
    if whole != expected:
        raise AdapterError(
            f"{module}: lokr_w1 and lokr_w2 make a matrix {list(whole)}, but {source.base.model} has {list(expected)}: "
            "the adapter was made for another base.",
            param=next(iter(infos.values())).name,
        )
    return rank


def _expand_lokr(tensors: Tensors, infos: _Infos) -> tuple[Array, Array]:
    (a1, b1), (a2, b2) = (_factors(tensors, infos, name) for name in ("lokr_w1", "lokr_w2"))
    return np.kron(b1, b2), np.kron(a1, a2)


def _dense_lokr(tensors: Tensors, infos: _Infos) -> Array:
    first, second = (np.matmul(*_factors(tensors, infos, name)) for name in ("lokr_w1", "lokr_w2"))
    return np.kron(first, second)


def _factors(tensors: Tensors, infos: _Infos, name: str) -> tuple[Array, Array]:
    """Two matrices whose product is ``name``, of the smallest rank that is known without computing."""
    if name not in infos:
        return as_float32(tensors[infos[f"{name}_a"].name]), as_float32(tensors[infos[f"{name}_b"].name])
    whole = as_float32(tensors[infos[name].name])
    rows, columns = whole.shape
    if rows < columns:
        return np.eye(rows, dtype=np.float32), whole
    return whole, np.eye(columns, dtype=np.float32)


LOHA = Method(
    lambda source: _parse(source, _LOHA, _check_loha, _expand_loha, _dense_loha),
    "LoRA of rank r², beyond that of the weight a changed weight",
)
LOKR = Method(
    lambda source: _parse(source, _LOKR, _check_lokr, _expand_lokr, _dense_lokr),
    "LoRA of the product's rank, beyond that of the weight a changed weight",
)
