"""A model's text files (tokenizer, templates, defaults), read in the service's process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truffula.text.chat_template import ChatTemplates
from truffula.text.tokenizer import Tokenizer, digest_of, load_tokenizer
from truffula.types import EndToken, EngineInfo, FileStamp
from truffula.weights.texts import read_texts
from truffula.weights.watch import require_loaded, stamp, stamped_texts


@dataclass(frozen=True)
class LoadedTexts:
    """A model's text files, read.

    ``no_tokenizer`` says why ``tokenizer`` is None, ``warnings`` are for the operator, ``end_tokens`` those that the
    tokenizer's files name. ``stamps`` are of the files at ``path`` from before they were read;
    ``digest`` tells two states of the tokenizer's files apart.
    """

    tokenizer: Tokenizer | None = None
    no_tokenizer: str = ""
    warnings: tuple[str, ...] = ()
    end_tokens: tuple[EndToken, ...] = ()
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    stamps: tuple[FileStamp, ...] = ()
    digest: str = ""

    def chat_templates(self, replaced: Mapping[str, str] | None = None) -> ChatTemplates:
        """The model's chat templates, or those in ``replaced`` (name → source), with the tokens that they write."""
        if self.tokenizer is None:
            return ChatTemplates(replaced or {}, {})
        sources = self.tokenizer.chat_templates if replaced is None else replaced
        return ChatTemplates(sources, self.tokenizer.special_tokens)


def load_texts(path: Path) -> LoadedTexts:
    """Of a model folder or a ``.gguf`` file. Raises ``CheckpointError`` for files that cannot be read."""
    stamps = tuple(stamp(file) for file in stamped_texts(path))
    found = read_texts(path)
    tokenizer = load_tokenizer(found.tokenizer, found.end_tokens)
    known = tokenizer or found
    return LoadedTexts(
        tokenizer,
        found.no_tokenizer if tokenizer is None else "",
        found.warnings if tokenizer is None else (*found.warnings, *tokenizer.warnings),
        known.end_tokens,
        found.generation_config,
        path,
        stamps,
        digest_of(found.tokenizer),
    )


def without_tokenizer(reason: str) -> list[str]:
    """The warning that a model has no tokenizer, for ``LoadedTexts.no_tokenizer``; none for ""."""
    return [f"Only token ids can be served. {reason}"] if reason else []


def texts_of(info: EngineInfo, texts: LoadedTexts | None = None) -> LoadedTexts:
    """The text files beside the weights that an engine loaded; ``texts`` are those read while it loaded them.

    Raises ``CheckpointError`` for files that cannot be read, ``CheckpointChanged`` for ones that replaced those loaded.
    """
    if texts is None:
        texts = load_texts(Path(info.path)) if info.path else LoadedTexts()
    if texts.path is not None:
        require_loaded(texts.path, info.files, texts.stamps)
    return texts
