"""A text worker: ``python -m truffula.text.worker --fd N``, started by ``text/process.py``.

It runs one function at a time for the server: on text of any size, and on code of a model's folder (chat templates,
tokenizers). It has a limit of memory and is killed when a call takes too long. A function gets the ``Worker`` and one
argument; what it yields is sent as it comes. The process ends when its connection does.

Setup and calls arrive pickled: a worker trusts the server. The server trusts no worker and decodes what comes back.
"""

from __future__ import annotations

import gc
import math
import os
import pickle
import resource
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from truffula.errors import CheckpointChanged, TruffulaError, internal_error
from truffula.text.chat_template import ChatTemplates
from truffula.text.own_texts import Base, dropped, load_own
from truffula.text.process import END, FAILED, PART, READY, Setup
from truffula.text.tokenizer import Tokenizer, digest_of, load_tokenizer
from truffula.types import TextSource
from truffula.weights.text_files import ModelTexts
from truffula.weights.texts import read_texts

MAX_OWN = 2
"""Adapters' tokenizers that are kept, the last used."""


@dataclass
class Worker:
    """What a function gets: the ``setup``, and the model's texts, which are kept for later calls."""

    setup: Setup
    _own: dict[str, tuple[Tokenizer, ChatTemplates]] = field(default_factory=dict)  # by checksum

    @cached_property
    def templates(self) -> ChatTemplates:
        return ChatTemplates(self.setup.templates, self.setup.special_tokens)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Raises as ``files``."""
        files = self.files
        return load_tokenizer(files.tokenizer, files.end_tokens) if files.tokenizer else None

    @property
    def files(self) -> ModelTexts:
        """Raises ``CheckpointChanged`` when the files are not those that the server has read."""
        path = self.setup.texts_path
        texts = ModelTexts({}, {}) if path is None else read_texts(Path(path))
        if digest_of(texts.tokenizer) != self.setup.texts_digest:
            raise CheckpointChanged(
                f"The tokenizer of {path} was replaced while it was served, so long texts cannot be tokenized as "
                "before. Restart the server to serve the files that are there now.",
                param=path,
            )
        return texts

    def texts(self, source: TextSource | None) -> tuple[Tokenizer | None, ChatTemplates]:
        """The tokenizer and the templates of an adapter, or of the model."""
        if source is None:
            return self.tokenizer, self.templates
        found = self._own.pop(source.digest, None)
        if found is None:
            tokenizer = load_own(source, self.files)
            templates = Base(None, self.setup.templates, self.setup.replaced_templates, 0).templates_for(tokenizer)
            same = self.tokenizer if self.tokenizer is not None and tokenizer.same_as(self.tokenizer) else tokenizer
            found = same, templates
        self._own[source.digest] = found
        for digest in dropped([(key, one is not self.tokenizer) for key, (one, _) in self._own.items()], MAX_OWN):
            self._own.pop(digest, None)
        return found


def _limit_memory(extra: int) -> None:
    """Let this process allocate ``extra`` bytes more than it has now; further allocations fail."""
    with open("/proc/self/statm") as file:  # noqa: PTH123  # a pathlib import for one line
        now = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + extra if hard == resource.RLIM_INFINITY else min(hard, now + extra)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _limit_time(seconds: float) -> None:
    """Let this process use ``seconds`` more of processor time, rounded up to a second; then SIGXCPU ends it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    wanted = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def serve(connection: Connection) -> None:
    """Answer calls until the connection closes."""
    setup: Setup = connection.recv()
    os.nice(setup.niceness)
    if sys.platform == "linux":
        _limit_memory(setup.memory_bytes)
    worker = Worker(setup)
    connection.send_bytes(READY)
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        try:
            if not _answer(connection, worker, call):
                gc.collect()  # the error refers to all that its template made, which would count for the next call
        except MemoryError:
            return  # what is left of this process is in an unknown state; the server starts another


def _answer(connection: Connection, worker: Worker, call: bytes) -> bool:
    """Answer one call; whether it has a result. Raises ``MemoryError``."""
    try:
        function, argument, seconds = pickle.loads(call)
        _limit_time(seconds)
        for part in function(worker, argument):
            connection.send_bytes(PART + part)
        connection.send_bytes(END)
        return True
    except MemoryError:
        raise
    except BaseException as error:  # noqa: BLE001  # the caller gets it; a Rust panic is no Exception
        found = error if isinstance(error, TruffulaError) else internal_error(error)
        connection.send_bytes(FAILED + msgspec.msgpack.encode(found.info()))
        return False


def main(arguments: list[str] | None = None) -> Any:
    import argparse  # the functions' modules import this one, too

    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    # Signals meant for the whole process group are the server's, which closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Connection(parser.parse_args(arguments).fd) as connection:
        serve(connection)


if __name__ == "__main__":
    main()
