"""Decides whether embedding and head are one tensor, for every architecture.

The tensor names in the files decide, not the flag alone: a server that trusts ``tie_word_embeddings`` needs a head that
does not exist, or computes with a random one. ``decide`` is the whole rule as one pure function.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from truffula.errors import TyingError
from truffula.kernels.mapped import release_pages
from truffula.weights.checkpoint import Checkpoint, TensorInfo

FLAG = "tie_word_embeddings"
SPELLINGS = (FLAG, "tie_embedding")
NESTED_CONFIGS = ("text_config", "llm_config", "language_config")
_CHUNK_BYTES = 1 << 20


class Tie(enum.Enum):
    """The ways in which embedding and head are stored."""

    TIED = "tied"
    SEPARATE = "separate"
    REVERSED = "reversed"


@dataclass(frozen=True)
class TyingDecision:
    """``TIED``: the head uses the embedding's tensor. ``REVERSED``: the embedding uses the head's. ``SEPARATE``: two.

    ``reason`` is for the operator (start log, ``inspect``); ``warning`` for the author of the model, or None.
    """

    tie: Tie
    reason: str
    warning: str | None = None


def read_flag(config: Mapping[str, Any]) -> tuple[bool | None, list[str]]:
    """``tie_word_embeddings`` of a config.json (``tie_embedding`` in older LFM2 files), and warnings about it.

    The value is that of the level which owns the head, else of the nested text config. None when it is missing; two
    levels that disagree count as missing, and so does ``null``, both with a warning.

    Raises:
        TyingError: A value that is not a JSON boolean (``1``, ``0``, ``"true"``).
    """
    warnings: list[str] = []
    written: dict[str, bool] = {}
    levels = [("", config)] + [(f"{key}.", config[key]) for key in NESTED_CONFIGS if isinstance(config.get(key), dict)]
    for prefix, level, name in [(*level, name) for level in levels for name in SPELLINGS]:
        if name not in level:
            continue
        value, where = level[name], f"{prefix}{name}"
        if value is None:
            warnings.append(f"{where} is null in config.json, which is treated as if it were absent.")
        elif isinstance(value, bool):
            written[where] = value
        else:
            raise TyingError(f"{where} in config.json is {value!r}; it must be true or false.", param=where)
    if len(set(written.values())) > 1:
        values = ", ".join(f"{where} is {str(value).lower()}" for where, value in written.items())
        return None, [*warnings, f"config.json contradicts itself ({values}); the tables in the files decide."]
    return next(iter(written.values()), None), warnings


def decide(
    flag: bool | None,
    *,
    has_embed: bool,
    has_head: bool,
    equal: bool,
    class_default: bool | None = None,
    same_shape: bool = True,
    embed_name: str,
    head_name: str,
) -> TyingDecision:
    """Tied, separate or reversed, and why.

    Args:
        flag: ``tie_word_embeddings`` as ``read_flag`` read it; None when it is missing.
        has_embed: Whether the files hold the embedding.
        has_head: Whether the files hold any tensor under the head's prefix (a quantised head counts).
        equal: Whether the two are the same bits as stored. Not needed when one is missing or ``flag`` is false.
        class_default: The default of the model's class, for the warnings only. None for GGUF, which expresses tying by
            a missing head: no warning then.
        same_shape: Whether the two have the same shape.
        embed_name: Name of the embedding in the files, for messages.
        head_name: Name of the head in the files, for messages.

    Raises:
        TyingError: A table is missing, or flag and shapes contradict each other; names the tensor and the flag.
    """
    said = f"{FLAG} is not set" if flag is None else f"{FLAG} is {str(flag).lower()}"
    unset, advice = f"config.json does not set {FLAG}", f"The model's author should set {FLAG}:"
    if not has_embed and not has_head:
        why = (
            f"Neither {embed_name} nor {head_name} is in the files: the model has no input table and no head ({said})."
        )
        raise TyingError(why, param=embed_name)
    if flag is False and has_embed and has_head:
        return TyingDecision(Tie.SEPARATE, f"separate: {said} and the files hold {embed_name} and {head_name}")
    if flag is False:
        missing, other = (head_name, embed_name) if has_embed else (embed_name, head_name)
        raise TyingError(
            f"{missing} is not in the files, and config.json says {FLAG}: false, so {other} must not be used in its "
            f"place. If the model is tied, set {FLAG}: true; otherwise the checkpoint is incomplete.",
            param=missing,
            flag=FLAG,
        )
    if not has_head:
        reason = f"tied: {said} and the files hold {embed_name} but no {head_name}"
        warning = f"{unset} and the class assumes false, yet there is no {head_name}. {advice} true."
        return TyingDecision(Tie.TIED, reason, warning if flag is None and class_default is False else None)
    if not has_embed:
        reason = f"reversed: {said} and the files hold {head_name} but no {embed_name}"
        warning = f"{unset} and there is no {embed_name}; {head_name} serves as the input table. {advice} true."
        return TyingDecision(Tie.REVERSED, reason, warning if flag is None else None)
    if flag and not same_shape:
        why = f"{head_name} and {embed_name} have different shapes, yet config.json says {FLAG}: true."
        raise TyingError(why, param=head_name, flag=FLAG)
    if equal and same_shape:
        reason = f"tied: {said} and {head_name} repeats {embed_name} bit for bit; the copy is dropped"
        return TyingDecision(Tie.TIED, reason)
    claim = f"config.json says {FLAG}: true" if flag else f"{unset} and the class assumes true"
    warning = f"{claim}, but {head_name} differs from {embed_name}; both are kept. {advice} false."
    reason = f"separate: {said} but {head_name} differs from {embed_name}"
    return TyingDecision(Tie.SEPARATE, reason, warning if flag or class_default else None)


def equal_as_stored(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Whether two tensors have the same dtype, shape and bytes in the file, in all stored parts.

    A head that is the bfloat16 rounding of a float32 embedding is not equal. Both are read in chunks up to the first
    difference, and their pages are released.
    """
    first, second = checkpoint.tensors[a], checkpoint.tensors[b]
    if (first.dtype, first.shape, len(first.parts)) != (second.dtype, second.shape, len(second.parts)):
        return False
    pairs = zip(first.parts or (first,), second.parts or (second,), strict=True)
    return all(_equal_bytes(checkpoint, left, right) for left, right in pairs)


def _equal_bytes(checkpoint: Checkpoint, first: TensorInfo, second: TensorInfo) -> bool:
    if (first.dtype, first.shape, first.nbytes) != (second.dtype, second.shape, second.nbytes):
        return False
    left, right = checkpoint.bytes_of(first), checkpoint.bytes_of(second)
    same = all(
        np.array_equal(left[start : start + _CHUNK_BYTES], right[start : start + _CHUNK_BYTES])
        for start in range(0, left.size, _CHUNK_BYTES)
    )
    release_pages(left)
    release_pages(right)
    return same
