"""Differences between the predictions of two computations of one model: KL, top-1 agreement, perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
_ROWS = 64
"""Rows per chunk: float64 copies of whole texts would take gigabytes."""


@dataclass(frozen=True)
class Divergence:
    """The divergence of another computation from a base, over ``positions``.

    ``kl_mean``, ``kl_p99`` and ``kl_max`` are KL(base || other) in nats per position, ``same_top1`` the share of
    positions with the same most likely token, ``perplexity`` the other's, of the given texts (NaN when every text has
    one token). ``logit_diff_max`` is the largest absolute difference of two logits,
    ``logit_diff_p99`` the 99th percentile of the largest difference per position.
    """

    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    same_top1: float
    perplexity: float
    logit_diff_max: float
    logit_diff_p99: float


@dataclass
class Divergences:
    """Accumulates the divergence over texts."""

    _kl: list[Float64] = field(default_factory=list)
    _surprise: list[Float64] = field(default_factory=list)
    _same: int = 0
    _differences: list[Float32] = field(default_factory=list)

    def add(self, base: Float32, other: Float32, ids: Sequence[int]) -> None:
        """Add one text: the float32 logits ``[T, V]`` of both after each of its T ``ids``.

        Raises ``ValueError`` for other shapes.
        """
        if base.shape != other.shape or len(base) != len(ids):
            raise ValueError(f"logits {base.shape} and {other.shape} for {len(ids)} ids")
        for lo in range(0, len(ids), _ROWS):
            ours, theirs = base[lo : lo + _ROWS], other[lo : lo + _ROWS]
            p, q = log_softmax(ours), log_softmax(theirs)
            self._kl.append((np.exp(p) * (p - q)).sum(-1))
            self._same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            self._differences.append(np.abs(ours - theirs).max(-1))
            follow = np.asarray(ids[lo + 1 : lo + 1 + len(q)], np.int64)
            self._surprise.append(-q[np.arange(len(follow)), follow])

    def result(self) -> Divergence:
        """The divergence over all added texts. Raises ``ValueError`` when there are none."""
        if not self._kl:
            raise ValueError("no text was added")
        kl, surprise = np.concatenate(self._kl), np.concatenate(self._surprise)
        off = np.concatenate(self._differences)
        return Divergence(
            positions=len(kl),
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            same_top1=self._same / len(kl),
            perplexity=float(np.exp(surprise.mean())) if len(surprise) else float("nan"),
            logit_diff_max=float(off.max()),
            logit_diff_p99=float(np.quantile(off, 0.99)),
        )


def log_softmax(logits: Float32) -> Float64:
    """Log-softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    made: Float64 = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return made
