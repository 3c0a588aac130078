"""Modules with any names, wrapped by PEFT itself: what its adapters hold, and how it reads their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truffula.kernels.program import Site

VISION = {
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj": (16, 16),
    "vision_tower.vision_model.encoder.layers.0.self_attn.v_proj": (16, 16),
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1": (16, 16),
    "multi_modal_projector.linear_1": (16, 16),
}


def linears(sites: tuple[Site, ...], root: str, parts: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Module path → (in, out): the layers of ``sites`` (named from ``model.``) below ``root``, and ``parts``."""
    own = {
        root + site.module.removeprefix("model."): (site.in_features, site.out_features)
        for site in sites
        if site.kind == "linear"
    }
    return own | dict(parts)


def save_peft(folder: Path, modules: Mapping[str, tuple[int, int]], **config: Any) -> dict[str, tuple[int, float]]:
    """An adapter of a model with these linear ``modules``, saved by PEFT. Returns what PEFT loads again: module path →
    (rank, scale) of every module that it adapts.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    def build() -> torch.nn.Module:
        model = torch.nn.Module()
        for path, (width, rows) in modules.items():
            *parents, leaf = path.split(".")
            at = model
            for name in parents:
                if not hasattr(at, name):
                    at.add_module(name, torch.nn.Module())
                at = getattr(at, name)
            at.add_module(leaf, torch.nn.Linear(width, rows, bias=False))
        return model

    torch.manual_seed(0)
    asked = LoraConfig(init_lora_weights=False, task_type=None, **config)
    get_peft_model(build(), asked).save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(build(), str(folder))
    found = {}
    for name, module in loaded.base_model.model.named_modules():
        if hasattr(module, "scaling"):
            found[name] = (module.r["default"], float(module.scaling["default"]))
    return found
