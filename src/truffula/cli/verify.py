"""``truffula verify``: compares truffula's logits and tokens with those of transformers (and peft)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from truffula.cli.output import out, progress, table, warn
from truffula.config import EngineConfig
from truffula.environment import prepare_compute
from truffula.errors import AdapterNotFound, TruffulaError
from truffula.lora.foreign import describe_folder

if TYPE_CHECKING:
    from truffula.testing.parity import OpRow
    from truffula.testing.served import ServedReport, ServingReport


class VerifyFailed(TruffulaError):
    """The served model differs from the reference."""

    code = "verify_failed"


def run_verify(config: EngineConfig, adapter: str | None, tokens: int, *, as_json: bool) -> None:
    from truffula.kernels.host import usable_cpus
    from truffula.testing.oracle import require_packages
    from truffula.weights.sources import resolve_source

    require_packages(adapter=adapter is not None)
    if adapter is not None:
        require_adapter(Path(adapter))
    prepare_compute()
    with progress() as report:
        path = resolve_source(
            config.model, cache_dir=config.cache_dir, offline=config.offline, revision=config.revision, progress=report
        )
    require_packages(adapter=adapter is not None, gguf=path.suffix == ".gguf")
    from truffula.testing.served import verify_serving

    result = verify_serving(
        path,
        config,
        threads=config.threads or usable_cpus(),
        adapter=Path(adapter) if adapter else None,
        new_tokens=tokens,
    )
    if as_json:
        served = None if result.served is None else {**asdict(result.served), "ok": result.served.ok}
        out().print_json(data={**asdict(result.values), "served": served, "ok": result.ok})
    else:
        _show(result)
    if not result.values.ok:
        raise VerifyFailed(_reason(result.values.first_divergence), model=result.values.model)
    if result.served is not None and not result.served.ok:
        raise VerifyFailed(_lost(result.served), model=result.values.model)
    if not as_json:
        _conclude(result)


def require_adapter(folder: Path) -> None:
    """Raise ``AdapterNotFound`` when ``folder`` holds no adapter, before the base is compared, which takes a minute."""
    if not folder.is_dir():
        raise AdapterNotFound(f"--adapter is {str(folder)!r}; there is no such folder.", param="adapter")
    if (lacking := describe_folder(folder)) is not None:
        raise AdapterNotFound(f"--adapter is {str(folder)!r}: {lacking[0]}", param="adapter")


def _show(result: ServingReport) -> None:
    values, served = result.values, result.served
    shown = table("", "", title=f"{values.model}{f' with {values.adapter}' if values.adapter else ''}")
    shown.add_row("architecture", values.model_type)
    shown.add_row("tying", values.tying)
    shown.add_row("backend", values.backend)
    shown.add_row("first", f"{values.dtype} on the values, against transformers in {values.dtype}")
    worst = max(row.error for row in values.rows)
    shown.add_row("  ops compared", f"{len(values.rows)}, worst {worst:.1e} of its row (limit {values.tolerance:.0e})")
    shown.add_row("  largest logit difference", f"{values.max_logit_diff:.1e}")
    equal = ("all equal", "") if values.tokens_equal else ("different", "red")
    compared = Text.assemble(f"{values.tokens_compared} compared, ", equal, f", {values.near_ties} near-ties")
    shown.add_row("  greedy tokens", compared)
    if served is None:
        shown.add_row("as served", "in the same arithmetic")
    else:
        at, limit = served.divergence, served.limit
        shown.add_row("as served", f"{served.arithmetic}, against transformers in float32")
        shown.add_row(
            "  KL of its predictions",
            f"{at.kl_mean:.1e} on average (limit {limit.kl_mean:.0e}), at most {at.kl_max:.1e}, of {at.positions} rows",
        )
        shown.add_row("  top-1 equal", f"{at.same_top1:.1%}")
        shown.add_row(
            "  greedy tokens",
            f"{served.tokens_compared} compared, at most {served.worst_below:.2f} nats below transformers' most likely "
            f"(limit {limit.below})",
        )
    out().print(shown)
    for text in values.warnings:
        warn(text)


def _conclude(result: ServingReport) -> None:
    reference = "transformers and peft" if result.values.adapter else "transformers"
    text = f"the same as {reference} in {result.values.dtype}"
    if result.served is not None:
        text += f"; as served ({result.served.arithmetic}) within its limit"
    out().print(Text.assemble(("\nok", "green"), f": {text}"))


def _reason(row: OpRow | None) -> str:
    if row is None:
        return "Every op agrees within tolerance, yet greedy tokens differ. Please report this model."
    where = "outside the layers" if row.layer is None else f"of layer {row.layer}"
    return (
        f"First divergence: op {row.index} {row.op} ({row.kind}) {where}, the {row.side}put of {row.module}: "
        f"relative error {row.error:.1e}. All ops before it agree."
    )


def _lost(served: ServedReport) -> str:
    other = "--exact" if served.formats else "--dtype float32"
    return (
        f"In float32 every op agrees, but as served ({served.arithmetic}, {served.backend}) predictions are too far "
        f"from those of transformers: KL {served.divergence.kl_mean:.1e} on average (limit {served.limit.kl_mean:.0e}),"
        f" a greedy token {served.worst_below:.2f} nats below the most likely (limit {served.limit.below}). Either "
        f"this model needs more precision or a kernel is wrong: serve it with {other}, and please report it."
    )
