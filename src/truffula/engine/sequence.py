"""Sequence: the scheduler's record of one request. Only the scheduler writes to it."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from truffula.engine.blocks import NEVER, BlockTable
from truffula.engine.constraints import GrammarCompiler, Matcher
from truffula.engine.limits import EngineLimits
from truffula.engine.plan import Chunk, ChunkResult, SequenceState, TopList
from truffula.engine.prefix import BlockKeys, BoundAdapter
from truffula.engine.states import Span
from truffula.errors import AdapterError, DeadlineExceeded, ErrorInfo, GenerationError, QueueTimeout, TruffulaError
from truffula.kernels.inputs import NO_IDS, RELAY, Float32, Int32, SequenceSampling
from truffula.lora.image import AdapterFacts, KvPrefix
from truffula.lora.loads import SourceState, source_state
from truffula.lora.pool import AdapterLease
from truffula.types import AdapterRef, EngineRequest, FinishReason, RequestTimes, TokenEvent

AdapterKey = tuple[SourceState, ...]
"""Identifies the adapters of a request: each a state of a source, whatever names and weights it has. () is the base."""
TurnKey = tuple[str, AdapterKey]
"""Identifies a queue, whose sequences take turns with others: a tenant, and one of its adapters (or several)."""

End = tuple[FinishReason, int | None]
"""How a sequence ended: the reason, and the id that stopped it."""


def adapter_key(ref: AdapterRef | None) -> AdapterKey:
    return () if ref is None else tuple(sorted({source_state(part.ref) for part in ref.acting}, key=repr))


def sources_of(sequence: Sequence) -> dict[SourceState, AdapterRef]:
    """The adapters of its request."""
    ref = sequence.request.adapter
    return {} if ref is None else {source_state(part.ref): part.ref for part in ref.acting}


class Sequence:
    """One stream of tokens: its request, its tokens, how many of them are computed, and its blocks.

    Tokens are only appended. The first ``num_known`` of ``num_tokens`` are known; the others are *pending*: unfinished
    steps draw them, and ``RELAY`` is in their place until ``commit``. The K and V of ``num_computed`` tokens are in
    ``table`` once all planned steps have finished; those of ``num_committed`` are now. Both fall to 0 on preemption. A
    sequence has work while ``num_computed < num_wanted``.

    ``serial`` is its age: smaller is older. It ends with ``length`` at ``max_total`` tokens, prompt and completion.
    ``samples``: it draws tokens (with ``max_tokens`` 0 it only scores). ``seq_slot`` is None unless it runs. With a
    ``grammar`` it has a ``matcher`` from when the grammar is compiled; its next token is planned only when all its
    tokens are known, as the mask of a draw depends on them.
    ``last_step`` is the newest step that was planned with it. All of its adapters act from position ``acts_from`` on.
    ``num_virtual`` of its ``num_prompt`` prompt tokens are virtual ones of its adapter, which clients do not see.
    """

    def __init__(
        self, serial: int, request: EngineRequest, max_total: int, limits: EngineLimits, table: BlockTable
    ) -> None:
        params = request.params
        self.serial = serial
        self.request = request
        self.request_id = request.request_id
        self.adapter_key = adapter_key(request.adapter)
        self.key: TurnKey = (request.tenant, self.adapter_key)
        self.weight = request.weight
        self.max_total = max_total
        self.num_virtual = 0
        self.num_prompt = len(request.prompt_ids)
        self.samples = max_total > self.num_prompt
        # A resumed request has sent the scores of its prompt before its first token: they are not computed again.
        self.scoring = params.prompt_logprobs is not None and not request.resume_ids
        known = request.prompt_ids + request.resume_ids
        self._ids = np.zeros(min(max(max_total, len(known)), len(known) + 64), np.int32)
        self._ids[: len(known)] = known
        self._block_size = limits.block_size
        self.num_tokens = self.num_known = len(known)
        # Nothing follows the last token that it may have, or the last token of a prompt that is only scored.
        self._most_wanted = max_total - 1 if self.samples or self.scoring else 0
        self.num_wanted = min(self.num_tokens, self._most_wanted)
        self.grammar = request.grammar if self.samples else None
        self.matcher: Matcher | None = None

        self.num_computed = 0
        self.num_committed = 0
        self.table = table
        self.loaded_leases: dict[SourceState, AdapterLease] = {}  # of each source, until it ends
        self.adapters: tuple[BoundAdapter, ...] = ()  # once all sources have a lease, in the order of their deltas
        self.leases: tuple[AdapterLease, ...] = ()  # resident, of ``adapters``: while it runs
        self.slots: tuple[tuple[int, float], ...] = ()
        self.seq_slot: int | None = None
        self.last_step = 0
        self.acts_from = 0
        self.prefix: KvPrefix | None = None
        self._restart = True
        self._block_keys: BlockKeys | None = None
        self._rope = limits.rope_regime
        self._rope_length = self._choose_rope_length()
        self.kept_borders: set[int] = set()  # where snapshots of its states stay, see ``StateRows``

        self._stop_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else limits.eos_token_ids)
        self._min_tokens = params.min_tokens
        self._wants_logprobs = params.logprobs is not None
        self._sampling = sampling_of(request, self._stop_ids, limits.base_ids)
        self.scores: list[tuple[float, TopList]] = []
        self._scores_sent = False

        self.arrival = request.arrival
        self.cached_tokens = 0
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.load_s = 0.0
        self.refused_steps = 0

    @property
    def ready(self) -> bool:
        """Whether it does not wait for an adapter."""
        return len(self.loaded_leases) == len(self.adapter_key)

    def bind_adapter(self, source: SourceState, lease: AdapterLease) -> None:
        """Take the lease of one of its sources. With the last one its ``adapters`` are known: in the order of their
        generations, equal ones once, and none whose weight is 0.
        """
        self.loaded_leases[source] = lease
        if not self.ready:
            return
        weights: dict[str, list[float]] = {}
        for part in self.request.adapter.acting if self.request.adapter is not None else ():
            weights.setdefault(self.loaded_leases[source_state(part.ref)].generation, []).append(part.weight)
        sums = [(generation, float(np.float32(math.fsum(each)))) for generation, each in sorted(weights.items())]
        acts_from = {lease.generation: self._acts_from(lease.facts) for lease in self.loaded_leases.values()}
        self.adapters = tuple(BoundAdapter(one, weight, acts_from[one]) for one, weight in sums if weight)
        self.acts_from = max([one.acts_from for one in self.adapters], default=0)

    def _acts_from(self, facts: AdapterFacts) -> int:
        first = facts.acts_from(self.request.prompt_ids)
        return NEVER if first is None else first

    @property
    def acting_leases(self) -> dict[SourceState, AdapterLease]:
        """The loaded leases of its ``adapters``, by source."""
        bound = {one.generation for one in self.adapters}
        return {source: lease for source, lease in self.loaded_leases.items() if lease.generation in bound}

    @property
    def virtual_lease(self) -> AdapterLease | None:
        """The lease of its adapter with virtual tokens; None: it has no such adapter."""
        return next((one for one in self.acting_leases.values() if one.facts.virtual_ids), None)

    def take_vocabulary(self, vocab_size: int) -> None:
        """Draw from the first ``vocab_size`` ids, of which its adapter has rows."""
        self._sampling = sampling_of(self.request, self._stop_ids, vocab_size)

    def take_leases(self, leases: tuple[AdapterLease, ...]) -> None:
        """Set the resident leases of its ``adapters``, or none when it leaves the batch."""
        self.leases = leases
        self.slots = tuple((lease.slot, one.weight) for lease, one in zip(leases, self.adapters, strict=False))

    def prepend(self, lease: AdapterLease, max_total: int) -> None:
        """Begin with the virtual tokens of ``lease``, and end at ``max_total`` tokens. Nothing is computed."""
        ids, self.prefix = lease.facts.virtual_ids, lease.prefix
        self.num_virtual, self.max_total = len(ids), max_total
        self._ids = np.concatenate([np.array(ids, np.int32), self._ids])
        self.num_prompt += len(ids)
        self.num_tokens = self.num_known = self.num_known + len(ids)
        self._most_wanted = max_total - 1 if self.samples or self.scoring else 0
        self._update_wanted()
        self._rope_length = self._choose_rope_length()

    # Tokens

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of the request."""
        return self.num_prompt - self.num_virtual

    @property
    def num_given(self) -> int:
        """Tokens whose keys and values are its adapter's: nothing is computed of them."""
        return 0 if self.prefix is None else self.num_virtual

    @property
    def acting(self) -> tuple[tuple[int, float], ...]:
        """Slots and weights of the adapters that act on its next token."""
        if self.num_computed >= self.acts_from:
            return self.slots
        pairs = zip(self.slots, self.adapters, strict=bool(self.slots))
        return tuple([slot for slot, adapter in pairs if adapter.acts_from <= self.num_computed])

    @property
    def row_order(self) -> tuple[bool, tuple[tuple[int, float], ...], int]:
        """Its place among the chunks of a step."""
        acting = self.acting
        return not acting, acting, self.serial

    @property
    def num_completion(self) -> int:
        """Completion tokens that are known."""
        return self.num_known - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens that are not computed by any planned step."""
        return self.num_wanted - self.num_computed

    def bind_grammar(self, grammars: GrammarCompiler) -> None:
        """Take its matcher, and advance it by the tokens that were resumed. The grammar is compiled."""
        assert self.grammar is not None
        params = self.request.params
        self.matcher = grammars.matcher(
            self.grammar, self._stop_ids, ignore_eos=params.ignore_eos, min_tokens=self._min_tokens
        )
        for token in self.request.resume_ids:
            self.matcher.advance(token)

    @property
    def grammar_error(self) -> TruffulaError | None:
        """Why it cannot continue its grammar."""
        return None if self.matcher is None else self.matcher.error

    def ended_before_start(self) -> End | None:
        """How it ended if nothing is left to compute: it was resumed after its last token, or requested no token."""
        if self.matcher is not None:
            if self.matcher.finished:
                return "stop", self.matcher.stop_id
        elif self.num_completion and self._is_stop(self.request.resume_ids[-1], self.num_completion - 1):
            return "stop", self.request.resume_ids[-1]
        if self.num_wanted == 0 or self.num_tokens >= max(self.max_total, self.num_prompt + 1):
            return "length", None
        return None

    def _is_stop(self, token: int, before: int) -> bool:
        return token in self._stop_ids and before >= self._min_tokens

    # Steps

    def advance(self, count: int, step: int, spans: tuple[Span, ...] = ()) -> Chunk:
        """The chunk of its next ``count`` tokens for ``step``. They count as computed from here on, and a token that
        the step draws is pending. ``spans``: of its state rows.
        """
        assert self.seq_slot is not None
        start, adapters = self.num_computed, self.acting
        stop = self.num_computed = start + count
        self.last_step = step
        draws = self.samples and stop == self.num_tokens
        chunk = Chunk(
            serial=self.serial,
            seq_slot=self.seq_slot,
            restart=self._state() if self._restart else None,
            start=start,
            token_ids=self._ids[start:stop],
            block_tables=self.table.views,
            adapters=adapters,
            targets=self._targets(start, stop) if self.scoring else NO_IDS,
            draws=(stop - self.num_prompt,) if draws else (),
            matcher=self.matcher if draws else None,
            rope_length=self._rope_length,
            spans=spans,
            prefix=self.prefix if start == self.num_given else None,
            prefix_from=min(self.num_given, self.table.num_indexed * self._block_size),
        )
        self._restart = False
        if draws:
            if stop == len(self._ids):
                self._grow_ids()
            self._ids[stop] = RELAY
            self.num_tokens = stop + 1
            self._update_wanted()
        return chunk

    def _update_wanted(self) -> None:
        ready = self.num_tokens if self.matcher is None else self.num_known
        self.num_wanted = min(ready, self._most_wanted)

    def _state(self) -> SequenceState:
        assert self.num_known == self.num_tokens, "a sequence restarts with a token that is not known"
        prompt = self._ids[self.num_virtual : self.num_prompt]
        completion = self._ids[self.num_prompt : self.num_known]
        return SequenceState(prompt, completion, self._sampling)

    def _targets(self, start: int, stop: int) -> Int32:
        first = max(start, self.first_unscored)
        return self._ids[first + 1 : min(stop, self.num_prompt - 1) + 1]

    def _grow_ids(self) -> None:
        grown = np.zeros(min(self.max_total, 2 * len(self._ids)), np.int32)
        grown[: len(self._ids)] = self._ids
        self._ids = grown

    def undo(self, chunk: Chunk) -> None:
        """Undo ``advance`` for ``chunk``, the newest that is planned: its step failed, or its result is discarded."""
        self.num_computed = chunk.start
        self.num_tokens -= len(chunk.draws)
        self._update_wanted()
        self._restart = True

    def commit(self, chunk: Chunk, result: ChunkResult, now: float) -> TokenEvent | None:
        """Record what ``chunk`` computed; returns the event for the client, the final one if the sequence ends."""
        self.num_committed = chunk.start + len(chunk.token_ids)
        if result.scores:
            self.scores += result.scores
        if result.tokens:
            return self._commit_tokens(result, now)
        if self.samples or self.num_committed < self.num_wanted:
            return None
        return self.final_event("length", now, vector=result.vector)

    def _commit_tokens(self, result: ChunkResult, now: float) -> TokenEvent:
        finish: FinishReason | None = None
        stop, count, matcher = None, 0, self.matcher
        for token in result.tokens:
            place = self.num_known
            self._ids[place] = token
            self.num_known = place + 1
            count += 1
            if matcher is not None:
                matcher.advance(token)
                if matcher.finished:
                    finish, stop = "stop", matcher.stop_id
                    break
            elif token in self._stop_ids and self._is_stop(token, place - self.num_prompt):
                finish, stop = "stop", token
                break
            if place + 1 >= self.max_total:
                finish = "length"
                break
        if matcher is not None:
            self._update_wanted()
        times = None
        if finish is not None or self.first_token_at is None:
            # With the first token too: a request that its client ends early (a stop string) ignores the last event.
            self.first_token_at = now if self.first_token_at is None else self.first_token_at
            times = self.times(now)
        tokens, logprobs, tops = result.tokens, result.logprobs, result.tops
        if count < len(tokens):
            tokens, logprobs, tops = tokens[:count], logprobs[:count], tops[:count]
        return TokenEvent(
            request_id=self.request_id,
            token_ids=tokens,
            logprobs=logprobs if self._wants_logprobs else [],
            top_logprobs=tops if self._wants_logprobs else [],
            prompt_logprobs=self._take_scores() if self.scoring else None,
            finish_reason=finish,
            stop_reason=stop,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            times=times,
            generations="" if times is None else "+".join(one.generation for one in self.adapters),
        )

    def reset(self, num_computed: int) -> None:
        """Reset its progress to ``num_computed`` tokens: prefix hits at admission, 0 when it leaves the batch."""
        self.num_computed = self.num_committed = num_computed
        self._restart = True
        if self.needs_other_rope:
            self._rope_length = self._choose_rope_length()
            self._block_keys = None

    # Rotary tables

    def _choose_rope_length(self) -> int:
        return 0 if self._rope is None else self._rope.length(self.num_prompt, self.num_wanted)

    @property
    def needs_other_rope(self) -> bool:
        """Whether it is too long for the rotary tables that its keys were computed with."""
        if self._rope is None:
            return False
        return self._rope.key(self._choose_rope_length()) != self._rope.key(self._rope_length)

    # Rows of logits

    @property
    def first_unscored(self) -> int:
        """Position of the first row that remains to be scored; past the prompt when there is none."""
        return self.num_virtual + len(self.scores) if self.scoring else self.num_prompt

    def rows(self, count: int) -> int:
        """Rows of logits that the next ``count`` tokens need."""
        stop = self.num_computed + count
        rows = int(self.samples and stop == self.num_tokens)
        if self.scoring:
            rows += max(0, min(stop, self.num_prompt - 1) - max(self.num_computed, self.first_unscored))
        return rows

    def fit(self, count: int, rows: int) -> int:
        """The largest part of ``count`` that is one chunk: it needs no more than ``rows`` rows of logits, and ends
        where an adapter begins to act."""
        if self.num_computed < self.acts_from:
            borders = [one.acts_from for one in self.adapters if one.acts_from > self.num_computed]
            count = min(count, min(borders) - self.num_computed)
        while count > 0 and (over := self.rows(count) - rows) > 0:
            count -= over
        return max(count, 0)

    # Prefix cache

    def block_keys(self) -> BlockKeys:
        """The keys of its full blocks of known tokens, up to date. Its adapters must be known."""
        if self._block_keys is None:
            rope = 0 if self._rope is None else self._rope.key(self._rope_length)
            self._block_keys = BlockKeys(self.request.salt, self.adapters, self._block_size, rope)
        if len(self._block_keys) < self.num_known // self._block_size:
            self._block_keys.extend(self._ids[: self.num_known])
        return self._block_keys

    def max_prefix_blocks(self) -> int:
        """Blocks it may take from the prefix cache: it computes at least one token, and all rows yet to be scored."""
        limit = self.num_wanted - 1
        if self.scoring and self.first_unscored < self.num_prompt - 1:
            limit = min(limit, self.first_unscored)
        return max(limit, 0) // self._block_size

    def snapshot_borders(self, count: int) -> list[int]:
        """The block borders in its next ``count`` tokens where snapshots of its states are taken."""
        start, stop = self.num_computed, self.num_computed + count
        newest = stop // self._block_size * self._block_size
        return sorted({border for border in (*self.kept_borders, newest) if start < border <= stop})

    # Events

    def final_event(
        self,
        finish: FinishReason,
        now: float,
        *,
        stop: int | None = None,
        error: ErrorInfo | None = None,
        vector: Float32 | None = None,
    ) -> TokenEvent:
        """The event of an end without a token."""
        return TokenEvent(
            request_id=self.request_id,
            prompt_logprobs=self._take_scores() if finish in ("stop", "length") else None,
            vector=None if vector is None else vector.tolist(),
            finish_reason=finish,
            stop_reason=stop,
            error=error,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            times=self.times(now),
        )

    def timeout_error(self, now: float, *, loading: bool) -> TruffulaError:
        """Why it ends when it is out of time. ``loading``: its adapter was loading."""
        waited = now - self.arrival
        if self.admitted_at is None:
            why = "while its adapter was loading" if loading else "for a free slot in the batch"
            return QueueTimeout(f"Waited {waited:.3f} s {why}.", waited_s=waited, loading=loading)
        return DeadlineExceeded(
            f"The request reached its time limit after {waited:.3f} s with {self.num_completion} completion tokens.",
            elapsed_s=waited,
        )

    def non_finite_error(self) -> TruffulaError:
        """Why it ends when its logits are not finite. The base's are: the cause is its adapter, if any."""
        if self.request.adapter is None:
            return GenerationError("The model computed a NaN or infinite logit.")
        return AdapterError(
            f"With adapter {self.request.adapter.name!r} the model computed a NaN or infinite logit: the adapter's "
            "values are too large for this base.",
            param="adapter",
        )

    def times(self, now: float) -> RequestTimes:
        admitted = now if self.admitted_at is None else self.admitted_at
        return RequestTimes(
            queue_s=max(0.0, admitted - self.arrival),
            load_s=self.load_s,
            ttft_s=0.0 if self.first_token_at is None else max(0.0, self.first_token_at - self.arrival),
            total_s=max(0.0, now - self.arrival),
        )

    def _take_scores(self) -> list[tuple[float, TopList] | None] | None:
        if not self.scoring or self._scores_sent:
            return None
        self._scores_sent = True
        return [None, *self.scores]


