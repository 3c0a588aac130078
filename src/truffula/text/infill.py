"""Prompts that ask for the text between a beginning and an end, in the form that the model was trained on."""

from __future__ import annotations

from truffula.errors import InvalidRequest
from truffula.text.tokenizer import Tokenizer

# The tokens around the two texts, in the order in which the model reads them.
_FORMS = (
    ("<|fim_prefix|>", "{prompt}", "<|fim_suffix|>", "{suffix}", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "{prompt}", "<fim_suffix>", "{suffix}", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "{prompt}", "<fim-suffix>", "{suffix}", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "{prompt}", "<｜fim▁hole｜>", "{suffix}", "<｜fim▁end｜>"),  # DeepSeek-Coder
    ("▁<PRE>", "{prompt}", "▁<SUF>", "{suffix}", "▁<MID>"),  # Code Llama
    ("[SUFFIX]", "{suffix}", "[PREFIX]", "{prompt}"),  # Codestral
)


def infill_prompt(prompt: str, suffix: str, tokenizer: Tokenizer) -> str:
    """The prompt for the text between ``prompt`` and ``suffix``.

    Raises ``InvalidRequest`` where the vocabulary has no tokens for that.
    """
    known = {tokenizer.id_to_token(i) for i in tokenizer.added_ids}
    for form in _FORMS:
        if known.issuperset(part for part in form if part not in ("{prompt}", "{suffix}")):
            texts = {"{prompt}": prompt, "{suffix}": suffix}
            return "".join(texts.get(part, part) for part in form)
    raise InvalidRequest(
        "suffix needs a model that fills in text, and this model's vocabulary has no tokens for that, such as "
        "<|fim_prefix|>; leave it out.",
        param="suffix",
    )
