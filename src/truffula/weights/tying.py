"""Whether the input table and the head are one tensor: decided once, here, for every architecture.

The names in the files decide, not the flag alone: a server that trusts ``tie_word_embeddings`` asks for a head that is
not there, or computes with a random one. ``decide`` is the whole rule as one pure function; a row of its table is a
case.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np

from truffula.errors import TyingError
from truffula.weights.checkpoint import Checkpoint

FLAG = "tie_word_embeddings"
NESTED_CONFIGS = ("text_config", "llm_config", "language_config")
_FIRST_LOOK_BYTES = 4096
_FIRST_LOOKS = 16
_CHUNK_BYTES = 1 << 20


class Tie(enum.Enum):
    """How the two tables are stored."""

    TIED = "tied"
    SEPARATE = "separate"
    REVERSED = "reversed"


@dataclass(frozen=True)
class TyingDecision:
    """``TIED``: the head uses the input table's tensor. ``REVERSED``: the input table is the head's. ``SEPARATE``: two.

    ``reason`` is for the operator (start log, ``inspect``); ``warning`` for the model's author, or None.
    """

    tie: Tie
    reason: str
    warning: str | None = None


@dataclass(frozen=True)
class FlagReading:
    """What a config says of tying: true, false, or None where it says nothing usable; and why, where that is odd."""

    value: bool | None
    warnings: tuple[str, ...] = ()


def read_flag(config: dict[str, Any]) -> FlagReading:
    """``tie_word_embeddings`` of a config.json: at the level that owns the head, else of the nested text config.

    Two levels that disagree count as not written: the files decide. ``null`` is not written, with a warning.

    Raises:
        TyingError: A value that is not a JSON boolean (``1``, ``0``, ``"true"``).
    """
    warnings: list[str] = []
    written: dict[str, bool] = {}
    levels = [("", config)] + [(f"{key}.", config[key]) for key in NESTED_CONFIGS if isinstance(config.get(key), dict)]
    for prefix, level in levels:
        if FLAG not in level:
            continue
        value, where = level[FLAG], f"{prefix}{FLAG}"
        if value is None:
            warnings.append(f"{where} is null in config.json, which is treated as if it were absent.")
        elif isinstance(value, bool):
            written[where] = value
        else:
            raise TyingError(f"{where} in config.json is {value!r}; it must be true or false.", param=where)
    if len(set(written.values())) > 1:
        said = ", ".join(f"{where} is {str(value).lower()}" for where, value in written.items())
        warnings.append(f"config.json contradicts itself ({said}); the tables in the files decide.")
        return FlagReading(None, tuple(warnings))
    return FlagReading(next(iter(written.values()), None), tuple(warnings))


def decide(
    flag: bool | None,
    *,
    has_embed: bool,
    has_head: bool,
    equal: bool | None,
    class_default: bool | None = None,
    same_shape: bool = True,
    embed_name: str,
    head_name: str,
) -> TyingDecision:
    """Tied, separate or reversed, and why.

    Args:
        flag: ``tie_word_embeddings`` as ``read_flag`` read it; None where it is not written.
        has_embed: Whether the files hold the input table.
        has_head: Whether the files hold any tensor under the head's prefix (a quantised head counts).
        equal: Whether the two are the same bits as stored. Needed only where both are there and ``flag`` is not false.
        class_default: What the model's class would assume; words the warnings only. None where a format states tying by
            absence (GGUF): no warning then.
        same_shape: Whether the two tables have one shape.
        embed_name: Name of the input table in the files, for messages.
        head_name: Name of the head in the files, for messages.

    Raises:
        TyingError: No answer would be right; the message names the tensor and the flag.
    """
    if not has_embed and not has_head:
        raise TyingError(
            f"Neither {embed_name} nor {head_name} is in the files: the model has no input table and no head "
            f"({_said(flag)}).",
            param=embed_name,
        )
    if flag is False:
        return _decide_untied(has_embed, has_head, embed_name, head_name)
    if not has_head:
        warning = None
        if flag is None and class_default is False:
            warning = (
                f"config.json does not set {FLAG} and the class assumes false, yet there is no {head_name}: "
                f"the model's author should write {FLAG}: true."
            )
        reason = f"tied: {_said(flag)} and the files hold {embed_name} but no {head_name}"
        return TyingDecision(Tie.TIED, reason, warning)
    if not has_embed:
        warning = None
        if flag is None:
            warning = (
                f"config.json does not set {FLAG} and there is no {embed_name}; {head_name} serves as the "
                f"input table. The model's author should set {FLAG}: true."
            )
        reason = f"reversed: {_said(flag)} and the files hold {head_name} but no {embed_name}"
        return TyingDecision(Tie.REVERSED, reason, warning)
    return _decide_both(flag, equal, same_shape, class_default, embed_name, head_name)


def _decide_untied(has_embed: bool, has_head: bool, embed_name: str, head_name: str) -> TyingDecision:
    if has_embed and has_head:
        return TyingDecision(Tie.SEPARATE, f"separate: {_said(False)} and the files hold {embed_name} and {head_name}")
    missing, there = (head_name, embed_name) if has_embed else (embed_name, head_name)
    raise TyingError(
        f"{missing} is not in the files, and config.json says {FLAG}: false, so {there} must not be used in its place. "
        f"If the model is tied, set {FLAG}: true; otherwise the checkpoint is incomplete.",
        param=missing,
        flag=FLAG,
    )


def _decide_both(
    flag: bool | None, equal: bool | None, same_shape: bool, class_default: bool | None, embed_name: str, head_name: str
) -> TyingDecision:
    if flag is True and not same_shape:
        raise TyingError(
            f"{head_name} and {embed_name} have different shapes, yet config.json says {FLAG}: true.",
            param=head_name,
            flag=FLAG,
        )
    if same_shape and equal is None:
        raise ValueError("both tables are present: say whether they are equal")
    if same_shape and equal:
        return TyingDecision(
            Tie.TIED, f"tied: {_said(flag)} and {head_name} repeats {embed_name} bit for bit; the copy is dropped"
        )
    warning = None
    if flag is True:
        warning = (
            f"config.json says {FLAG}: true, but {head_name} differs from {embed_name}; both are kept. "
            f"The model's author should set {FLAG}: false."
        )
    elif class_default is True:
        warning = (
            f"config.json does not set {FLAG} and the class assumes true, but {head_name} differs from {embed_name}; "
            f"both are kept. The model's author should set {FLAG}: false."
        )
    return TyingDecision(Tie.SEPARATE, f"separate: {_said(flag)} but {head_name} differs from {embed_name}", warning)


def _said(flag: bool | None) -> str:
    return f"{FLAG} is not set" if flag is None else f"{FLAG} is {str(flag).lower()}"


def equal_as_stored(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Whether two tensors are the same bits in the file: one dtype, one shape, every byte.

    A head that is the bf16 rounding of a float32 table is another head. A few places are looked at first, so that the
    common different pair costs next to nothing; else both are read once, in chunks, and released.
    """
    first, second = checkpoint.tensors[a], checkpoint.tensors[b]
    if (first.dtype, first.shape, first.nbytes) != (second.dtype, second.shape, second.nbytes):
        return False
    left, right = checkpoint.raw(a), checkpoint.raw(b)
    for start in range(0, left.size, max(left.size // _FIRST_LOOKS, 1)):
        if not np.array_equal(left[start : start + _FIRST_LOOK_BYTES], right[start : start + _FIRST_LOOK_BYTES]):
            return False
    same = all(
        np.array_equal(left[start : start + _CHUNK_BYTES], right[start : start + _CHUNK_BYTES])
        for start in range(0, left.size, _CHUNK_BYTES)
    )
    checkpoint.release(a)
    checkpoint.release(b)
    return same
