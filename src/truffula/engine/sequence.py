"""Sequence: the Scheduler's private record of one request. Nobody else writes to it."""

from __future__ import annotations

import numpy as np

from truffula.engine.plan import Chunk, ChunkResult, SequenceState, TopList
from truffula.engine.prefix import PrefixChain, namespace
from truffula.engine.sampling import sampling_of
from truffula.errors import ErrorInfo
from truffula.kernels.inputs import NO_IDS, Int32
from truffula.lora.leases import AdapterLease
from truffula.types import AdapterRef, EngineRequest, FinishReason, RequestTimes, TokenEvent

AdapterKey = tuple[str, str, str | None, str] | None
"""What a queue is for: one state of one adapter's place, whatever names it goes by. None is the base."""


def adapter_key(ref: AdapterRef | None) -> AdapterKey:
    return None if ref is None else (ref.kind, ref.locator, ref.revision, ref.fingerprint)


class Sequence:
    """One stream of tokens: what it asked for, what it has, how much of it is computed, and what it holds.

    ``max_total`` is the number of tokens, prompt and completion, at which it ends with ``length``. ``serial`` is its
    age: smaller is older. Tokens only ever append. ``num_computed`` tokens have their K and V in ``blocks``; it falls
    to 0 on preemption, and everything else follows from ``num_computed < num_wanted``.
    """

    def __init__(
        self, serial: int, request: EngineRequest, *, max_total: int, eos: tuple[int, ...], vocab: int, size: int
    ) -> None:
        params = request.params
        self.serial = serial
        self.request = request
        self.key = adapter_key(request.adapter)
        self.max_total = max_total
        self.num_prompt = len(request.prompt_ids)
        known = request.prompt_ids + request.resume_ids
        self.num_tokens = len(known)
        self._ids = np.zeros(min(max(max_total, len(known)), len(known) + 64), np.int32)
        self._ids[: len(known)] = known
        self._block_size = size

        self.num_computed = 0
        self.blocks: list[int] = []
        self.block_tables: tuple[Int32, ...] = ()
        self.seq_slot: int | None = None
        self.restart = True
        self.num_registered = 0
        self.parent: int | bytes | None = None  # where the next block to index hangs; None: no more are indexed
        self.chain: PrefixChain | None = None
        self.generation: str | None = None
        self.lease: AdapterLease | None = None

        self._stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos))
        self.sampling = sampling_of(request, self._stop_ids, vocab)
        self._min_tokens = params.min_tokens
        self._wants_logprobs = params.logprobs is not None
        # A resumed request showed its prompt's scores before its first token, so they are not made again.
        self.scoring = params.prompt_logprobs is not None and not request.resume_ids
        self.scores: list[tuple[float, TopList]] = []
        self._scores_shown = False

        self.arrival = request.arrival
        self.cached_tokens: int | None = None
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.loading_since: float | None = None
        self.load_s = 0.0
        self.refused_steps = 0

    @property
    def ready(self) -> bool:
        """Whether it waits for no load."""
        return self.key is None or self.generation is not None

    # Tokens

    @property
    def num_completion(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def samples(self) -> bool:
        """Whether it draws tokens at all (``max_tokens`` 0 only scores)."""
        return self.max_total > self.num_prompt

    @property
    def num_wanted(self) -> int:
        """Tokens to compute as things stand: all it has, or, when only scoring, all that have a successor to score."""
        return self.num_tokens if self.samples else (self.num_prompt - 1 if self.scoring else 0)

    @property
    def behind(self) -> int:
        return self.num_wanted - self.num_computed

    @property
    def token_ids(self) -> Int32:
        return self._ids[: self.num_tokens]

    def finished_before_start(self) -> tuple[FinishReason, int | None] | None:
        """How it ended when nothing is left to do: resumed after its last token, or nothing asked."""
        if self.num_completion and self._is_stop(self.request.resume_ids[-1], self.num_completion - 1):
            return "stop", self.request.resume_ids[-1]
        if self.num_wanted == 0 or self.num_tokens >= max(self.max_total, self.num_prompt + 1):
            return "length", None
        return None

    def append(self, token: int) -> tuple[FinishReason, int | None] | None:
        """Take a drawn token; says how the sequence ends with it, or None."""
        if self.num_tokens == len(self._ids):
            grown = min(self.max_total, 2 * len(self._ids))
            self._ids = np.concatenate([self._ids, np.zeros(grown - len(self._ids), np.int32)])
        stops = self._is_stop(token, self.num_completion)
        self._ids[self.num_tokens] = token
        self.num_tokens += 1
        if stops:
            return "stop", token
        return ("length", None) if self.num_tokens >= self.max_total else None

    def _is_stop(self, token: int, before: int) -> bool:
        return token in self._stop_ids and before >= self._min_tokens

    # Rows of logits

    @property
    def first_unscored(self) -> int:
        """Position of the first row still to be scored; past the prompt when there is none."""
        return len(self.scores) if self.scoring else self.num_prompt

    def rows(self, count: int) -> int:
        """Rows of logits that the next ``count`` tokens need."""
        stop = self.num_computed + count
        rows = int(self.samples and stop == self.num_tokens)
        if self.scoring:
            rows += max(0, min(stop, self.num_prompt - 1) - max(self.num_computed, self.first_unscored))
        return rows

    def fit_rows(self, count: int, rows: int) -> int:
        """The largest part of ``count`` that needs no more than ``rows`` rows of logits."""
        while count > 0 and (over := self.rows(count) - rows) > 0:
            count -= over
        return max(count, 0)

    # Blocks

    def set_blocks(self, blocks: list[int]) -> None:
        self.blocks = []
        self.add_blocks(blocks)

    def add_blocks(self, blocks: list[int]) -> None:
        self.blocks += blocks
        self.block_tables = (np.array(self.blocks, np.int32),)

    def swap_block(self, index: int, block: int) -> None:
        """Use ``block``, which holds the same content, from now on."""
        self.blocks[index] = block
        self.block_tables = (np.array(self.blocks, np.int32),)

    def open_chain(self) -> PrefixChain:
        """The keys of its full blocks, up to date. The generation must be known."""
        if self.chain is None:
            self.chain = PrefixChain(namespace(self.generation, self.request.salt), self._block_size)
        if len(self.chain) < self.num_tokens // self._block_size:
            self.chain.extend(self.token_ids)
        return self.chain

    def max_prefix_blocks(self) -> int:
        """Blocks it may take from the prefix cache: at least one token is computed, and every row yet to score is."""
        limit = self.num_wanted - 1
        if self.scoring and self.first_unscored < self.num_prompt - 1:
            limit = min(limit, self.first_unscored)
        return max(limit, 0) // self._block_size

    def chunk(self, count: int) -> Chunk:
        """The next ``count`` tokens as data for the runner."""
        assert self.seq_slot is not None
        start, stop = self.num_computed, self.num_computed + count
        targets, restart = NO_IDS, None
        if self.scoring and self.first_unscored < self.num_prompt - 1:
            targets = self._ids[max(start, self.first_unscored) + 1 : min(stop, self.num_prompt - 1) + 1]
        if self.restart:
            self.restart = False
            completion_ids = self._ids[self.num_prompt : self.num_tokens]
            restart = SequenceState(self._ids[: self.num_prompt], completion_ids, self.sampling)
        return Chunk(
            serial=self.serial,
            seq_slot=self.seq_slot,
            restart=restart,
            start=start,
            token_ids=self._ids[start:stop],
            block_tables=self.block_tables,
            adapter_slot=None if self.lease is None else self.lease.slot,
            targets=targets,
            draws=(self.num_completion,) if self.samples and stop == self.num_tokens else (),
        )

    # Events

    def token_event(self, result: ChunkResult, ends: tuple[FinishReason, int | None] | None, now: float) -> TokenEvent:
        """What ``result`` gives the client. Called once the token is appended."""
        finish, stop = ends or (None, None)
        return TokenEvent(
            request_id=self.request.request_id,
            token_ids=result.tokens,
            logprobs=result.logprobs if self._wants_logprobs else [],
            top_logprobs=result.tops if self._wants_logprobs else [],
            prompt_logprobs=self._take_scores(),
            finish_reason=finish,
            stop_reason=stop,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached_tokens or 0,
            # With the first token too: a request that its client ends early (a stop string) has no use for the last
            # event.
            times=self.times(now) if finish or self.num_completion == 1 else None,
        )

    def final_event(
        self, finish: FinishReason, now: float, *, stop: int | None = None, error: ErrorInfo | None = None
    ) -> TokenEvent:
        """An end without a token."""
        return TokenEvent(
            request_id=self.request.request_id,
            prompt_logprobs=self._take_scores() if finish in ("stop", "length") else None,
            finish_reason=finish,
            stop_reason=stop,
            error=error,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached_tokens or 0,
            times=self.times(now),
        )

    def times(self, now: float) -> RequestTimes:
        admitted = now if self.admitted_at is None else self.admitted_at
        load_s = self.load_s + (now - self.loading_since if self.loading_since is not None else 0.0)
        return RequestTimes(
            queue_s=max(0.0, admitted - self.arrival),
            load_s=max(0.0, load_s),
            ttft_s=0.0 if self.first_token_at is None else max(0.0, self.first_token_at - self.arrival),
            total_s=max(0.0, now - self.arrival),
        )

    def _take_scores(self) -> list[tuple[float, TopList] | None] | None:
        if not self.scoring or self._scores_shown:
            return None
        self._scores_shown = True
        return [None, *self.scores]
