"""What text workers do for requests: chat templates that are not plain, and prompts of any length.

The functions run in a text worker (``text/worker.py``); ``RENDER_JOB`` and ``PROMPT_JOB`` name them for the server.
"""

from __future__ import annotations

import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from truffula.errors import CheckpointChanged
from truffula.params import SamplingParams
from truffula.service.files import digest_of
from truffula.service.prompts import Prompt, left_out, make_prompt, prompt_text
from truffula.text.chat_template import ChatTemplates
from truffula.text.tokenizer import Tokenizer, load_tokenizer
from truffula.text.worker import Worker
from truffula.types import GenerateRequest, TokenPiece
from truffula.weights.texts import read_texts

RENDER_JOB = "truffula.service.text_jobs:render"
PROMPT_JOB = "truffula.service.text_jobs:prompt"


class TemplateJob(NamedTuple):
    """A chat to render, and the templates to choose from with the special tokens that they write."""

    request: GenerateRequest
    sources: dict[str, str]
    special_tokens: dict[str, str]


def template_job(request: GenerateRequest, templates: ChatTemplates) -> TemplateJob:
    """The argument of ``render``."""
    return TemplateJob(for_worker(request), dict(templates.sources), dict(templates.special_tokens))


def for_worker(request: GenerateRequest) -> GenerateRequest:
    """``request`` without what does not change its prompt."""
    params = SamplingParams(prompt_logprobs=request.params.prompt_logprobs)
    return msgspec.structs.replace(request, params=params, adapter=None)


class _Rendered(msgspec.Struct, frozen=True, array_like=True):
    text: str
    ignored: tuple[str, ...]


class _Packed(msgspec.Struct, frozen=True, array_like=True):
    ids: bytes
    text: str | None
    pieces: list[TokenPiece] | None
    ignored: tuple[str, ...]


def render(worker: Worker, job: TemplateJob) -> Iterator[bytes]:
    """The chat's text and what its template leaves out, for ``unpack_rendered``. Needs no tokenizer."""
    templates = worker.kept.get("templates")
    if templates is None:
        templates = worker.kept["templates"] = ChatTemplates(job.sources, job.special_tokens)
    text = prompt_text(job.request, templates) or ""
    yield msgspec.msgpack.encode(_Rendered(text, left_out(job.request, templates, text)))


def unpack_rendered(raw: bytes) -> tuple[str, tuple[str, ...]]:
    """The text, and the names of what the template does not use."""
    found = msgspec.msgpack.decode(raw, type=_Rendered)
    return found.text, found.ignored


def prompt(worker: Worker, request: GenerateRequest) -> Iterator[bytes]:
    """The request's prompt, for ``unpack_prompt``."""
    tokenizer, templates = texts_of_worker(worker)
    yield pack_prompt(make_prompt(request, tokenizer, templates, worker.setup.info))


def pack_prompt(made: Prompt) -> bytes:
    """``made`` in few bytes that decode quickly."""
    return msgspec.msgpack.encode(_Packed(array.array("i", made.ids).tobytes(), made.text, made.pieces, made.ignored))


def unpack_prompt(raw: bytes) -> Prompt:
    """What ``pack_prompt`` packed."""
    found = msgspec.msgpack.decode(raw, type=_Packed)
    return Prompt(array.array("i", found.ids).tolist(), found.text, found.pieces, found.ignored)


def texts_of_worker(worker: Worker) -> tuple[Tokenizer | None, ChatTemplates]:
    """The model's tokenizer and chat templates, read with the first call.

    Raises ``CheckpointChanged`` when the files are not those that the server has read.
    """
    found: tuple[Any, ChatTemplates] | None = worker.kept.get("texts")
    if found is None:
        found = worker.kept["texts"] = _load(worker)
    return found


def _load(worker: Worker) -> tuple[Tokenizer | None, ChatTemplates]:
    setup = worker.setup
    if setup.texts_path is None:
        return None, ChatTemplates(setup.templates or {}, {})
    texts = read_texts(Path(setup.texts_path))
    tokenizer = load_tokenizer(texts.tokenizer, texts.end_tokens)
    if tokenizer is None:
        return None, ChatTemplates(setup.templates or {}, {})
    if digest_of(texts.tokenizer) != setup.texts_digest:
        raise CheckpointChanged(
            f"The tokenizer of {setup.texts_path} was replaced while it was served, so long texts cannot be tokenized "
            "as before. Restart the server to serve the files that are there now.",
            param=setup.texts_path,
        )
    sources = tokenizer.chat_templates if setup.templates is None else setup.templates
    return tokenizer, ChatTemplates(sources, tokenizer.special_tokens)
