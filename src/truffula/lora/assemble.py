"""From an adapter's tensors, matched with the base's sites, to the parts of each site (``kernels/adapters.py``)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from truffula.errors import AdapterError
from truffula.kernels.adapters import (
    KINDS,
    Bias,
    ColumnScale,
    InputScale,
    LowRank,
    Part,
    Replace,
    SiteTensors,
    tensors_of,
)
from truffula.kernels.adapters import Rows as RowsPart
from truffula.kernels.backend import Array
from truffula.kernels.program import ModuleSlice, Site
from truffula.lora.base import BaseWeights, Float32
from truffula.lora.fields import LoraSettings
from truffula.lora.parsed import Computed, Pair
from truffula.lora.saved import Saved
from truffula.lora.stacked import of_each_expert, site_tensors
from truffula.lora.variants import (
    PARTS,
    Rows,
    Taken,
    column_norms,
    magnitude_scale,
    row_norms,
    smallest_parts,
    with_taken_a,
    with_taken_b,
)
from truffula.weights.finite import first_non_finite

_ZERO_CHUNK = 1 << 16
"""Values that are compared with zero at a time."""
_FEW_ROWS = 8
"""A table of which fewer rows than one of so many differ from the base's is kept as these rows."""
_SAME_SCALE = 1e-5
"""Norms that PEFT computed at the start of training differ from ours by rounding."""


