"""The models of ``chat`` and ``generate``: in this process, or of a running server."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from truffula.cli.options import resolve
from truffula.cli.output import note, progress
from truffula.cli.server_client import ServerClient
from truffula.config import ENGINE_PROCESS, OPTIONS, EngineConfig, options_of
from truffula.errors import ConfigError, TruffulaError
from truffula.items import Text
from truffula.params import SamplingParams
from truffula.types import TextDelta

BASE = "base"
Message = Mapping[str, str]
Prompt = str | Sequence[Message]


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
    """An ``LLM``, loaded with a progress bar. ``name`` is the base's; an adapter of None means the base."""

    def __init__(self, config: EngineConfig, adapters: Mapping[str, str]) -> None:
        from truffula.llm import LLM

        options = {o.field: getattr(config, o.field) for o in options_of(EngineConfig) if o.topic != ENGINE_PROCESS}
        with progress() as report:
            self._llm = LLM(**options, adapters=adapters, progress=report)
        self.name = config.model
        if text := self._llm.info.int8_note:
            note(text)

    def can_chat(self, adapter: str | None) -> bool:
        """Whether there is a chat template for ``adapter``."""
        return self._llm.can_chat(adapter)

    def adapters(self) -> list[str]:
        """The names of the available adapters."""
        return self._llm.adapters.names()

    def load(self, name: str, source: str) -> None:
        """Load the adapter at ``source`` as ``name``. Raises ``TruffulaError``."""
        self._llm.adapters.load(name, source)

    def stream(
        self, prompts: Sequence[Prompt], adapters: Sequence[str | None], params: SamplingParams
    ) -> Iterator[tuple[int, TextDelta]]:
        """Deltas of one answer per prompt, by the adapter at the same index, as (index, delta). An error is raised.

        A text is completed; messages are answered with the chat template. Closing the iterator aborts the answers.
        """
        for position, delta in self._llm.stream_each(prompts, params, adapters=adapters):
            if delta.error is not None:
                raise TruffulaError.from_info(delta.error)
            yield position, delta

    def close(self) -> None:
        self._llm.close()


class ServerModel:
    """The model of a running server, with the methods of ``LocalModel``."""

    def __init__(self, server: ServerClient) -> None:
        self._server = server
        base = next((row for row in server.models() if not row.get("parent")), None)
        if base is None:
            raise ConfigError(f"The server at {server.url} lists no model.", param="url")
        self.name = str(base["id"])

    def can_chat(self, adapter: str | None) -> bool:
        return True  # without a template, the server answers with an error

    def adapters(self) -> list[str]:
        return [str(row["id"]) for row in self._server.models() if row.get("parent")]

    def load(self, name: str, source: str) -> None:
        self._server.load_adapter(name, source)

    def stream(
        self, prompts: Sequence[Prompt], adapters: Sequence[str | None], params: SamplingParams
    ) -> Iterator[tuple[int, TextDelta]]:
        if len(prompts) == 1:
            for delta in self._one(prompts[0], adapters[0], params):
                yield 0, delta
            return
        arrived: queue.SimpleQueue[tuple[int, TextDelta | Exception | None]] = queue.SimpleQueue()

        def follow(position: int) -> None:
            try:
                for delta in self._one(prompts[position], adapters[position], params):
                    arrived.put((position, delta))
                arrived.put((position, None))
            except Exception as error:  # noqa: BLE001  raised by the reading thread
                arrived.put((position, error))

        for position in range(len(prompts)):
            threading.Thread(target=follow, args=(position,), daemon=True).start()
        running = len(prompts)
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
                yield TextDelta(parts=[Text(text)] if text else [], finish_reason=choice.get("finish_reason"))

    def close(self) -> None:
        self._server.close()


ChatModel = LocalModel | ServerModel


@contextlib.contextmanager
def open_chat_model(
    model: str | None, options: dict[str, Any], url: str | None, api_key: str | None, adapters: Sequence[str]
) -> Iterator[tuple[ChatModel, list[str | None]]]:
    """The model of ``chat`` and ``generate``, and the names of ``adapters`` (values of ``--adapter``; None: the base).

    The model is loaded in this process or, with ``url``, a running server's. It is closed on exit. Raises
    ``ConfigError`` for contradictory options, and the errors of opening the model.
    """
    opened: ChatModel
    if url is not None:
        _check_server_options(model, options, adapters)
        opened = ServerModel(ServerClient(url, None, api_key))
        names = [None if word == BASE else word for word in adapters]
    else:
        if api_key is not None:
            raise ConfigError("--api-key is for a running server; add its --url.", param="api_key")
        parsed = [split_adapter(word) for word in adapters]
        sources = {name: source for name, source in parsed if source is not None}
        for name, source in parsed:
            if source is not None and sources[name] != source:
                raise ConfigError(
                    f"--adapter names both {source} and {sources[name]} {name!r}; write NAME=FOLDER for one of them.",
                    param="adapter",
                )
        opened = LocalModel(resolve(options, model=model).engine, sources)
        names = [None if source is None else name for name, source in parsed]
    with contextlib.closing(opened):
        yield opened, names


def _check_server_options(model: str | None, options: dict[str, Any], adapters: Sequence[str]) -> None:
    """Raise ``ConfigError`` for an option that has no effect on a running server."""
    if model is not None:
        raise ConfigError(f"--url names a server that has its own model; leave out {model!r}.", param="model")
    if options:
        flags = ", ".join(OPTIONS[name].flag if name in OPTIONS else f"--{name}" for name in options)
        raise ConfigError(f"{flags} would have no effect on a server that runs already (--url).", param="url")
    for word in adapters:
        if "=" in word:
            raise ConfigError(
                f"--adapter is {word!r}; with --url it is a name that 'truffula adapters list' shows "
                "('truffula adapters load' adds one).",
                param="adapter",
            )
