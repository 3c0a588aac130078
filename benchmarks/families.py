"""Greedy generation of eight sequences, family by family: truffula against transformers' ``generate``.

    python benchmarks/families.py                        # ten minutes, 1.5 GB
    python benchmarks/families.py llama qwen3_moe        # some of them
    python benchmarks/families.py --smoke                # three tiny shapes

Each model has random bfloat16 weights that transformers saves to a folder; both load that folder, with the same number
of threads. They take turns (A B A B) with prompts that no round repeats. *Tiny* shapes show what a step costs beside
arithmetic, the others have 60 to 200 million parameters. x is the median over the rounds of how many times more tokens
a second truffula makes, the prompts' computation included. Prefix hits are tokens that truffula's cache had: 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

from truffula import LLM, SamplingParams
from truffula.errors import TruffulaError
from truffula.kernels.host import usable_cpus

ROWS, PROMPT = 8, 32
SMOKE = ("llama", "qwen3_5_text", "persimmon")
BASE: Mapping[str, Any] = {
    "vocab_size": 16384, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
TINY: Mapping[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32,
}  # fmt: skip
EXPERTS: Mapping[str, Any] = {"num_experts_per_tok": 4, "moe_intermediate_size": 256}
LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 12, "q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16,
    "v_head_dim": 64, "head_dim": None,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
# What a family needs beside ``BASE``; keys that its class lacks, or None, are left out.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gemma3_text": {"sliding_window": 512},
    "gemma4_text": {
        "global_head_dim": 128, "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": 16384, "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 3,
    },
    "qwen3_5_text": {"linear_num_key_heads": 8, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
                     "linear_value_head_dim": 64, "layer_types": (["linear_attention"] * 3 + [FULL]) * 3},
    "qwen3_moe": {**EXPERTS, "num_experts": 24},
    "glm4_moe_lite": {**EXPERTS, **LATENT, "n_routed_experts": 24, "n_group": 1, "topk_group": 1},
    "gpt_oss": {**EXPERTS, "num_local_experts": 12, "intermediate_size": 384, "sliding_window": 128},
    "lfm2": {"layer_types": ["conv", "conv", FULL] * 4},
    "granitemoehybrid": {
        "num_local_experts": 0, "shared_intermediate_size": 2048, "layer_types": (["mamba"] * 5 + ["attention"]) * 2,
        "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1,
    },
    "nemotron_h": {
        **EXPERTS, "hybrid_override_pattern": "MEM*" * 3, "n_routed_experts": 24, "mamba_num_heads": 24,
        "mamba_head_dim": 64, "n_groups": 2, "ssm_state_size": 64, "moe_shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
    },
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    # What transformers' own code computes: whole batches, and one sequence at a time.
    "exaone": {},
    "persimmon": {},
    "falcon_mamba": {"num_hidden_layers": 12, "state_size": 16},
}  # fmt: skip
TINY_OF: Mapping[str, Mapping[str, Any]] = {
    "gemma4_text": {
        "global_head_dim": 32, "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 256, "layer_types": [SLIDING, FULL] * 2,
    },
    "qwen3_5_text": {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                     "linear_value_head_dim": 16, "layer_types": ["linear_attention"] * 3 + [FULL]},
    "glm4_moe_lite": {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 12,
                      "qk_rope_head_dim": 4, "v_head_dim": 16, "head_dim": None, "n_routed_experts": 8},
    "qwen3_moe": {"num_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 32},
    "lfm2": {"layer_types": ["conv", FULL] * 2},
    "granitemoehybrid": {"shared_intermediate_size": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
                         "layer_types": ["mamba", "mamba", "mamba", "attention"]},
    "nemotron_h": {"hybrid_override_pattern": "MEM*", "n_routed_experts": 8, "mamba_num_heads": 8,
                   "mamba_head_dim": 16, "ssm_state_size": 16, "moe_shared_expert_intermediate_size": 64},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4},
    "falcon_mamba": {"num_hidden_layers": 4},
}  # fmt: skip
Side = Callable[[list[list[int]]], None]


def make(folder: Path, family: str, *, tiny: bool) -> int:
    """Save a random model; returns the number of its parameters."""
    config_class = CONFIG_MAPPING[family]
    given = {**BASE, **FAMILIES[family], **(TINY | TINY_OF.get(family, {}) if tiny else {})}
    known = {*config_class().to_dict(), *config_class.attribute_map, *FAMILIES[family]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_class(**{key: value for key, value in given.items() if key in known and value is not None}),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def theirs(folder: Path, new: int) -> Side:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def run(prompts: list[list[int]]) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        if found.shape != (len(prompts), PROMPT + new):
            raise RuntimeError(f"transformers made {tuple(found.shape)} tokens")

    return run


def ours(llm: LLM, new: int) -> Side:
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)

    def run(prompts: list[list[int]]) -> None:
        found = llm.generate(prompts, params, progress=False)
        if any(len(out.token_ids) != new for out in found):
            raise RuntimeError("truffula stopped early")

    return run


def prompts(vocab: int) -> Iterator[list[list[int]]]:
    """Prompts that differ from their first token on, none of them twice."""
    rng = np.random.default_rng(0)
    while True:
        made = rng.integers(3, vocab, (ROWS, PROMPT))
        made[:, 0] = rng.choice(vocab - 3, ROWS, replace=False) + 3
        yield made.tolist()


def measure(family: str, *, tiny: bool, rounds: int, new: int, threads: int) -> tuple[str, ...]:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = make(folder, family, tiny=tiny)
        with LLM(folder, dtype="bfloat16", max_model_len=256, max_running=ROWS, threads=threads, offline=True) as llm:
            sides = {"ours": ours(llm, new), "theirs": theirs(folder, new)}
            feed = prompts((TINY if tiny else BASE)["vocab_size"])
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            for round_ in range(rounds + 1):
                for side, run in sides.items():
                    batch = next(feed)
                    begun = time.perf_counter()
                    run(batch)
                    if round_:  # the first warms up
                        seconds[side].append(time.perf_counter() - begun)
            stats = llm.stats()
            served = llm.info.implementation
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    rates = [f"{ROWS * new / statistics.median(seconds[side]):.0f}" for side in sides]
    spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
    ratio = f"{statistics.median(ratios):.2f} {spread}"
    return family, served, f"{count / 1e6:.1f}", *rates, ratio, str(stats.prefix_hit_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--smoke", action="store_true", help="some families, tiny shapes, a few tokens")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="compute threads of both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=32, help="tokens of each sequence")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    rounds, new = (1, 2) if options.smoke else (options.rounds, options.new)
    title = f"{ROWS} rows, {PROMPT} + {new} tokens, bfloat16, {options.threads} threads: output tokens/s, median"
    table = Table("family", "served", "shape", "M parameters", "truffula", "transformers", "x (each round)",
                  "prefix hits", title=title)  # fmt: skip
    refused: list[str] = []
    for family in options.families or (SMOKE if options.smoke else FAMILIES):
        for tiny in (True,) if options.smoke else (True, False):
            shape = "tiny" if tiny else ""
            try:
                name, served, *rest = measure(family, tiny=tiny, rounds=rounds, new=new, threads=options.threads)
            except TruffulaError as error:
                refused.append(f"{family} {shape}: {error.message}")
                continue
            table.add_row(name, served, shape, *rest)
    Console(width=120).print(table)
    if refused:
        sys.exit("\n".join(["Not measured:", *refused]))


if __name__ == "__main__":
    main()
