"""``truffula inspect``: how a model or an adapter would be loaded, from its metadata; with ``--quantize``, the rounding
error of the weights.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.text import Text

from truffula.cli.output import out, progress, table, warn
from truffula.config import OPTIONS
from truffula.environment import expanded
from truffula.errors import CheckpointError, ConfigError, TruffulaError
from truffula.option import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truffula.kernels.program import Site
    from truffula.lora.parsed import BaseFacts
    from truffula.lora.peft import AdapterReport
    from truffula.model.load import ModelPlan
    from truffula.types import EndToken
    from truffula.weights.checkpoint import Checkpoint


def run_inspect(source: str, base: str | None, quantize: str | None, *, as_json: bool) -> None:
    """Print the report. Raises ``ConfigError`` for an invalid ``quantize``, or one for an adapter."""
    if quantize is not None:
        quantize = OPTIONS["quantize"].parse(quantize, "--quantize")
    path = _resolve(source)
    if not _is_adapter(path):
        _model(path, rounded=quantize == "q8_0", as_json=as_json)
    elif quantize is None:
        _adapter(path, base, as_json=as_json)
    else:
        raise ConfigError("--quantize rounds a model's weights; adapters are never rounded.", param="quantize")


def _resolve(source: str) -> Path:
    """The files of a model or an adapter, downloaded if necessary."""
    path = expanded(source)
    if path.exists():
        return path
    from truffula.cli.options import resolve
    from truffula.weights.sources import resolve_source

    config = resolve({}, model=source).engine
    with progress() as report:
        return resolve_source(source, cache_dir=config.cache_dir, offline=config.offline, progress=report)


def _is_adapter(path: Path) -> bool:
    """Whether ``path`` is an adapter, complete or not."""
    from truffula.lora.foreign import meant_as_adapter

    if not path.is_dir() or (path / "config.json").is_file():
        return (path / "adapter_config.json").is_file()
    return meant_as_adapter(path)


def _model(path: Path, *, rounded: bool, as_json: bool) -> None:
    from truffula.kernels.trim import defer_gc
    from truffula.model.load import plan_model
    from truffula.model.read import read_config
    from truffula.text.ends import describe

    # A model of many experts is hundreds of thousands of objects.
    with defer_gc(), contextlib.closing(_open(path)) as checkpoint:
        plan = plan_model(checkpoint)
        if plan.transformers is None:
            uses = read_config(checkpoint.config).key_uses
        else:
            uses = plan.transformers.skeleton.key_uses(checkpoint.config)
        kinds: dict[str, list[int]] = {}
        for info in checkpoint.tensors.values():
            kinds.setdefault(info.dtype, []).append(info.nbytes)
        texts, ends, warnings = _texts(checkpoint.path, plan)
        facts = {**_facts(path, checkpoint, plan), **texts}
        rounding = _rounding(checkpoint, plan) if rounded else None
    if as_json:
        stored = {kind: {"tensors": len(sizes), "bytes": sum(sizes)} for kind, sizes in kinds.items()}
        keys = [{"key": f.key, "value": f.value, "fate": f.use} for f in uses]
        report = {**facts, "end_tokens": [{"id": end.id, "text": end.text, "source": end.source} for end in ends]}
        report |= {"stored": stored, "config": keys, "unused": plan.unused, "warnings": warnings}
        out().print_json(data=report | ({"rounding": rounding} if rounding else {}))
        return
    console = out()
    shown = table("", "", title=str(path))
    for name, value in facts.items():
        label = LABELS.get(name, name.removesuffix("_bytes").replace("_", " "))
        text = f"{value:,}" if name.endswith("parameters") else str(value)
        shown.add_row(label, format_size(value) if name.endswith("_bytes") else text)
    for index, end in enumerate(ends):
        shown.add_row("" if index else "end tokens", describe([end]))
    console.print(shown)
    stored_table = table("stored as", ">tensors", ">bytes", title="\nweights")
    for kind, sizes in sorted(kinds.items()):
        stored_table.add_row(kind, str(len(sizes)), format_size(sum(sizes)))
    console.print(stored_table)
    source = "metadata" if checkpoint.format == "gguf" else "config.json"
    config_table = table("key", "value", "what happens", title=f"\n{source}")
    for use in uses:
        config_table.add_row(use.key, use.value, use.use)
    console.print(config_table)
    if plan.unused:
        more = f" and {len(plan.unused) - 10} more" if len(plan.unused) > 10 else ""
        console.print(f"\ntensors not used when serving: {', '.join(plan.unused[:10])}{more}")
    if rounding is not None:
        _show_rounding(rounding)
    for text in warnings:
        warn(text)


def _open(path: Path) -> Checkpoint:
    """A model, or a config.json without weights, in a folder or by itself."""
    from truffula.model.config_alone import ConfigAlone
    from truffula.weights.folder import holds_weights
    from truffula.weights.open import open_checkpoint

    if path.suffix == ".json":
        return ConfigAlone(path)
    alone = (path / "config.json").is_file() and not holds_weights(path)
    return ConfigAlone(path / "config.json") if alone else open_checkpoint(path)


def _texts(path: Path, plan: ModelPlan) -> tuple[dict[str, str], list[EndToken], list[str]]:
    """Facts about chats, the end tokens, and the warnings about weights and text files."""
    from truffula.service.files import load_texts, without_tokenizer
    from truffula.text.ends import EndTokens
    from truffula.text.tool_formats import detect_format

    texts = load_texts(path)
    sources = texts.tokenizer.chat_templates if texts.tokenizer is not None else {}
    source = sources.get("tool_use", sources.get("default", ""))
    form = detect_format(source, texts.tokenizer.response_template if texts.tokenizer is not None else None)
    ends = EndTokens(
        texts.end_tokens,
        plan.end_tokens,
        tokenizer=texts.tokenizer,
        templates=texts.chat_templates(),
        vocab_size=plan.interface.vocab_size,
    )
    warnings = [*plan.warnings, *without_tokenizer(texts.no_tokenizer), *texts.warnings, *ends.warnings]
    templates = ", ".join(sources) or ("none" if texts.tokenizer is not None else "no tokenizer")
    return {"chat_template": templates, "answers": form.described}, ends.all, warnings


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
        errors = {"error": found.error(names), "worst": worst, "worst_error": found.error([worst])}
        rows[kind] = {"tensors": len(names), **errors}
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
        "served_reason": "  because",
        "layer_kinds": "  with",
        "active_parameters": "  of which a token uses",
        "memory_bytes": "weights in memory (cpu)",
        "memory_formats": "  as",
        "gpu": "on a GPU",
        "tying": "embedding and head",
        "tying_reason": "  because",
        "saved_by_tying_bytes": "  saved by tying",
        "kv_per_token_bytes": "KV cache per token",
        "kv_windows_bytes": "  and per sequence, in layers with a window",
        "state_bytes": "state per sequence",
        "adapter_modules": "  on",
        **{f"weights_of_{part}_bytes": f"  {part}" for part in ("tables", "experts", "attention", "MLPs", "others")},
        "eos_ids": "end token ids",
        "rank_16_adapter_bytes": "adapter of rank 16",
    }
)


def int8_products(plan: ModelPlan) -> str:
    """The weights that the cpu backend multiplies in int8 by default."""
    from truffula.kernels.cpu.formats import INT8_KINDS

    formats = sorted(set(plan.stored_types.values()).intersection(INT8_KINDS))
    return f"matrix products with {', '.join(formats)} weights; --exact computes on their values" if formats else "none"


def gpu_ops(plan: ModelPlan) -> str:
    """How the ops are computed with ``--device cuda``."""
    from truffula.kernels.triton.served import ops_without_kernels

    if plan.native_spec is None:
        return "by torch"
    slow = ops_without_kernels(plan.program)
    return f"with kernels, but for these ops, which torch computes: {slow}" if slow else "with kernels"


def _facts(path: Path, checkpoint: Checkpoint, plan: ModelPlan) -> dict[str, Any]:
    """The facts of the report by JSON key; byte counts end in ``_bytes``."""
    from truffula.model.facts import site_kinds
    from truffula.weights.quantised.config import read_scheme

    size, interface, scheme = plan.size, plan.interface, read_scheme(checkpoint.config)
    # Bytes per token in bfloat16; layers with a window keep that many tokens.
    per_token = {group.window: 2 * sum(plane.width for plane in group.planes) for group in interface.kv_groups}
    windows = {window: nbytes for window, nbytes in per_token.items() if window is not None}
    sites = [site for site in interface.sites if site.kind == "linear"]
    return {
        "architecture": size.model_type,
        "served": plan.implementation.kind,
        "served_reason": plan.implementation.reason,
        "format": checkpoint.format,
        "path": str(path),
        "layers": size.layers,
        **_structure(checkpoint, plan),
        "hidden_size": size.hidden,
        "vocabulary": interface.vocab_size,
        "longest_sequence": plan.max_model_len,
        "stored_dtype": plan.stored_dtype,
        "quantisation": scheme.method if scheme is not None else "none",
        "weights_bytes": plan.stored_bytes,
        **_bytes_by_part(checkpoint, plan),
        **_memory(plan),
        "int8": int8_products(plan),
        "gpu": gpu_ops(plan),
        "tying": plan.tying.tie.name.lower(),
        "tying_reason": plan.tying.reason,
        "saved_by_tying_bytes": plan.saved_bytes,
        "kv_per_token_bytes": per_token.get(None, 0),
        **({"kv_windows_bytes": sum(window * nbytes for window, nbytes in windows.items())} if windows else {}),
        **({"state_bytes": interface.state_bytes(2)} if interface.states else {}),
        "adapter_sites": len(sites),
        "adapter_modules": ", ".join(site_kinds(interface)) or "none",
        "rank_16_adapter_bytes": 2 * 16 * sum(site.in_features + site.out_features for site in sites),
    }


def _structure(checkpoint: Checkpoint, plan: ModelPlan) -> dict[str, Any]:
    """Layers, positions and parameters. What transformers' code does inside a layer is not known."""
    from truffula.model.facts import describe_positions, layer_kinds, parameter_counts
    from truffula.weights.tying import Tie

    if plan.native_spec is None:
        return {"parameters": sum(math.prod(decl.shape) for decl in plan.program.weights)}
    total, active = parameter_counts(plan.native_spec, tied=plan.tying.tie is not Tie.SEPARATE)
    return {
        "layer_kinds": layer_kinds(plan.native_spec),
        "positions": describe_positions(plan.native_spec, checkpoint.config),
        "parameters": total,
        "active_parameters": active,
    }


