"""Several adapters in one request: as a weighted sum without new tensors, or merged into one by a loading worker."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import msgspec

from truffula.errors import InvalidRequest
from truffula.types import MAX_ADAPTERS, AdapterRef, MergeMethod, WeightedAdapter

MAX_WEIGHT = 1000.0


def compose(parts: Iterable[WeightedAdapter], param: str = "adapters") -> AdapterRef | None:
    """The weighted sum of what ``parts`` change: Σ weight · scale · B A. The order of ``parts`` has no effect; one that
    is named twice counts by the sum of its weights, and one of weight 0 not at all. Without any it is the base: None.

    Raises ``InvalidRequest`` (``param``) for a weight out of range, and for more than ``MAX_ADAPTERS`` adapters.
    """
    weights: dict[str, list[float]] = {}
    refs: dict[str, AdapterRef] = {}
    for part in parts:
        check_weight(part.weight, param)
        for one in part.ref.acting:
            key = _identity(one.ref)
            refs.setdefault(key, one.ref)
            weights.setdefault(key, []).append(part.weight * one.weight)
    summed = {key: math.fsum(weights[key]) for key in sorted(weights)}
    acting = tuple(WeightedAdapter(refs[key], weight) for key, weight in summed.items() if weight)
    _check_count(len(acting), param)
    if len(acting) == 1 and acting[0].weight == 1.0:
        return acting[0].ref
    return _of_parts("composed", acting) if acting else None


def merge(parts: Sequence[WeightedAdapter], method: MergeMethod, param: str = "adapters") -> AdapterRef:
    """The adapter that a loading worker makes of ``parts`` by ``method``. Their order has no effect. Raises as
    ``compose``.
    """
    for part in parts:
        check_weight(part.weight, param)
        if part.ref.wanted:
            raise InvalidRequest(
                f"{param} merges {part.ref.name!r} in one generation (@sha:), which a merge_strategy cannot; leave "
                "@sha: out, or merge_strategy, as a sum takes any generation.",
                param=param,
            )
    _check_count(len(parts), param)
    ordered = tuple(sorted(parts, key=lambda part: (_identity(part.ref), part.weight)))
    return _of_parts("merged", ordered, method)


def check_weight(weight: float, param: str) -> None:
    """Raise ``InvalidRequest`` unless ``weight`` is a finite number of at most ``MAX_WEIGHT``."""
    if not abs(weight) <= MAX_WEIGHT:
        raise InvalidRequest(
            f"{param} has the weight {weight:g}; a weight is a number from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}.",
            param=param,
        )


def _check_count(count: int, param: str) -> None:
    if count > MAX_ADAPTERS:
        raise InvalidRequest(
            f"{param} names {count} adapters; at most {MAX_ADAPTERS} act together.", param=param, limit=MAX_ADAPTERS
        )


def _of_parts(kind: str, parts: tuple[WeightedAdapter, ...], method: MergeMethod | None = None) -> AdapterRef:
    names = "+".join(f"{part.ref.name}={part.weight:g}" for part in parts)
    described = ", ".join(f"{part.weight!r} x {_identity(part.ref)}" for part in parts)
    fingerprints = "\0".join(part.ref.fingerprint for part in parts)
    return msgspec.structs.replace(
        AdapterRef(name=names if method is None else f"{method.strategy}({names})", locator=""),
        kind=kind,
        locator=described if method is None else f"{method.strategy} {method.density!r} {method.sign}: {described}",
        fingerprint=hashlib.blake2b(fingerprints.encode(), digest_size=16).hexdigest(),
        parts=parts,
        merge=method,
    )


def _identity(ref: AdapterRef) -> str:
    """Where ``ref`` is read from, by what right, and in which generation if it names one, whatever its name is."""
    right = () if ref.credential is None else (ref.credential.id,)
    return " ".join(repr(one) for one in (ref.kind, ref.locator, ref.revision, ref.root, ref.wanted, *right) if one)
