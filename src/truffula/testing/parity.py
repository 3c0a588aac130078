"""Compares a model with transformers (and an adapter with peft), op by op, for ``truffula verify``.

Both compute the same ids; the output of each op is compared with the value that its probe names. The first divergence
is the first op, in program order, whose error is above the tolerance; all ops before it agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from truffula.errors import InvalidRequest
from truffula.kernels.adapters import SiteTensors, make_image
from truffula.kernels.backend import Array, Backend, Executable, as_array
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Linear, ModelInterface, Op, Probe, Program, WeightDecl
from truffula.kernels.select import select_backend
from truffula.lora.peft import BaseFacts, validate_adapter
from truffula.lora.tables import BaseTable, base_tables
from truffula.model.load import ModelPlan, WeightReader, plan_model
from truffula.testing.drive import Driver, capacity_for
from truffula.testing.oracle import Oracle
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
class Perturbation:
    """A deliberate error in truffula's computation, for tests of ``verify``. Each field changes its argument."""

    program: Callable[[Program], Program] = lambda program: program
    weight: Callable[[WeightDecl, Sequence[Array]], Sequence[Array]] = lambda decl, parts: parts
    adapter: Callable[[Sequence[SiteTensors]], Sequence[SiteTensors]] = lambda sites: sites


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
    prompts: Sequence[str | Sequence[int]] | None = None,
    adapter: Path | None = None,
    dtype: str = "float32",
    backend: str | Backend = "reference",
    new_tokens: int = 16,
    tolerance: float = TOLERANCE,
    perturb: Perturbation | None = None,
    oracle: Oracle | None = None,
) -> VerifyReport:
    """Compare the model at ``path`` (with ``adapter``) with transformers (and peft).

    Args:
        path: A model folder or a ``.gguf`` file.
        prompts: Texts (when the model has a tokenizer) or ids; None: ``DEFAULT_PROMPTS``.
        adapter: A PEFT folder, or None for the base.
        dtype: Compute dtype of both. In bfloat16 they round at different places: expect errors up to 2e-2.
        backend: truffula's backend, or its name in ``kernels/select.py``. It gets the dequantised values of quantised
            files.
        new_tokens: Number of greedy tokens to compare after each prompt.
        tolerance: Limit of an op's relative error.
        perturb: Changes truffula's computation; for tests.
        oracle: The same model, adapter and dtype in transformers, if it is already loaded.

    Raises:
        TruffulaError: The model or the adapter is not supported, or a library of the comparison is missing.

    Cost: both models in memory, and a forward pass of each per prompt.
    """
    change = perturb or Perturbation()
    chosen = select_backend(backend, "cpu") if isinstance(backend, str) else backend
    checkpoint = open_checkpoint(path)
    try:
        plan = plan_model(checkpoint)
        program = change.program(plan.program)
        sequences = prompts_as_ids(checkpoint, plan, prompts)
        capacity = capacity_for(max(len(ids) for ids in sequences) + new_tokens)
        executable = _load(chosen, checkpoint, plan, program, dtype, capacity, change)
        try:
            tables = base_tables(plan.tables, checkpoint)
            slot = None if adapter is None else attach_folder(executable, adapter, program, tables, change)
            oracle = oracle or Oracle(path, tied=plan.tying.tie is not Tie.SEPARATE, adapter=adapter, dtype=dtype)
            comparison = _Comparison(program)
            for ids in sequences:
                comparison.add(executable, capacity, slot, oracle, ids, new_tokens)
        finally:
            executable.close()
        return VerifyReport(
            model=str(path),
            model_type=plan.spec.model_type,
            adapter=None if adapter is None else str(adapter),
            backend=describe(chosen),
            dtype=dtype,
            tying=plan.tying.reason,
            tolerance=tolerance,
            rows=comparison.rows(),
            first_divergence=next((row for row in comparison.rows() if not row.error <= tolerance), None),
            max_logit_diff=comparison.logit_diff,
            tokens_equal=comparison.tokens_equal,
            tokens_compared=comparison.tokens_compared,
            near_ties=comparison.near_ties,
            warnings=(*plan.warnings, *oracle.notes),
        )
    finally:
        checkpoint.close()


def describe(backend: Backend) -> str:
    """The name and the instruction set of a backend: ``cpu (avx2)``."""
    return f"{backend.name} ({backend.isa})" if backend.isa else backend.name


def _load(
    backend: Backend,
    checkpoint: Checkpoint,
    plan: ModelPlan,
    program: Program,
    dtype: str,
    capacity: Capacity,
    change: Perturbation,
) -> Executable:
    pull = WeightReader(checkpoint, plan)
    executable = backend.load(
        program, dtype, lambda decl: change.weight(decl, [as_array(part) for part in pull(decl)]), capacity, debug=True
    )
    pull.finish()
    return executable


