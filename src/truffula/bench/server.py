"""A truffula server of our own to measure, and what its model is asked with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truffula.bench.processes import Server, free_port
from truffula.config import EngineConfig, options_of

if TYPE_CHECKING:
    from truffula.model.load import ModelPlan


def engine_flags(config: EngineConfig) -> list[str]:
    """The command line that gives ``config`` again: only what differs from the defaults."""
    flags = []
    for option in options_of(EngineConfig):
        value = getattr(config, option.field)
        if option.required or value == option.default:
            continue
        if option.kind == "switch":
            flags.append(option.flag if value else f"--no-{option.flag.removeprefix('--')}")
        else:
            flags += [option.flag, str(value)]
    return flags


class OwnServer(Server):
    """``truffula serve`` as a child: starts on entering, stops on leaving. ``url`` answers once ``wait`` returns."""

    def __init__(self, config: EngineConfig, flags: list[str], port: int | None = None) -> None:
        port = port or free_port()
        argv = [sys.executable, "-m", "truffula", "serve", config.model, "--port", str(port)]
        super().__init__("truffula", [*argv, *engine_flags(config), *flags], f"http://127.0.0.1:{port}")


def planned(config: EngineConfig) -> ModelPlan:
    """``config``'s model as it would be loaded; reads no weights."""
    from truffula.model.load import plan_model
    from truffula.weights.open import open_checkpoint
    from truffula.weights.sources import resolve_source

    path = resolve_source(config.model, cache_dir=config.cache_dir, offline=config.offline, revision=config.revision)
    checkpoint = open_checkpoint(path)
    try:
        return plan_model(checkpoint)
    finally:
        checkpoint.close()


def random_adapters(plan: ModelPlan, folder: Path, names: list[str], rank: int) -> Mapping[str, Path]:
    """Write a random all-linear adapter per name for a planned model: bfloat16, alpha 2r, different seeds."""
    from truffula.testing.adapters import write_tiny_adapter

    sites = plan.program.sites
    return {
        name: write_tiny_adapter(
            folder / name, sites, rank=rank, alpha=2 * rank, targets="all-linear", seed=seed, dtype="bfloat16"
        )
        for seed, name in enumerate(names)
    }


def config_fields(config: EngineConfig) -> dict[str, Any]:
    """``config`` as JSON-able values, for a child process."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
