"""Compares a model with transformers (and an adapter with peft), op by op, for ``truffula verify``.

Both compute the same ids; the output of each op is compared with the value that its probe names. The first divergence
is the first op, in program order, whose error is above the tolerance; all ops before it agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from truffula.errors import UnsupportedModel
from truffula.kernels.adapters import make_image
from truffula.kernels.backend import Backend, Executable, Part, as_array
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Linear, Op, Probe, Program, RowOrder, WeightDecl
from truffula.kernels.select import select_backend
from truffula.lora.base import BaseWeights, base_source
from truffula.lora.image import NO_FACTS, AdapterFacts, KvPrefix
from truffula.lora.peft import BaseFacts, validate_adapter
from truffula.model.load import ModelPlan, WeightReader, plan_model
from truffula.testing.oracle import Oracle
from truffula.testing.programs import Driver, capacity_for
from truffula.text.tokenizer import load_tokenizer
from truffula.weights.checkpoint import Checkpoint
from truffula.weights.open import open_checkpoint
from truffula.weights.texts import read_texts
from truffula.weights.tying import Tie

Float32 = npt.NDArray[np.float32]

DEFAULT_PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a forest of very tall trees, there lived a",
)
# Relative to the value plus the root mean square of its row, because a few columns are a thousand times larger than the
# others. Rounding differences in float32 reach 3e-5 over SmolLM2's thirty layers.
TOLERANCE = 3e-4
# Rounding may decide between logits this close: such a step is counted as a near-tie, not as an error.
NEAR_TIE = 1e-4


@dataclass(frozen=True)
class OpRow:
    """The largest difference of one op over all prompts: ``error`` relative, ``difference`` absolute.

    ``module`` and ``side`` locate the value in transformers; for a fused op, of the slice with the largest error.
    """

    index: int
    op: str
    kind: str
    layer: int | None
    module: str
    side: str
    error: float
    difference: float


@dataclass(frozen=True)
class VerifyReport:
    """``rows`` in program order. ``tokens_compared`` greedy tokens were compared with transformers', of which
    ``near_ties`` were too close to decide. ``first_divergence`` None: every op agrees within ``tolerance``.
    """

    model: str
    model_type: str
    adapter: str | None
    backend: str
    dtype: str
    tying: str
    tolerance: float
    rows: tuple[OpRow, ...]
    first_divergence: OpRow | None
    max_logit_diff: float
    tokens_equal: bool
    tokens_compared: int
    near_ties: int
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.first_divergence is None and self.tokens_equal


def verify_model(
    path: Path,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    adapter: Path | None = None,
    dtype: str = "float32",
    backend: str | Backend = "reference",
    new_tokens: int = 16,
    tolerance: float = TOLERANCE,
    oracle: Oracle | None = None,
) -> VerifyReport:
    """Compare the model at ``path`` (with ``adapter``) with transformers (and peft).

    Args:
        path: A model folder or a ``.gguf`` file.
        prompts: Token ids; None: ``DEFAULT_PROMPTS``, or random ids when the model has no tokenizer.
        adapter: A PEFT folder, or None for the base.
        dtype: Compute dtype of both. In bfloat16 they round at different places: expect errors up to 2e-2.
        backend: truffula's backend, or its name in ``kernels/select.py``. It gets the dequantised values of quantised
            files.
        new_tokens: Number of greedy tokens to compare after each prompt.
        tolerance: Limit of an op's relative error.
        oracle: The same model, adapter and dtype in transformers, if it is already loaded.

    Raises:
        TruffulaError: The model or the adapter is not supported, or a library of the comparison is missing.

    Cost: both models in memory, and a forward pass of each per prompt.
    """
    chosen = select_backend(backend, "cpu") if isinstance(backend, str) else backend
    with load_model(path, chosen, dtype, prompts, adapter, new_tokens, as_blocks=False) as running:
        plan = running.plan
        oracle = oracle or Oracle(path, tied=plan.tying.tie is not Tie.SEPARATE, adapter=adapter, dtype=dtype)
        comparison = _Comparison(running, oracle)
        for ids in running.prompts:
            comparison.add(ids, new_tokens)
    rows = tuple(comparison.worst[index] for index in sorted(comparison.worst))
    return VerifyReport(
        model=str(path),
        model_type=plan.size.model_type,
        adapter=None if adapter is None else str(adapter),
        backend=describe(chosen),
        dtype=dtype,
        tying=plan.tying.reason,
        tolerance=tolerance,
        rows=rows,
        first_divergence=next((row for row in rows if not row.error <= tolerance), None),
        max_logit_diff=comparison.logit_diff,
        tokens_equal=comparison.tokens_equal,
        tokens_compared=comparison.tokens_compared,
        near_ties=comparison.near_ties,
        warnings=(*plan.warnings, *oracle.notes),
    )


def describe(backend: Backend) -> str:
    """The name and the instruction set of a backend: ``cpu (avx2)``."""
    return f"{backend.name} ({backend.isa})" if backend.isa else backend.name


@dataclass(frozen=True)
class LoadedModel:
    """A model, with the adapter in ``slot`` and its ``facts``, loaded by a backend for a comparison on ``prompts``
    (ids)."""

    plan: ModelPlan
    prompts: list[list[int]]
    executable: Executable
    capacity: Capacity
    slot: int | None
    facts: AdapterFacts = NO_FACTS
    prefix: KvPrefix | None = None

    def driver(self) -> Driver:
        """A new sequence."""
        return Driver(self.executable, self.capacity, self.slot, self.facts, self.prefix)


@contextlib.contextmanager
def load_model(
    path: Path,
    backend: Backend,
    dtype: str,
    prompts: Sequence[Sequence[int]] | None,
    adapter: Path | None,
    new_tokens: int,
    *,
    as_blocks: bool,
) -> Iterator[LoadedModel]:
    """The model at ``path`` with room for the longest of ``prompts`` and ``new_tokens``, closed on exit.

    ``as_blocks``: whether the backend gets matrices as they are stored in the kinds of blocks that it multiplies;
    without it, it gets their values, and the output of each op can be read. The adapter is validated as in a server.
    """
    with contextlib.ExitStack() as opened:
        checkpoint = opened.enter_context(contextlib.closing(open_checkpoint(path)))
        plan = native_plan(checkpoint)
        found, facts = None, NO_FACTS
        if adapter is not None:
            source = base_source(plan, checkpoint, dtype=dtype)
            base = BaseFacts(plan.program.name, opened.enter_context(contextlib.closing(BaseWeights(source))))
            found = validate_adapter(adapter, plan.program.sites, base=base)
            facts = found.facts
        sequences = [list(ids) for ids in prompts or _default_prompts(checkpoint, plan, facts)]
        capacity = capacity_for(len(facts.virtual_ids) + max(len(ids) for ids in sequences) + new_tokens)
        reader = WeightReader(checkpoint, plan, block_kinds=backend.block_kinds if as_blocks else frozenset())

        def pull(decl: WeightDecl) -> Sequence[Part]:
            parts = reader(decl)
            return parts if as_blocks else [as_array(part) for part in parts]

        executable = backend.load(plan.program, dtype, pull, capacity, debug=not as_blocks)
        opened.enter_context(contextlib.closing(executable))
        reader.finish()
        slot = prefix = None
        if found is not None:
            if found.prefix is not None:
                prefix = KvPrefix(facts.kv_ops, found.prefix)
            slot = executable.adapter(make_image(executable.layout, found.sites, generation=found.generation))
        yield LoadedModel(plan, sequences, executable, capacity, slot, facts, prefix)


def native_plan(checkpoint: Checkpoint) -> ModelPlan:
    """The plan of a model that truffula's own code computes.

    Raises:
        UnsupportedModel: transformers' code computes it: there is nothing to compare it with.
    """
    plan = plan_model(checkpoint)
    if plan.transformers is not None:
        raise UnsupportedModel(
            f"{plan.implementation.reason}. verify compares truffula's own implementations with transformers; this "
            "model is compared with its own code at each start.",
            param="model_type",
            value=plan.size.model_type,
        )
    return plan


def _default_prompts(checkpoint: Checkpoint, plan: ModelPlan, facts: AdapterFacts) -> list[list[int]]:
    """Prompts that an activated LoRA acts on from the middle."""
    tokenizer = load_tokenizer(read_texts(checkpoint.path).tokenizer)
    if tokenizer is not None:
        prompts = [tokenizer.encode(prompt) for prompt in DEFAULT_PROMPTS]
    else:
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, plan.interface.vocab_size, count).tolist() for count in (5, 17, 33)]
    called = facts.invocation
    return [[*ids, *called, *ids] for ids in prompts] if called else prompts


@dataclass(frozen=True)
class _Check:
    """Compare ``columns`` of the output of op ``index`` with the value of ``probe``, whose columns ``order`` sorts."""

    index: int
    op: Op
    probe: Probe
    columns: slice
    order: RowOrder | None = None


@dataclass
class _Comparison:
    """The largest differences so far, by op."""

    running: LoadedModel
    oracle: Oracle
    worst: dict[int, OpRow] = field(default_factory=dict)
    logit_diff: float = 0.0
    tokens_equal: bool = True
    tokens_compared: int = 0
    near_ties: int = 0

    def add(self, prompt: list[int], new_tokens: int) -> None:
        """Compare one prompt op by op, then the greedy tokens that follow it."""
        ops = self.running.plan.program.ops
        checks = _checks(self.running.plan.program)
        driver = self.running.driver()
        driver.taps = dict.fromkeys([check.index for check in checks], np.zeros((0, 0), np.float32))
        logits = driver.feed(prompt)
        ours = driver.taps
        theirs, seen = self.oracle.observe(prompt, {(check.probe, check.op.layer) for check in checks})
        self.logit_diff = max(self.logit_diff, float(np.abs(logits - theirs).max()))
        for check in checks:
            theirs_there = seen[check.probe]
            if check.order is not None:
                theirs_there = check.order.sorted(theirs_there.T).T
            self._row(check, ours[check.index][:, check.columns], theirs_there)
        # The logits after scale and softcap are not the output of a module, so they are compared separately.
        self._row(_Check(len(ops) - 1, ops[-1], Probe("logits", "out"), slice(None)), logits, theirs)
        if new_tokens:
            self._tokens(prompt, new_tokens)

    def _row(self, check: _Check, ours: Float32, theirs: Float32) -> None:
        difference = np.abs(ours - theirs)
        scale = np.sqrt(np.mean(np.square(theirs), 1, keepdims=True))
        error = float((difference / np.maximum(scale + np.abs(theirs), 1e-6)).max())
        if check.index in self.worst and error <= self.worst[check.index].error:
            return
        self.worst[check.index] = OpRow(
            index=check.index,
            op=check.op.name,
            kind=type(check.op).__name__,
            layer=check.op.layer,
            module=check.probe.module,
            side=check.probe.side,
            error=error,
            difference=float(difference.max()),
        )

    def _tokens(self, prompt: list[int], count: int) -> None:
        """Compare truffula's greedy tokens, one per step, with the oracle's choice after the same tokens."""
        chosen, logits = self.running.driver().greedy(prompt, count)
        theirs = self.oracle.logits([*prompt, *chosen[:-1]], len(prompt))[len(prompt) - 1 :]
        self.logit_diff = max(self.logit_diff, float(np.abs(logits - theirs).max()))
        for token, row in zip(chosen, theirs, strict=True):
            self.tokens_compared += 1
            if token != int(row.argmax()):
                near = float(row.max() - row[token]) < NEAR_TIE
                self.near_ties += near
                self.tokens_equal &= near


def _checks(program: Program) -> list[_Check]:
    """The comparisons: each op's probe; for a fused linear, each slice at its own module."""
    checks = []
    for index, op in enumerate(program.ops):
        if op.probe is None:
            continue
        plain = isinstance(op, Linear) and not op.epilogue.glu and op.epilogue.residual is None
        if isinstance(op, Linear) and plain and len(op.slices) > 1:
            for item in op.slices:
                module = [part for part in program.sites[item.site].modules if part.hi - part.lo == part.of][-1]
                columns = slice(item.lo, item.hi)
                checks.append(_Check(index, op, Probe(module.name, "out"), columns, module.order))
        else:
            order = program.sites[op.slices[0].site].modules[0].order if isinstance(op, Linear) and plain else None
            checks.append(_Check(index, op, op.probe, slice(None), order))
    return checks