def _bytes_by_part(checkpoint: Checkpoint, plan: ModelPlan) -> dict[str, int]:
    """The bytes of the weights as stored, by the part of the model, largest first."""
    from truffula.model.facts import part_of_weights

    if plan.native_spec is None:
        return {}
    parts, sizes = part_of_weights(plan.native_spec), Counter[str]()
    for decl in plan.program.weights:
        names = dict.fromkeys(part.name for part in decl.parts)
        sizes[parts[decl.name]] += sum(checkpoint.tensors[name].nbytes for name in names)
    return {f"weights_of_{part}_bytes": nbytes for part, nbytes in sizes.most_common()}


def _memory(plan: ModelPlan) -> dict[str, Any]:
    """The bytes of the weights as the cpu backend would hold them by default, and in which formats."""
    from truffula.kernels.cpu import CpuBackend, available
    from truffula.kernels.cpu.formats import WeightOptions
    from truffula.kernels.cpu.weights import planned_weights
    from truffula.kernels.select import choose_dtype

    if plan.native_spec is None or not available():
        return {}
    dtype = choose_dtype(CpuBackend(1), "auto", plan.stored_dtype).dtype
    formats = Counter[str]()
    for name, nbytes in planned_weights(plan.program, WeightOptions(dtype), plan.stored_types):
        formats[name] += nbytes
    text = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in formats.most_common())
    return {"memory_bytes": formats.total(), "memory_formats": text}


