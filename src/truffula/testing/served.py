"""Hold a model in the arithmetic it is served in (bfloat16, int8) against transformers in float32.

What is rounded cannot agree to 1e-4. It is judged by its predictions: how far the distributions are apart, and how far
below transformers' choice each greedy token is. That weights, program and adapter are right is ``parity.py``'s, in
float32; this says that the arithmetic put on top loses no more than it may.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truffula.config import EngineConfig
from truffula.kernels.backend import Array, Backend, QuantisedArray
from truffula.kernels.cpu.formats import BLOCK_KINDS
from truffula.kernels.program import WeightDecl
from truffula.kernels.select import Precision, choose_dtype, select_backend
from truffula.model.load import ModelPlan, plan_model, puller
from truffula.testing.drive import Driver, capacity_for
from truffula.testing.oracle import Oracle
from truffula.testing.parity import VerifyReport, attach, describe, prompts_as_ids, verify_model
from truffula.testing.predictions import Divergence, Divergences, log_softmax
from truffula.weights.open import open_checkpoint
from truffula.weights.tying import Tie

Parts = Sequence[Array | QuantisedArray]
ChangeWeight = Callable[[WeightDecl, Parts], Parts]


@dataclass(frozen=True)
class Limit:
    """``kl_mean``: of KL(transformers float32 || as served) per position, nats. ``below``: nats that a greedy token may
    be below transformers' likeliest. Several times what correct arithmetic was measured to lose (docs/quantization.md:
    1e-3 in bfloat16, 5e-3 in int8); mistakes are whole nats.
    """

    kl_mean: float
    below: float


BFLOAT16 = Limit(kl_mean=0.01, below=0.5)
INT8 = Limit(kl_mean=0.05, below=1.0)


@dataclass(frozen=True)
class ServedReport:
    """``formats`` are those of matrices in int8, empty on values; ``worst_below`` is of the
    ``tokens_compared`` greedy tokens, which continue the prompts as served."""

    backend: str
    dtype: str
    formats: tuple[str, ...]
    limit: Limit
    divergence: Divergence
    tokens_compared: int
    worst_below: float

    @property
    def arithmetic(self) -> str:
        """In words."""
        held = f"int8 ({', '.join(self.formats)} weights)" if self.formats else "on the values"
        return f"{self.dtype}, {held}"

    @property
    def ok(self) -> bool:
        # Written so that NaN fails.
        return self.divergence.kl_mean <= self.limit.kl_mean and self.worst_below <= self.limit.below


@dataclass(frozen=True)
class ServingReport:
    """``values``: op by op in float32 on the values. ``served`` is None where that is just what is served."""

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
    prompts: Sequence[str | Sequence[int]] | None = None,
    adapter: Path | None = None,
    new_tokens: int = 16,
    change_weight: ChangeWeight = lambda decl, parts: parts,
) -> ServingReport:
    """Whether the model at ``path`` (and ``adapter`` on it) is served right by ``config``'s backend and precision.

    Args:
        path: A model folder or a ``.gguf`` file.
        config: Its backend, instruction set, dtype, ``quantize`` and ``exact`` count, as for an engine.
        threads: To compute with.
        prompts: Texts or ids; None takes a few that are built in.
        adapter: A PEFT folder, or None for the base.
        new_tokens: How many greedy tokens follow each prompt.
        change_weight: A mistake made on purpose where our side computes as served; for tests.

    Raises:
        TruffulaError: The model or the adapter is refused, or a library of the comparison is missing.

    Cost: the model twice in memory (ours and transformers' in float32), a few forward passes of each.
    """
    options: dict[str, Any] = {"threads": threads, "cpu_isa": config.cpu_isa}
    backend = select_backend(
        config.backend, config.device, precision=Precision(config.quantize, config.exact), **options
    )
    checkpoint = open_checkpoint(path)
    try:
        plan = plan_model(checkpoint)
        dtype = choose_dtype(backend, config.dtype, plan.stored_dtype).dtype
        formats = _int8_formats(backend, dtype, plan)
    finally:
        checkpoint.close()
    oracle = Oracle(path, tied=plan.tying.tie is not Tie.SEPARATE, adapter=adapter)
    given: dict[str, Any] = {"prompts": prompts, "adapter": adapter, "new_tokens": new_tokens, "oracle": oracle}
    values = verify_model(path, backend=select_backend(config.backend, config.device, **options), **given)
    if dtype == "float32" and not formats:
        return ServingReport(values, None)
    return ServingReport(values, _served(path, backend, dtype, formats, change_weight, **given))


def _int8_formats(backend: Backend, dtype: str, plan: ModelPlan) -> tuple[str, ...]:
    """The formats of matrices that ``backend`` would multiply in int8; mostly none."""
    memory = backend.plan(plan.program, dtype, capacity_for(1), plan.stored_types)
    return tuple(sorted(name for name in memory.weight_formats if name.upper() in BLOCK_KINDS))


def _served(
    path: Path,
    backend: Backend,
    dtype: str,
    formats: tuple[str, ...],
    change_weight: ChangeWeight,
    *,
    prompts: Sequence[str | Sequence[int]] | None,
    adapter: Path | None,
    new_tokens: int,
    oracle: Oracle,
) -> ServedReport:
    checkpoint = open_checkpoint(path)
    found, below = Divergences(), [0.0]
    tokens = 0
    try:
        plan = plan_model(checkpoint)
        sequences = prompts_as_ids(checkpoint, plan, prompts)
        capacity = capacity_for(max(map(len, sequences)) + new_tokens)
        pull = puller(checkpoint, plan, block_kinds=backend.block_kinds)
        executable = backend.load(plan.program, dtype, lambda decl: change_weight(decl, pull(decl)), capacity)
        try:
            slot = None if adapter is None else attach(executable, adapter, plan.program)
            for ids in sequences:
                chosen = Driver(executable, capacity, slot).greedy(ids, new_tokens)[0] if new_tokens else []
                whole = [*ids, *chosen[:-1]]
                theirs = oracle.logits(whole)
                found.add(theirs, Driver(executable, capacity, slot).feed(whole), whole)
                for token, row in zip(chosen, log_softmax(theirs[len(ids) - 1 :]), strict=bool(chosen)):
                    below.append(float(row.max() - row[token]))
                tokens += len(chosen)
        finally:
            executable.close()
    finally:
        checkpoint.close()
    limit = INT8 if formats else BFLOAT16
    return ServedReport(describe(backend), dtype, formats, limit, found.result(), tokens, max(below))
