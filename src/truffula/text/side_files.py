"""Tokens that the files beside tokenizer.json name, added to the tokenizer as transformers 5 adds them.

Where tokenizer_config.json has an ``added_tokens_decoder``, that is the whole list. Otherwise special_tokens_map.json
(which then wins over tokenizer_config.json) and added_tokens.json are read, as older versions wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from truffula.errors import CheckpointError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")


@dataclass
class SpecialTokens:
    """``named`` by name (``eos_token``, …), ``sources`` the file of each; ``extra`` are special without a name."""

    named: dict[str, AddedToken] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    extra: list[AddedToken] = field(default_factory=list)


def special_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> SpecialTokens:
    """The special tokens of the two files. Raises ``CheckpointError`` for a value that is no token."""
    found = SpecialTokens()
    sources = [(CONFIG, config)]
    if "added_tokens_decoder" not in config:
        sources.append((MAP, special_map))
    for file, source in sources:
        named = {
            name: value
            for name, value in source.items()
            if name in NAMED_TOKENS or (name.endswith("_token") and isinstance(value, str | Mapping))
        }
        extra = next((source[name] for name in _EXTRA if source.get(name)), None)
        if isinstance(extra, Mapping):
            named |= extra
        for name, value in named.items():
            token = _token(value, name, file)
            if token is not None:
                found.named[name], found.sources[name] = token, file
        if isinstance(extra, list):
            known = {token.content for token in found.extra}
            tokens = [_token(value, "additional_special_tokens", file) for value in extra]
            found.extra += [token for token in tokens if token is not None and token.content not in known]
        elif extra is not None and not isinstance(extra, Mapping):
            raise _invalid(file, "additional_special_tokens", extra, "a list of tokens")
    return found


def add_tokens(
    library: Library, config: Mapping[str, Any], legacy: Mapping[str, Any], special: SpecialTokens
) -> list[str]:
    """Add to ``library`` what the other files name, and mark the named tokens special. Returns warnings.

    Args:
        config: tokenizer_config.json.
        legacy: added_tokens.json.
        special: Of ``special_tokens``.
    """
    existing = library.get_added_tokens_decoder()
    named = [*special.named.values(), *special.extra]
    declared, file = _declared(config, legacy, {token.content for token in named})
    if file == ADDED:
        declared |= existing
    known = {repr(token) for token in existing.values()}
    tokens = [token for _, token in sorted(declared.items()) if repr(token) not in known]
    contents = {token.content for token in (*existing.values(), *tokens)}
    tokens += [token for token in named if token.content not in contents]
    names = {token.content for token in special.named.values()}
    for token in tokens:
        token.special = token.special or token.content in names
    library.add_tokens(tokens)
    library.add_special_tokens(named)
    return [
        f"{file} gives the token {token.content!r} the id {index}; added after the tokens of tokenizer.json, as "
        f"transformers does, it has the id {library.token_to_id(token.content)}."
        for index, token in sorted(declared.items())
        if library.token_to_id(token.content) != index
    ]


def _declared(
    config: Mapping[str, Any], legacy: Mapping[str, Any], special: set[str]
) -> tuple[dict[int, AddedToken], str]:
    """Tokens by the id that their file gives them, and the file."""
    found: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        listed = config["added_tokens_decoder"] or {}
        if not isinstance(listed, Mapping):
            raise _invalid(CONFIG, "added_tokens_decoder", listed, "an object of tokens by id")
        for index, entry in listed.items():
            if not str(index).isdecimal() or len(str(index)) > 10 or not isinstance(entry, Mapping):
                raise _invalid(CONFIG, f"added_tokens_decoder[{index!r}]", entry, "an object with content, by an id")
            token = _token(entry, f"added_tokens_decoder[{index!r}]", CONFIG, special=bool(entry.get("special", False)))
            if token is not None:
                found[int(index)] = token
        return found, CONFIG
    for content, index in legacy.items():
        if isinstance(index, bool) or not isinstance(index, int) or not content:
            raise _invalid(ADDED, content, index, "a token id")
        is_special = content in special
        found[index] = AddedToken(content, normalized=not is_special, special=is_special)
    return found, ADDED


def _token(value: Any, name: str, file: str, *, special: bool = True) -> AddedToken | None:
    """A token is written as text, or as an object with ``content`` and flags; null and "" mean that there is none."""
    flags: dict[str, bool] = {}
    content = value
    if isinstance(value, Mapping):
        content = value.get("content")
        flags = {flag: bool(value[flag]) for flag in _FLAGS if flag in value}
    if content is None or content == "":
        return None
    if not isinstance(content, str):
        raise _invalid(file, name, value, "text, or an object with content")
    return AddedToken(content, special=special, **flags)


def _invalid(file: str, name: str, value: Any, wanted: str) -> CheckpointError:
    more = ""
    if name == "eos_token" and isinstance(value, list):
        more = " Put further end tokens into eos_token_id of generation_config.json."
    return CheckpointError(f"{file}: {name} is {str(value)[:80]!r}; it must be {wanted}.{more}", param=file)
