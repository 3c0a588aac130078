"""Compares a model in the arithmetic in which it is served (bfloat16, int8) with transformers in float32.

Rounded values do not agree to 1e-4, so predictions are compared: the divergence of the distributions, and how far each
greedy token is below transformers' choice. ``parity.py`` checks weights, program and adapter in float32; this checks
that the served arithmetic loses no more than its limit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from truffula.config import EngineConfig
from truffula.kernels.backend import Backend
from truffula.kernels.cpu.formats import BLOCK_KINDS
from truffula.kernels.select import Precision, choose_dtype, select_backend
from truffula.testing.oracle import Oracle
from truffula.testing.parity import VerifyReport, describe, load_model, native_plan, verify_model
from truffula.testing.predictions import Divergence, Divergences, log_softmax
from truffula.testing.programs import capacity_for
from truffula.weights.open import open_checkpoint
from truffula.weights.tying import Tie


@dataclass(frozen=True)
class Limit:
    """``kl_mean``: of KL(transformers float32 || as served) per position, nats. ``below``: nats that a greedy token may
    be below transformers' most likely token. Limits are several times the measured loss of correct arithmetic
    (docs/quantization.md: 1e-3 in bfloat16, 5e-3 in int8); errors cause whole nats.
    """

    kl_mean: float
    below: float


BFLOAT16 = Limit(kl_mean=0.01, below=0.5)
INT8 = Limit(kl_mean=0.05, below=1.0)


@dataclass(frozen=True)
class ServedReport:
    """``formats``: those of the matrices multiplied in int8, else empty. ``worst_below``: the largest of the
    ``tokens_compared`` greedy tokens, which continue the prompts as served.
    """

    backend: str
    dtype: str
    formats: tuple[str, ...]
    limit: Limit
    divergence: Divergence
    tokens_compared: int
    worst_below: float

    @property
    def arithmetic(self) -> str:
        """A description for messages."""
        products = f"int8 ({', '.join(self.formats)} weights)" if self.formats else "on the values"
        return f"{self.dtype}, {products}"

    @property
    def ok(self) -> bool:
        # Comparisons with NaN are false, so NaN fails.
        return self.divergence.kl_mean <= self.limit.kl_mean and self.worst_below <= self.limit.below


@dataclass(frozen=True)
class ServingReport:
    """``values``: the comparison op by op in float32. ``served``: None when the model is served in the same way."""

    values: VerifyReport
    served: ServedReport | None

    @property
    def ok(self) -> bool:
        return self.values.ok and (self.served is None or self.served.ok)


def verify_serving(
    path: Path,
    config: EngineConfig,
    *,
    threads: int | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    adapter: Path | None = None,
    new_tokens: int = 16,
) -> ServingReport:
    """Check the model at ``path`` (with ``adapter``) as served with ``config``'s backend and precision.

    Args:
        path: A model folder or a ``.gguf`` file.
        config: Its backend, instruction set, dtype, ``quantize`` and ``exact`` are used.
        threads: Number of compute threads.
        prompts: Token ids; None: built-in prompts.
        adapter: A PEFT folder, or None for the base.
        new_tokens: Number of greedy tokens after each prompt.

    Raises:
        TruffulaError: The model or the adapter is not supported, or a library of the comparison is missing.

    Cost: the model twice in memory (the second time in float32 in transformers), a few forward passes of each.
    """
    options: dict[str, Any] = {"threads": threads, "cpu_isa": config.cpu_isa}
    backend = select_backend(
        config.backend, config.device, precision=Precision(config.quantize, config.exact), **options
    )
    with contextlib.closing(open_checkpoint(path)) as checkpoint:
        plan = native_plan(checkpoint)
        dtype = choose_dtype(backend, config.dtype, plan.stored_dtype).dtype
    memory = backend.plan(plan.program, dtype, capacity_for(1), plan.stored_types)
    formats = tuple(sorted(name for name in memory.weight_formats if name.upper() in BLOCK_KINDS))  # those in int8
    oracle = Oracle(path, tied=plan.tying.tie is not Tie.SEPARATE, adapter=adapter)
    given: dict[str, Any] = {"prompts": prompts, "adapter": adapter, "new_tokens": new_tokens, "oracle": oracle}
    values = verify_model(path, backend=select_backend(config.backend, config.device, **options), **given)
    if dtype == "float32" and not formats:
        return ServingReport(values, None)
    return ServingReport(values, check_served(path, backend, dtype, formats, **given))


def check_served(
    path: Path,
    backend: Backend,
    dtype: str,
    formats: tuple[str, ...],
    *,
    prompts: Sequence[Sequence[int]] | None,
    adapter: Path | None,
    new_tokens: int,
    oracle: Oracle,
) -> ServedReport:
    """The part of ``verify_serving`` that compares predictions with those of ``oracle``."""
    found, below = Divergences(), [0.0]
    tokens = 0
    with load_model(path, backend, dtype, prompts, adapter, new_tokens, as_blocks=True) as running:
        for ids in running.prompts:
            chosen = running.driver().greedy(ids, new_tokens)[0] if new_tokens else []
            whole = [*ids, *chosen[:-1]]
            theirs = oracle.logits(whole, len(ids))
            driver = running.driver()
            found.add(theirs, np.concatenate([driver.feed(part) for part in (ids, chosen[:-1]) if part]), whole)
            for token, row in zip(chosen, log_softmax(theirs[len(ids) - 1 :]), strict=bool(chosen)):
                below.append(float(row.max() - row[token]))
            tokens += len(chosen)
    limit = INT8 if formats else BFLOAT16
    return ServedReport(describe(backend), dtype, formats, limit, found.result(), tokens, max(below))
