"""Loading a large tied model: a random checkpoint of Qwen2.5-3B's exact configuration loads and answers.

    python benchmarks/big_checkpoint.py [--dir FOLDER] [--keep] [--layers 36] [--rounds 3] [--smoke]

Writes 6.2 GB of random bfloat16 weights (``--smoke``: a few MB), which a process of its own loads, first from the disk
(*cold*: the system has dropped the file's pages), then from the page cache (*warm*), round after round. Printed are

- the rate of loading: the file's bytes by the seconds of the constructor, imports aside; with it how many of the bytes
  came from the disk;
- what to compare it with, measured in the same round: the rate at which one thread reads the file past the cache
  (O_DIRECT), and the rate at which the system hands out new memory, of which the packed weights need their size;
- after eight tokens, the peak of resident memory, mapped file pages included, and what it is of the packed weights.

Linux only.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from truffula.kernels.host import usable_cpus
from truffula.kernels.mapped import HUGE

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 32768, "max_window_layers": 70, "model_type": "qwen2", "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
SMOKE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
SMOKE |= {"eos_token_id": 3, "bos_token_id": 2}

CHILD = """
import json, sys, time
import truffula.engine.build, truffula.engine.inline, truffula.kernels.cpu, truffula.model.load
from truffula import LLM, SamplingParams
def table(path):
    return dict(line.split(":", 1) for line in open(path) if ":" in line)
def kb(key):
    return int(table("/proc/self/status")[key].split()[0]) * 1024
before, read = kb("VmRSS"), int(table("/proc/self/io")["read_bytes"])
begun = time.perf_counter()
llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=2048, max_running=4, offline=True)
seconds, read = time.perf_counter() - begun, int(table("/proc/self/io")["read_bytes"]) - read
out = llm.generate([[11, 12, 13, 14, 15]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0]
print(json.dumps({"seconds": seconds, "disk_bytes": read, "peak": kb("VmHWM"), "before": before,
                  "anonymous": kb("RssAnon"), "mapped": kb("RssFile"), "tokens": len(out.token_ids),
                  "tying": llm.info.tying, "weight_bytes": llm.info.weight_bytes}))
"""
DIRECT_BYTES, NEW_BYTES = 8 << 20, 1 << 30


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
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


def write(folder: Path, config: dict[str, Any]) -> int:
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


def disk_rate(file: Path) -> float:
    """Bytes a second that one thread reads past the page cache; 0 where the file system can't."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return 0.0
    with mmap.mmap(-1, DIRECT_BYTES) as buffer:
        begun, offset = time.perf_counter(), 0
        while count := os.preadv(descriptor, [buffer], offset):
            offset += count
            if count % mmap.PAGESIZE:
                break
    os.close(descriptor)
    return offset / (time.perf_counter() - begun)


def memory_rate(threads: int, nbytes: int) -> float:
    """Bytes a second of new memory, in huge pages, that the threads touch together."""
    with mmap.mmap(-1, nbytes) as memory, ThreadPoolExecutor(threads) as pool:
        memory.madvise(mmap.MADV_HUGEPAGE)
        parts = np.array_split(np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE], threads)
        begun = time.perf_counter()
        list(pool.map(lambda part: part.fill(1), parts))
        seconds = time.perf_counter() - begun
        del parts
    return nbytes / seconds


def load(folder: Path) -> dict[str, Any]:
    child = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True)
    if child.returncode:
        sys.exit(child.stderr)
    seen: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return seen


def drop_pages(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where the checkpoint is written (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="use the files in --dir if they are there, and leave them")
    parser.add_argument("--layers", type=int, default=36, help="fewer make a smaller file: 6 are 1.5 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    config = CONFIG | {"num_hidden_layers": args.layers} | (SMOKE if args.smoke else {})
    runs: dict[str, list[float]] = {name: [] for name in ("disk", "new memory", "cold", "warm")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dir or Path(temporary)
        file = folder / "model.safetensors"
        size = file.stat().st_size if args.keep and file.exists() else write(folder, config)
        for _ in range(1 if args.smoke else args.rounds):
            runs["disk"].append(disk_rate(file))
            runs["new memory"].append(memory_rate(usable_cpus(), min(NEW_BYTES, -(-size // HUGE) * HUGE)))
            drop_pages(file)
            cold, warm = load(folder), load(folder)
            runs["cold"].append(size / cold["seconds"])
            runs["warm"].append(size / warm["seconds"])
    for name, rates in runs.items():
        shown = ", ".join(f"{rate / 1e9:.2f}" for rate in rates)
        print(f"{name:10s} {statistics.median(rates) / 1e9:.2f} GB/s ({shown})")
    shares = [cold / disk for cold, disk in zip(runs["cold"], runs["disk"], strict=True) if disk]
    if shares:
        print(f"cold / disk {statistics.median(shares):.2f}; from the disk came {cold['disk_bytes'] / size:.2f} of it")
    kv = 2 * 2 * config["num_hidden_layers"] * 2 * 128 * 16  # one touched block of bf16 K and V in each layer
    peak = max(cold["peak"], warm["peak"]) - kv
    cold |= {"file_bytes": size, "touched_kv_bytes": kv, "peak_over_file": round(peak / size, 4)}
    cold["peak_over_weights"] = round(peak / cold["weight_bytes"], 4)
    print(json.dumps(cold, indent=2))


if __name__ == "__main__":
    main()
