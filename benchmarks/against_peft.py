"""Mixed adapters: truffula's ``LLM.generate`` against PEFT's ``generate`` with ``adapter_names``, alternating in one
process.

    python benchmarks/against_peft.py [--rounds 5] [--smoke]

Both get the same batch: 8 rows, 8 distinct random rank-16 all-linear adapters, 105 random prompt ids, 64 greedy
tokens; the model
is smollm2 in bfloat16 on both sides (``--dtype`` for ours). Prints every round, the medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from truffula import LLM, SamplingParams
from truffula.cli.doctor import cpu_name
from truffula.model.load import plan_model
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.tiny import write_tiny_model
from truffula.weights.open import open_checkpoint
from truffula.weights.sources import resolve_source

Batch = list[list[int]]
Run = Callable[[Batch], int]


def peft_side(model: Path, adapters: dict[str, Path], new_tokens: int) -> Run:
    """PEFT's way to mix adapters in a batch: every row names its own."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GgufConfig

    if model.is_file():
        config = GgufConfig(dequantize=True)
        base = AutoModelForCausalLM.from_pretrained(
            model.parent, gguf_file=model.name, quantization_config=config, dtype=torch.bfloat16
        )
    else:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    names = list(adapters)
    mixed = PeftModel.from_pretrained(base.eval(), adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        mixed.load_adapter(adapters[name], adapter_name=name)
    mixed.eval()

    def run(batch: Batch) -> int:
        ids = torch.tensor(batch)
        with torch.inference_mode():
            out = mixed.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                adapter_names=names,
            )
        return int(out.numel() - ids.numel())

    return run


def our_side(model: Path, adapters: dict[str, Path], new_tokens: int, dtype: str) -> tuple[LLM, Run]:
    llm = LLM(model, adapters=adapters, dtype=dtype, max_running=len(adapters))
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)

    def run(batch: Batch) -> int:
        return sum(len(out.token_ids) for out in llm.generate(batch, params, adapters=list(adapters)))

    return llm, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round")
    args = parser.parse_args()
    rows, prompt_tokens, new_tokens = (2, 9, 4) if args.smoke else (8, 105, 64)
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)
        model = (
            write_tiny_model(where / "model")
            if args.smoke
            else resolve_source("smollm2", cache_dir=None, offline=False)
        )
        plan = plan_model(open_checkpoint(model))
        adapters = {
            f"a{seed}": write_tiny_adapter(
                where / f"a{seed}",
                plan.program.sites,
                rank=16,
                alpha=32,
                targets="all-linear",
                seed=seed,
                dtype="bfloat16",
            )
            for seed in range(rows)
        }
        llm, ours = our_side(model, adapters, new_tokens, args.dtype)
        theirs = peft_side(model, adapters, new_tokens)
        rng = random.Random(0)
        speeds: dict[str, list[float]] = {"truffula": [], "peft": []}
        for number in range(1 if args.smoke else args.rounds + 1):
            batch = [[rng.randrange(3, plan.program.vocab_size - 1) for _ in range(prompt_tokens)] for _ in range(rows)]
            for name, run in (("truffula", ours), ("peft", theirs)):
                begun = time.perf_counter()
                speed = run(batch) / (time.perf_counter() - begun)
                print(f"round {number or 'warm-up'} {name:9} {speed:6.1f} tokens/s", flush=True)
                if number or args.smoke:
                    speeds[name].append(speed)
        llm.close()
    medians = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    cpu, sets = cpu_name()
    ratio = round(medians["truffula"] / medians["peft"], 2)
    print(json.dumps({**medians, "ratio": ratio, "dtype": llm.info.dtype, "cpu": cpu, "isa": sets[:1]}))


if __name__ == "__main__":
    main()
