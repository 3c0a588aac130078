"""Reading and judging a PEFT LoRA adapter: it is served exactly, or refused with the field or tensor that is wrong.

PEFT creates modules from the configuration and fills them from the file, silently where they disagree. Here the tensors
lead: every key must be half of a pair on a module of this base, the configuration gives ranks and scales and must name
exactly those modules, and every number must be finite. What passes is laid out per site, bits unchanged, scale apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from truffula.errors import AdapterError, CheckpointError, ErrorInfo, InsufficientMemory, TruffulaError
from truffula.kernels.backend import Array, SiteTensors
from truffula.kernels.program import ModuleSlice, Site
from truffula.lora.beside import warnings_beside
from truffula.lora.fields import FieldRow, LoraSettings, judge_fields, parse_config, read_settings
from truffula.lora.folder import AdapterFolder
from truffula.lora.image import DTYPES, image_nbytes
from truffula.lora.keys import KeyPlan, listed, plan_keys
from truffula.lora.patterns import PatternTable, Steps
from truffula.lora.place import TENSORS
from truffula.lora.targets import Targets
from truffula.weights.checkpoint import TensorInfo
from truffula.weights.finite import first_non_finite

_ZERO_CHUNK = 1 << 20


@dataclass(frozen=True)
class BaseFacts:
    """What messages say about the base besides its sites."""

    model: str = "the base model"


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that may be served. ``sites`` hold views of the mapped file: lay them out before closing anything.

    ``generation`` is the hash of both files, ``rank`` the largest of its modules, ``nbytes`` of its tensors laid out;
    ``report`` a row per field and one for the tensors, ``warnings`` are for the operator.
    """

    generation: str
    rank: int
    nbytes: int
    sites: tuple[SiteTensors, ...]
    report: tuple[FieldRow, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class AdapterReport:
    """What ``inspect`` shows: every field's fate, from metadata alone. ``error`` says why it would not load."""

    rows: tuple[FieldRow, ...]
    warnings: tuple[str, ...] = ()
    error: ErrorInfo | None = None
    rank: int = 0
    nbytes: int = 0
    modules: int = 0


@dataclass(frozen=True)
class _Pair:
    """A and B of one module, and the sites that B's rows belong to."""

    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    parts: tuple[tuple[Site, ModuleSlice], ...]

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass
class _Judged:
    """What metadata alone decide."""

    settings: LoraSettings
    pairs: list[_Pair] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return max(pair.rank for pair in self.pairs)


class _Sites:
    """The base's sites by the module paths that PEFT knows them by."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.by_name: dict[str, list[tuple[Site, ModuleSlice]]] = {}
        self.tables: set[str] = set()
        self.all = sites
        self.linear = [site for site in sites if site.kind == "linear"]
        for site in sites:
            for module in site.modules:
                if site.kind == "linear":
                    self.by_name.setdefault(module.name, []).append((site, module))
                else:
                    self.tables.add(module.name)
        for parts in self.by_name.values():
            parts.sort(key=lambda part: part[1].lo)
        self.names = frozenset(self.by_name)
        self.fused_leaves = {_leaf(m.name) for site in self.linear for m in site.modules if not _is_own(site, m)}


def judge_adapter(
    folder: Path,
    sites: Sequence[Site],
    *,
    base: BaseFacts,
    max_bytes: int | None = None,
    max_file_bytes: int | None = None,
) -> PeftAdapter:
    """Read the adapter in ``folder`` for a base with these ``sites``; refuse it unless it can be served exactly.

    Raises ``AdapterError`` (``param``: the field or key), ``AdapterNotFound``, ``AdapterLoadError`` when the files
    can't be read, ``InsufficientMemory`` above ``max_bytes``. Costs two passes over the file. What it returns are views
    of the file: who copies them compares ``folder.fingerprint`` before and after.
    """
    files = AdapterFolder(folder, max_file_bytes)
    try:
        config = parse_config(files.config_bytes)
        judged = _judge_metadata(files, config, _Sites(sites), base)
        _check_size(judged.pairs, max_bytes)
        tensors, zero = _read_tensors(files, judged.pairs)
        warnings = list(judged.warnings)
        if zero:
            warnings.append(f"{len(zero)} of {len(judged.pairs)} modules are zero and change nothing: {listed(zero)}.")
        laid = _lay_out(judged.pairs, tensors)
        generation = files.generation()
        return PeftAdapter(
            generation=generation,
            rank=judged.rank,
            nbytes=image_nbytes(laid),
            sites=laid,
            report=(*judge_fields(config), _tensor_row(judged.pairs)),
            warnings=tuple(warnings),
        )
    except CheckpointError as error:
        raise AdapterError(files.without_path(error.message), param=TENSORS) from error
    finally:
        files.close()


def inspect_adapter(folder: Path, sites: Sequence[Site] | None = None, base: BaseFacts | None = None) -> AdapterReport:
    """Every field's fate without reading tensor data; milliseconds for any size. Without ``sites`` no base is compared.

    Raises only when there is nothing to report on (no folder, no files, a configuration that is no object); all else is
    in the report.
    """
    files = AdapterFolder(folder)
    try:
        config = parse_config(files.config_bytes)
        rows = judge_fields(config)
        try:
            if sites is None:
                return _inspect_alone(files, config, rows)
            judged = _judge_metadata(files, config, _Sites(sites), base or BaseFacts())
        except TruffulaError as error:
            return AdapterReport(tuple(rows), (), error.info())
        nbytes = sum(pair.a.nbytes + pair.b.nbytes for pair in judged.pairs)
        report = (*rows, _tensor_row(judged.pairs))
        return AdapterReport(report, tuple(judged.warnings), None, judged.rank, nbytes, len(judged.pairs))
    finally:
        files.close()


def _inspect_alone(files: AdapterFolder, config: Mapping[str, Any], rows: list[FieldRow]) -> AdapterReport:
    """What can be said without a base."""
    read_settings(config)
    infos = files.tensors.tensors
    plan = plan_keys(list(infos))
    _check_all_dtypes(infos)
    ranks = [infos[key].shape[0] for key in plan.a.values() if infos[key].shape]
    nbytes = sum(info.nbytes for info in infos.values())
    row = FieldRow(
        "tensors", f"{len(plan.a)} pairs, {nbytes} bytes", "check", f"ranks {_numbers(ranks)}; no base given"
    )
    warnings = tuple(warnings_beside(files.folder, config, sites=None, model=None))
    return AdapterReport((*rows, row), warnings, None, max(ranks, default=0), nbytes, len(plan.a))


def _judge_metadata(files: AdapterFolder, config: Mapping[str, Any], sites: _Sites, base: BaseFacts) -> _Judged:
    settings = read_settings(config)
    infos = files.tensors.tensors
    plan = plan_keys(list(infos))
    _check_all_dtypes(infos)
    judged = _Judged(settings)
    steps = Steps()
    ranks = PatternTable(settings.rank_pattern, "rank_pattern", steps)
    alphas = PatternTable(settings.alpha_pattern, "alpha_pattern", steps)
    _check_modules(plan, sites, base)
    for module, key in plan.a.items():
        rank = ranks.value(module, settings.r)
        alpha = alphas.value(module, settings.lora_alpha)
        scale = float(np.float32(alpha / (math.sqrt(rank) if settings.use_rslora else rank)))
        pair = _Pair(module, infos[key], infos[plan.b[module]], scale, tuple(sites.by_name[module]))
        _check_shapes(pair, rank, base)
        judged.pairs.append(pair)
    _check_sites_once(judged.pairs)
    _cross_check(judged, Targets(settings, sites.names, steps), sites)
    for table, name in ((ranks, "rank_pattern"), (alphas, "alpha_pattern")):
        for module, winner, loser in table.conflicts[:10]:
            judged.warnings.append(
                f"{name}: {winner!r} and {loser!r} both match {module} with different values; the first in the file "
                "counts. PEFT sorts patterns when it saves, so training may have used the other."
            )
        if unused := table.unused():
            judged.warnings.append(f"{name}: matches no module of the adapter: {listed(unused)}.")
    if plan.unused:
        judged.warnings.append(f"Buffers that only training used: {listed(plan.unused)}.")
    judged.warnings += warnings_beside(files.folder, config, sites=sites.all, model=base.model)
    return judged


def _check_all_dtypes(infos: Mapping[str, TensorInfo]) -> None:
    for name, info in infos.items():
        if info.dtype not in DTYPES:
            raise AdapterError(
                f"{name} is {info.dtype}; adapters are served from F32, F16 or BF16.", param=name, dtype=info.dtype
            )


def _check_modules(plan: KeyPlan, sites: _Sites, base: BaseFacts) -> None:
    """Every module of the file must be a linear layer of the base."""
    tables = [module for module in plan.a if module in sites.tables]
    if tables:
        raise _no_tables(tables, plan.a[tables[0]])
    unknown = [plan.a[module] for module in plan.a if module not in sites.by_name]
    if unknown:
        every = "None of its modules is" if len(unknown) == len(plan.a) else f"{len(unknown)} of {len(plan.a)} are not"
        raise AdapterError(
            f"{every} in {base.model}: {listed(unknown)}. The adapter was made for another base.", param=min(unknown)
        )
    for module in plan.a:
        parts = sites.by_name[module]
        edges = [0, *(part.hi for _, part in parts)]
        if any(part.lo != edge or part.of != parts[0][1].of for (_, part), edge in zip(parts, edges, strict=False)) or (
            edges[-1] != parts[0][1].of
        ):
            raise AdapterError(f"{module} is not adaptable as a whole in {base.model}.", param=plan.a[module])


def _no_tables(tables: list[str], key: str) -> AdapterError:
    return AdapterError(
        f"LoRA on the output head or the embedding ({listed(tables)} in target_modules) is not served yet.",
        param="target_modules",
        key=key,
    )


def _check_shapes(pair: _Pair, rank: int, base: BaseFacts) -> None:
    site, part = pair.parts[0]
    found_rank = pair.a.shape[0] if pair.a.shape else 0
    if len(pair.a.shape) == len(pair.b.shape) == 2 and found_rank != rank and pair.b.shape[1] == found_rank:
        raise AdapterError(
            f"{pair.a.name} has rank {found_rank}, the configuration says {rank} (r, rank_pattern). The scale depends "
            "on it, so neither is taken.",
            param=pair.a.name,
            found=found_rank,
            expected=rank,
        )
    for info, expected in ((pair.a, (rank, site.in_features)), (pair.b, (part.of, rank))):
        if info.shape != expected:
            raise AdapterError(
                f"{info.name} has shape {list(info.shape)}; {pair.module} of {base.model} takes {list(expected)}. "
                "The adapter was made for another base.",
                param=info.name,
                found=list(info.shape),
                expected=list(expected),
            )


def _check_sites_once(pairs: Sequence[_Pair]) -> None:
    """A site addressed by two names (its own and a fused one, or two prefixes) would be ambiguous."""
    owner: dict[int, _Pair] = {}
    for pair in pairs:
        for site, _ in pair.parts:
            other = owner.setdefault(site.id, pair)
            if other is not pair:
                raise AdapterError(
                    f"{pair.a.name} and {other.a.name} both adapt {site.module}; keep one.", param=pair.a.name
                )


def _cross_check(judged: _Judged, targets: Targets, sites: _Sites) -> None:
    """Configuration and file must name the same modules, both ways."""
    covered = {site.id for pair in judged.pairs for site, _ in pair.parts}
    if judged.settings.target_modules is None:
        judged.warnings.append("target_modules is null; the tensors alone say which modules are adapted.")
        return
    if tables := [table for table in sites.tables if targets.targeted(table)]:
        raise _no_tables(tables, "target_modules")
    stray = [pair.a.name for pair in judged.pairs if not targets.targeted(pair.module)]
    if stray:
        raise AdapterError(
            f"Tensors for modules that the configuration does not target (target_modules, exclude_modules, "
            f"layers_to_transform): {listed(stray)}.",
            param="target_modules",
            key=stray[0],
        )
    fused = sites.fused_leaves & {_leaf(pair.module) for pair in judged.pairs}
    if isinstance(judged.settings.target_modules, tuple):
        fused |= sites.fused_leaves & {_leaf(entry) for entry in judged.settings.target_modules}
    missing = [
        site.module
        for site in sites.linear
        if site.id not in covered and any(targets.targeted(name) for name in _names_in_use(site, fused))
    ]
    if missing:
        raise AdapterError(
            f"Modules that target_modules names have no tensors in the file: {listed(missing)}.",
            param="target_modules",
            modules=sorted(missing)[:10],
        )
    if unused := targets.unused_entries(sites.names):
        judged.warnings.append(f"target_modules: names no module of the base: {listed(unused)}.")


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _is_own(site: Site, module: ModuleSlice) -> bool:
    """Whether this name means the whole site, rather than a fused module that holds it."""
    return module.lo == 0 and module.hi == module.of == site.out_features


def _names_in_use(site: Site, fused: set[str]) -> list[str]:
    """The names that PEFT can know this site by. A base has either a fused module or its parts, never both, and only
    the adapter tells which: a pattern like ``.*up_proj`` does not mean ``gate_up_proj`` where no such module is in use.
    """
    whole = [m.name for m in site.modules if not _is_own(site, m) and _leaf(m.name) in fused]
    return whole or [m.name for m in site.modules if _is_own(site, m)]


def _check_size(pairs: Sequence[_Pair], max_bytes: int | None) -> None:
    needed = sum(pair.a.nbytes + pair.b.nbytes for pair in pairs)
    if max_bytes is not None and needed > max_bytes:
        raise InsufficientMemory(
            f"The adapter takes {needed} bytes; adapters may use {max_bytes}. Give the server more memory.",
            requested_bytes=needed,
            limit_bytes=max_bytes,
        )


def _read_tensors(files: AdapterFolder, pairs: Sequence[_Pair]) -> tuple[dict[str, Array], list[str]]:
    """Tensors by key, finite; and the modules whose addition is zero. All of them being zero is an error."""
    tensors: dict[str, Array] = {}
    zero: list[str] = []
    for pair in pairs:
        for info in (pair.a, pair.b):
            array = files.tensors.read(info.name)
            bad = first_non_finite(array)
            if bad is not None:
                count, first = bad
                raise AdapterError(
                    f"{info.name} holds {count} values that are NaN or infinite, the first at {list(first)}.",
                    param=info.name,
                    count=count,
                )
            tensors[info.name] = array
        if pair.scale == 0 or _is_zero(tensors[pair.b.name]) or _is_zero(tensors[pair.a.name]):
            zero.append(pair.module)
    if len(zero) == len(pairs):
        scales = all(pair.scale == 0 for pair in pairs)
        why = "its scale is zero (lora_alpha)" if scales else "its tensors are zero, as before training"
        key = pairs[0].b.name
        raise AdapterError(f"The adapter changes nothing: {why} ({key}).", param="lora_alpha" if scales else key)
    return tensors, zero


def _is_zero(array: Array) -> bool:
    """Whether every value is zero; stops at the first chunk that holds another."""
    flat = array.reshape(-1)
    return not any((flat[i : i + _ZERO_CHUNK] != 0).any() for i in range(0, flat.size, _ZERO_CHUNK))


def _lay_out(pairs: Sequence[_Pair], tensors: Mapping[str, Array]) -> tuple[SiteTensors, ...]:
    def of_pair(pair: _Pair) -> Iterator[SiteTensors]:
        a, b = tensors[pair.a.name], tensors[pair.b.name]
        for site, part in pair.parts:
            yield SiteTensors(site.id, a, b[part.lo : part.hi], pair.scale)

    return tuple(sorted((s for pair in pairs for s in of_pair(pair)), key=lambda s: s.site))


def _numbers(values: Iterable[float]) -> str:
    every = sorted(set(values))
    return ", ".join(f"{value:g}" for value in every[:8]) + (", …" if len(every) > 8 else "")


def _tensor_row(pairs: Sequence[_Pair]) -> FieldRow:
    nbytes = sum(pair.a.nbytes + pair.b.nbytes for pair in pairs)
    dtypes = ", ".join(sorted({info.dtype for pair in pairs for info in (pair.a, pair.b)}))
    note = f"ranks {_numbers([p.rank for p in pairs])}; scales {_numbers([p.scale for p in pairs])}; {dtypes}"
    return FieldRow("tensors", f"{len(pairs)} pairs, {nbytes} bytes", "serve", note)
