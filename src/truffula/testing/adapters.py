"""Writes tiny LoRA adapters in PEFT's format, with numpy only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from truffula.kernels.program import Site
from truffula.testing.files import Array, as_dtype, write_safetensors
from truffula.weights.safetensors import SafetensorsFile

PREFIX = "base_model.model."


def linear_modules(base: Path | Sequence[Site]) -> dict[str, tuple[int, int]]:
    """Module path → (in, out) of every linear that adapters may target, in a model folder or a program's sites."""
    if not isinstance(base, Path):
        return {site.module: (site.in_features, site.out_features) for site in base if site.kind == "linear"}
    found: dict[str, tuple[int, int]] = {}
    for path in sorted(base.glob("*.safetensors")):
        file = SafetensorsFile(path)
        for name, info in file.tensors.items():
            if len(info.shape) == 2 and name.endswith(".weight") and re.search(r"\.\d+\.", name):
                found[name.removesuffix(".weight")] = (info.shape[1], info.shape[0])
        file.close()
    return found


def tiny_config(*, rank: int, alpha: float, targets: Sequence[str] | str, **overrides: Any) -> dict[str, Any]:
    """An ``adapter_config.json`` in PEFT's format, changed by ``overrides``."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "r": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "lora_bias": False,
    } | overrides


def tiny_tensors(
    base: Path | Sequence[Site], config: Mapping[str, Any], *, seed: int = 0, dtype: str = "float32"
) -> dict[str, Array]:
    """Random A and B for every module that ``config`` targets, large enough to change a tiny model's answers."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for name, (in_features, out_features) in linear_modules(base).items():
        if not _targeted(config, name):
            continue
        rank = next((r for p, r in config["rank_pattern"].items() if re.match(rf"(.*\.)?({p})$", name)), config["r"])
        # A and B are random; their product is about as large as the weights of a layer.
        size = 0.5 / math.sqrt(math.sqrt(in_features) * max(1, rank))
        for half, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
            tensors[f"{PREFIX}{name}.{half}.weight"] = as_dtype(rng.normal(0, size, shape), dtype)
    return tensors


def _targeted(config: Mapping[str, Any], name: str) -> bool:
    def hit(entries: Any) -> bool:
        if not entries:
            return False
        if isinstance(entries, str):
            return entries.lower() == "all-linear" or re.fullmatch(entries, name) is not None
        return any(name == entry or name.endswith(f".{entry}") for entry in entries)

    layers = config["layers_to_transform"]
    if layers is not None and name not in config["target_modules"]:
        layer = re.search(r"\.(\d+)\.", name)
        if layer is None or int(layer.group(1)) not in ([layers] if isinstance(layers, int) else layers):
            return False
    return hit(config["target_modules"]) and not hit(config["exclude_modules"])


def write_adapter(folder: Path | str, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Path:
    """Write the two files of an adapter without checks, and return ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return folder


def write_tiny_adapter(
    folder: Path | str,
    base: Path | str | Sequence[Site],
    *,
    rank: int = 4,
    alpha: float = 8,
    targets: Sequence[str] | str = ("q_proj", "v_proj"),
    seed: int = 0,
    dtype: str = "float32",
    **overrides: Any,
) -> Path:
    """Write a LoRA adapter for ``base`` (a model folder, or a program's sites) with random A and B, and return
    ``folder``.

    ``targets`` is a list, a regular expression or ``all-linear``; ``overrides`` are fields of ``adapter_config.json``
    (``rank_pattern``, ``use_rslora``, ``layers_to_transform``, …), applied to the tensors as in PEFT. ``dtype`` is
    that of the file. The same arguments write the same bytes.
    """
    where = Path(base) if isinstance(base, str) else base
    config = tiny_config(rank=rank, alpha=alpha, targets=targets, **overrides)
    return write_adapter(folder, config, tiny_tensors(where, config, seed=seed, dtype=dtype))
