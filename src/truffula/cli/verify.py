"""``truffula verify``: our logits and tokens against transformers' (and peft's)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from truffula.cli.options import resolve
from truffula.cli.output import out, progress, table, warn
from truffula.errors import MissingDependency, TruffulaError


class VerifyFailed(TruffulaError):
    """The model as we serve it differs from the reference."""

    code = "verify_failed"


def run_verify(model: str, adapter: str | None, tokens: int, *, as_json: bool) -> None:
    from truffula.weights.sources import resolve_source

    config = resolve({}, model=model).engine
    with progress() as report:
        path = resolve_source(model, cache_dir=config.cache_dir, offline=config.offline, progress=report)
    try:
        from truffula.testing.parity import verify_model

        result = verify_model(path, adapter=Path(adapter) if adapter else None, new_tokens=tokens)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"verify compares with transformers and peft, and {error.name} is not installed: "
            "pip install 'truffula[torch,hf]' peft",
            param=error.name,
        ) from error
    if as_json:
        out().print_json(json.dumps({**asdict(result), "ok": result.ok}))
    else:
        console = out()
        shown = table("", "", title=f"{result.model}{f' with {result.adapter}' if result.adapter else ''}")
        shown.add_row("architecture", result.model_type)
        shown.add_row("tying", result.tying)
        shown.add_row(
            "ops compared", f"{len(result.rows)}, worst {max(row.error for row in result.rows):.1e} of its row"
        )
        shown.add_row("largest logit difference", f"{result.max_logit_diff:.1e}")
        equal = "all equal" if result.tokens_equal else "[red]different[/]"
        shown.add_row("greedy tokens", f"{result.tokens_compared} compared, {equal}, {result.near_ties} near-ties")
        console.print(shown)
        for text in result.warnings:
            warn(text)
    if not result.ok:
        raise VerifyFailed(_reason(result.first_divergence), model=result.model)
    if not as_json:
        out().print(
            f"\n[green]ok[/]: the same as {'transformers and peft' if adapter else 'transformers'} in {result.dtype}"
        )


def _reason(row: object) -> str:
    from truffula.testing.parity import OpRow

    if not isinstance(row, OpRow):
        return "Every op agrees within tolerance, yet greedy tokens differ. Please report this model."
    where = "outside the layers" if row.layer is None else f"of layer {row.layer}"
    return (
        f"First divergence: op {row.index} {row.op} ({row.kind}) {where}, the {row.side}put of {row.module}: "
        f"relative error {row.error:.1e}. What comes before it agrees."
    )
