"""Where the service's process finds a model's text files: at the path that the engine tells."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truffula.text.tokenizer import Tokenizer, load_tokenizer
from truffula.types import EndToken, EngineInfo
from truffula.weights.texts import read_texts
from truffula.weights.watch import require_loaded, stamp, text_stamped


@dataclass(frozen=True)
class LoadedTexts:
    """A model's text files, read.

    ``no_tokenizer`` says why ``tokenizer`` is None, ``warnings`` are for the operator, ``end_tokens`` those that the
    tokenizer's files name. ``digest`` tells two states of these files apart.
    """

    tokenizer: Tokenizer | None = None
    no_tokenizer: str = ""
    warnings: tuple[str, ...] = ()
    end_tokens: tuple[EndToken, ...] = ()
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""


def load_texts(path: Path) -> LoadedTexts:
    """Of a model folder or a ``.gguf`` file. Raises ``CheckpointError`` for files that can't be read."""
    found = read_texts(path)
    tokenizer = load_tokenizer(found.tokenizer, found.end_tokens)
    if tokenizer is None:
        return LoadedTexts(None, found.no_tokenizer, found.warnings, found.end_tokens, found.generation_config)
    warnings = (*found.warnings, *tokenizer.warnings)
    digest = digest_of(found.tokenizer)
    return LoadedTexts(tokenizer, "", warnings, tokenizer.end_tokens, found.generation_config, digest)


def digest_of(files: Mapping[str, bytes]) -> str:
    """A checksum of a tokenizer's files (name → content)."""
    return " ".join(f"{name}:{len(files[name])}:{zlib.crc32(files[name]):08x}" for name in sorted(files))


def without_tokenizer(reason: str) -> list[str]:
    """The warning that a model has no tokenizer, for ``LoadedTexts.no_tokenizer``; none for ""."""
    return [f"Only token ids can be served. {reason}"] if reason else []


def texts_of(info: EngineInfo) -> LoadedTexts:
    """The text files beside the weights that ``info``'s engine loaded.

    Raises ``CheckpointError`` for files that can't be read, ``CheckpointChanged`` for files that replaced those loaded.
    """
    if "path" not in info.details:
        return LoadedTexts()
    path = Path(info.details["path"])
    stamps = [stamp(file) for file in text_stamped(path)]
    texts = load_texts(path)
    require_loaded(path, info.files, stamps)
    return texts
