"""``Grammars``: constraints of requests to grammars for the engine, compiled in a text worker and kept."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from truffula.errors import InvalidRequest
from truffula.items import Constraint, Grammar
from truffula.service.workers import WorkerPool
from truffula.text.process import Setup, TextWorker, WorkerStopped
from truffula.text.tokenizer import Tokenizer
from truffula.text.worker import Worker
from truffula.types import EngineInfo

COMPILE_SECONDS = 3.0
"""Processor time of compiling one constraint; the engine spends as much on it."""
COMPILE_BYTES = 512 << 20
IDLE_S = 600.0
"""The worker's process ends after this time without a new constraint."""
MAX_KEPT, MAX_KEPT_BYTES = 1024, 32 << 20
ERROR_KEPT_S = 60.0
"""How long a refused constraint is refused again without compiling it."""


@dataclass(frozen=True)
class _Kept:
    """A grammar, or why there is none; ``until`` is a time of the clock."""

    grammar: Grammar | None
    error: str
    until: float

    @property
    def nbytes(self) -> int:
        return len(self.error) + (0 if self.grammar is None else len(self.grammar.source))


def compile_job(worker: Worker, job: tuple[Constraint, tuple[str, ...]]) -> Iterator[bytes]:
    """In a text worker: llguidance's grammar of a constraint, for a vocabulary with the given special tokens."""
    from truffula.text.grammars import compile_source  # llguidance is not for the server's process

    yield compile_source(*job).encode()


class Grammars:
    """Compiles constraints for a model. ``compile`` is for one event loop, ``compile_now`` for any threads instead.

    Both raise ``InvalidRequest`` for the constraint's param. The process that compiles is started with the first
    constraint; it has limits, since llguidance takes long on some grammars and ends its process on others.
    """

    def __init__(
        self, info: EngineInfo, tokenizer: Tokenizer | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        special = () if tokenizer is None else tuple(map(tokenizer.text_of, sorted(tokenizer.special_ids)))
        self._special = tuple(text for text in special if text)
        setup = Setup(
            info=info, texts_path=None, texts_digest="", templates={}, special_tokens={}, memory_bytes=COMPILE_BYTES
        )
        self._pool = WorkerPool([TextWorker(setup)], IDLE_S)
        self._clock = clock
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._running: dict[bytes, asyncio.Task[_Kept]] = {}
        self._lock = threading.Lock()

    async def compile(self, constraint: Constraint, client: str) -> Grammar:
        """The grammar of ``constraint``. Requests for one that is being compiled wait for the same call.

        Also raises ``Overloaded`` and ``ShuttingDown``.
        """
        key = _key(constraint)
        kept = self._find(key)
        if kept is None:
            task = self._running.get(key)
            if task is None:
                task = asyncio.create_task(self._compile(key, constraint, client))
                self._running[key] = task
                task.add_done_callback(lambda done: self._ended(key, done))
            kept = await asyncio.shield(task)
        return _grammar(kept, constraint)

    def compile_now(self, constraint: Constraint) -> Grammar:
        """As ``compile``, in the calling thread."""
        key = _key(constraint)
        with self._lock:
            kept = self._find(key)
            if kept is None:
                (worker,) = self._pool.workers
                try:
                    parts = worker.call(compile_job, (constraint, self._special), COMPILE_SECONDS)
                    kept = self._keep(key, parts[0])
                except (InvalidRequest, WorkerStopped) as error:
                    kept = self._keep(key, error)
        return _grammar(kept, constraint)

    def close(self) -> None:
        """End the process; calls that run end with ``ShuttingDown``. Idempotent."""
        self._pool.close()

    async def _compile(self, key: bytes, constraint: Constraint, client: str) -> _Kept:
        job = (constraint, self._special)
        try:
            parts = await self._pool.run(compile_job, job, client=client, seconds=COMPILE_SECONDS)
        except (InvalidRequest, WorkerStopped) as error:
            return self._keep(key, error)
        return self._keep(key, parts[0])

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

    def _keep(self, key: bytes, found: bytes | InvalidRequest | WorkerStopped) -> _Kept:
        """Keeps what compiling gave, in place of what was used least recently."""
        if isinstance(found, bytes):
            digest = blake2b(found, digest_size=16).hexdigest()
            kept = _Kept(Grammar(key=digest, source=found.decode()), "", float("inf"))
        else:
            message = found.message
            if isinstance(found, WorkerStopped):
                message = f"Compiling this constraint was stopped: {message}. Use a smaller schema or grammar."
            kept = _Kept(None, message, self._clock() + ERROR_KEPT_S)
        old = self._kept.pop(key, None)
        self._kept_bytes += kept.nbytes - (0 if old is None else old.nbytes)
        self._kept[key] = kept
        while len(self._kept) > MAX_KEPT or (self._kept_bytes > MAX_KEPT_BYTES and len(self._kept) > 1):
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= dropped.nbytes
        return kept


def _key(constraint: Constraint) -> bytes:
    return blake2b(f"{constraint.kind}\n{constraint.value}".encode(), digest_size=16).digest()


def _grammar(kept: _Kept, constraint: Constraint) -> Grammar:
    if kept.grammar is None:
        raise InvalidRequest(kept.error, param=constraint.param)
    return kept.grammar
