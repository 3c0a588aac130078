"""Reads and validates a PEFT LoRA adapter: it is served exactly, or refused with the field or tensor that is wrong.

PEFT creates modules from the configuration and fills them from the file, and reports no disagreement. Here the tensors
decide: every key must be half of a pair on a module of this base, the configuration gives ranks and scales and must
name exactly those modules, and every number must be finite. A valid adapter is returned as tensors per site, bits
unchanged, and a scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truffula.errors import AdapterError, ErrorInfo, TruffulaError
from truffula.kernels.adapters import SiteTensors, low_rank
from truffula.kernels.backend import Array
from truffula.kernels.program import Site
from truffula.lora.extra_files import extra_file_warnings
from truffula.lora.fields import FieldRow, field_rows, parse_config, read_settings
from truffula.lora.folder import AdapterFiles, open_adapter
from truffula.lora.image import check_size
from truffula.lora.keys import listed, plan_keys
from truffula.lora.matching import BaseFacts as BaseFacts
from truffula.lora.matching import Pair, ParsedAdapter, check_values, left_out_warnings, parse_metadata
from truffula.lora.paths import OpenFolder
from truffula.lora.stacked import site_tensors
from truffula.lora.tables import check_copies
from truffula.weights.finite import first_non_finite

_ZERO_CHUNK = 1 << 20


@dataclass(frozen=True)
class PeftAdapter:
    """A valid adapter. ``sites`` hold views of the mapped file: an image copies them.

    ``generation`` is the hash of both files, ``rank`` the largest of its modules; ``warnings`` are for the operator.
    """

    generation: str
    rank: int
    sites: tuple[SiteTensors, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class AdapterReport:
    """What ``inspect`` shows, from metadata alone: how each field is treated. ``error``: why it would not load."""

    rows: tuple[FieldRow, ...]
    warnings: tuple[str, ...] = ()
    error: ErrorInfo | None = None
    rank: int = 0
    nbytes: int = 0
    modules: int = 0


def validate_adapter(
    folder: Path | OpenFolder,
    sites: Sequence[Site],
    *,
    base: BaseFacts,
    max_bytes: int | None = None,
    max_file_bytes: int | None = None,
    untrained: bool = False,
) -> PeftAdapter:
    """Read the adapter in ``folder`` for a base with these ``sites``; refuse it unless it can be served exactly, and
    unless it changes something. ``untrained``: its tensors may all be zero.

    Raises ``AdapterError`` (``param``: the field or key), ``AdapterNotFound``, ``AdapterLoadError`` when the files
    can't be read, ``InsufficientMemory`` above ``max_bytes``. Costs two passes over the file. What it returns are views
    of the file: a caller that copies them compares the folder's fingerprint before and after.
    """
    with open_adapter(folder, max_file_bytes) as files:
        config = parse_config(files.config_bytes)
        parsed = parse_metadata(files.folder, files.tensors.tensors, config, sites, base)
        check_size(stored_bytes(parsed.pairs), max_bytes)
        copies = {kind: (key, files.tensors.read(key)) for kind, key in parsed.copies.items()}
        check_copies(copies, base.tables)
        tensors, zero = _read_tensors(files, parsed.pairs)
        warnings = list(parsed.warnings)
        if len(zero) == len(parsed.pairs) and not (untrained and any(pair.scale for pair in parsed.pairs)):
            raise _no_effect(parsed.pairs)
        if zero:
            warnings.append(f"{len(zero)} of {len(parsed.pairs)} modules are zero and change nothing: {listed(zero)}.")
        return PeftAdapter(
            generation=files.generation(),
            rank=parsed.rank,
            sites=_site_tensors(parsed.pairs, tensors),
            warnings=tuple(warnings),
        )


def inspect_adapter(folder: Path, sites: Sequence[Site] | None = None, base: BaseFacts | None = None) -> AdapterReport:
    """How each field is treated, from metadata alone: milliseconds for any size. Without ``sites`` no base is compared.

    Raises only when there is nothing to report on (no folder, no files, a configuration that is not a JSON object); any
    other error is in the report.
    """
    with open_adapter(folder) as files:
        config = parse_config(files.config_bytes)
        rows = field_rows(config)
        try:
            if sites is None:
                return _inspect_alone(files, config, rows)
            parsed = parse_metadata(files.folder, files.tensors.tensors, config, sites, base or BaseFacts())
        except TruffulaError as error:
            return AdapterReport(tuple(rows), (), error.info())
        nbytes = stored_bytes(parsed.pairs)
        report = (*rows, _tensor_row(parsed))
        return AdapterReport(report, tuple(parsed.warnings), None, parsed.rank, nbytes, len(parsed.pairs))


def _inspect_alone(files: AdapterFiles, config: Mapping[str, Any], rows: list[FieldRow]) -> AdapterReport:
    """The report without a base."""
    read_settings(config)
    infos = files.tensors.tensors
    plan = plan_keys(list(infos))
    check_values(infos, plan)
    ranks = [infos[key].shape[0] for key in plan.a.values() if infos[key].shape]
    nbytes = sum(infos[key].nbytes for key in (*plan.a.values(), *plan.b.values()))
    row = FieldRow(
        "tensors", f"{len(plan.a)} pairs, {nbytes} bytes", "check", f"ranks {_numbers(ranks)}; not compared with a base"
    )
    warnings = (*left_out_warnings(plan), *extra_file_warnings(files.folder, config, sites=None, model=None))
    return AdapterReport((*rows, row), warnings, None, max(ranks, default=0), nbytes, len(plan.a))


def stored_bytes(pairs: Sequence[Pair]) -> int:
    """Bytes of the file's tensors that are served."""
    return sum(pair.a.nbytes + pair.b.nbytes for pair in pairs)


