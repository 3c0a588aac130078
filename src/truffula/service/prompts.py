"""From what a client sent to prompt ids within the model's limits, and back to pieces of text for ``echo``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec

from truffula.errors import InvalidRequest, NoTokenizer, PromptTooLong
from truffula.params import SamplingParams
from truffula.text.chat_template import ChatTemplates
from truffula.text.infill import infill_prompt
from truffula.text.template_probe import Kind
from truffula.text.tokenizer import Encoded, Tokenizer, check_text
from truffula.text.worker import Worker
from truffula.types import EngineInfo, GenerateRequest, PromptPart, TextSource, TokenPiece, TopToken

# Text that is cut by ``truncate`` may be longer than any prompt that fits, up to this.
MAX_TRUNCATED_CHARS = 2**21
TAIL_CHARS = 200
# Normalisers may shorten a text a little (composition, blanks), so the bound by the longest token is taken with room to
# spare.
SLACK = 4


@dataclass(frozen=True)
class Prompt:
    """``ids`` go to the engine. ``pieces`` are made only when the client asked for the prompt. ``ignored`` names what
    the chat template did not use. ``tail`` is the end of a prompt that is text: it says whether the answer begins in
    the middle of something, as reasoning that the chat template opened.
    """

    ids: list[int]
    pieces: list[TokenPiece] | None = None
    ignored: tuple[str, ...] = ()
    tail: str = ""

    @cached_property
    def text(self) -> str:
        """Of ``pieces``."""
        return "".join(piece.text for piece in self.pieces or [])


def need_tokenizer(tokenizer: Tokenizer | None, info: EngineInfo) -> Tokenizer:
    """``tokenizer``. Raises ``NoTokenizer`` with the reason where there is none."""
    if tokenizer is None:
        reason = f" {info.no_tokenizer}" if info.no_tokenizer else ""
        raise NoTokenizer(
            f"This model has no tokenizer; send the prompt as token ids and read token ids.{reason}", param="prompt"
        )
    return tokenizer


def prompt_text(request: GenerateRequest, templates: ChatTemplates) -> str | None:
    """The request's text, its messages rendered; None when it sends ids."""
    if (request.prompt is None) == (request.messages is None):
        what = "neither" if request.prompt is None else "both"
        raise InvalidRequest(f"A request has either a prompt or messages; this one has {what}.", param="prompt")
    if request.messages is not None:
        text = templates.render(request)
        check_text(text, "messages")
        return text
    if isinstance(request.prompt, str):
        check_text(request.prompt, "prompt")
        return request.prompt
    return None


# How what a chat template leaves out is named, by its kind.
_FIELDS: Mapping[Kind, str] = {
    "documents": "documents",
    "name": "messages.name",
    "system message": "messages(role=system)",
    "tool calls": "messages.tool_calls",
    "tools": "tools",
}


def left_out(request: GenerateRequest, templates: ChatTemplates, prompt: str) -> tuple[str, ...]:
    """Names of what the request holds and the chat template does not use; ``prompt`` is what it made.

    Raises ``InvalidRequest`` for the result of a tool that would be missing from the prompt: nothing else
    in the prompt holds it, and the model would answer as if no tool had been called.
    """
    if request.messages is None:
        return ()
    found = templates.left_out(request, prompt)
    for place in found.places:
        if place.kind == "tool message":
            raise InvalidRequest(
                f"{place.param} is the result of a tool, and the model's chat template leaves messages of its role out "
                "of the prompt. Write the result into a user message, or use a chat template that supports tools.",
                param=place.param,
            )
    fields = dict.fromkeys(_FIELDS[place.kind] for place in found.places)
    return (*found.fields, *fields)


