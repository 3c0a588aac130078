"""The methods of PEFT other than LoRA, and activated LoRA: rows of the parity table of adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity import LENGTHS, prompt_ids
from parity_kinds import TARGETS, Kind, Target, move

LINEAR = tuple(family for family in TARGETS if family != "gpt2")  # of the others PEFT's LoHa and LoKr know no layer
NARROW = ("qwen3_5_text", "deepseek_v3")  # with a weight of less rank than the factors of LoKr
FEED_FORWARD = {"gpt2": ["mlp.c_proj"]}
PARTS = ("llama", "qwen2", "gemma3_text", "gpt2")  # without states, latents and experts


@dataclass(frozen=True)
class Method:
    """Makes an adapter with PEFT's class ``config`` and the ``fields`` for a family and its base's configuration."""

    config: str
    fields: Callable[[Target, dict[str, Any]], dict[str, Any]]
    task: str | None = "CAUSAL_LM"
    before_saving: Callable[[Any], None] = lambda adapted: None

    def __call__(self, folder: Path, base: Path, seed: int) -> Path:
        import peft
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, experts_implementation="eager")
        facts = json.loads((base / "config.json").read_text())
        config = getattr(peft, self.config)(task_type=self.task, **self.fields(TARGETS[facts["model_type"]], facts))
        adapted = peft.get_peft_model(model, config)
        move(adapted)
        self.before_saving(adapted)
        adapted.save_pretrained(str(folder))
        return folder


def _drop_ranks(adapted: Any) -> None:
    """What AdaLoRA's allocator leaves: some ranks of a module, none of another."""
    names = [name for name, _ in adapted.base_model.model.named_parameters() if name.endswith("lora_E.default")]
    kept = [[True, False, True, True], [False] * 4]
    adapted.peft_config["default"].rank_pattern = {
        name.removesuffix(".default"): keep for name, keep in zip(names, kept, strict=False)
    }


def _linear(**fields: Any) -> Callable[[Target, dict[str, Any]], dict[str, Any]]:
    return lambda target, facts: {"target_modules": list(target.linear), **fields}


def _ia3(target: Target, facts: dict[str, Any]) -> dict[str, Any]:
    return {"target_modules": list(target.linear), "feedforward_modules": [target.linear[-1]]}


def _invoked(target: Target, facts: dict[str, Any]) -> dict[str, Any]:
    """The invocation is in the middle of the table's first prompt. PEFT fails on kv_b_proj: its x has four axes."""
    called = prompt_ids(0, facts["vocab_size"])[LENGTHS[0] // 2 :][:2]
    targets = [name for name in target.linear if name != "kv_b_proj"]
    return {"target_modules": targets, "r": 3, "lora_alpha": 5, "alora_invocation_tokens": called}


def _seen(target: Target, facts: dict[str, Any]) -> dict[str, Any]:
    """Three tokens of the table's first prompt."""
    return {"token_indices": sorted(set(prompt_ids(0, facts["vocab_size"])))[:3]}


def _virtual(**fields: Any) -> Callable[[Target, dict[str, Any]], dict[str, Any]]:
    return lambda target, facts: {"num_virtual_tokens": 5, **fields}


def _small_blocks(target: Target, facts: dict[str, Any]) -> dict[str, Any]:
    return {"target_modules": list(target.linear[:1]), "r": 2, "alpha": 3, "decompose_both": True}


def _dense(**fields: Any) -> Callable[[Target, dict[str, Any]], dict[str, Any]]:
    """Changed weights, which kv_b_proj of latents cannot have."""
    return lambda target, facts: {
        "target_modules": [name for name in target.linear if name != "kv_b_proj"],
        "alpha": 3, "init_weights": False, **fields,
    }  # fmt: skip


KINDS: list[Kind] = [
    Kind("aLoRA", Method("LoraConfig", _invoked)),
    Kind("AdaLoRA", Method("AdaLoraConfig", _linear(init_r=4, lora_alpha=7, total_step=9))),
    Kind(
        "AdaLoRA, dropped ranks",
        Method("AdaLoraConfig", _linear(init_r=4, lora_alpha=7, total_step=9), before_saving=_drop_ranks),
    ),
    Kind("VeRA", Method("VeraConfig", _linear(r=6))),
    Kind("IA3", Method("IA3Config", _ia3)),
    Kind("LoHa", Method("LoHaConfig", _linear(r=2, alpha=3, init_weights=False)), only=LINEAR),
    Kind("LoHa, above the rank", Method("LoHaConfig", _dense(r=16)), only=LINEAR),
    Kind("LoKr", Method("LoKrConfig", _linear(r=1, alpha=3, init_weights=False)), only=LINEAR),
    Kind("LoKr, both decomposed", Method("LoKrConfig", _small_blocks), only=LINEAR),
    Kind("LoKr, above the rank", Method("LoKrConfig", _dense(r=11, decompose_factor=2)), only=NARROW),
    Kind("trainable tokens method", Method("TrainableTokensConfig", _seen, None)),
    Kind("LN tuning", Method("LNTuningConfig", lambda t, f: {"target_modules": list(t.norms)})),
    Kind("prompt tuning", Method("PromptTuningConfig", _virtual())),
    Kind("prefix tuning", Method("PrefixTuningConfig", _virtual()), only=("llama", "qwen2", "gpt2", "mixtral")),
    Kind("P-tuning", Method("PromptEncoderConfig", _virtual(encoder_hidden_size=12))),
]