def _adapter(path: Path, base: str | None, *, as_json: bool) -> None:
    from truffula.lora.peft import inspect_adapter

    sites, facts = _base_facts(base) if base else (None, None)
    report = inspect_adapter(path, sites, facts)
    if as_json:
        rows = [{"field": r.field, "value": r.value, "verdict": r.verdict, "note": r.note} for r in report.rows]
        error = {"code": report.error.code, "message": report.error.message} if report.error else None
        sizes = {"rank": report.rank, "bytes": report.nbytes, "modules": report.modules}
        out().print_json(data={**sizes, "fields": rows, "warnings": report.warnings, "error": error})
    else:
        _show_adapter(report, path, base)
    if report.error is not None:
        raise TruffulaError.from_info(report.error)


def _show_adapter(report: AdapterReport, path: Path, base: str | None) -> None:
    """Print how each field is handled; then, for a supported adapter, its size and the checks that were made."""
    shown = table("field", "value", "what happens", "why", title=str(path))
    words = {"refuse": Text("refused", "red"), "serve": Text("served", "green"), "check": Text("checked", "dim")}
    order = list(words)
    for row in sorted((r for r in report.rows if r.verdict in words), key=lambda r: order.index(r.verdict)):
        shown.add_row(row.field, row.value, words[row.verdict], row.note)
    out().print(shown)
    if ignored := [row.field for row in report.rows if row.verdict == "ignore"]:
        out().print(Text.assemble(("\nNo effect when serving: ", "dim"), ", ".join(ignored)))
    if report.error is None:
        against = f"compared with {base}" if base else "not compared with a base (give --base MODEL)"
        modules = f"{report.modules} module{'s' * (report.modules != 1)}"
        out().print(f"\nrank {report.rank}, {modules}, {format_size(report.nbytes)}; {against}")
        checked = "Checked here: names, shapes and dtypes. The values are checked when the adapter is loaded."
        out().print(checked, style="dim")
    for text in report.warnings:
        warn(text)


def _base_facts(base: str) -> tuple[Sequence[Site], BaseFacts]:
    from truffula.lora.base import BaseWeights, base_source
    from truffula.lora.parsed import BaseFacts as Facts
    from truffula.model.load import plan_model
    from truffula.weights.open import open_checkpoint

    path = _resolve(base)
    if _is_adapter(path):
        raise CheckpointError(f"--base {base} is an adapter; name the model it is for.", param="base")
    with contextlib.closing(open_checkpoint(path)) as checkpoint:
        plan = plan_model(checkpoint)
        return plan.interface.sites, Facts(base, BaseWeights(base_source(plan, checkpoint)))
