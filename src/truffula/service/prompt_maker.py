"""``PromptMaker``: where a request's prompt is made, so that no request delays the others.

| what | where |
|---|---|
| short texts, short chats with a plain template | on the event loop |
| longer ones, up to ``HEAVY_CHARS`` | in a thread |
| chats with a template that is not plain, texts for adapters with texts of their own | in a light text worker |
| longer texts and chats | in a heavy text worker |
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from truffula.errors import AdapterError, InvalidRequest
from truffula.items import Message, ToolCall
from truffula.service.core import Service
from truffula.service.prompts import Prompt, prompt_job, render_job, unpack_prompt, unpack_rendered
from truffula.service.text_sets import TextSet, parts_of
from truffula.service.workers import TEMPLATE_SECONDS, TextWorkers, template_stopped
from truffula.text.own_texts import Examined, examine
from truffula.text.process import Job, WorkerStopped
from truffula.types import AdapterRef, GenerateRequest, TextSource

T = TypeVar("T")
INLINE_CHARS = 4096
"""Shorter prompts are tokenized on the event loop: a trip to a thread costs as much."""
HEAVY_CHARS = 65_536
"""Longer texts and bodies go to a text worker."""
HEAVY_SECONDS = 20.0
"""Processor time of reading one large request, or an adapter's texts for the first time."""
OWN_SECONDS = 6.0
"""Processor time of a short request with an adapter's own texts, which the worker may have to read again."""


class PromptMaker:
    """Owns ``workers`` (None: this process does their work, without limits) and threads. ``close`` ends both."""

    def __init__(self, core: Service, workers: TextWorkers | None) -> None:
        self.core = core
        self._workers = workers
        self._examining: dict[TextSource, asyncio.Future[TextSet]] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="truffula-text")

    async def of(self, adapter: AdapterRef | None, client: str = "") -> TextSet:
        """What texts of a request for ``adapter`` are made and read with. An adapter's own are read in a text worker
        first. Raises ``AdapterError`` and ``AdapterLoadError`` for files that cannot be used, and ``Overloaded``."""
        sets = self.core.text_sets
        if (known := sets.known(adapter)) is not None:
            return known
        found = []
        for ref in parts_of(adapter):
            one = await self._in_thread(sets.find, ref)
            if isinstance(one, TextSource):
                if (task := self._examining.get(one)) is None:
                    task = self._examining[one] = asyncio.ensure_future(self._make(one, client))
                one = await asyncio.shield(task)
            found.append((ref.name, one))
        return sets.common(found)

    async def _make(self, source: TextSource, client: str) -> TextSet:
        sets = self.core.text_sets
        try:
            examined = None
            if self._workers is not None:
                (packed,) = await self._workers.heavy.run(examine, source, client=client, seconds=HEAVY_SECONDS)
                examined = msgspec.msgpack.decode(packed, type=Examined)
            return await self._in_thread(sets.make, source, examined)
        except AdapterError as error:
            sets.refuse(source, error)
            raise
        except WorkerStopped as error:
            refused = AdapterError(
                f"Reading the adapter's tokenizer was stopped: {error.message}. Remove its tokenizer files, or use "
                "those of its base.", param="tokenizer.json",
            )  # fmt: skip
            sets.refuse(source, refused)
            raise refused from error
        finally:
            del self._examining[source]

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def prompt(self, request: GenerateRequest, texts: TextSet) -> Prompt:
        """The request's prompt. Raises as ``make_prompt``, and ``Overloaded``."""
        if request.prepared is not None:
            if (request.prepared_with and request.prepared_with.digest) != (texts.source and texts.source.digest):
                raise InvalidRequest("The prompt was made for an adapter with another tokenizer.", param="prompt")
            return unpack_prompt(request.prepared)
        size = chars_of(request)
        own = texts.source is not None
        if self._workers is None or (size <= HEAVY_CHARS and not own and self.core.is_plain(request)):
            return await self.in_thread(size, lambda: self.core.prompt(request, texts))
        if size > HEAVY_CHARS or own:
            seconds = HEAVY_SECONDS if size > HEAVY_CHARS else OWN_SECONDS
            (packed,) = await self.in_worker(prompt_job, (request, texts.source), request.salt, seconds)
            return unpack_prompt(packed)
        light = self._workers.light
        try:
            (packed,) = await light.run(render_job, request, client=request.salt, seconds=TEMPLATE_SECONDS)
        except WorkerStopped as error:
            raise template_stopped(error) from error
        text, ignored = unpack_rendered(packed)
        special = bool(request.add_special_tokens)
        rendered = msgspec.structs.replace(request, messages=None, prompt=text, add_special_tokens=special)
        return replace(await self.prompt(rendered, texts), ignored=ignored)

    async def in_worker(self, job: Job, argument: Any, client: str, seconds: float = HEAVY_SECONDS) -> list[bytes]:
        """What ``job`` yields for a large text, or one of an adapter's own tokenizer, within a heavy worker's limits.

        Raises ``InvalidRequest`` when it exceeds them, ``Overloaded`` when too many calls wait.
        """
        assert self._workers is not None
        try:
            return await self._workers.heavy.run(job, argument, client=client, seconds=seconds)
        except WorkerStopped as error:
            raise InvalidRequest(
                f"Reading this request was stopped: {error.message}. Send a shorter text, or ask the operator if the "
                "adapter has a chat template of its own.",
                param="prompt",
            ) from error

    async def in_thread(self, size: int, work: Callable[[], T]) -> T:
        """The result of ``work``, from a thread when ``size`` (characters or tokens) says that it takes long."""
        if size <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def chars_of(request: GenerateRequest) -> int:
    """How much text there is to work on, roughly; what cannot be told at a glance counts as more than a short text."""
    if request.messages is not None:
        if request.chat_template or request.tools or request.documents or request.template_kwargs:
            return INLINE_CHARS + 1
        return sum(map(_chars_of_message, request.messages))
    return len(request.prompt or "") + len(request.suffix)


def _chars_of_message(message: Message) -> int:
    if message.extra or any(isinstance(item, ToolCall) for item in message.items):
        return INLINE_CHARS + 1
    return 64 + sum(len(item.text) for item in message.items if not isinstance(item, ToolCall))
