"""How much longer a tokenizer's rules can make a text: a model's files may not multiply what clients send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from truffula.errors import CheckpointError

MAX_EXPANSION = 256.0
"""Characters per character. Unicode's own normal forms reach 18, a byte's stand-in 4."""
_FIXED: Mapping[str, float] = MappingProxyType(
    {"NFKC": 18, "NFKD": 18, "NFC": 3, "NFD": 4, "Lowercase": 3, "BertNormalizer": 9, "Precompiled": 18, "ByteLevel": 4}
)


def check_expansion(normalizer: Any, decoder: Any) -> None:
    """Raise ``CheckpointError`` for rules of tokenizer.json that could make a text ``MAX_EXPANSION`` times as long."""
    for name, rule, inside in (("normalizer", normalizer, "normalizers"), ("decoder", decoder, "decoders")):
        found = _expansion(rule, inside)
        if found > MAX_EXPANSION:
            raise CheckpointError(
                f"tokenizer.json: the {name} could make a text {found:.3g} times as long; at most {MAX_EXPANSION:g} is "
                "accepted. Take the file again from where the model comes from.",
                param="tokenizer.json",
            )


def _expansion(rule: Any, inside: str) -> float:
    if not isinstance(rule, Mapping):
        return 1.0
    if rule.get("type") == "Sequence":
        steps = rule.get(inside)
        factor = 1.0
        for step in steps if isinstance(steps, Sequence) else ():
            factor *= _expansion(step, inside)
        return factor
    if rule.get("type") == "Replace":
        written, pattern = str(rule.get("content", "")), rule.get("pattern")
        text = pattern.get("String") if isinstance(pattern, Mapping) else None
        # A regular expression may match between any two characters.
        return max(1.0, len(written) / len(text)) if text else 1.0 + len(written)
    if rule.get("type") == "Prepend":
        return 1.0 + len(str(rule.get("prepend", "")))
    return _FIXED.get(str(rule.get("type")), 1.0)
