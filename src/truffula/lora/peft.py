"""Reads and validates a PEFT LoRA adapter: it is served exactly, or refused with the field or tensor that is wrong.

PEFT creates modules from the configuration and fills them from the file, and reports no disagreement. Here the tensors
decide: every key must belong to a module of this base, the configuration gives ranks and scales and must name exactly
those modules, and every number must be finite. A valid adapter is returned as parts per site; A and B keep their bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from truffula.errors import AdapterError, ErrorInfo, TruffulaError
from truffula.kernels.adapters import SiteTensors
from truffula.kernels.backend import Array
from truffula.kernels.inputs import Float32
from truffula.kernels.program import Site
from truffula.lora.assemble import Assembly
from truffula.lora.checks import check_values, left_out_warnings
from truffula.lora.extra_files import extra_file_warnings, text_files
from truffula.lora.fields import FieldRow, field_rows, parse_config
from truffula.lora.folder import AdapterFiles, open_adapter
from truffula.lora.image import AdapterFacts, check_size
from truffula.lora.keys import listed, plan_keys
from truffula.lora.matching import parse_metadata
from truffula.lora.method_fields import check_config, table_of
from truffula.lora.methods import METHODS, Metadata
from truffula.lora.parsed import BaseFacts as BaseFacts
from truffula.lora.parsed import Matched as Matched
from truffula.lora.parsed import ParsedAdapter
from truffula.lora.paths import OpenFolder
from truffula.lora.patterns import Ranks, matching_limit, tied_tables
from truffula.lora.saved import with_rows
from truffula.weights.finite import first_non_finite


@dataclass(frozen=True)
class PeftAdapter:
    """A valid adapter. ``sites`` hold views of the mapped file: an image copies them.

    ``generation`` is the hash of both files, ``rank`` the largest of its modules; ``facts`` and ``prefix`` (the values
    of ``KvPrefix``) are for the scheduler, ``warnings`` for the operator.
    """

    generation: str
    rank: int
    sites: tuple[SiteTensors, ...]
    facts: AdapterFacts
    prefix: Float32 | None
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
    own_texts: bool = True,
) -> PeftAdapter:
    """Read the adapter in ``folder`` for a base with these ``sites``; refuse it unless it can be served exactly, and
    unless it changes something. ``untrained``: its tensors may all be zero. ``own_texts``: its tokenizer and chat
    template are used for its requests.

    Raises ``AdapterError`` (``param``: the field or key), ``AdapterNotFound``, ``AdapterLoadError`` when the files
    can't be read, ``InsufficientMemory`` above ``max_bytes``. Costs two passes over the file. What it returns are views
    of the file: a caller that copies them compares the folder's fingerprint before and after.
    """
    with open_adapter(folder, max_file_bytes) as files, files.hashing() as generation:
        config = parse_config(files.config_bytes)
        parsed = _parse(files, config, sites, base, own_texts=own_texts)
        check_size(stored_bytes(parsed), max_bytes)
        assembly = Assembly(parsed.settings, _read_tensors(files, parsed), base.weights, tables=_tables(sites))
        assembly.add_saved(parsed.saved)
        if parsed.facts.invocation and assembly.parts:
            raise _acts_before(parsed)
        with np.errstate(over="ignore", invalid="ignore"):  # checked afterwards
            for pair in parsed.pairs:
                assembly.add_pair(pair)
            for item in parsed.computed:
                assembly.add_computed(item)
        _tie_head(parsed, assembly, sites, base)
        idle, count = assembly.without_effect, len(parsed.pairs) + len(parsed.saved) + len(parsed.computed)
        warnings = list(parsed.warnings)
        if len(idle) >= count and not (untrained and any(pair.scale for pair in parsed.pairs)):
            raise _no_effect(parsed)
        if idle:
            warnings.append(
                f"{len(idle)} of {count} modules or tensors are zero and change nothing, or are the base's own: "
                f"{listed(idle)}."
            )
        return PeftAdapter(
            generation.result(), parsed.rank, assembly.sites(), parsed.facts, assembly.prefix, tuple(warnings)
        )


def inspect_adapter(folder: Path, sites: Sequence[Site] | None = None, base: BaseFacts | None = None) -> AdapterReport:
    """How each field is treated, from metadata alone: milliseconds for any size. Without ``sites`` no base is compared.

    Raises only when there is nothing to report on (no folder, no files, a configuration that is not a JSON object); any
    other error is in the report.
    """
    with open_adapter(folder) as files:
        config = parse_config(files.config_bytes)
        rows: list[FieldRow] = []
        try:
            rows += field_rows(config, table_of(config))
            if sites is None:
                return _inspect_alone(files, config, rows)
            parsed = _parse(files, config, sites, base or BaseFacts())
        except TruffulaError as error:
            return AdapterReport(tuple(rows), (), error.info())
        nbytes = stored_bytes(parsed)
        report = (*rows, *_tensor_rows(parsed), *_text_rows(files))
        return AdapterReport(
            report, tuple(parsed.warnings), None, parsed.rank, nbytes, len(parsed.pairs) + len(parsed.computed)
        )


def _parse(
    files: AdapterFiles, config: Mapping[str, Any], sites: Sequence[Site], base: BaseFacts, *, own_texts: bool = True
) -> ParsedAdapter:
    """The adapter as its metadata says, whatever its method."""
    method, infos = METHODS.get(str(config.get("peft_type"))), files.tensors.tensors
    sites = base.own_sites(sites)
    check_config(config)
    if method is not None:
        with matching_limit():
            parsed = method.parse(Metadata(config, infos, sites, base))
    elif base.matched is None:
        parsed = parse_metadata(infos, config, sites, base)
    else:
        key = files.config_bytes, files.tensors.header
        parsed = base.matched.get(key, len(infos), lambda: parse_metadata(infos, config, sites, base))
    rows = parsed.facts.vocab_size
    more = extra_file_warnings(
        files.folder, config, sites=with_rows(sites, rows) if rows else sites, model=base.model,
        texts_of=None if own_texts else "" if base.weights is None else base.weights.source.path,
    )  # fmt: skip
    return replace(parsed, warnings=[*parsed.warnings, *more]) if more else parsed


def _inspect_alone(files: AdapterFiles, config: Mapping[str, Any], rows: list[FieldRow]) -> AdapterReport:
    """The report without a base."""
    check_config(config)
    infos = files.tensors.tensors
    if config["peft_type"] in METHODS:
        nbytes = sum(info.nbytes for info in infos.values())
        rows += _text_rows(files)
        row = FieldRow("tensors", f"{len(infos)} tensors, {nbytes} bytes", "check", "not compared with a base")
        notes = extra_file_warnings(files.folder, config, sites=None, model=None)
        return AdapterReport((*rows, row), tuple(notes), None, 0, nbytes, 0)
    rows += _text_rows(files)
    plan = plan_keys(list(infos))
    check_values([infos[key] for key in plan.read()])
    ranks = [infos[key].shape[0] for key in plan.a.values() if infos[key].shape]
    nbytes = sum(infos[key].nbytes for key in plan.read())
    row = FieldRow(
        "tensors", f"{len(plan.a)} pairs, {nbytes} bytes", "check", f"ranks {_numbers(ranks)}; not compared with a base"
    )
    rows += [
        FieldRow(what, f"{len(group)} tensors", "check", "not compared with a base")
        for what, group in (("saved weights", plan.weights | plan.copies), ("trained biases", plan.biases),
                            ("trained rows", plan.tokens))
        if group
    ]  # fmt: skip
    warnings = (*left_out_warnings(plan), *extra_file_warnings(files.folder, config, sites=None, model=None))
    return AdapterReport((*rows, row), warnings, None, max(ranks, default=0), nbytes, len(plan.a))


def _tables(sites: Sequence[Site]) -> dict[int, Site]:
    return {site.id: site for site in sites if site.kind in ("embed", "head")}


def stored_bytes(parsed: ParsedAdapter) -> int:
    """Bytes of the file's tensors that are served."""
    return sum(info.nbytes for info in parsed.tensors.values())