def attach_folder(
    executable: Executable,
    folder: Path,
    interface: ModelInterface,
    tables: Mapping[str, BaseTable],
    change: Perturbation = Perturbation(),
) -> int:
    """The slot of the PEFT adapter in ``folder``, validated as in a server."""
    adapter = validate_adapter(folder, interface.sites, base=BaseFacts(interface.name, tables))
    sites = change.adapter(adapter.sites)
    return executable.adapter(make_image(executable.layout, sites, generation=adapter.generation))


def prompts_as_ids(
    checkpoint: Checkpoint, plan: ModelPlan, prompts: Sequence[str | Sequence[int]] | None
) -> list[list[int]]:
    """``prompts`` as ids; None: ``DEFAULT_PROMPTS``, or random ids when the model has no tokenizer."""
    tokenizer = load_tokenizer(read_texts(checkpoint.path).tokenizer)
    if prompts is None and tokenizer is None:
        rng = np.random.default_rng(0)
        return [rng.integers(0, plan.spec.vocab_size, count).tolist() for count in (5, 17, 33)]
    sequences = []
    for prompt in prompts if prompts is not None else DEFAULT_PROMPTS:
        if not isinstance(prompt, str):
            sequences.append([int(item) for item in prompt])
        elif tokenizer is None:
            raise InvalidRequest("This model has no tokenizer; give prompts as token ids.", param="prompts")
        else:
            sequences.append(tokenizer.encode(prompt))
    if not sequences or not all(sequences):
        raise InvalidRequest("verify needs at least one prompt, and none may be empty.", param="prompts")
    return sequences


@dataclass(frozen=True)
class _Check:
    """Compare columns ``lo .. hi`` of the output of op ``index`` with the value of ``probe``."""

    index: int
    op: Op
    probe: Probe
    lo: int
    hi: int


@dataclass
class _Comparison:
    """The largest differences so far, by op."""

    program: Program
    worst: dict[int, OpRow] = field(default_factory=dict)
    logit_diff: float = 0.0
    tokens_equal: bool = True
    tokens_compared: int = 0
    near_ties: int = 0

    def add(
        self, executable: Executable, capacity: Capacity, slot: int | None, oracle: Oracle, prompt: list[int], new: int
    ) -> None:
        """Compare one prompt op by op, then the greedy tokens that follow it."""
        checks = _checks(self.program)
        logits = Driver(executable, capacity, slot).feed(prompt)
        ours = {check.index: executable.tap(check.index) for check in checks}
        theirs, seen = oracle.observe(prompt, {(check.probe, check.op.layer) for check in checks})
        self.logit_diff = max(self.logit_diff, float(np.abs(logits - theirs).max()))
        for check in checks:
            self._row(check, ours[check.index][:, check.lo : check.hi], seen[check.probe])
        # The logits after scale and softcap are not the output of a module, so they are compared separately.
        last = len(self.program.ops) - 1
        self._row(_Check(last, self.program.ops[last], Probe("logits", "out"), 0, theirs.shape[1]), logits, theirs)
        if new:
            self._tokens(executable, capacity, slot, oracle, prompt, new)

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

    def _tokens(
        self, executable: Executable, capacity: Capacity, slot: int | None, oracle: Oracle, prompt: list[int], new: int
    ) -> None:
        """Compare truffula's greedy tokens, one per step, with the oracle's choice after the same tokens."""
        chosen, logits = Driver(executable, capacity, slot).greedy(prompt, new)
        theirs = oracle.logits([*prompt, *chosen[:-1]])[len(prompt) - 1 :]
        self.logit_diff = max(self.logit_diff, float(np.abs(logits - theirs).max()))
        for token, row in zip(chosen, theirs, strict=True):
            self.tokens_compared += 1
            if token != int(row.argmax()):
                near = float(row.max() - row[token]) < NEAR_TIE
                self.near_ties += near
                self.tokens_equal &= near

    def rows(self) -> tuple[OpRow, ...]:
        return tuple(self.worst[index] for index in sorted(self.worst))


def _checks(program: Program) -> list[_Check]:
    """The comparisons: each op's probe; for a fused linear, each slice at its own module."""
    checks = []
    for index, op in enumerate(program.ops):
        if op.probe is None:
            continue
        plain = isinstance(op, Linear) and not op.epilogue.glu and op.epilogue.residual is None
        if isinstance(op, Linear) and plain and len(op.slices) > 1:
            for item in op.slices:
                probe = Probe(program.sites[item.site].module, "out")
                checks.append(_Check(index, op, probe, item.lo, item.hi))
        else:
            checks.append(_Check(index, op, op.probe, 0, _width(op)))
    return checks


def _width(op: Op) -> int:
    ref = getattr(op, "out", None) or op.x  # type: ignore[attr-defined]  # Rope works in place
    return int(ref.width)
