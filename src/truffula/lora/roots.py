"""The module paths of a text model in different model classes, and the modules that text does not pass through.

A text model's layers are ``model.layers.N`` in its own class and ``model.language_model.layers.N`` in a multimodal
class that contains it. An adapter uses the names of the class it was trained on; the matrices are the same,
so it is served on all of them. Its configuration is read with its own names, as PEFT reads it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

TEXT_ROOTS: Mapping[str, str] = {
    "model.": "lm_head",  # the text class (LlamaForCausalLM, Gemma3ForCausalLM, …)
    "model.language_model.": "lm_head",  # Gemma3-, Llava-, Qwen2VLForConditionalGeneration from transformers 4.52 on
    "language_model.model.": "language_model.lm_head",  # the same classes before
    "model.text_model.": "lm_head",  # Idefics 2 and 3, SmolVLM
    "thinker.model.language_model.": "thinker.lm_head",  # Qwen2.5-Omni
    "thinker.model.": "thinker.lm_head",  # the same before
    "language_model.": "lm_head",  # a multimodal class without its head (Gemma3Model, AutoModel)
    "": "lm_head",  # a text class without its head (LlamaModel, AutoModel)
}
"""Path of the text model → path of the output head, in the same class."""

_OTHER_PART = re.compile(
    r"(?:thinker\.)?(?:model\.)?"
    r"(?P<part>(?:vision|image|video|audio)_(?:tower|model|encoder|projection)|visual|vision_embed_tokens"
    r"|embed_vision|embed_audio|multi_modal_projector|mm_projector|connector|talker|token2wav)\."
)


def other_part(module: str) -> str | None:
    """The image or audio part of a multimodal model that ``module`` lies in, or None. Text does not pass through it."""
    found = _OTHER_PART.match(module)
    return None if found is None else found["part"]


def text_root_of(modules: Iterable[str]) -> str:
    """The text root of a base with these ``modules``: the longest that all begin with."""
    names = list(modules)
    return max((root for root in TEXT_ROOTS if all(name.startswith(root) for name in names)), key=len)


def root_used(modules: Collection[str], tails: Collection[str], own: str) -> str:
    """The text root that most of an adapter's ``modules`` have before one of the base's ``tails``, or whose head they
    are; ``own`` on a tie."""

    def hits(root: str) -> int:
        head = TEXT_ROOTS.get(root) in modules
        return head + sum(module.startswith(root) and module[len(root) :] in tails for module in modules)

    return own if hits(own) == len(modules) else max((own, *TEXT_ROOTS), key=hits)


def tail_of(module: str, tails: Collection[str]) -> tuple[str, str] | None:
    """``module`` split into anything and one of ``tails``, at a dot; None when it does not end with one."""
    parts = module.split(".")
    splits = ((".".join(parts[:at]), ".".join(parts[at:])) for at in range(len(parts)))
    return next(((before + "." if before else "", tail) for before, tail in splits if tail in tails), None)
