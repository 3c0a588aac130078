"""The lists of items that kernels take, against their definition, row by row and key by key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from truffula.errors import KernelError
from truffula.kernels.inputs import Capacity, StepInputs
from truffula.kernels.triton.work import (
    PIECE_ROWS,
    AttentionCut,
    attention_capacity,
    attention_lists,
    check_places,
    row_lists,
)

segments = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda s: (min(s), max(s))), max_size=4)


@given(st.integers(0, 40), segments)
def test_each_row_is_in_one_piece_with_its_segments_in_order(rows: int, spans: list[tuple[int, int]]) -> None:
    spans = [(min(lo, rows), min(hi, rows)) for lo, hi in spans]
    lists = row_lists(rows, spans)
    seen = []
    for lo, hi, first, count in lists.pieces.tolist():
        assert 0 < hi - lo <= PIECE_ROWS
        for row in range(lo, hi):
            seen.append(row)
            acting = [index for index, (begin, end) in enumerate(spans) if begin <= row < end]
            assert lists.entries[first : first + count].tolist() == acting
    assert seen == list(range(rows))
    wanted = [(lo, hi, first + j, j) for lo, hi, first, count in lists.pieces.tolist() for j in range(count)]
    assert [tuple(item) for item in lists.shrinks.tolist()] == wanted


def inputs_of(lengths: list[tuple[int, int]]) -> StepInputs:
    """Sequences with so many rows after so many keys."""
    capacity = Capacity(256, 8, 8, 1, 64, 4, 64)
    inputs = StepInputs.allocate(capacity, 1)
    inputs.N = len(lengths)
    for n, (before, rows) in enumerate(lengths):
        inputs.q_start[n + 1] = inputs.q_start[n] + rows
        inputs.kv_len[n] = before + rows
    inputs.T = int(inputs.q_start[inputs.N])
    return inputs


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=4),
    st.sampled_from([(None, False), (1, False), (7, False), (40, False), (5, True), (16, True)]),
    st.integers(1, 5), st.integers(0, 12), st.sampled_from([0, 40, 512]),
)  # fmt: skip
def test_each_query_meets_each_of_its_keys_once(lengths, window, queries, enough, partial_rows) -> None:
    window, chunked = window
    inputs, cut = inputs_of(lengths), AttentionCut(8, queries, enough, partial_rows)
    lists = attention_lists(inputs, window, chunked, cut)
    most_items, most_merges = attention_capacity(Capacity(256, 8, 8, 1, 64, 4, 64), cut)
    assert len(lists.items) <= most_items and len(lists.merges) <= most_merges
    assert lists.partial_rows <= partial_rows
    splits: dict[int, list[int]] = {}
    parts: dict[int, list[tuple[int, int]]] = {}
    for n, q0, s0, count, part in lists.items.tolist():
        start, rows = inputs.q_start[n], inputs.q_start[n + 1] - inputs.q_start[n]
        assert part < 0 or count == 1
        for row in range(q0, min(q0 + queries, rows)):
            splits.setdefault(int(start + row), []).extend(range(s0, s0 + count))
            parts.setdefault(int(start + row), []).append((part + row - q0, s0))
            assert part < 0 or part + row - q0 < lists.partial_rows
    assert sorted(splits) == list(range(inputs.T))
    for n in range(inputs.N):
        for row in range(inputs.q_start[n], inputs.q_start[n + 1]):
            position = int(inputs.kv_len[n] - inputs.q_start[n + 1] + row)
            low = 0 if window is None else position // window * window if chunked else max(0, position - window + 1)
            assert len(set(splits[row])) == len(splits[row])
            assert set(range(low // 8, position // 8 + 1)) <= set(splits[row])
    for t, first, count in lists.merges.tolist():
        assert [part for part, _ in sorted(parts[t], key=lambda p: p[1])] == [first + s * queries for s in range(count)]
    apart = any(part >= 0 for part in lists.items[:, 4])
    assert sorted(lists.merges[:, 0].tolist()) == (list(range(inputs.T)) if apart else [])


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("slot_mapping", lambda i: i.slot_mapping.__setitem__((0, 1), 10_000)),
        ("logit_rows", lambda i: i.logit_rows.__setitem__(0, 5)),
        ("kv_len", lambda i: i.kv_len.__setitem__(0, 10_000)),
        ("block_tables", lambda i: i.block_tables.__setitem__((0, 0, 0), -1)),
        ("block_tables", lambda i: i.block_tables.__setitem__((0, 0, 1), 64)),
    ],
)
def test_what_would_be_read_outside_memory_is_an_error(field, spoil) -> None:
    inputs, capacity = inputs_of([(0, 5)]), Capacity(256, 8, 8, 1, 64, 4, 64)
    inputs.block_tables[0, 0, :2] = 1, 2
    inputs.R, inputs.block_tables[0, 0, 2] = 1, -1
    check_places(inputs, capacity, [(0, None, False)])
    spoil(inputs)
    with pytest.raises(KernelError, match=field):
        check_places(inputs, capacity, [(0, None, False)])


def test_a_block_behind_the_window_may_be_freed() -> None:
    inputs, capacity = inputs_of([(7, 1)]), Capacity(256, 8, 8, 1, 64, 4, 64)
    inputs.block_tables[0, 0, :2] = -1, 3
    check_places(inputs, capacity, [(0, 4, False), (0, 4, True)])
    with pytest.raises(KernelError):
        check_places(inputs, capacity, [(0, 5, False)])
    assert np.array_equal(inputs.block_tables[0, 0, :2], [-1, 3])
