"""Checks the other files of an adapter's folder: the name of its base, a tokenizer and a chat template.

The base's tokenizer and template are used instead of the adapter's, with a warning: most adapters have copies of them.
Added tokens that the base has no row for are an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from truffula.errors import AdapterError
from truffula.kernels.program import Site
from truffula.lora.paths import OpenFolder

ADDED, TOKENIZER_CONFIG = "added_tokens.json", "tokenizer_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", TOKENIZER_CONFIG, ADDED)
TEMPLATES = ("chat_template.jinja", "chat_template.json")
READ = (ADDED, TOKENIZER_CONFIG, *TEMPLATES)
"""The small ones, which are downloaded with an adapter."""
MAX_BYTES = 4 << 20
_QUANTISED = re.compile(r"(?i)(^|[-_./])(bnb|[2-8]-?bit|gptq|awq|nf4|fp4|int[48]|hqq|aqlm|i?q\d(_\w+)?)([-_./]|$)")
_VARIANTS = re.compile(
    r"[-_.](hf|gguf|awq|gptq|fp8|int[48]|[48]bit|bnb|unsloth|base|instruct|chat|it|q\d\w*|i?q\d_\w+|f16|bf16)\b"
)


def extra_file_warnings(
    folder: OpenFolder, config: Mapping[str, Any], *, sites: Sequence[Site] | None, model: str | None
) -> list[str]:
    """Warnings for the operator. ``sites`` and ``model`` are the base's; None: they are not checked.

    Raises ``AdapterError`` (``param``: the file) for added tokens beyond the base's vocabulary.
    """
    return [*_other_base(config.get("base_model_name_or_path"), model), *_unused_text_files(folder, sites)]


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


def _unused_text_files(folder: OpenFolder, sites: Sequence[Site] | None) -> Iterator[str]:
    names = folder.names()
    tokenizers = [name for name in TOKENIZERS if name in names]
    settings = _object(folder, TOKENIZER_CONFIG)
    templates = [name for name in TEMPLATES if name in names]
    if settings.get("chat_template"):
        templates.append(f"chat_template in {TOKENIZER_CONFIG}")
    _check_added(folder, settings, sites)
    if tokenizers:
        yield f"Its own tokenizer ({', '.join(tokenizers)}) is not used: prompts are tokenized with the base's."
    if templates:
        yield f"Its own chat template ({', '.join(templates)}) is not used: chats are rendered with the base's."


def _check_added(folder: OpenFolder, settings: Mapping[str, Any], sites: Sequence[Site] | None) -> None:
    """Every id of an added token must have a row in the base's tables."""
    tables = [site.in_features if site.kind == "embed" else site.out_features for site in sites or () if _table(site)]
    if not tables:
        return
    decoder = settings.get("added_tokens_decoder")
    keys = decoder if isinstance(decoder, dict) else ()
    decoded = [int(key.lstrip("0")[:20] or 0) for key in keys if key.isdecimal()]  # Python limits the digits of an int
    listed = [value for value in _object(folder, ADDED).values() if isinstance(value, int)]
    for name, ids in ((TOKENIZER_CONFIG, decoded), (ADDED, listed)):
        highest = max(ids, default=0)
        if highest >= min(tables):
            raise AdapterError(
                f"{name} adds token {highest}, but the base has {min(tables)} tokens. The adapter was trained with a "
                "larger vocabulary, which is not served; train it without added tokens.",
                param=name,
                found=highest,
                limit=min(tables),
            )


def _table(site: Site) -> bool:
    return site.kind in ("embed", "head")


def _object(folder: OpenFolder, name: str) -> dict[str, Any]:
    """The JSON object in a file that may be missing; empty when it can't be read as one."""
    try:
        found = json.loads(folder.read(name, MAX_BYTES) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