def resolve_seed(request: EngineRequest) -> int:
    """The request's seed; without one, a number made from its id, so that a resumed request continues as it began."""
    if request.params.seed is not None:
        return request.params.seed
    digest = hashlib.blake2b(f"{request.request_id}\0{request.choice}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def sampling_of(request: EngineRequest, stop_ids: frozenset[int], vocab_size: int) -> SequenceSampling:
    """The sampling of ``request`` from the first ``vocab_size`` ids: its ``stop_ids`` are banned until it has
    ``min_tokens``."""
    p = request.params
    bias = sorted(p.logit_bias.items())
    banned = sorted(token for token in stop_ids if token < vocab_size) if p.min_tokens else []
    return SequenceSampling(
        width=vocab_size, temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p, typical_p=p.typical_p,
        repetition=p.repetition_penalty, frequency=p.frequency_penalty, presence=p.presence_penalty,
        n_logprobs=-1 if p.logprobs is None else min(p.logprobs, vocab_size),
        n_prompt_logprobs=-1 if p.prompt_logprobs is None else min(p.prompt_logprobs, vocab_size),
        seed=resolve_seed(request), choice=request.choice, warped=p.logprobs_of == "warped",
        bias_ids=np.array([token for token, _ in bias], np.int32),
        bias_values=np.array([value for _, value in bias], np.float32),
        min_tokens=p.min_tokens, banned_ids=np.array(banned, np.int32),
    )  # fmt: skip
