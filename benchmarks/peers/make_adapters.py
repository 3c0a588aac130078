"""Write random LoRA adapters as PEFT does, for a model folder: rank 16 on every linear layer of the blocks, bfloat16.

    make_adapters.py MODEL OUT [--count 32] [--rank 16]        a000, a001, ...

A is drawn as PEFT draws it; B is small and not zero, so that each adapter changes the answers. Same seed, same files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
B_STD = 0.02


def shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Module name -> (out, in) of every linear layer of the blocks."""
    found = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in list(file.keys()):
                module = name.removesuffix(".weight")
                if module != name and module.rsplit(".", 1)[-1] in LINEAR:
                    found[module] = tuple(file.get_slice(name).get_shape())
    if not found:
        raise SystemExit(f"no layer of {model} is named like {', '.join(LINEAR)}")
    return found


def write(folder: Path, layers: dict[str, tuple[int, int]], base: str, rank: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in layers.items():
        bound = columns**-0.5  # PEFT: kaiming_uniform_ with a = sqrt(5)
        a = (torch.rand(rank, columns, generator=rng) * 2 - 1) * bound
        b = torch.randn(rows, rank, generator=rng) * B_STD
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.bfloat16()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.bfloat16()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
        "use_dora": False, "inference_mode": True, "init_lora_weights": True, "target_modules": list(LINEAR),
        "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None,
        "layers_pattern": None,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    layers = shapes(args.model)
    for index in range(args.count):
        write(args.out / f"a{index:03d}", layers, args.model.name, args.rank, args.seed * 1_000_003 + index)
    print(f"{args.count} adapters of rank {args.rank} on {len(layers)} layers in {args.out}")


if __name__ == "__main__":
    main()
