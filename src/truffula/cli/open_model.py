"""Opens the model of ``chat`` and ``generate``: MODEL in this process, or that of the server at ``--url``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from truffula.cli.options import resolve
from truffula.config import OPTIONS
from truffula.errors import ConfigError

if TYPE_CHECKING:
    from truffula.cli.chat_models import ChatModel


@contextlib.contextmanager
def open_chat_model(
    model: str | None,
    options: dict[str, Any],
    url: str | None,
    api_key: str | None,
    adapters: Sequence[str],
) -> Iterator[tuple[ChatModel, list[str | None]]]:
    """The model, and the names of ``adapters`` (values of ``--adapter``), None for the base. Closes the model on exit.

    Raises ``ConfigError`` for contradictory options, and the errors of opening the model.
    """
    from truffula.cli.chat_models import BASE, LocalModel, ServerModel, split_adapter

    opened: ChatModel
    if url is None:
        if api_key is not None:
            raise ConfigError("--api-key is for a running server; add its --url.", param="api_key")
        parsed = [split_adapter(word) for word in adapters]
        named = {name: source for name, source in parsed if source is not None}
        for name, source in parsed:
            if source is not None and named[name] != source:
                raise ConfigError(
                    f"--adapter names both {source} and {named[name]} {name!r}; write NAME=FOLDER for one of them.",
                    param="adapter",
                )
        opened = LocalModel(resolve(options, model=model).engine, named)
        names = [None if source is None else name for name, source in parsed]
    else:
        from truffula.cli.server_client import ServerClient, server_address

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
        opened = ServerModel(ServerClient(server_address(url, None), api_key))
        names = [None if word == BASE else word for word in adapters]
    with contextlib.closing(opened):
        yield opened, names
