"""``truffula inspect``: how a model or an adapter would be loaded, from its metadata; with ``--quantize``, the rounding
error of the weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from truffula.cli.output import out, progress, table, warn
from truffula.config import OPTIONS
from truffula.environment import expanded
from truffula.errors import CheckpointError, ConfigError, TruffulaError
from truffula.option import format_size

if TYPE_CHECKING:
    from truffula.lora.peft import AdapterReport
    from truffula.model.load import ModelPlan
    from truffula.types import EndToken
    from truffula.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Source:
    """The files of a model or an adapter, downloaded if necessary."""

    path: Path
    is_adapter: bool


def run_inspect(source: str, base: str | None, quantize: str | None, *, as_json: bool) -> None:
    """Print the report. Raises ``ConfigError`` for an invalid ``quantize``, or one for an adapter."""
    if quantize is not None:
        quantize = OPTIONS["quantize"].parse(quantize, "--quantize")
    found = _resolve(source)
    if found.is_adapter:
        if quantize is not None:
            raise ConfigError("--quantize rounds a model's weights; adapters are never rounded.", param="quantize")
        _adapter(found.path, base, as_json=as_json)
    else:
        _model(found.path, rounded=quantize == "q8_0", as_json=as_json)


def _resolve(source: str) -> Source:
    folder = expanded(source)
    if folder.exists():
        return Source(folder, _is_adapter(folder))
    from truffula.cli.options import resolve
    from truffula.weights.sources import resolve_source

    config = resolve({}, model=source).engine
    with progress() as report:
        path = resolve_source(source, cache_dir=config.cache_dir, offline=config.offline, progress=report)
    return Source(path, _is_adapter(path))


def _is_adapter(path: Path) -> bool:
    """Whether ``path`` is an adapter, complete or not."""
    from truffula.lora.foreign import meant_as_adapter

    if not path.is_dir() or (path / "config.json").is_file():
        return (path / "adapter_config.json").is_file()
    return meant_as_adapter(path)


def _model(path: Path, *, rounded: bool, as_json: bool) -> None:
    from truffula.model.load import plan_model
    from truffula.model.read import read_config
    from truffula.text.ends import describe
    from truffula.weights.open import open_checkpoint

    checkpoint = open_checkpoint(path)
    try:
        plan = plan_model(checkpoint)
        uses = read_config(checkpoint.config).key_uses
        kinds: dict[str, list[int]] = {}
        for info in checkpoint.tensors.values():
            kinds.setdefault(info.dtype, []).append(info.nbytes)
        ends, warnings = _texts(path, plan)
        facts = _facts(path, checkpoint.format, plan)
        rounding = _rounding(checkpoint, plan) if rounded else None
    finally:
        checkpoint.close()
    if as_json:
        stored = {kind: {"tensors": len(sizes), "bytes": sum(sizes)} for kind, sizes in kinds.items()}
        keys = [{"key": f.key, "value": f.value, "fate": f.use} for f in uses]
        report = {**facts, "end_tokens": [{"id": end.id, "text": end.text, "source": end.source} for end in ends]}
        report |= {"stored": stored, "config": keys, "unused": plan.unused, "warnings": warnings}
        out().print_json(json.dumps(report | ({"rounding": rounding} if rounding else {})))
        return
    console = out()
    shown = table("", "", title=str(path))
    for name, value in facts.items():
        label = LABELS.get(name, name.removesuffix("_bytes").replace("_", " "))
        shown.add_row(label, escape(format_size(value) if name.endswith("_bytes") else str(value)))
    for index, end in enumerate(ends):
        shown.add_row("" if index else "end tokens", escape(describe([end])))
    console.print(shown)
    stored_table = table("stored as", ">tensors", ">bytes", title="\nweights")
    for kind, sizes in sorted(kinds.items()):
        stored_table.add_row(kind, str(len(sizes)), format_size(sum(sizes)))
    console.print(stored_table)
    source = "metadata" if checkpoint.format == "gguf" else "config.json"
    config_table = table("key", "value", "what happens", title=f"\n{source}")
    for use in uses:
        config_table.add_row(escape(use.key), escape(use.value), escape(use.use))
    console.print(config_table)
    if plan.unused:
        more = f" and {len(plan.unused) - 10} more" if len(plan.unused) > 10 else ""
        console.print(f"\ntensors not used when serving: {escape(', '.join(plan.unused[:10]))}{more}")
    if rounding is not None:
        _show_rounding(rounding)
    for text in warnings:
        warn(text)


def _texts(path: Path, plan: ModelPlan) -> tuple[list[EndToken], list[str]]:
    """The end tokens, and the warnings about weights and text files."""
    from truffula.service.files import load_texts, without_tokenizer
    from truffula.text.ends import EndTokens

    texts = load_texts(path)
    ends = EndTokens(
        texts.end_tokens,
        plan.end_tokens,
        tokenizer=texts.tokenizer,
        templates=texts.chat_templates(),
        vocab_size=plan.interface.vocab_size,
    )
    return ends.all, [*plan.warnings, *without_tokenizer(texts.no_tokenizer), *texts.warnings, *ends.warnings]


def _rounding(checkpoint: Checkpoint, plan: ModelPlan) -> dict[str, Any]:
    """The rounding error of ``--quantize q8_0``, per linear of a layer (``q``, ``down``) and in all."""
    from truffula.kernels.cpu import CpuBackend
    from truffula.kernels.host import usable_cpus
    from truffula.model.load import WeightReader

    backend = CpuBackend(usable_cpus(), quantize="q8_0")
    with progress() as report:
        pull = WeightReader(checkpoint, plan, progress=report, block_kinds=backend.block_kinds)
        found = backend.rounding(plan.program, pull)
    kinds: dict[str, list[str]] = {}
    for name in found.sums:
        module = name.rpartition(".")[0].rpartition(".")[2].removesuffix("_proj")
        kinds.setdefault("head" if module in ("embed_tokens", "lm_head") else module, []).append(name)
    rows = {}
    for kind, names in [*kinds.items(), *([("all", list(found.sums))] if kinds else [])]:
        worst = found.worst(names)
        rows[kind] = {
            "tensors": len(names),
            "error": found.error(names),
            "worst": worst,
            "worst_error": found.error([worst]),
        }
    matrices = sum(len(decl.parts) for decl in plan.program.weights if len(decl.shape) > 1)
    return {"format": "q8_0", "kinds": rows, "kept": matrices - len(found.sums)}


def _show_rounding(rounding: dict[str, Any]) -> None:
    console = out()
    if not rounding["kinds"]:
        console.print(f"\n--quantize q8_0 would round nothing: all {rounding['kept']} matrices are not rounded")
        return
    shown = table("site", ">tensors", ">relative RMS error", ">worst", "tensor", title="\n--quantize q8_0 would lose")
    for name, row in rounding["kinds"].items():
        shown.add_row(name, str(row["tensors"]), f"{row['error']:.3%}", f"{row['worst_error']:.3%}", row["worst"])
    console.print(shown)
    if rounding["kept"]:
        console.print(f"{rounding['kept']} matrices are not rounded")


# Labels of facts whose JSON key, without "_bytes" and underscores, is not clear enough.
LABELS = MappingProxyType(
    {
        "format": "file format",
        "stored_dtype": "stored as",
        "tying": "embedding and head",
        "tying_reason": "  because",
        "saved_by_tying_bytes": "  saved by tying",
        "kv_per_token_bytes": "KV cache per token",
        "kv_windows_bytes": "  and per sequence, in layers with a window",
        "eos_ids": "end token ids",
        "rank_16_adapter_bytes": "adapter of rank 16",
    }
)


def int8_products(plan: ModelPlan) -> str:
    """The weights that the cpu backend multiplies in int8 by default."""
    from truffula.kernels.cpu.formats import BLOCK_KINDS

    formats = sorted(set(plan.stored_types.values()).intersection(BLOCK_KINDS))
    return f"matrix products with {', '.join(formats)} weights; --exact computes on their values" if formats else "none"


def _facts(path: Path, format_: str, plan: Any) -> dict[str, Any]:
    """The facts of the report by JSON key; byte counts end in ``_bytes``."""
    spec, interface = plan.spec, plan.interface
    # Bytes per token in bfloat16; layers with a window keep that many tokens.
    per_token = {group.window: 2 * sum(plane.width for plane in group.planes) for group in interface.kv_groups}
    windows = {window: nbytes for window, nbytes in per_token.items() if window is not None}
    sites = sum(1 for site in interface.sites if site.kind == "linear")
    return {
        "architecture": spec.model_type,
        "format": format_,
        "path": str(path),
        "layers": len(spec.layers),
        "hidden_size": spec.hidden,
        "vocabulary": interface.vocab_size,
        "longest_sequence": plan.max_model_len,
        "stored_dtype": plan.stored_dtype,
        "weights_bytes": plan.stored_bytes,
        "int8": int8_products(plan),
        "tying": plan.tying.tie.name.lower(),
        "tying_reason": plan.tying.reason,
        "saved_by_tying_bytes": plan.saved_bytes,
        "kv_per_token_bytes": per_token.get(None, 0),
        **({"kv_windows_bytes": sum(window * nbytes for window, nbytes in windows.items())} if windows else {}),
        "adapter_sites": sites,
        "rank_16_adapter_bytes": 2
        * 16
        * sum(s.in_features + s.out_features for s in interface.sites if s.kind == "linear"),
    }


def _adapter(path: Path, base: str | None, *, as_json: bool) -> None:
    from truffula.lora.peft import BaseFacts, inspect_adapter

    sites = _base_sites(base) if base else None
    report = inspect_adapter(path, sites, BaseFacts(base) if base else None)
    if as_json:
        rows = [{"field": r.field, "value": r.value, "verdict": r.verdict, "note": r.note} for r in report.rows]
        error = {"code": report.error.code, "message": report.error.message} if report.error else None
        facts = {"rank": report.rank, "bytes": report.nbytes, "modules": report.modules}
        out().print_json(json.dumps({**facts, "fields": rows, "warnings": report.warnings, "error": error}))
    else:
        _show_adapter(report, path, base)
    if report.error is not None:
        raise TruffulaError.from_info(report.error)


def _show_adapter(report: AdapterReport, path: Path, base: str | None) -> None:
    """Print how each field is handled; then, for a supported adapter, its size and the checks that were made."""
    shown = table("field", "value", "what happens", "why", title=str(path))
    words = {"refuse": "[red]refused[/]", "serve": "[green]served[/]", "check": "[dim]checked[/]"}
    order = list(words)
    for row in sorted((r for r in report.rows if r.verdict in words), key=lambda r: order.index(r.verdict)):
        shown.add_row(row.field, escape(row.value), words[row.verdict], escape(row.note))
    out().print(shown)
    if ignored := [row.field for row in report.rows if row.verdict == "ignore"]:
        out().print(f"\n[dim]No effect when serving:[/] {escape(', '.join(ignored))}")
    if report.error is None:
        against = f"compared with {base}" if base else "not compared with a base (give --base MODEL)"
        modules = f"{report.modules} module{'s' * (report.modules != 1)}"
        out().print(f"\nrank {report.rank}, {modules}, {format_size(report.nbytes)}; {escape(against)}")
        out().print(
            "[dim]Checked here: names, shapes and dtypes. The values are checked when the adapter is loaded.[/]"
        )
    for text in report.warnings:
        warn(text)


def _base_sites(base: str) -> Any:
    from truffula.model.load import plan_model
    from truffula.weights.open import open_checkpoint

    found = _resolve(base)
    if found.is_adapter:
        raise CheckpointError(f"--base {base} is an adapter; name the model it is for.", param="base")
    checkpoint = open_checkpoint(found.path)
    try:
        return plan_model(checkpoint).interface.sites
    finally:
        checkpoint.close()
