"""transformers and PEFT behind the protocol of ``lines.py``: ``hf_peft_child.py MODEL DTYPE [ADAPTER_FOLDER ...]``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from lines import serve_lines
from transformers import AutoModelForCausalLM


def main() -> None:
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).eval()
    folders = [Path(name) for name in sys.argv[3:]]
    if folders:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folders[0]), adapter_name=folders[0].name)
        for folder in folders[1:]:
            model.load_adapter(str(folder), adapter_name=folder.name)
        model.eval()

    def answer(question: dict[str, Any]) -> tuple[int, list[float]]:
        ids = torch.tensor(question["prompts"])
        mixed = {"adapter_names": [name or "__base__" for name in question["adapters"]]} if folders else {}
        count = question["max_tokens"]
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                min_new_tokens=count, max_new_tokens=count, **mixed,
            )  # fmt: skip
        return int(out.numel() - ids.numel()), []

    serve_lines(begun, answer)


if __name__ == "__main__":
    main()
