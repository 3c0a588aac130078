"""The protocol of a peer that has no server: a JSON line in, a JSON line out.

First the child says {"ready": true, "load_s": ...}. Then each question {"prompts": [[ids]], "adapters": [name or null],
"max_tokens": n} is answered, greedily and without regard to an end token, by {"wall_s", "output_tokens", "ttft_s"}:
``ttft_s`` has a value per prompt, or is empty where the library does not say.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Answer = Callable[[dict[str, Any]], tuple[int, list[float]]]


def serve_lines(begun: float, answer: Answer) -> None:
    """Answer questions until standard input ends. ``answer`` returns (output tokens, seconds to first tokens)."""
    print(json.dumps({"ready": True, "load_s": time.perf_counter() - begun}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        start = time.perf_counter()
        tokens, ttft = answer(question)
        wall = time.perf_counter() - start
        print(json.dumps({"wall_s": wall, "output_tokens": tokens, "ttft_s": ttft}), flush=True)
