"""The tokenizer and the chat templates in an adapter's folder: what they are beside the base's.

Where the folder has a tokenizer.json, its files alone make the tokenizer; otherwise they are read on top of the base's.
Chat templates are the folder's if it has any. A tokenizer may add tokens to the base's and rename added ones; one that
gives an id of the base's vocabulary to another token, merges or decodes otherwise is an error.

A server trusts them no more than a client's text: what runs their rules and templates does so in a text worker
(``examine``). Decoding, which does not, is the base's, or ``ByteRule``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from truffula.errors import AdapterError, AdapterLoadError, CheckpointError
from truffula.lora.paths import OpenFolder
from truffula.text.chat_template import ChatTemplates
from truffula.text.ends import EndTokens
from truffula.text.tokenizer import Tokenizer, digest_of, load_tokenizer
from truffula.types import EndToken, TextSource
from truffula.weights.text_files import TOKENIZER_FILES, ModelTexts, is_lfs_pointer

if TYPE_CHECKING:
    from truffula.text.worker import Worker

MAX_BYTES, MAX_SMALL_BYTES = 64 << 20, 4 << 20
"""Of tokenizer.json, and of each other file."""
MAX_TEMPLATES = 32
"""Adapters' texts that are kept, the last used; fewer of those with tokenizers of their own."""
MAX_TOKEN_CHARS = 1024
"""Of a token that the base lacks: each of an answer's tokens may be it."""
TOKENIZER, CONFIG, TEMPLATES = "tokenizer.json", "tokenizer_config.json", ("chat_template.jinja", "chat_template.json")


class Examined(msgspec.Struct, frozen=True):
    """What an adapter's text files make. ``same_tokenizer``: as the base's. ``turn_ends``, ``warnings``: see
    ``EndTokens``."""

    same_tokenizer: bool
    templates: dict[str, str]
    special_tokens: dict[str, str]
    response_template: Any
    turn_ends: dict[str, EndToken]
    warnings: list[str]


@dataclass(frozen=True)
class Base:
    """What an adapter's text files are compared with. ``replaced_templates``: the operator's own are used for all."""

    tokenizer: Tokenizer | None
    templates: Mapping[str, str]
    replaced_templates: bool
    vocab_size: int

    def templates_for(self, own: Tokenizer) -> ChatTemplates:
        sources = self.templates if self.replaced_templates or not own.chat_templates else own.chat_templates
        return ChatTemplates(sources, own.special_tokens)


def find_source(folder: str, root: str, base_digest: str) -> TextSource | None:
    """The text files of an adapter's ``folder``; None where it has none but the base's.

    Raises ``AdapterError`` for a file that cannot be used, ``AdapterLoadError`` for a folder that cannot be read.
    """
    files = text_files(folder, root)
    same = base_digest.split(" ")
    return None if all(digest_of({name: files[name]}) in same for name in files) else TextSource(
        folder, root, digest_of(files)
    )  # fmt: skip


def load_own(source: TextSource, base: ModelTexts) -> Tokenizer:
    """The tokenizer, with the chat templates, of an adapter. Raises as ``find_source``, and where its files changed."""
    files = text_files(source.folder, source.root)
    if digest_of(files) != source.digest:
        raise AdapterLoadError("The adapter's tokenizer changed while it was read; send the request again.")
    try:
        if TOKENIZER in files:
            found = load_tokenizer(files)
        else:
            kept = dict(base.tokenizer)
            if _has_template(files):
                kept = {name: content for name, content in kept.items() if name not in TEMPLATES}
            found = load_tokenizer(kept | files, base.end_tokens)
    except CheckpointError as error:
        raise AdapterError(f"The adapter's tokenizer cannot be used: {error.message}", param=error.param) from error
    if found is None:
        raise AdapterError(
            "The adapter has text files of its own, and neither it nor its base has a tokenizer.json.", param=TOKENIZER
        )
    return found


def examine(worker: Worker, source: TextSource) -> Iterator[bytes]:
    """In a text worker: an ``Examined``. Raises ``AdapterError`` where the adapter contradicts its base."""
    setup, texts = worker.setup, worker.files
    base = Base(
        worker.tokenizer, setup.templates, setup.replaced_templates, setup.info.vocab_size + setup.info.more_ids
    )
    yield msgspec.msgpack.encode(examined(load_own(source, texts), base))


