"""Reading and judging a PEFT LoRA adapter: it is served exactly, or refused with the field or tensor that is wrong.

PEFT creates modules from the configuration and fills them from the file, silently where they disagree. Here the tensors
lead: every key must be half of a pair on a module of this base, the configuration gives ranks and scales and must name
exactly those modules, and every number must be finite. What passes is laid out per site, bits unchanged, scale apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truffula.errors import AdapterError, CheckpointError, ErrorInfo, InsufficientMemory, TruffulaError
from truffula.kernels.backend import Array, SiteTensors
from truffula.kernels.program import Site
from truffula.lora.extra_files import extra_file_warnings
from truffula.lora.fields import FieldRow, judge_fields, parse_config, read_settings
from truffula.lora.folder import AdapterFolder
from truffula.lora.image import image_nbytes
from truffula.lora.keys import listed, plan_keys
from truffula.lora.matching import BaseFacts as BaseFacts
from truffula.lora.matching import Judged, Pair, check_values, judge_metadata, left_out_warnings
from truffula.lora.paths import TENSORS, OpenFolder
from truffula.weights.finite import first_non_finite

_ZERO_CHUNK = 1 << 20


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
    """What ``inspect`` shows, from metadata alone: how each field is treated. ``error`` says why it would not load."""

    rows: tuple[FieldRow, ...]
    warnings: tuple[str, ...] = ()
    error: ErrorInfo | None = None
    rank: int = 0
    nbytes: int = 0
    modules: int = 0


def judge_adapter(
    folder: Path | OpenFolder,
    sites: Sequence[Site],
    *,
    base: BaseFacts,
    max_bytes: int | None = None,
    max_file_bytes: int | None = None,
) -> PeftAdapter:
    """Read the adapter in ``folder`` for a base with these ``sites``; refuse it unless it can be served exactly.

    Raises ``AdapterError`` (``param``: the field or key), ``AdapterNotFound``, ``AdapterLoadError`` when the files
    can't be read, ``InsufficientMemory`` above ``max_bytes``. Costs two passes over the file. What it returns are views
    of the file: a caller that copies them compares the folder's fingerprint before and after.
    """
    files = AdapterFolder(folder, max_file_bytes)
    try:
        config = parse_config(files.config_bytes)
        judged = judge_metadata(files.opened, files.tensors.tensors, config, sites, base)
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
            report=(*judge_fields(config), _tensor_row(judged)),
            warnings=tuple(warnings),
        )
    except CheckpointError as error:
        raise AdapterError(files.without_path(error.message), param=TENSORS) from error
    finally:
        files.close()


def inspect_adapter(folder: Path, sites: Sequence[Site] | None = None, base: BaseFacts | None = None) -> AdapterReport:
    """How each field is treated, without reading tensor data; milliseconds for any size. Without ``sites`` no base is
    compared.

    Raises only when there is nothing to report on (no folder, no files, a configuration that is no JSON object); all
    else is in the report.
    """
    files = AdapterFolder(folder)
    try:
        config = parse_config(files.config_bytes)
        rows = judge_fields(config)
        try:
            if sites is None:
                return _inspect_alone(files, config, rows)
            judged = judge_metadata(files.opened, files.tensors.tensors, config, sites, base or BaseFacts())
        except TruffulaError as error:
            return AdapterReport(tuple(rows), (), error.info())
        nbytes = sum(pair.a.nbytes + pair.b.nbytes for pair in judged.pairs)
        report = (*rows, _tensor_row(judged))
        return AdapterReport(report, tuple(judged.warnings), None, judged.rank, nbytes, len(judged.pairs))
    finally:
        files.close()


def _inspect_alone(files: AdapterFolder, config: Mapping[str, Any], rows: list[FieldRow]) -> AdapterReport:
    """What can be said without a base."""
    read_settings(config)
    infos = files.tensors.tensors
    plan = plan_keys(list(infos))
    check_values(infos, plan)
    ranks = [infos[key].shape[0] for key in plan.a.values() if infos[key].shape]
    nbytes = sum(infos[key].nbytes for key in (*plan.a.values(), *plan.b.values()))
    row = FieldRow(
        "tensors", f"{len(plan.a)} pairs, {nbytes} bytes", "check", f"ranks {_numbers(ranks)}; not compared with a base"
    )
    warnings = (*left_out_warnings(plan), *extra_file_warnings(files.opened, config, sites=None, model=None))
    return AdapterReport((*rows, row), warnings, None, max(ranks, default=0), nbytes, len(plan.a))


def _check_size(pairs: Sequence[Pair], max_bytes: int | None) -> None:
    needed = sum(pair.a.nbytes + pair.b.nbytes for pair in pairs)
    if max_bytes is not None and needed > max_bytes:
        raise InsufficientMemory(
            f"The adapter takes {needed} bytes and adapters may use {max_bytes}. "
            "Give the server more memory (--memory, --adapter-memory).",
            requested_bytes=needed,
            limit_bytes=max_bytes,
        )


def _read_tensors(files: AdapterFolder, pairs: Sequence[Pair]) -> tuple[dict[str, Array], list[str]]:
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
                    f"{info.name} holds {count} values that are NaN or infinite, the first at {list(first)}: "
                    "training diverged, or the file is damaged. Take an earlier checkpoint.",
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
        raise AdapterError(
            f"The adapter changes nothing: {why} ({key}). Its answers would be those of the base.",
            param="lora_alpha" if scales else key,
        )
    return tensors, zero


def _is_zero(array: Array) -> bool:
    """Whether every value is zero; stops at the first chunk that holds another."""
    flat = array.reshape(-1)
    return not any((flat[i : i + _ZERO_CHUNK] != 0).any() for i in range(0, flat.size, _ZERO_CHUNK))


def _lay_out(pairs: Sequence[Pair], tensors: Mapping[str, Array]) -> tuple[SiteTensors, ...]:
    def of_pair(pair: Pair) -> Iterator[SiteTensors]:
        a, b = tensors[pair.a.name], tensors[pair.b.name]
        for site, part in pair.parts:
            yield SiteTensors(site.id, a, b[part.lo : part.hi], pair.scale)

    return tuple(sorted((s for pair in pairs for s in of_pair(pair)), key=lambda s: s.site))


def _numbers(values: Iterable[float]) -> str:
    every = sorted(set(values))
    return ", ".join(f"{value:g}" for value in every[:8]) + (", …" if len(every) > 8 else "")


def _tensor_row(judged: Judged) -> FieldRow:
    pairs = judged.pairs
    nbytes = sum(pair.a.nbytes + pair.b.nbytes for pair in pairs)
    dtypes = ", ".join(sorted({info.dtype for pair in pairs for info in (pair.a, pair.b)}))
    note = f"ranks {_numbers([p.rank for p in pairs])}; scales {_numbers([p.scale for p in pairs])}; {dtypes}"
    return FieldRow("tensors", f"{len(pairs)} pairs, {nbytes} bytes", "serve", note)