@dataclass
class Assembly:
    """Collects the parts of one adapter. ``without_effect``: the modules and tensors that change nothing."""

    settings: LoraSettings
    tensors: Mapping[str, Array]
    weights: BaseWeights | None
    parts: dict[int, list[Part]] = field(default_factory=dict)
    without_effect: list[str] = field(default_factory=list)
    prefix: Float32 | None = None
    tables: Mapping[int, Site] = field(default_factory=dict)  # of the base, which may have more rows than its own
    _replaced: dict[int, Array] = field(default_factory=dict)

    def sites(self) -> tuple[SiteTensors, ...]:
        """The parts of each site, in the order of ``KINDS``; biases are summed."""
        order = list(KINDS)
        made = []
        for site, parts in sorted(self.parts.items()):
            if len(parts) == 1 and site not in self.tables and not isinstance(parts[0], Bias):
                made.append(SiteTensors(site, (parts[0],)))
                continue
            biases = [part.values.astype(np.float32) for part in parts if isinstance(part, Bias)]
            others: list[Part] = [part for part in parts if not isinstance(part, Bias)]
            if biases:
                others.append(Bias(functools.reduce(np.add, biases)))
            if (table := self.tables.get(site)) is not None:
                others = [_padded(part, table) for part in others]
            made.append(SiteTensors(site, tuple(sorted(others, key=lambda part: order.index(part.kind)))))
        return tuple(made)

    # ---- tensors that take the place of the base's

    def add_saved(self, every: list[Saved]) -> None:
        """Add all of them: pairs on the same modules act on the replaced weights."""
        self._check_tied_copies(every)
        for saved in every:
            changed = {"weight": self._weight, "bias": self._bias, "rows": self._rows}[saved.kind](saved)
            if not changed:
                self.without_effect.append(saved.info.name)

    def _weight(self, saved: Saved) -> bool:
        values, changed = self.tensors[saved.info.name], False
        base = self._base(saved.field)
        for site, module in saved.parts:
            if site.kind == "norm":
                own: Array = values.astype(np.float32) + np.float32(site.transform == "plus_one")
                same = np.array_equal(own, base.vector(site))
            elif site.kind == "linear":
                own = module.rows(values.T if site.transform == "transpose" else values)
                if own.shape != (site.out_features, site.in_features):
                    raise AdapterError(
                        f"{saved.info.name} is not stored as the base's weight is.", param=saved.info.name
                    )
                same = _equal(own, base.rows(site, stored=True))
            else:
                own, most = values, len(values) // _FEW_ROWS
                ids = _other_rows(own, base.rows(site, stored=True), most)
                same = not len(ids)
                if 0 < len(ids) <= most:
                    self._set_rows(site, ids, own[ids])
                elif not same:
                    self._add(site, Replace(own))
            if not same:
                changed = True
                self._replaced[site.id] = own
                if site.kind in ("norm", "linear"):
                    self._add(site, Replace(own))
        return changed

    def _set_rows(self, site: Site, ids: Array, values: Array) -> None:
        """Replace rows of a table, whose weight or other rows may be replaced already."""
        parts = self.parts.setdefault(site.id, [])
        before = next((part for part in parts if isinstance(part, Replace | RowsPart)), None)
        if before is not None:
            parts.remove(before)
            old = before.weight if isinstance(before, Replace) else before.values
            if old.dtype != values.dtype:
                old, values = old.astype(np.float32), values.astype(np.float32)
            if isinstance(before, Replace):
                weight = old.copy()
                weight[ids] = values
                parts.append(Replace(weight))
                return
            kept = ~np.isin(before.ids, ids)
            ids, values = np.concatenate([before.ids[kept], ids]), np.concatenate([old[kept], values])
        order = np.argsort(ids)
        parts.append(RowsPart(ids[order].astype(np.int32), np.ascontiguousarray(values[order])))

    def _bias(self, saved: Saved) -> bool:
        values, changed = self.tensors[saved.info.name], False
        for site, module in saved.parts:
            own = self._base(saved.field).bias(site)
            if own is None:
                raise AdapterError(
                    f"{saved.info.name}: {site.module} of the base has no bias: the adapter was made for another base.",
                    param="bias", key=saved.info.name,
                )  # fmt: skip
            delta = module.rows(values).astype(np.float32) - own
            if delta.any():
                changed = True
                self._add(site, Bias(delta))
        return changed

    def _rows(self, saved: Saved) -> bool:
        ((site, _),) = saved.parts
        base = self._base(saved.field)
        if site.kind == "head" and base.has_bias(site):
            raise AdapterError(
                "trainable_token_indices: the base's head has a bias, which PEFT leaves out where it replaces rows of "
                "the head, so that training and serving would differ. Name the rows in modules_to_save instead.",
                param="trainable_token_indices", key=saved.info.name,
            )  # fmt: skip
        ids, values = np.asarray(saved.ids, np.int32), self.tensors[saved.info.name]
        if site.id not in self._replaced and np.array_equal(base.gather(site, ids).astype(values.dtype), values):
            return False
        self._set_rows(site, ids, values)
        return True

    def _check_tied_copies(self, every: list[Saved]) -> None:
        """PEFT loads copies and trained rows of a tied base into one tensor: both must be the same."""
        copies = [saved for saved in every if saved.shared and saved.copy]
        rows = [saved for saved in every if saved.shared and saved.kind == "rows"]
        for first, other in (*itertools.pairwise(copies), *itertools.pairwise(rows)):
            if not np.array_equal(self.tensors[first.info.name], self.tensors[other.info.name]):
                raise AdapterError(
                    f"{first.info.name} and {other.info.name} ({other.field}) differ, but embedding and head of the "
                    "base are one tensor: the adapter was trained on another base.",
                    param=other.field, key=other.info.name,
                )  # fmt: skip

    # ---- other methods

    def add_computed(self, item: Computed) -> None:
        made = list(item.make(self.tensors))
        if item.make_prefix is not None:
            self.prefix = item.make_prefix(self.tensors)
            return
        for tensors in made:
            for part in tensors.parts:
                _check_finite(item.infos[0].name, part)
            self.parts.setdefault(tensors.site, []).extend(tensors.parts)
        if not any(_has_effect(part) for tensors in made for part in tensors.parts):
            self.without_effect.append(item.module)

    # ---- pairs

    def add_pair(self, pair: Pair) -> None:
        a, b = self.tensors[pair.a.name], self.tensors[pair.b.name]
        empty = pair.scale == 0 or _is_zero(b) or _is_zero(a)
        if pair.experts:
            split = of_each_expert if pair.grouped else site_tensors
            for made in split(pair.sites, a, b, pair.scale):
                self.parts.setdefault(made.site, []).extend(made.parts)
        else:
            a, b = pair.form.expand(a, b)
            taken = self._taken(pair)
            empty &= taken is None
            diagonal = None if pair.diagonal is None else self.tensors[pair.diagonal.name]
            a = with_taken_a(a, diagonal, taken)
            scale, lo = (pair.scale if taken is None else 1.0), 0
            for site, part in pair.parts:
                rows = with_taken_b(part.rows(b), pair.scale, taken, lo)
                lo += len(rows)
                low_rank = LowRank(a, rows, scale)
                if pair.form.group or diagonal is not None or taken is not None:
                    _check_finite(pair.b.name, low_rank)
                self._add(site, low_rank)
                empty &= not self._add_scale(pair, site, part, a, rows, scale)
        empty &= not self._add_b_bias(pair)
        if empty:
            self.without_effect.append(pair.module)

    def _taken(self, pair: Pair) -> Taken | None:
        """B0 [O, r] and A0 [r, I] of what training took from the base's weight, rows in the order of the parts."""
        init = self.settings.init_lora_weights
        on_table = pair.parts[0][0].kind == "embed"
        if self.settings.kasa_config is None and (not isinstance(init, str) or init not in PARTS or on_table):
            return None
        name = "kasa_config" if self.settings.kasa_config is not None else "init_lora_weights"
        transposed = pair.parts[0][0].transform == "transpose"
        weight = np.concatenate([self._matrix(site, name) for site, _ in pair.parts])
        if pair.rank >= min(weight.shape) if name == "kasa_config" else pair.rank > min(weight.shape):
            raise AdapterError(
                f"{name}: {pair.module} has rank {pair.rank}, and its weight {list(weight.shape)}.", param=name
            )
        if transposed and init != "pissa":
            raise AdapterError(f"{name}: PEFT does not serve it on {pair.module}, which is a Conv1D.", param=name)
        if name == "kasa_config":
            return smallest_parts(weight, pair.rank)
        b0, a0 = PARTS[str(init)](weight, pair.rank)
        return (b0 if init == "pissa" else b0 * np.float32(pair.scale)), a0

    def _add_scale(self, pair: Pair, site: Site, part: ModuleSlice, a: Array, b: Array, scale: float) -> bool:
        """Add DoRA's scale at a site; False when it is 1."""
        if pair.magnitude is None:
            return False
        key = pair.magnitude.name
        magnitude = part.rows(pair.form.in_order(self.tensors[key].reshape(-1)))
        if site.kind == "embed":
            norms = column_norms(self._weight_rows(site, "use_dora"), a, b, scale)
        else:
            norms = row_norms(self._weight_rows(site, "use_dora"), site.out_features, a, b, scale)
        factor = magnitude_scale(magnitude, norms, key)
        _check_finite(key, ColumnScale(factor))
        self._add(site, ColumnScale(factor))
        return bool(np.abs(factor - 1).max() > _SAME_SCALE)

    def _add_b_bias(self, pair: Pair) -> bool:
        """Add the biases of B, scaled; False when they are zero."""
        if pair.b_bias is None:
            return False
        values = pair.form.in_order(self.tensors[pair.b_bias.name]).astype(np.float32) * np.float32(pair.scale)
        _check_finite(pair.b_bias.name, Bias(values))
        for site, part in pair.parts:
            self._add(site, Bias(part.rows(values)))
        return bool(values.any())

    def tie_head(self, embed: Pair, head: Site, own: Pair | None, scale: float) -> None:
        """``ensure_weight_tying``: the head has the embedding's pair, with A and B transposed, and a ``scale`` of its
        own. ``own``: the file has it, too."""
        a, b = self.tensors[embed.b.name].T, self.tensors[embed.a.name].T
        if own is None and embed.magnitude is not None:
            raise AdapterError(
                "ensure_weight_tying is true, but the file has no pair of the head, whose lora_magnitude_vector is "
                f"another than that of {embed.module}. The file is incomplete; save the adapter again.",
                param="ensure_weight_tying", key=embed.magnitude.name,
            )  # fmt: skip
        if own is None:
            self._add(head, LowRank(np.ascontiguousarray(a), np.ascontiguousarray(b), scale))
        elif not (np.array_equal(a, self.tensors[own.a.name]) and np.array_equal(b, self.tensors[own.b.name])):
            raise AdapterError(
                f"ensure_weight_tying is true, but {own.a.name} and {own.b.name} are not those of {embed.module} "
                "transposed: PEFT would use one of the two for both.",
                param="ensure_weight_tying", key=own.a.name,
            )  # fmt: skip

    # ---- the base

    def _weight_rows(self, site: Site, field: str) -> Rows:
        if site.id in self._replaced:
            return iter([(0, self._replaced[site.id])])
        return self._base(field).rows(site)

    def _matrix(self, site: Site, field: str) -> Float32:
        blocks = [np.asarray(values, np.float32) for _, values in self._weight_rows(site, field)]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def _base(self, field: str) -> BaseWeights:
        if self.weights is None:
            raise AdapterError(f"{field} needs the base's weights, which are not known here.", param=field)
        return self.weights

    def _add(self, site: Site, part: Part) -> None:
        self.parts.setdefault(site.id, []).append(part)


