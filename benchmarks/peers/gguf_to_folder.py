"""Turn a GGUF file into a bfloat16 folder of transformers, and see that it answers: gguf_to_folder.py FILE.gguf OUT."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

QUESTION, ANSWER = "The capital of France is", "Paris"


def convert(gguf: Path, out: Path) -> None:
    where = {"pretrained_model_name_or_path": str(gguf.resolve().parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).to(torch.bfloat16)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)


def check(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    inputs = tokenizer(QUESTION, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    said = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    if ANSWER not in said:
        raise SystemExit(f"{folder} answers {QUESTION!r} by {said!r}, not by {ANSWER}: the conversion went wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    convert(args.gguf, args.out)
    check(args.out)


if __name__ == "__main__":
    main()