def make_prompt(
    request: GenerateRequest, tokenizer: Tokenizer | None, templates: ChatTemplates, info: EngineInfo
) -> Prompt:
    """Template, tokenise and truncate; ``check_fits`` checks the length.

    Raises ``InvalidRequest`` (empty, an id outside the vocabulary), ``PromptTooLong`` for text that cannot fit,
    ``TemplateError``, ``NoTokenizer``. A text that can't fit is refused by its length before any work is done on it.
    """
    if request.messages is not None:
        need_tokenizer(tokenizer, info)
    text = prompt_text(request, templates)
    ignored = left_out(request, templates, text or "")
    wants_pieces = request.echo or request.return_prompt_tokens or request.params.prompt_logprobs is not None
    pieces: list[TokenPiece] | None = None
    if text is not None:
        tokenizer = need_tokenizer(tokenizer, info)
        if request.suffix:
            check_text(request.suffix, "suffix")
            text = infill_prompt(text, request.suffix, tokenizer)
        _check_length(text, request, tokenizer, info)
        special = request.add_special_tokens
        special = request.messages is None if special is None else special
        if wants_pieces:
            encoded = tokenizer.encode_with_offsets(text, add_special_tokens=special)
            ids, pieces = encoded.ids, slices(text, encoded, tokenizer)
        else:
            ids = tokenizer.encode(text, add_special_tokens=special)
        if not ids and tokenizer.bos_id is not None:
            # An empty text means the beginning of a document, where there is a token for that.
            ids, pieces = [tokenizer.bos_id], [TokenPiece(tokenizer.bos_id, "", special=True)]
    else:
        if not isinstance(request.prompt, list | tuple):
            kind = type(request.prompt).__name__
            raise InvalidRequest(f"prompt is a {kind}; it must be text or a list of token ids.", param="prompt")
        ids = checked_ids(request.prompt, "prompt", ids_of(request, info))
        if wants_pieces:
            pieces = id_pieces(ids, tokenizer)
    if not ids:
        raise InvalidRequest("The prompt is empty, and the model has no token that begins a text.", param="prompt")
    keep = request.truncate
    if keep is not None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise InvalidRequest(f"truncate is {keep!r}; it must be at least 1.", param="truncate")
        ids, pieces = ids[-keep:], None if pieces is None else pieces[-keep:]
    return Prompt(ids, (pieces or []) if wants_pieces else None, ignored, (text or "")[-TAIL_CHARS:])


def ids_of(request: GenerateRequest, info: EngineInfo) -> int:
    """The ids that a request may name; the engine knows which of them its adapter has rows for."""
    return info.vocab_size + (0 if request.adapter is None else info.more_ids)


def render_job(worker: Worker, request: GenerateRequest) -> Iterator[bytes]:
    """In a text worker: a chat's text and what its template leaves out, for ``unpack_rendered``. Needs no tokenizer."""
    text = prompt_text(request, worker.templates) or ""
    yield msgspec.msgpack.encode((text, left_out(request, worker.templates, text)))


def unpack_rendered(raw: bytes) -> tuple[str, tuple[str, ...]]:
    """The text, and the names of what the template does not use."""
    return msgspec.msgpack.decode(raw, type=tuple[str, tuple[str, ...]])


def prompt_job(worker: Worker, job: tuple[GenerateRequest, TextSource | None]) -> Iterator[bytes]:
    """In a text worker: the request's prompt, for ``unpack_prompt``. One that does not fit is not sent."""
    (request, source), info = job, worker.setup.info
    made = make_prompt(request, *worker.texts(source), info)
    fitting(request, len(made.ids), info)
    yield msgspec.msgpack.encode(made)


def unpack_prompt(raw: bytes) -> Prompt:
    return msgspec.msgpack.decode(raw, type=Prompt)


def checked_ids(ids: Sequence[int], param: str, vocab_size: int) -> list[int]:
    """``ids`` as a list of ints within the vocabulary. They are looked at one by one only when one is wrong."""
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return list(ids)
    for index, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{param}[{index}] is {token_id!r}; token ids of this model are 0 to {vocab_size - 1}.",
                param=param,
                at=index,
                vocab_size=vocab_size,
            )
    return list(ids)


def slices(text: str, encoded: Encoded, tokenizer: Tokenizer) -> list[TokenPiece]:
    """The text cut at the tokens' borders: joined pieces are exactly ``text``, whatever a normaliser did to it.

    A gap before a token (a space that offsets leave out) belongs to it; a character split over tokens comes with the
    last.
    """
    pieces = []
    done, last = 0, len(encoded.ids) - 1
    while last >= 0 and encoded.added[last]:
        last -= 1
    for index, token_id in enumerate(encoded.ids):
        special = token_id in tokenizer.special_ids
        if encoded.added[index]:
            pieces.append(TokenPiece(token_id, "", special=True, shown=False))
            continue
        until = len(text) if index == last else encoded.offsets[index][1]
        if index < last and not encoded.added[index + 1]:
            until = min(until, encoded.offsets[index + 1][0])
        until = max(until, done)
        pieces.append(TokenPiece(token_id, text[done:until], special=special))
        done = until
    return pieces