def examined(own: Tokenizer, base: Base) -> Examined:
    """See ``Examined``. Raises ``AdapterError``."""
    same = base.tokenizer is not None and own.same_as(base.tokenizer)
    if not same:
        _require_rows(own, base)
    if base.tokenizer is not None and not same:
        _require_extension(own, base.tokenizer)
    templates = base.templates_for(own)
    ends = EndTokens(own.end_tokens, (), tokenizer=own, templates=templates, vocab_size=base.vocab_size)
    response = {} if base.replaced_templates else own.response_template
    return Examined(same, templates.sources, own.special_tokens, response, ends.turn_ends, ends.warnings)


def text_files(folder: str, root: str) -> dict[str, bytes]:
    """The text files of an adapter's folder, by name. Raises as ``find_source``."""
    try:
        with closing(OpenFolder(Path(folder), Path(root) if root else None)) as opened:
            names = opened.names()
            files = {name: opened.read(name, _most(name)) for name in TOKENIZER_FILES if name in names}
    except OSError as error:
        raise AdapterLoadError(f"The adapter's folder cannot be read: {error.strerror or error}.") from error
    for name, content in files.items():
        if content is None or is_lfs_pointer(content[:64]):
            raise AdapterError(
                f"The adapter's {name} cannot be read: it is not a regular file, has more than {_most(name)} bytes, is "
                "a Git LFS pointer, or leads out of the folder that adapters may be in.", param=name,
            )  # fmt: skip
    return {name: content for name, content in files.items() if content is not None}


def _most(name: str) -> int:
    return MAX_BYTES if name == TOKENIZER else MAX_SMALL_BYTES


def dropped(own: Sequence[tuple[str, bool]], most: int) -> list[str]:
    """The keys of kept texts that are dropped, of these in the order of their use, each with whether its tokenizer is
    one of its own, of which ``most`` are kept."""
    tokenizers = [key for key, is_own in own if is_own]
    return [*tokenizers[:-most], *(key for key, _ in own[:-MAX_TEMPLATES])]


def _has_template(files: Mapping[str, bytes]) -> bool:
    try:
        config = msgspec.json.decode(files.get(CONFIG, b"{}"))
    except (msgspec.DecodeError, RecursionError):
        return False  # refused when it is loaded
    return bool(isinstance(config, dict) and config.get("chat_template")) or any(name in files for name in TEMPLATES)


def _require_rows(own: Tokenizer, base: Base) -> None:
    """Every token that the base's tokenizer lacks has a row, and is no long text."""
    ids, longest = ([], 0) if base.tokenizer is None else (base.tokenizer.ids, base.tokenizer.longest_piece)
    if (highest := own.ids[-1:]) and highest[0] >= max(base.vocab_size, *ids[-1:], 0) and highest != ids[-1:]:
        raise AdapterError(
            f"The adapter's tokenizer has token {highest[0]}, and the model {base.vocab_size} ids. Start truffula with "
            "--adapter-tokens if the adapter has rows for it, or remove the token.", param=TOKENIZER,
            token_id=highest[0], limit=base.vocab_size,
        )  # fmt: skip
    if own.longest_piece > max(longest, MAX_TOKEN_CHARS):
        raise AdapterError(
            f"The adapter's tokenizer has a token of {own.longest_piece} characters; the limit is {MAX_TOKEN_CHARS}.",
            param=TOKENIZER,
        )


def _require_extension(own: Tokenizer, base: Tokenizer) -> None:
    """Every id of the base's tokenizer means the same, though an added token may have another name; what is no added
    token is cut and decoded alike."""
    for token_id in base.ids:
        theirs, mine = base.id_to_token(token_id), own.id_to_token(token_id)
        if theirs != mine and theirs is not None and not (token_id in base.added_ids and token_id in own.added_ids):
            raise AdapterError(
                f"The adapter's tokenizer contradicts the base's: token {token_id} is {mine!r}, and {theirs!r} there. "
                "It is of another base; remove the tokenizer files from the adapter's folder if it was trained with "
                "the base's.", param=TOKENIZER, token_id=token_id,
            )  # fmt: skip

    rules, others = own.rules(), base.rules()
    if not own.has_byte_rule and rules.decoder != others.decoder:
        raise AdapterError(
            "The adapter's tokenizer contradicts the base's: it decodes otherwise (decoder in tokenizer.json). Remove "
            "the tokenizer files from the adapter's folder if it was trained with the base's.", param=TOKENIZER,
        )  # fmt: skip
    for number, merges in enumerate(itertools.zip_longest(rules.model.merges, others.model.merges)):
        if merges[0] != merges[1]:
            raise AdapterError(
                f"The adapter's tokenizer contradicts the base's: merge {number} is {merges[0]!r}, and {merges[1]!r} "
                "there. It is of another base; remove the tokenizer files from the adapter's folder if it was trained "
                "with the base's.", param=TOKENIZER, merge=number,
            )  # fmt: skip
