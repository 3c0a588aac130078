"""LoRAX's response headers: who answered, how many tokens, how many milliseconds."""

from __future__ import annotations

import time

from starlette.requests import Request

from truffula.server.body import safe_header
from truffula.server.prepare import Read
from truffula.server.state import record_of, state_of


def stream_headers(request: Request, read: Read) -> dict[str, str]:
    """What is known before the first token. Ids are client's words and are made safe."""
    state = state_of(request)
    headers = {
        "x-compute-type": safe_header(state.service.info.device),
        "x-compute-characters": str(read.characters),
        "x-model-id": safe_header(state.model_id),
    }
    if read.adapter is not None:
        headers["x-adapter-id"] = safe_header(read.adapter.name)
        headers["x-adapter-source"] = read.adapter.kind
    return headers


def reply_headers(request: Request, read: Read, completion_tokens: int) -> dict[str, str]:
    """The times, in whole milliseconds, and counts of an answer that has just ended. Nothing divides by zero."""
    record, total_s = record_of(request), time.monotonic() - read.at
    queue, ttft = record.queue_s or 0.0, record.ttft_s or 0.0
    inference = max(0.0, total_s - record.validation_s - queue)
    times = {
        "x-compute-time": total_s,
        "x-total-time": total_s,
        "x-validation-time": record.validation_s,
        "x-queue-time": queue,
        "x-inference-time": inference,
        "x-time-per-token": inference / max(1, completion_tokens),
        "x-time-to-first-token": ttft,
        "x-time-per-output-token": max(0.0, total_s - ttft) / max(1, completion_tokens - 1),
    }
    counts = {
        "x-prompt-tokens": record.prompt_tokens,
        "x-generated-tokens": completion_tokens,
        "x-total-tokens": record.prompt_tokens + completion_tokens,
        "x-skipped-tokens": 0,
    }
    headers = stream_headers(request, read)
    headers |= {name: str(round(seconds * 1000)) for name, seconds in times.items()}
    return headers | {name: str(count) for name, count in counts.items()}