def id_pieces(ids: Sequence[int], tokenizer: Tokenizer | None) -> list[TokenPiece]:
    """Pieces of a prompt that came as ids: what each adds to their text, special tokens written out."""
    if tokenizer is None:
        return [TokenPiece(token_id, "") for token_id in ids]
    machine = tokenizer.detokenizer()
    pieces = [TokenPiece(i, machine.push(i), special=i in tokenizer.special_ids) for i in ids]
    if pieces and (rest := machine.flush()):
        pieces[-1] = TokenPiece(pieces[-1].id, pieces[-1].text + rest, special=pieces[-1].special)
    return pieces


def prompt_part(
    prompt: Prompt, scores: Sequence[tuple[float, list[tuple[int, float]]] | None] | None, tokenizer: Tokenizer | None
) -> PromptPart:
    """The prompt for the answer, each token with its score when there are any."""
    pieces = prompt.pieces or []

    def tokens() -> list[TokenPiece]:
        return [
            piece
            if score is None
            else msgspec.structs.replace(piece, logprob=score[0], top=top_pieces(score[1], tokenizer))
            for piece, score in zip(pieces, scores or (), strict=True)
        ]

    if scores is None:
        return PromptPart(prompt.text, len(pieces), lambda: pieces)
    return PromptPart(prompt.text, sum(1 if one is None else 1 + len(one[1]) for one in scores), tokens)


def top_pieces(top: Sequence[tuple[int, float]], tokenizer: Tokenizer | None) -> list[TopToken]:
    if tokenizer is None:
        return [TopToken(token_id, "", logprob) for token_id, logprob in top]
    return [TopToken(i, tokenizer.text_of(i), logprob, tokenizer.bytes_of(i)) for i, logprob in top]


def _check_length(text: str, request: GenerateRequest, tokenizer: Tokenizer, info: EngineInfo) -> None:
    # The vocabulary is only looked through for a text that is long at all.
    if len(text) <= info.max_model_len:
        return
    bound = SLACK * info.max_model_len * tokenizer.longest_piece
    if request.truncate is not None:
        bound = max(bound, MAX_TRUNCATED_CHARS)
    if len(text) > bound:
        raise PromptTooLong(
            f"The prompt has {len(text)} characters; no text of more than {bound} fits the {info.max_model_len} tokens "
            "of the model's limit, prompt and completion together.",
            param="prompt",
            prompt_chars=len(text),
            max_chars=bound,
            max_model_len=info.max_model_len,
        )


def fitting(request: GenerateRequest, prompt: int, info: EngineInfo) -> SamplingParams:
    """The parameters of a request whose prompt has ``prompt`` tokens. Raises ``PromptTooLong``."""
    params = request.params
    if request.clip_max_tokens and params.max_tokens is not None and prompt + params.max_tokens > info.max_model_len:
        params = msgspec.structs.replace(params, max_tokens=None)  # as many as the model's length leaves
    check_fits(prompt, params, info)
    return params


def check_fits(prompt: int, params: SamplingParams, info: EngineInfo) -> None:
    """Raise ``PromptTooLong`` when ``prompt`` tokens and what is asked for are more than the model takes."""
    # Without max_tokens one more token must fit; with it all of them.
    asked = 1 if params.max_tokens is None else params.max_tokens
    if prompt + asked <= info.max_model_len:
        return
    asks = "" if params.max_tokens is None else f" and max_tokens is {asked}"
    raise PromptTooLong(
        f"The prompt has {prompt} tokens{asks}; the model's limit is {info.max_model_len}, prompt and completion "
        "together.",
        param="prompt" if prompt >= info.max_model_len else "max_tokens",
        prompt_tokens=prompt,
        max_tokens=params.max_tokens,
        max_model_len=info.max_model_len,
    )