def _read_tensors(files: AdapterFiles, parsed: ParsedAdapter) -> dict[str, Array]:
    """Tensors by key, finite."""
    infos = parsed.tensors
    tensors = {key: files.tensors.read(key) for key in infos}
    if all(first_non_finite(run) is None for run in files.tensors.runs(infos.values())):
        return tensors
    for key, array in tensors.items():
        if (bad := first_non_finite(array)) is not None:
            count, first = bad
            raise AdapterError(
                f"{key} holds {count} values that are NaN or infinite, the first at {list(first)}: training diverged, "
                "or the file is damaged. Take an earlier checkpoint.",
                param=key,
                count=count,
            )
    return tensors


def _tie_head(parsed: ParsedAdapter, assembly: Assembly, sites: Sequence[Site], base: BaseFacts) -> None:
    """On a tied base, ``ensure_weight_tying`` gives the head the embedding's pair."""
    tables = {pair.parts[0][0].kind: pair for pair in parsed.pairs}
    head = next((site for site in sites if site.kind == "head"), None)
    tied = base.tied and tied_tables(parsed.settings) == "targets"
    if tied and "embed" in tables and head is not None:
        with matching_limit():
            _, scale = Ranks(parsed.settings).of(head.module)
        assembly.tie_head(tables["embed"], head, tables.get("head"), scale)


