"""``general.sampling.*`` of a GGUF file: the author's default sampling parameters. Imports no array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def sampling_defaults(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Those that generation_config.json can state too, under its names."""
    found = {}
    for key, name in _NAMES.items():
        value = metadata.get(f"general.sampling.{key}")
        if value is not None:
            # Stored as float32: 0.7 is read as 0.699999988.
            found[name] = float(f"{value:.7g}") if isinstance(value, float) else value
    return found
