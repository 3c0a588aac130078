"""Steps whose sequences have several spans of state rows."""

from __future__ import annotations

from hypothesis import strategies as st

from truffula.kernels.inputs import StepInputs


def fill_spans(inputs: StepInputs, lengths: list[list[int]], *, in_place: bool) -> None:
    """One sequence per list, with spans of these lengths. Row 0 begins each; ``in_place``: one state row each."""
    inputs.N, inputs.Z, at, row = len(lengths), 0, 0, 1
    for n, spans in enumerate(lengths):
        before = 0
        for length in spans:
            z, at = inputs.Z, at + length
            inputs.state_in[z], inputs.state_out[z], inputs.span_start[z + 1] = before, row, at
            before, row, inputs.Z = row, row if in_place else row + 1, z + 1
        row = before + 1
        inputs.q_start[n + 1], inputs.kv_len[n] = at, sum(spans)


sequences = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=3)