def _acts_before(parsed: ParsedAdapter) -> AdapterError:
    """The error of an activated LoRA with tensors that PEFT applies to all tokens."""
    keys = [saved.info.name for saved in parsed.saved]
    return AdapterError(
        f"alora_invocation_tokens is set, but PEFT would apply {listed(keys)} to all tokens, not from the invocation "
        "on, so that the base's cache could not be used. Train without modules_to_save, trained biases and tokens.",
        param="alora_invocation_tokens",
        key=keys[0],
    )


def _no_effect(parsed: ParsedAdapter) -> AdapterError:
    """The error of an adapter that changes nothing."""
    scales = bool(parsed.pairs) and all(pair.scale == 0 for pair in parsed.pairs)
    why = "its scale is zero (lora_alpha)" if scales else "its tensors are zero, as before training"
    if not parsed.pairs:
        why = "its tensors equal the base's"
    if parsed.computed:
        why = "with its tensors the results are the base's, as before training"
    key = parsed.pairs[0].b.name if parsed.pairs else next(iter(parsed.tensors), "adapter_model.safetensors")
    return AdapterError(
        f"The adapter changes nothing: {why} ({key}). Its answers would be those of the base.",
        param="lora_alpha" if scales else key,
    )


def _text_rows(files: AdapterFiles) -> Iterator[FieldRow]:
    if names := text_files(files.folder):
        yield FieldRow("texts", names, "serve", "tokenizer and chat template of its requests, compared with the base's")


def _numbers(values: Iterable[float]) -> str:
    every = sorted(set(values))
    return ", ".join(f"{value:g}" for value in every[:8]) + (", …" if len(every) > 8 else "")


def _tensor_rows(parsed: ParsedAdapter) -> Iterator[FieldRow]:
    """One row for the pairs, and one for each kind of tensor that takes the place of the base's."""
    pairs = parsed.pairs
    infos = [info for pair in pairs for info in pair.tensors]
    if pairs:
        dtypes = ", ".join(sorted({info.dtype for info in infos}))
        note = f"ranks {_numbers([p.rank for p in pairs])}; scales {_numbers([p.scale for p in pairs])}; {dtypes}"
        yield FieldRow("tensors", f"{len(pairs)} pairs, {sum(info.nbytes for info in infos)} bytes", "serve", note)
    if parsed.computed:
        own = {info.name: info for item in parsed.computed for info in item.infos}
        nbytes = sum(info.nbytes for info in own.values())
        note = f"{len(parsed.computed)} modules; as LoRA of ranks {_numbers([item.rank for item in parsed.computed])}"
        note = note if parsed.rank else listed(item.module for item in parsed.computed)
        yield FieldRow("tensors", f"{len(own)} tensors, {nbytes} bytes", "serve", note)
    for kind, what in (("weight", "saved weights"), ("bias", "trained biases"), ("rows", "trained rows")):
        saved = {item.info.name: item for item in parsed.saved if item.kind == kind}
        if not saved:
            continue
        nbytes = sum(item.info.nbytes for item in saved.values())
        note = listed(item.module for item in saved.values())
        if copies := sum(item.copy for item in saved.values()):
            note += f"; {copies} may be copies of the base's, which is compared at loading"
        yield FieldRow(what, f"{len(saved)} tensors, {nbytes} bytes", "serve", note)
