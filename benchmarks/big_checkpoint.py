"""Memory of a large tied model: a random checkpoint of Qwen2.5-3B's exact configuration loads and answers.

    python benchmarks/big_checkpoint.py [--dir FOLDER] [--keep] [--smoke]

Writes 6.2 GB of random bfloat16 weights (``--smoke``: a few MB), loads them in a process of its own, generates eight
tokens and
prints the peak resident memory, mapped file pages included, against the file's size and the KV that was touched.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 32768, "max_window_layers": 70, "model_type": "qwen2", "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
SMOKE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
SMOKE |= {"eos_token_id": 3, "bos_token_id": 2}

CHILD = """
import json, sys
from truffula import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=2048, max_running=4, offline=True)
out = llm.generate([[11, 12, 13, 14, 15]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0]
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
kb = lambda key: int(status[key].split()[0]) * 1024
print(json.dumps({"peak": kb("VmHWM"), "anonymous": kb("RssAnon"), "mapped": kb("RssFile"), "tokens":
len(out.token_ids),
                  "tying": llm.info.tying, "weight_bytes": llm.info.weight_bytes}))
"""


def tensors(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the (tied) checkpoint: there is no lm_head.weight."""
    D, F, V = (int(config[key]) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    head = D // int(config["num_attention_heads"])
    K = int(config["num_key_value_heads"]) * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for layer in range(int(config["num_hidden_layers"])):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": (D,), at + "post_attention_layernorm.weight": (D,)}
        shapes |= {at + f"self_attn.{n}_proj.weight": (w, D) for n, w in (("q", D), ("k", K), ("v", K))}
        shapes |= {at + f"self_attn.{n}_proj.bias": (w,) for n, w in (("q", D), ("k", K), ("v", K))}
        shapes |= {at + "self_attn.o_proj.weight": (D, D), at + "mlp.down_proj.weight": (D, F)}
        shapes |= {at + "mlp.gate_proj.weight": (F, D), at + "mlp.up_proj.weight": (F, D)}
    return shapes


def write(folder: Path, config: dict[str, object]) -> int:
    """One safetensors file, written in pieces of a repeated random pattern; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in tensors(config).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = (np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    ones = np.ones(1 << 14, ml_dtypes.bfloat16)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors(config).items():
            left = int(np.prod(shape))
            while left:
                piece = (ones if "norm" in name else noise)[:left]
                file.write(piece.tobytes())
                left -= len(piece)
    return offset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where the checkpoint is written (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="use the files in --dir if they are there, and leave them")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    config = CONFIG | (SMOKE if args.smoke else {})
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dir or Path(temporary)
        file = folder / "model.safetensors"
        size = file.stat().st_size if args.keep and file.exists() else write(folder, config)
        child = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True)
        if child.returncode:
            sys.exit(child.stderr)
        seen = json.loads(child.stdout.splitlines()[-1])
    kv = 2 * 2 * 36 * 2 * 128 * 16  # one touched block of bf16 K and V in each of 36 layers
    seen |= {"file_bytes": size, "touched_kv_bytes": kv, "peak_over_file": round((seen["peak"] - kv) / size, 4)}
    print(json.dumps(seen, indent=2))


if __name__ == "__main__":
    main()
