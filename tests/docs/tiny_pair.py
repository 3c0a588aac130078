"""A tiny model with a tokenizer and chat template, and an adapter for it: what the docs' python blocks run on."""

from __future__ import annotations

from pathlib import Path

from live_server import write_model

from truffula.testing.adapters import write_tiny_adapter


def write_tiny_pair(folder: Path) -> tuple[Path, Path]:
    model = write_model(folder / "model")
    return model, write_tiny_adapter(folder / "adapter", model)
