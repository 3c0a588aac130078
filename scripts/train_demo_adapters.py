"""Train the three demo adapters on SmolLM2-135M-Instruct with peft: about ten minutes on two cores.

    python scripts/train_demo_adapters.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf [pirate extract tldr]

Needs ``pip install truffula[dev]``. ``truffula inspect smollm2`` prints where the .gguf file lies. Writes
examples/adapters/NAME/{adapter_config.json, adapter_model.safetensors}; adapters are stored in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
ROOT = Path(__file__).resolve().parent.parent
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Recipe:
    """Ranks differ on purpose: the demo serves all of them in one batch."""

    rank: int
    targets: list[str]
    epochs: int
    rate: float


RECIPES = {
    "pirate": Recipe(rank=4, targets=ALL, epochs=4, rate=2e-3),
    "extract": Recipe(rank=8, targets=ATTENTION, epochs=2, rate=2e-3),
    "tldr": Recipe(rank=2, targets=ALL, epochs=2, rate=2e-3),
}


def encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> tuple[list[int], list[int]]:
    """Ids and labels; only the answer (and its end) is learned."""
    messages = [{"role": "user", "content": row["prompt"]}]
    head = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(head, add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["answer"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
    return prompt + answer, [-100] * len(prompt) + answer


def batches(rows: list[tuple[list[int], list[int]]], size: int, rng: random.Random) -> Iterator[Batch]:
    """Right-padded batches of rows of similar length, in random order."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]), rng.random()))
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(chunks)
    for chunk in chunks:
        width = max(len(rows[i][0]) for i in chunk)
        ids = torch.tensor([rows[i][0] + [0] * (width - len(rows[i][0])) for i in chunk])
        labels = torch.tensor([rows[i][1] + [-100] * (width - len(rows[i][1])) for i in chunk])
        mask = torch.tensor([[1] * len(rows[i][0]) + [0] * (width - len(rows[i][0])) for i in chunk])
        yield ids, labels, mask


def train(name: str, gguf: Path, seed: int) -> None:
    recipe, rng = RECIPES[name], random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    base = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=recipe.targets,
        task_type="CAUSAL_LM",
        lora_dropout=0.0,
    )
    model = get_peft_model(base, config)
    lines = (ROOT / "examples" / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [encode(tokenizer, json.loads(line)) for line in lines]
    steps = [b for _ in range(recipe.epochs) for b in batches(rows, 8, rng)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=len(steps), pct_start=0.1)
    start, model = time.monotonic(), model.train()
    for number, (ids, labels, mask) in enumerate(steps, 1):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if number % 5 == 0 or number == len(steps):
            print(
                f"{name} step {number}/{len(steps)} loss {loss.item():.3f} {time.monotonic() - start:.0f} s", flush=True
            )
    out = ROOT / "examples" / "adapters" / name
    model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(out)
    file = out / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="the SmolLM2-135M-Instruct .gguf file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("names", nargs="*", default=list(RECIPES))
    args = parser.parse_args()
    for name in args.names:
        train(name, args.gguf.resolve(), args.seed)


if __name__ == "__main__":
    main()
