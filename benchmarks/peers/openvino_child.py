"""OpenVINO GenAI's continuous batching behind the protocol of ``lines.py``: ``openvino_child.py MODEL.gguf``."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from lines import serve_lines

CACHE_GB, MOST_SEQUENCES = 2, 64


def main() -> None:
    begun = time.perf_counter()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_seqs = MOST_SEQUENCES
    scheduler.enable_prefix_caching = False
    pipe = genai.LLMPipeline(sys.argv[1], "CPU", scheduler_config=scheduler)

    def answer(question: dict[str, Any]) -> tuple[int, list[float]]:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = question["max_tokens"]
        config.ignore_eos = True
        config.do_sample = False
        ids = np.array(question["prompts"], dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        done = pipe.generate(inputs, config)
        # Of several prompts it says one mean, which is no single request's time.
        first = [done.perf_metrics.get_ttft().mean / 1000] if len(ids) == 1 else []
        return sum(len(tokens) for tokens in done.tokens), first

    serve_lines(begun, answer)


if __name__ == "__main__":
    main()