def _read_tensors(files: AdapterFiles, pairs: Sequence[Pair]) -> tuple[dict[str, Array], list[str]]:
    """Tensors by key, finite; and the modules whose addition is zero."""
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
    return tensors, zero


def _no_effect(pairs: Sequence[Pair]) -> AdapterError:
    """The error of an adapter that changes nothing."""
    scales = all(pair.scale == 0 for pair in pairs)
    why = "its scale is zero (lora_alpha)" if scales else "its tensors are zero, as before training"
    key = pairs[0].b.name
    return AdapterError(
        f"The adapter changes nothing: {why} ({key}). Its answers would be those of the base.",
        param="lora_alpha" if scales else key,
    )


def _is_zero(array: Array) -> bool:
    """Whether every value is zero; stops at the first chunk that holds another."""
    flat = array.reshape(-1)
    return not any((flat[i : i + _ZERO_CHUNK] != 0).any() for i in range(0, flat.size, _ZERO_CHUNK))


def _site_tensors(pairs: Sequence[Pair], tensors: Mapping[str, Array]) -> tuple[SiteTensors, ...]:
    made: list[SiteTensors] = []
    for pair in pairs:
        a, b = tensors[pair.a.name], tensors[pair.b.name]
        if pair.experts:
            made += site_tensors(pair.sites, a, b, pair.scale)
            continue
        made += [low_rank(site.id, a, part.rows(b), pair.scale) for site, part in pair.parts]
    return tuple(sorted(made, key=lambda s: s.site))


def _numbers(values: Iterable[float]) -> str:
    every = sorted(set(values))
    return ", ".join(f"{value:g}" for value in every[:8]) + (", …" if len(every) > 8 else "")


def _tensor_row(parsed: ParsedAdapter) -> FieldRow:
    pairs = parsed.pairs
    nbytes = stored_bytes(pairs)
    dtypes = ", ".join(sorted({info.dtype for pair in pairs for info in (pair.a, pair.b)}))
    note = f"ranks {_numbers([p.rank for p in pairs])}; scales {_numbers([p.scale for p in pairs])}; {dtypes}"
    if parsed.copies:
        note += f"; copies of base tables ({listed(parsed.copies.values())}) are compared with the base at loading"
    return FieldRow("tensors", f"{len(pairs)} pairs, {nbytes} bytes", "serve", note)
