"""The kinds of adapter that PEFT saves, each made by PEFT on a tiny base: rows of the parity table of adapters.

``Kind.make(folder, base, seed)`` writes an adapter of the kind for the model folder ``base`` and returns ``folder``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Make = Callable[[Path, Path, int], Path]


@dataclass(frozen=True)
class Target:
    """Names of a family's modules: linear layers for LoRA, the embedding, norms, a linear layer to save."""

    linear: tuple[str, ...]
    embed: str = "embed_tokens"
    norms: tuple[str, ...] = ("post_attention_layernorm", "model.norm")
    saved: str = "layers.1.self_attn.o_proj"
    experts: tuple[str, ...] = ()


TARGETS: Mapping[str, Target] = {
    "llama": Target(("q_proj", "v_proj", "gate_proj", "down_proj")),
    "qwen2": Target(("q_proj", "k_proj", "up_proj", "down_proj")),
    "gemma3_text": Target(("q_proj", "o_proj", "up_proj"), norms=("pre_feedforward_layernorm", "q_norm", "model.norm")),
    "qwen3_5_text": Target(
        ("in_proj_qkv", "in_proj_z", "in_proj_b", "linear_attn.out_proj", "q_proj", "down_proj"),
        saved="layers.0.linear_attn.out_proj",
    ),
    "gpt2": Target(("c_attn", "mlp.c_proj"), "wte", ("ln_1", "ln_f"), "h.1.mlp.c_fc"),
    "mixtral": Target(("q_proj", "o_proj"), experts=("experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight")),
    "deepseek_v3": Target(
        ("q_b_proj", "kv_b_proj", "o_proj"), norms=("kv_a_layernorm", "model.norm"), experts=("experts.down_proj",)
    ),
}


@dataclass(frozen=True)
class Kind:
    """``only``: the families that PEFT makes it for (all). ``tied``: whether it needs a tied base, or one that is not.
    ``biases``: the base must have some. ``tolerance`` of logits: PEFT's own decompositions in float32 are less exact.
    """

    name: str
    make: Make
    only: tuple[str, ...] = tuple(TARGETS)
    tied: bool | None = None
    biases: bool = False
    tolerance: float = 1e-4

    def applies(self, base: Path) -> bool:
        """Whether PEFT makes it for the model in ``base``."""
        config = json.loads((base / "config.json").read_text())
        tied = config.get("tie_word_embeddings", config["model_type"] in ("gpt2", "gemma3_text"))
        has_biases = config["model_type"] in ("gpt2", "qwen2") or bool(config.get("attention_bias"))
        return config["model_type"] in self.only and self.tied in (None, tied) and (has_biases or not self.biases)


@dataclass(frozen=True)
class Lora:
    """Makes a LoRA adapter: the ``fields`` of ``LoraConfig`` for a family, every trainable parameter moved at random.

    ``save``: arguments of ``save_pretrained``. ``noise``: how far parameters move, for their size.
    """

    fields: Callable[[Target], dict[str, Any]]
    save: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.3

    def __call__(self, folder: Path, base: Path, seed: int) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, experts_implementation="eager")
        target = TARGETS[model.config.model_type]
        usual = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", "target_modules": list(target.linear)}
        adapted = get_peft_model(model, LoraConfig(**usual | self.fields(target)))
        move(adapted, self.noise)
        adapted.save_pretrained(str(folder), **self.save)
        return folder