def _padded(part: Part, table: Site) -> Part:
    """``part`` with as many rows as the base's ``table``: no token of the adapter's is behind its own."""
    if isinstance(part, InputScale | RowsPart):
        return part
    if table.kind == "embed":
        rows = table.in_features
        if isinstance(part, LowRank):
            return LowRank(_extended(part.a.T, rows).T, part.b, part.scale)
        return Replace(_extended(part.weight, rows)) if isinstance(part, Replace) else part
    rows = table.out_features
    match part:
        case LowRank(a, b, scale):
            return LowRank(a, _extended(b, rows), scale)
        case ColumnScale(factor):
            return ColumnScale(_extended(factor, rows, 1))
        case Bias(values):
            return Bias(_extended(values, rows))
        case Replace(weight):
            return Replace(_extended(weight, rows))


def _extended(array: Array, rows: int, value: float = 0) -> Array:
    """``array`` with further rows of ``value``."""
    more = rows - len(array)
    return array if not more else np.concatenate([array, np.full((more, *array.shape[1:]), value, array.dtype)])


def _check_finite(key: str, part: Part) -> None:
    """Raise ``AdapterError`` when a part that was computed with the tensor ``key`` is not finite."""
    if any(first_non_finite(array) is not None for array in tensors_of(part)):
        raise AdapterError(f"{key}: what is computed with it is beyond the range of float32.", param=key)


