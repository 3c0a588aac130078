"""Checks the other files of an adapter's folder: the name of its base, a tokenizer and a chat template.

Those of an adapter from elsewhere are not used: a warning, as most adapters have copies of their base's, but an error
where they add a token. Added tokens that the base has no row for always are one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from truffula.errors import AdapterError
from truffula.kernels.program import Site
from truffula.lora.paths import OpenFolder
from truffula.weights.texts import read_texts

ADDED, TOKENIZER_CONFIG = "added_tokens.json", "tokenizer_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", TOKENIZER_CONFIG, ADDED)
TEMPLATES = ("chat_template.jinja", "chat_template.json")
READ = (ADDED, TOKENIZER_CONFIG, *TEMPLATES)
"""The small ones, which are downloaded with an adapter."""
MAX_BYTES = 4 << 20
_QUANTISED = re.compile(r"(?i)(^|[-_./])(bnb|[2-8]-?bit|gptq|awq|nf4|fp4|int[48]|hqq|aqlm|i?q\d(_\w+)?)([-_./]|$)")
_ONLY = "The text files of adapters from the Hub and URLs are not read: download it, and serve it from a folder."
_VARIANTS = re.compile(
    r"[-_.](hf|gguf|awq|gptq|fp8|int[48]|[48]bit|bnb|unsloth|base|instruct|chat|it|q\d\w*|i?q\d_\w+|f16|bf16)\b"
)


def extra_file_warnings(
    folder: OpenFolder, config: Mapping[str, Any], *, sites: Sequence[Site] | None, model: str | None,
    texts_of: str | None = None,
) -> list[str]:  # fmt: skip
    """Warnings for the operator. ``sites`` and ``model`` are the base's; None: they are not checked. ``texts_of``: the
    model whose text files are used in place of the adapter's; None: the adapter's own are.

    Raises ``AdapterError`` (``param``: the file) for added tokens beyond the base's vocabulary, or unknown to a
    tokenizer that is used instead.
    """
    settings = _object(folder, TOKENIZER_CONFIG)
    added = list(_added(folder, settings))
    _check_rows(added, sites)
    warnings = [*_other_base(config.get("base_model_name_or_path"), model)]
    if texts_of is not None:
        _check_known(added, texts_of)
        warnings += _unused_text_files(folder, settings)
    return warnings


def text_files(folder: OpenFolder) -> str:
    """The names of an adapter's own tokenizer and templates; "" without."""
    names = folder.names()
    return ", ".join(name for name in (*TOKENIZERS, *TEMPLATES) if name in names)


def _other_base(named: Any, model: str | None) -> Iterator[str]:
    if not isinstance(named, str) or not named.strip() or model is None:
        return
    one, other = plain_name(named), plain_name(model)
    if one and other and one not in other and other not in one:
        yield (
            f"base_model_name_or_path is {named[:200]!r}, but {model!r} is served: if these are different models, "
            "the adapter's answers are meaningless."
        )
    if _QUANTISED.search(named) and not _QUANTISED.search(model):
        yield (
            f"base_model_name_or_path is {named[:200]!r}, a quantised model: the adapter was trained on rounded "
            f"weights, and on {model!r} its answers may differ slightly from those in training."
        )


def plain_name(model: str) -> str:
    """A model's name without folders, organisation, revision, format, tuning and spelling, in which copies differ."""
    path = PurePosixPath(model.replace("\\", "/"))
    cached = [part.rpartition("--")[2] for part in path.parts if part.startswith("models--")]
    name = (cached[0] if cached else path.name).lower().partition("@")[0].removesuffix(".gguf")
    before = None
    while before != name:
        before, name = name, _VARIANTS.sub("", name)
    return re.sub(r"[^a-z0-9]", "", name)


def _unused_text_files(folder: OpenFolder, settings: Mapping[str, Any]) -> Iterator[str]:
    names = folder.names()
    tokenizers = [name for name in TOKENIZERS if name in names]
    templates = [name for name in TEMPLATES if name in names]
    if settings.get("chat_template"):
        templates.append(f"chat_template in {TOKENIZER_CONFIG}")
    if tokenizers:
        yield f"Its own tokenizer ({', '.join(tokenizers)}) is not used: prompts are tokenized with the base's. {_ONLY}"
    if templates:
        yield f"Its own chat template ({', '.join(templates)}) is not used: chats are rendered with the base's. {_ONLY}"


def _added(folder: OpenFolder, settings: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
    """File, id and text of each token that the files add."""
    decoder = settings.get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        if key.isdecimal():
            text = entry.get("content") if isinstance(entry, dict) else None
            number = int(key.lstrip("0")[:20] or 0)  # Python limits the digits of an int
            yield TOKENIZER_CONFIG, number, text if isinstance(text, str) else ""
    for text, value in _object(folder, ADDED).items():
        if isinstance(value, int):
            yield ADDED, value, text


def _check_rows(added: Sequence[tuple[str, int, str]], sites: Sequence[Site] | None) -> None:
    """Every id of an added token must have a row in the adapter's tables, or the base's."""
    tables = [site.in_features if site.kind == "embed" else site.out_features for site in sites or () if _table(site)]
    name, highest, _ = max(added, key=lambda one: one[1], default=("", 0, ""))
    if tables and highest >= min(tables):
        raise AdapterError(
            f"{name} adds token {highest}, but the adapter's tables, or the base's, have {min(tables)} rows. Save the "
            "adapter with save_embedding_layers=True after resize_token_embeddings, or train it without added tokens.",
            param=name, found=highest, limit=min(tables),
        )  # fmt: skip


def _check_known(added: Sequence[tuple[str, int, str]], base: str) -> None:
    """The base's tokenizer must know every added token."""
    if not added or not base:
        return
    known = b"\n".join(read_texts(Path(base)).tokenizer.values())
    for name, number, text in added:
        if text and not any(json.dumps(text, ensure_ascii=plain).encode() in known for plain in (True, False)):
            raise AdapterError(f"{name} adds token {number}, {text[:80]!r}. {_ONLY}", param=name, found=number)


def _table(site: Site) -> bool:
    return site.kind in ("embed", "head")


def _object(folder: OpenFolder, name: str) -> dict[str, Any]:
    """The JSON object in a file that may be missing; empty when it can't be read as one."""
    try:
        found = json.loads(folder.read(name, MAX_BYTES) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
