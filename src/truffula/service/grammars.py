"""``Grammars``: constraints of requests to grammars for the engine, compiled in a text worker and kept."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from truffula.errors import InvalidRequest
from truffula.items import Constraint, Grammar
from truffula.service.text_sets import TextSet
from truffula.service.workers import WorkerPool
from truffula.text.answers import Answer, compile_answer
from truffula.text.process import Setup, TextWorker, WorkerStopped
from truffula.text.worker import Worker
from truffula.types import MAX_VOCABULARIES, EngineInfo, Vocabulary

COMPILE_SECONDS = 3.0
"""Processor time of compiling one constraint; the engine spends as much on it."""
COMPILE_BYTES = 512 << 20
IDLE_S = 600.0
"""The worker's process ends after this time without a new constraint."""
Special = tuple[tuple[str, int], ...]
"""Text and id of each special token."""
MAX_KEPT, MAX_KEPT_BYTES = 1024, 32 << 20
ERROR_KEPT_S = 60.0
"""How long a refused constraint is refused again without compiling it."""


@dataclass(frozen=True)
class _Kept:
    """A grammar, or why there is none; ``until`` is a time of the clock, ``param`` a field that the error names."""

    grammar: Grammar | None
    error: str
    until: float
    param: str = ""

    @property
    def nbytes(self) -> int:
        return len(self.error) + (0 if self.grammar is None else len(self.grammar.source))


def compile_job(worker: Worker, job: tuple[Constraint | Answer, Special]) -> Iterator[bytes]:
    """In a text worker: llguidance's grammar of a constraint, for a vocabulary with the given special tokens."""
    from truffula.text.grammars import compile_source  # llguidance is not for the server's process

    wanted, special = job
    if isinstance(wanted, Answer):
        yield compile_answer(wanted, special).encode()
    else:
        yield compile_source(wanted, tuple(text for text, _ in special)).encode()


class Grammars:
    """Compiles constraints for a model, whose ``info`` is a service's; the engine gets the vocabulary of a tokenizer
    with its first.

    ``compile`` is for one event loop, ``compile_now`` for any threads instead.

    Both raise ``InvalidRequest`` for the constraint's param. The process that compiles is started with the first
    constraint; it has limits, since llguidance takes long on some grammars and ends its process on others.
    """

    def __init__(
        self,
        info: EngineInfo,
        set_vocabulary: Callable[[Vocabulary], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._info = info
        self._set_vocabulary = set_vocabulary
        self._sent: OrderedDict[str, Special] = OrderedDict()  # of each vocabulary that the engine has
        setup = Setup(
            info=info, texts_path=None, texts_digest="", templates={}, special_tokens={}, memory_bytes=COMPILE_BYTES
        )
        self._pool = WorkerPool([TextWorker(setup)], IDLE_S)
        self._clock = clock
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._running: dict[bytes, asyncio.Task[_Kept]] = {}
        self._lock = threading.Lock()

    async def compile(self, constraint: Constraint | Answer, client: str, texts: TextSet) -> Grammar:
        """The grammar of ``constraint``. Requests for one that is being compiled wait for the same call.

        Also raises ``Overloaded`` and ``ShuttingDown``.
        """
        special = self._sent.get(texts.own_tokenizer)
        if special is None:
            special = await asyncio.get_running_loop().run_in_executor(None, self._need_vocabulary, texts)
        key = _key(constraint, texts)
        kept = self._find(key)
        if kept is None:
            task = self._running.get(key)
            if task is None:
                task = asyncio.create_task(self._compile(key, (constraint, special), client, texts))
                self._running[key] = task
                task.add_done_callback(lambda done: self._ended(key, done))
            kept = await asyncio.shield(task)
        return _grammar(kept, constraint)

    def compile_now(self, constraint: Constraint | Answer, texts: TextSet) -> Grammar:
        """As ``compile``, in the calling thread."""
        special = self._need_vocabulary(texts)
        key = _key(constraint, texts)
        with self._lock:
            kept = self._find(key)
            if kept is None:
                (worker,) = self._pool.workers
                try:
                    parts = worker.call(compile_job, (constraint, special), COMPILE_SECONDS)
                    kept = self._keep(key, parts[0], texts)
                except (InvalidRequest, WorkerStopped) as error:
                    kept = self._keep(key, error, texts)
        return _grammar(kept, constraint)

    def close(self) -> None:
        """End the process; calls that run end with ``ShuttingDown``. Idempotent."""
        self._pool.close()

    def _need_vocabulary(self, texts: TextSet) -> Special:
        """Give the engine the vocabulary, once. Raises ``InvalidRequest`` for a tokenizer that has none."""
        own, tokenizer = texts.own_tokenizer, texts.tokenizer
        with self._lock:
            if own not in self._sent and tokenizer is not None:
                ends = self._info.eos_token_ids if not own else texts.ends.ids
                self._set_vocabulary(msgspec.structs.replace(tokenizer.vocabulary(ends), key=own))
                while len(self._sent) > MAX_VOCABULARIES - 2:  # the engine drops its oldest one first, too
                    del self._sent[next(one for one in self._sent if one)]
                self._sent[own] = tuple(
                    (text, i) for i in sorted(tokenizer.special_ids) if (text := tokenizer.text_of(i))
                )
            return self._sent.get(own, ())

    async def _compile(
        self, key: bytes, job: tuple[Constraint | Answer, Special], client: str, texts: TextSet
    ) -> _Kept:
        try:
            parts = await self._pool.run(compile_job, job, client=client, seconds=COMPILE_SECONDS)
        except (InvalidRequest, WorkerStopped) as error:
            return self._keep(key, error, texts)
        return self._keep(key, parts[0], texts)

    def _ended(self, key: bytes, task: asyncio.Task[_Kept]) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # of a call whose clients have all left, too

    def _find(self, key: bytes) -> _Kept | None:
        kept = self._kept.get(key)
        if kept is None or kept.until < self._clock():
            return None
        self._kept.move_to_end(key)
        return kept

    def _keep(self, key: bytes, found: bytes | InvalidRequest | WorkerStopped, texts: TextSet) -> _Kept:
        """Keeps what compiling gave, in place of what was used least recently."""
        if isinstance(found, bytes):
            own = texts.own_tokenizer
            digest = blake2b(own.encode() + found, digest_size=16).hexdigest()
            kept = _Kept(Grammar(key=digest, source=found.decode(), vocabulary=own), "", float("inf"))
        else:
            message = found.message
            if isinstance(found, WorkerStopped):
                message = f"Compiling this constraint was stopped: {message}. Use a smaller schema or grammar."
            kept = _Kept(None, message, self._clock() + ERROR_KEPT_S, getattr(found, "param", None) or "")
        old = self._kept.pop(key, None)
        self._kept_bytes += kept.nbytes - (0 if old is None else old.nbytes)
        self._kept[key] = kept
        while len(self._kept) > MAX_KEPT or (self._kept_bytes > MAX_KEPT_BYTES and len(self._kept) > 1):
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= dropped.nbytes
        return kept


def _key(constraint: Constraint | Answer, texts: TextSet) -> bytes:
    content = (constraint.kind, constraint.value) if isinstance(constraint, Constraint) else constraint
    # Not msgpack: the parameters of a tool may have integers of any size.
    return blake2b(repr((content, texts.own_tokenizer)).encode(), digest_size=16).digest()


def _grammar(kept: _Kept, constraint: Constraint | Answer) -> Grammar:
    if kept.grammar is None:
        param = kept.param or constraint.param
        raise InvalidRequest(f"{param}: {kept.error}", param=param)
    return kept.grammar