def move(model: Any, noise: float = 0.3) -> None:
    """Move each trainable parameter of a PEFT model at random, matrices for their size and other values a little."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                size = noise / parameter.shape[-1] ** 0.25 if "lora_" in name and parameter.dim() > 1 else 0.1
                parameter += size * torch.randn_like(parameter)


def _pick(**fields: Any) -> Callable[[Target], dict[str, Any]]:
    return lambda target: fields


DENSE = ("llama", "qwen2", "gemma3_text", "qwen3_5_text", "mixtral", "deepseek_v3")
LINEAR = ("llama", "qwen2", "gemma3_text")
BD = {
    "target_modules_bd_a": ["down_proj", "o_proj"],
    "target_modules_bd_b": ["q_proj", "v_proj", "k_proj", "up_proj", "gate_proj"],
    "nblocks": 2,
}
KINDS: list[Kind] = [
    Kind("plain", Lora(_pick())),
    Kind("rsLoRA, patterns", Lora(lambda t: {"use_rslora": True, "rank_pattern": {t.linear[0]: 5}})),
    Kind("DoRA", Lora(_pick(use_dora=True))),
    Kind("DoRA, tables", Lora(lambda t: {"use_dora": True, "target_modules": [*t.linear[:1], t.embed, "lm_head"]})),
    Kind("bias all", Lora(_pick(bias="all")), biases=True),
    Kind("bias lora_only", Lora(_pick(bias="lora_only")), biases=True),
    Kind("lora_bias", Lora(_pick(lora_bias=True))),
    Kind("embedding and head", Lora(lambda t: {"target_modules": [*t.linear[:1], t.embed, "lm_head"]})),
    Kind("saved head", Lora(_pick(modules_to_save=["lm_head"]))),
    Kind("saved embedding", Lora(lambda t: {"modules_to_save": [t.embed]})),
    Kind("saved norms and layer", Lora(lambda t: {"modules_to_save": [*t.norms, t.saved]})),
    Kind("trained tokens", Lora(lambda t: {"trainable_token_indices": [50, 7, 60]})),
    Kind("trained tokens of each", Lora(lambda t: {"trainable_token_indices": {t.embed: [7, 9], "lm_head": [11, 3]}})),
    Kind(
        "tied tokens",
        Lora(lambda t: {"trainable_token_indices": {t.embed: [7, 9], "lm_head": [7, 9]}, "ensure_weight_tying": True}),
        tied=True,
    ),
    Kind(
        "tied embedding",
        Lora(lambda t: {"target_modules": [*t.linear[:1], t.embed], "ensure_weight_tying": True}),
        tied=True,
    ),
    Kind("tied saved table", Lora(lambda t: {"modules_to_save": [t.embed], "ensure_weight_tying": True}), tied=True),
    Kind("experts", Lora(lambda t: {"target_parameters": list(t.experts)}), only=("mixtral", "deepseek_v3")),
    Kind(
        "linear parameters",
        Lora(
            lambda t: {
                "target_modules": list(t.linear[1:]),
                "target_parameters": [f"{t.linear[0]}.weight"],
                "rank_pattern": {f"{t.linear[0]}.weight": 5},
            }
        ),
        only=LINEAR,
    ),
    Kind("copies of tables", Lora(lambda t: {"target_modules": [t.embed, "lm_head"]}, {"save_embedding_layers": True})),
    Kind(
        "tokens and copies",
        Lora(lambda t: {"trainable_token_indices": [50, 7, 60]}, {"save_embedding_layers": True}),
    ),
    Kind("saved and copied", Lora(lambda t: {"modules_to_save": [t.embed]}, {"save_embedding_layers": True})),
    Kind(
        "all at once",
        Lora(
            lambda t: {
                "use_dora": True,
                "bias": "all",
                "modules_to_save": list(t.norms),
                "trainable_token_indices": [3, 4],
            }
        ),
    ),
    Kind("PiSSA", Lora(_pick(init_lora_weights="pissa"), noise=0.05), tolerance=1e-3),
    Kind("OLoRA", Lora(_pick(init_lora_weights="olora"), noise=0.05), only=DENSE, tolerance=1e-3),
    Kind("KaSA", Lora(lambda t: {"kasa_config": _config("KasaConfig")}), only=DENSE, tolerance=1e-3),
    Kind("MiCA", Lora(_pick(init_lora_weights="mica"))),
    Kind("BD-LoRA", Lora(lambda t: {"use_bdlora": _config("BdLoraConfig", **BD), "r": 4}), only=LINEAR),
]


def _config(name: str, **fields: Any) -> Any:
    from peft.tuners.lora import config

    return getattr(config, name)(**fields)