def _other_rows(own: Array, rows: Iterator[tuple[int, Array]], most: int) -> Array:
    """Ids of the rows of ``own`` that are not the base's; a few more than ``most`` when they are more."""
    found: list[Array] = []
    for lo, values in rows:
        mine = own[lo : lo + len(values)]
        found.append(lo + np.flatnonzero((values.astype(own.dtype) != mine).any(axis=1)))
        if sum(map(len, found)) > most:
            break
    return np.concatenate(found)


def _equal(own: Array, rows: Iterator[tuple[int, Array]]) -> bool:
    """Whether the base's ``rows``, in the dtype of ``own``, are ``own``. Stops at the first block that differs."""
    return all(np.array_equal(values.astype(own.dtype), own[lo : lo + len(values)]) for lo, values in rows)


def _has_effect(part: Part) -> bool:
    """Whether a part may change a result."""
    if isinstance(part, LowRank):
        return part.scale != 0 and not _is_zero(part.a) and not _is_zero(part.b)
    if isinstance(part, ColumnScale | InputScale):
        return bool((part.factor != 1).any())
    return not isinstance(part, Bias) or not _is_zero(part.values)


def _is_zero(array: Array) -> bool:
    """Whether every value is zero; stops at the first chunk that holds another."""
    flat = array.reshape(-1)
    if flat.size and flat.item(0) != 0:  # as of most tensors
        return False
    return not any((flat[i : i + _ZERO_CHUNK] != 0).any() for i in range(0, flat.size, _ZERO_CHUNK))
