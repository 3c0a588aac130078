"""Converts a request's parameters to the executable's ``SequenceSampling``."""

from __future__ import annotations

import hashlib

import numpy as np

from truffula.kernels.inputs import SequenceSampling
from truffula.types import EngineRequest


def resolve_seed(request: EngineRequest) -> int:
    """The request's seed; without one, a number made from its id, so that a resumed request continues as it began."""
    if request.params.seed is not None:
        return request.params.seed
    digest = hashlib.blake2b(f"{request.request_id}\0{request.choice}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def sampling_of(request: EngineRequest, stop_ids: frozenset[int], vocab_size: int) -> SequenceSampling:
    """The sampling of ``request``: its ``stop_ids`` are banned until it has ``min_tokens``."""
    p = request.params
    bias = sorted(p.logit_bias.items())
    banned = sorted(token for token in stop_ids if token < vocab_size) if p.min_tokens else []
    return SequenceSampling(
        temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p, typical_p=p.typical_p,
        repetition=p.repetition_penalty, frequency=p.frequency_penalty, presence=p.presence_penalty,
        n_logprobs=-1 if p.logprobs is None else min(p.logprobs, vocab_size),
        n_prompt_logprobs=-1 if p.prompt_logprobs is None else min(p.prompt_logprobs, vocab_size),
        seed=resolve_seed(request), choice=request.choice, warped=p.logprobs_of == "warped",
        bias_ids=np.array([token for token, _ in bias], np.int32),
        bias_values=np.array([value for _, value in bias], np.float32),
        min_tokens=p.min_tokens, banned_ids=np.array(banned, np.int32),
    )  # fmt: skip
