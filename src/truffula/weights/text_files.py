"""The text files of a model folder: JSON and tokenizers, read whole, with limits. Does not import numpy."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truffula.errors import CheckpointError
from truffula.types import EndToken

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
LFS_FIRST_LINE = b"version https://git-lfs"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
MAX_JSON_BYTES = 64 << 20
MAX_TOKENIZER_BYTES = 256 << 20


# Usual file names of other kinds of tokenizers.
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "merges.txt", "tekken.json", "vocab.txt", "*.tiktoken")


@dataclass(frozen=True)
class ModelTexts:
    """``tokenizer``: contents by file name (tokenizer.json, …); ``generation_config``: that file, ``{}`` for none.

    ``end_tokens``: those of a GGUF file's vocabulary. ``no_tokenizer``: why there is no tokenizer.json, and what to
    do; "" when there is one.
    """

    tokenizer: dict[str, bytes]
    generation_config: dict[str, Any]
    end_tokens: tuple[EndToken, ...] = ()
    warnings: tuple[str, ...] = ()
    no_tokenizer: str = ""


def no_tokenizer(folder: Path) -> str:
    """Why ``folder`` has no supported tokenizer, and what to do; "" when it has one."""
    if (folder / "tokenizer.json").is_file():
        return ""
    others = [file.name for pattern in _OTHER_TOKENIZERS for file in sorted(folder.glob(pattern))]
    if not others:
        return "The model's folder has no tokenizer.json. Copy it from where the weights come from."
    others_text = f"{' and '.join(others[:3])} {'is' if len(others) == 1 else 'are'} not read"
    return (
        f"The model's folder has no tokenizer.json; {others_text}. Make it once, with transformers, sentencepiece and "
        'protobuf installed, where DIR is the folder: python -c "from transformers import AutoTokenizer; '
        "AutoTokenizer.from_pretrained('DIR').save_pretrained('DIR')\""
    )


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Contents of the existing ``TOKENIZER_FILES``, by name."""
    return {
        name: _read_bytes(folder / name, MAX_TOKENIZER_BYTES) for name in TOKENIZER_FILES if (folder / name).is_file()
    }


def generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json; ``{}`` when there is none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def read_json(path: Path, *, infinity: bool = False) -> dict[str, Any]:
    """The JSON object in ``path``. ``infinity``: see ``parse_json``.

    Raises ``CheckpointError`` for another kind of value, NaN, infinity, a duplicate key, or a file above 64 MB.
    """
    try:
        value = parse_json(_read_bytes(path, MAX_JSON_BYTES), infinity=infinity)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.", param=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}.", param=str(path))
    return value


def parse_json(raw: bytes, *, infinity: bool = False) -> Any:
    """The JSON value in ``raw``; with ``infinity``, ``Infinity`` is a number, as Python writes it.

    Raises ``ValueError`` for NaN, infinity, a duplicate key and half a surrogate pair, ``RecursionError``.
    """

    def finite(text: str) -> float:
        number = float(text)
        if infinity and text == "Infinity":
            return number
        if not math.isfinite(number):
            raise ValueError(f"{text} is not a finite number")
        return number

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if key in made:
                raise ValueError(f"the key {key!r} is written twice")
            made[key] = value
        return made

    text = raw.decode("utf-8-sig")
    value = json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # half a pair is no character: no message could name it
    return value


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", param=str(path)) from error
    if len(raw) > limit:
        raise CheckpointError(f"{path} is larger than {limit} bytes.", param=str(path))
    if is_lfs_pointer(raw[:64]):
        raise lfs_pointer_error(path)
    return raw


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that begins with ``start`` is a Git LFS pointer, which replaces a file that was not fetched."""
    return start.startswith(LFS_FIRST_LINE[: max(8, len(start))])


def lfs_pointer_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a Git LFS pointer, a few lines of text in place of the weights. Run `git lfs pull` in its "
        "repository, or download the file itself.",
        param=str(path),
    )
