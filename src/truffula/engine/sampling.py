"""What the sampler must know of one sequence, kept up to date token by token instead of rebuilt each step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from truffula.kernels.inputs import Float32, Int32
from truffula.types import EngineRequest

NO_IDS = np.zeros(0, np.int32)
NO_VALUES = np.zeros(0, np.float32)


def resolve_seed(request: EngineRequest) -> int:
    """The request's seed; without one, a number made from its id, so that a resumed request goes on as it began."""
    if request.params.seed is not None:
        return request.params.seed
    digest = hashlib.blake2b(f"{request.request_id}\0{request.choice}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class SeenTokens:
    """Distinct ids of a sequence in order of first sight, and how often each is in the completion (0: prompt only)."""

    def __init__(self, prompt_ids: Int32, completion_ids: Iterable[int]) -> None:
        distinct = np.unique(prompt_ids)
        self._place = {int(token): place for place, token in enumerate(distinct)}
        self._ids = np.concatenate([distinct.astype(np.int32), np.zeros(64, np.int32)])
        self._counts = np.zeros(len(self._ids), np.int32)
        self._size = len(distinct)
        for token in completion_ids:
            self.add(token)

    def add(self, token: int) -> None:
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = self._size
            self._size += 1
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros(place, np.int32)])
                self._counts = np.concatenate([self._counts, np.zeros(place, np.int32)])
            self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> Int32:
        return self._ids[: self._size]

    @property
    def counts(self) -> Int32:
        return self._counts[: self._size]


class SequenceSampling:
    """Constant columns of a sequence's sampled row, and its sparse ones (seen ids, bias)."""

    def __init__(self, request: EngineRequest, stop_ids: frozenset[int], vocab_size: int) -> None:
        p = request.params
        self.temperature = p.temperature
        self.top_k = p.top_k
        self.top_p = p.top_p
        self.min_p = p.min_p
        self.typical_p = p.typical_p
        self.repetition = p.repetition_penalty
        self.frequency = p.frequency_penalty
        self.presence = p.presence_penalty
        self.seed = resolve_seed(request)
        self.choice = request.choice
        self.warped = int(p.logprobs_of == "warped")
        self.n_logprobs = -1 if p.logprobs is None else min(p.logprobs, vocab_size)
        self.n_prompt_logprobs = -1 if p.prompt_logprobs is None else min(p.prompt_logprobs, vocab_size)
        self._min_tokens = p.min_tokens
        self._penalised = self.repetition != 1.0 or self.frequency != 0.0 or self.presence != 0.0
        self._prompt_ids = request.prompt_ids
        self._seen: SeenTokens | None = None
        self._bias = _csr(p.logit_bias)
        banned = {token: -np.inf for token in stop_ids if token < vocab_size} if p.min_tokens else {}
        self._bias_banned = _csr({**p.logit_bias, **banned})

    def seen(self, completion_ids: Int32) -> tuple[Int32, Int32]:
        """Ids and counts for the penalties; empty when none is on. Built on the first call, then kept by ``add``."""
        if not self._penalised:
            return NO_IDS, NO_IDS
        if self._seen is None:
            self._seen = SeenTokens(np.asarray(self._prompt_ids, np.int32), completion_ids.tolist())
        return self._seen.ids, self._seen.counts

    def add(self, token: int) -> None:
        """``token`` was appended to the completion."""
        if self._seen is not None:
            self._seen.add(token)

    def bias(self, draw: int) -> tuple[Int32, Float32]:
        """Ids and additions for completion token ``draw``: stop ids are banned until ``min_tokens`` are there."""
        return self._bias_banned if draw < self._min_tokens else self._bias


def _csr(bias: dict[int, float]) -> tuple[Int32, Float32]:
    if not bias:
        return NO_IDS, NO_VALUES
    ids = sorted(bias)
    return np.asarray(ids, np.int32), np.asarray([bias[token] for token in ids], np.float32)
