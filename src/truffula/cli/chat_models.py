"""The models of ``chat`` and ``generate``: in this process, or of a running server."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from truffula.cli.output import note, progress
from truffula.cli.server_client import ServerClient
from truffula.config import EngineConfig
from truffula.environment import expanded
from truffula.errors import ConfigError, ErrorInfo, TruffulaError
from truffula.params import SamplingParams
from truffula.types import TextDelta

BASE = "base"
Message = Mapping[str, str]
Prompt = str | Sequence[Message]


class ChatModel(Protocol):
    """A base model and its adapters. ``name`` is the base's; an adapter of None means the base."""

    name: str
    has_chat_template: bool

    def adapters(self) -> list[str]:
        """The names of the available adapters."""

    def load(self, name: str, source: str) -> None:
        """Load the adapter at ``source`` as ``name``. Raises ``TruffulaError``."""

    def stream(
        self, prompt: Prompt, adapters: Sequence[str | None], params: SamplingParams
    ) -> Iterator[tuple[int, TextDelta]]:
        """Deltas of one answer per adapter, as (index of the adapter, delta). An error is raised.

        A text is completed; messages are answered with the chat template. Closing the iterator aborts the answers.
        """

    def close(self) -> None: ...


def split_adapter(word: str) -> tuple[str, str | None]:
    """(name, source) of ``name=source`` or of a source, whose last part is its name; (``base``, None) of ``base``.

    Raises ``ConfigError`` for an incomplete pair, and for an adapter with the name ``base``.
    """
    name, equals, source = word.partition("=")
    if word == BASE:
        return BASE, None
    if equals and (not name or not source):
        raise ConfigError(f"--adapter is {word!r}; it must be NAME=FOLDER, a folder, or 'base'.", param="adapter")
    if not equals:
        name, source = word.rstrip("/").rsplit("/", 1)[-1], word
    if name == BASE:
        raise ConfigError(
            f"{word!r} would be named 'base', which means the model without an adapter; write NAME={source}.",
            param="adapter",
        )
    return name, source


class LocalModel:
    """An ``LLM``, loaded with a progress bar."""

    def __init__(self, config: EngineConfig, adapters: Mapping[str, str]) -> None:
        from dataclasses import fields

        from truffula.llm import LLM

        options = {f.name: getattr(config, f.name) for f in fields(config)}
        with progress() as report:
            self._llm = LLM(options.pop("model"), adapters=adapters, progress=report, **options)
        self.name = config.model
        self.has_chat_template = self._llm.has_chat_template
        if text := self._llm.info.int8_note:
            note(text)

    def adapters(self) -> list[str]:
        return self._llm.adapters.names()

    def load(self, name: str, source: str) -> None:
        self._llm.adapters.load(name, source)

    def stream(
        self, prompt: Prompt, adapters: Sequence[str | None], params: SamplingParams
    ) -> Iterator[tuple[int, TextDelta]]:
        return self.stream_each([prompt] * len(adapters), adapters, params)

    def stream_each(
        self, prompts: Sequence[Prompt], adapters: Sequence[str | None], params: SamplingParams
    ) -> Iterator[tuple[int, TextDelta]]:
        """As ``stream``, with one answer per prompt, by the adapter at the same index; all are in one batch."""
        for position, delta in self._llm.stream_each(prompts, params, adapters=list(adapters)):
            if delta.error is not None:
                raise TruffulaError.from_info(delta.error)
            yield position, delta

    def close(self) -> None:
        self._llm.close()


class ServerModel:
    """The model of a running server, and its adapters."""

    has_chat_template = True  # without one, the server answers with an error

    def __init__(self, server: ServerClient) -> None:
        self._server = server
        base = next((row for row in server.models() if not row.get("parent")), None)
        if base is None:
            raise ConfigError(f"The server at {server.url} lists no model.", param="url")
        self.name = str(base["id"])

    def adapters(self) -> list[str]:
        return [str(row["id"]) for row in self._server.models() if row.get("parent")]

    def load(self, name: str, source: str) -> None:
        load_on(self._server, name, source)

    def stream(
        self, prompt: Prompt, adapters: Sequence[str | None], params: SamplingParams
    ) -> Iterator[tuple[int, TextDelta]]:
        if len(adapters) == 1:
            for delta in self._one(prompt, adapters[0], params):
                yield 0, delta
            return
        arrived: queue.SimpleQueue[tuple[int, TextDelta | Exception | None]] = queue.SimpleQueue()

        def follow(position: int, adapter: str | None) -> None:
            try:
                for delta in self._one(prompt, adapter, params):
                    arrived.put((position, delta))
                arrived.put((position, None))
            except Exception as error:  # noqa: BLE001  raised by the reading thread
                arrived.put((position, error))

        for position, adapter in enumerate(adapters):
            threading.Thread(target=follow, args=(position, adapter), daemon=True).start()
        running = len(adapters)
        while running:
            position, found = arrived.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                running -= 1
            else:
                yield position, found

    def _one(self, prompt: Prompt, adapter: str | None, params: SamplingParams) -> Iterator[TextDelta]:
        body: dict[str, Any] = {
            "model": self.name if adapter is None else adapter,
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        body |= {name: value for name in ("max_tokens", "seed") if (value := getattr(params, name)) is not None}
        if params.top_k:
            body["top_k"] = params.top_k
        if isinstance(prompt, str):
            path, body["prompt"] = "/v1/completions", prompt
        else:
            path, body["messages"] = "/v1/chat/completions", [dict(message) for message in prompt]
        for frame in self._server.stream(path, body):
            for choice in frame.get("choices", ()):
                text = choice.get("text") if isinstance(prompt, str) else choice.get("delta", {}).get("content")
                yield TextDelta(text=text or "", finish_reason=choice.get("finish_reason"))

    def close(self) -> None:
        self._server.close()


def load_on(server: ServerClient, name: str, source: str) -> Any:
    """Load an adapter on a server, from its disk; a path that exists on this machine is made absolute."""
    path = expanded(source)
    location = str(path.resolve()) if path.exists() else source
    return administer(server, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": location})


def administer(server: ServerClient, path: str, body: dict[str, Any]) -> Any:
    """Call a route that loads or unloads adapters. Raises the server's error, or that the server lacks these routes."""
    try:
        return server.call("POST", path, body)
    except TruffulaError as error:
        if error.code != "not_found":
            raise
        message = (
            f"The server at {server.url} runs without --adapter-admin; start it with that option to load and unload "
            "adapters while it runs."
        )
        raise TruffulaError.from_info(ErrorInfo(code=error.code, message=message)) from error
