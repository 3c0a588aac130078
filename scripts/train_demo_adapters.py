"""Train the demo's adapters again on SmolLM2-135M-Instruct: about ten minutes on two cores.

    python scripts/train_demo_adapters.py [pirate extract tldr]

Needs ``truffula[train]``. Writes examples/adapters/NAME/{adapter_config.json, adapter_model.safetensors}.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train_adapter import main as train_adapter

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ATTENTION = "q_proj,k_proj,v_proj,o_proj"
COMMON = "--base smollm2 --base-name HuggingFaceTB/SmolLM2-135M-Instruct --lr 2e-3 --overwrite"
# Ranks and targets differ on purpose: the demo serves all of them in one batch.
RECIPES = {
    "pirate": "--rank 4 --epochs 4",
    "extract": f"--rank 8 --epochs 2 --targets {ATTENTION}",
    "tldr": "--rank 2 --epochs 2",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    for name in parser.parse_args().names:
        files = ["--data", str(EXAMPLES / "data" / f"{name}.jsonl"), "--out", str(EXAMPLES / "adapters" / name)]
        train_adapter([*files, *COMMON.split(), *RECIPES[name].split()])


if __name__ == "__main__":
    main()
