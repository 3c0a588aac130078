"""The base of executables that finish a step within ``submit``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from truffula.errors import KernelError
from truffula.kernels.inputs import RELAY, Float32, Int32, SampleInputs, SequenceSampling, StepInputs, StepOutput
from truffula.kernels.program import Output


@dataclass(frozen=True)
class FinishedStep:
    """A ``PendingStep`` with its outcome: the output, or the error that ``result`` raises."""

    outcome: StepOutput | Exception

    def done(self) -> bool:
        return True

    def result(self) -> StepOutput:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class SynchronousExecutable(ABC):
    """``submit`` runs and samples before it returns; ``depth`` is 1.

    Subclasses implement ``run``, ``logits``, ``sample`` and ``_start_sampling``. This class keeps the last token of
    each sequence slot, for ``RELAY``. ``output`` is the program's.
    """

    depth = 1

    def __init__(self, inputs: StepInputs, samples: SampleInputs, output: Output) -> None:
        self.inputs = inputs
        self.samples = samples
        self._output = output
        self._last_drawn = np.full(len(inputs.seq_slot), RELAY, np.int32)

    def prepare(self) -> None:  # noqa: B027  (most have nothing to do)
        """Nothing to do."""

    def submit(self, wait_for_masks: Callable[[], None] | None = None) -> FinishedStep:
        try:
            self._insert_relayed()
            self.run()
            if wait_for_masks is not None:
                wait_for_masks()
            output = self.sample() if self._output.kind == "logits" else _of_vectors(self.logits())
        except Exception as error:  # noqa: BLE001  (``result`` raises it)
            return FinishedStep(error)
        if output.vectors is None:
            drawn = self.samples.target[: len(output.ids)] < 0
            self._last_drawn[self.samples.row_slot[: len(output.ids)][drawn]] = output.ids[drawn]
        return FinishedStep(output)

    def set_sequence(self, slot: int, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling) -> None:
        if not 0 <= slot < len(self._last_drawn):
            raise KernelError(f"sequence slot {slot} is not between 0 and {len(self._last_drawn) - 1}.", param="slot")
        self._start_sampling(slot, prompt_ids, completion_ids, sampling)
        self._last_drawn[slot] = completion_ids[-1] if len(completion_ids) else RELAY

    def adapter_ready(self, slot: int) -> bool:
        """True: an adapter is usable when ``adapter`` returns."""
        del slot
        return True

    @abstractmethod
    def run(self) -> None:
        """One forward pass over ``inputs``."""

    @abstractmethod
    def logits(self) -> Float32:
        """A copy of the last pass's result ``[R, width]``."""

    @abstractmethod
    def sample(self) -> StepOutput:
        """Draw or score an id for each row of the last pass's logits. When it raises, no draw is counted."""

    @abstractmethod
    def _start_sampling(
        self, slot: int, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling
    ) -> None: ...

    def _insert_relayed(self) -> None:
        i = self.inputs
        relayed = i.token_ids[: i.T] == RELAY
        if not relayed.any():
            return
        rows = np.flatnonzero(relayed)
        sequences = np.searchsorted(i.q_start[1 : i.N + 1], rows, side="right")
        tokens = self._last_drawn[i.seq_slot[sequences]]
        if (tokens == RELAY).any():
            raise KernelError("token_ids: a row relays a token of a sequence that has drawn none.", param="token_ids")
        i.token_ids[rows] = tokens


def _of_vectors(vectors: Float32) -> StepOutput:
    rows = len(vectors)
    finite = np.asarray(np.isfinite(vectors).all(axis=1), np.bool_)
    no_tops = np.zeros((rows, 0), np.int32), np.zeros((rows, 0), np.float32)
    return StepOutput(np.full(rows, -1, np.int32), np.zeros(rows, np.float32), finite, *no_tops, vectors)
