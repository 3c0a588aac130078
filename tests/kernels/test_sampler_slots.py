"""A sampler keeps the state of a sequence by slot: it draws what a new one draws that is told the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import SAMPLERS, on_every_sampler
from plain_sampler import PlainSequence, sample_rows
from sampler_rows import V, as_sent, params, sampling_of

from examples import examples
from truffula.errors import KernelError
from truffula.kernels.inputs import NO_IDS, Capacity, SampleInputs, SequenceSampling

SLOTS = 3
tokens = st.lists(st.integers(0, V - 1), max_size=12).map(lambda some: np.array(some, np.int32))
drawing = params.map(lambda row: {**as_sent(row), "target": -1})


def samples(slots: list[int], draws: list[int], targets: list[int] | None = None) -> SampleInputs:
    made = SampleInputs.allocate(Capacity(8, SLOTS, 2 * SLOTS, 1, 1, 1, 1), V)
    made.row_slot[: len(slots)], made.draw[: len(slots)] = slots, draws
    made.target[: len(slots)] = targets or [-1] * len(slots)
    return made


def same(one, other) -> bool:
    fields = ("ids", "logprob", "finite", "top_ids", "top_logprobs")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)


@on_every_sampler
@settings(max_examples=examples(40, 200))
@given(st.lists(st.tuples(tokens, tokens, drawing), min_size=SLOTS, max_size=SLOTS), st.data())
def test_what_was_drawn_before_is_known_however_it_came(sampler, sequences, data):
    """Steps of some of the sequences, of which some are drawn again from an earlier token, and some start anew."""
    kept = sampler(SLOTS, V)
    known = []
    for slot, (prompt, completion, row) in enumerate(sequences):
        kept.set_sequence(slot, prompt, completion, sampling_of(row))
        known.append(completion.tolist())
    for step in range(data.draw(st.integers(1, 6))):
        slots = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True))
        draws = [max(0, len(known[slot]) - data.draw(st.sampled_from([0, 0, 0, 1, 3]))) for slot in slots]
        logits = np.random.default_rng(step).standard_normal((len(slots), V)).astype(np.float32) * 3
        told = sampler(SLOTS, V)
        for slot, draw in zip(slots, draws, strict=True):
            prompt, _, row = sequences[slot]
            told.set_sequence(slot, prompt, np.array(known[slot][:draw], np.int32), sampling_of(row))
        output = kept.sample(logits, samples(slots, draws))
        assert same(output, told.sample(logits, samples(slots, draws)))
        for slot, draw, token in zip(slots, draws, output.ids.tolist(), strict=True):
            known[slot][draw:] = [token]
        if data.draw(st.booleans()):
            slot = data.draw(st.integers(0, SLOTS - 1))
            prompt, _, row = sequences[slot]
            kept.set_sequence(slot, prompt, np.array(known[slot], np.int32), sampling_of(row))


@settings(max_examples=examples(60, 200))
@given(st.lists(st.tuples(tokens, tokens, drawing), min_size=SLOTS, max_size=SLOTS), st.integers(0, 2**32 - 1))
def test_penalties_count_what_the_plain_sampler_counts(sequences, seed):
    """Greedy, without truncation: the ids of several steps are those of a sampler that counts anew for each row."""
    rows = [{**row, "temperature": 0.0, "warped": 0} for _, _, row in sequences]
    logits = np.random.default_rng(seed).standard_normal((5, SLOTS, V)).astype(np.float32)
    for name, sampler in SAMPLERS.items():
        made, plain = sampler(SLOTS, V), {}
        for slot, ((prompt, completion, _), row) in enumerate(zip(sequences, rows, strict=True)):
            made.set_sequence(slot, prompt, completion, sampling_of(row))
            plain[slot] = PlainSequence(prompt, completion, sampling_of(row))
        for step, of_step in enumerate(logits):
            asked = samples([0, 1, 2], [len(completion) + step for _, completion, _ in sequences])
            assert made.sample(of_step, asked).ids.tolist() == sample_rows(of_step, asked, plain).ids.tolist(), name


@on_every_sampler
def test_a_draw_counts_once_and_a_scored_row_not_at_all(sampler):
    made = sampler(SLOTS, V)
    made.set_sequence(0, NO_IDS, NO_IDS, SequenceSampling(frequency=1.0, n_prompt_logprobs=0))
    logits = np.zeros((2, V), np.float32)
    logits[:, 5], logits[:, 6] = 1.5, 1.0
    scored_and_drawn = samples([0, 0], [0, 0], [5, -1])
    for _ in range(3):
        assert made.sample(logits, scored_and_drawn).ids.tolist() == [5, 5]
    assert [made.sample(logits[:1], samples([0], [draw])).ids[0] for draw in (1, 2, 3)] == [6, 5, 0]


@on_every_sampler
def test_a_row_that_is_not_finite_draws_id_0(sampler):
    """A step may be under way that continues it."""
    made = sampler(SLOTS, V)
    made.set_sequence(0, NO_IDS, NO_IDS, SequenceSampling(presence=2.0))
    broken = made.sample(np.full((1, V), np.nan, np.float32), samples([0], [0]))
    assert broken.ids.tolist() == [0] and not broken.finite[0]
    logits = np.array([[1.0, 0.5, *[0.0] * (V - 2)]], np.float32)
    assert made.sample(logits, samples([0], [1])).ids.tolist() == [1]


@on_every_sampler
@pytest.mark.parametrize("wrong", ["no sequence", "no slot", "twice", "draw", "target", "mask row", "empty mask"])
def test_what_is_not_there_is_refused_and_nothing_counted(sampler, wrong):
    made = sampler(SLOTS, V)
    for slot in (0, 1):
        made.set_sequence(slot, NO_IDS, NO_IDS, SequenceSampling(frequency=1.0))
    logits = np.zeros((2, V), np.float32)
    logits[:, 5], logits[:, 6] = 1.5, 1.0
    asked = samples([0, 1], [0, 0])
    match wrong:
        case "no sequence":
            asked.row_slot[1] = 2
        case "no slot":
            asked.row_slot[1] = SLOTS
        case "twice":
            asked.row_slot[1] = 0
        case "draw":
            asked.draw[1] = 1
        case "target":
            asked.target[1] = V
        case "mask row":
            asked.mask_row[1] = SLOTS
        case "empty mask":
            asked.mask_row[1] = 0
            asked.mask[0] = np.uint32(0xFFFFFFFF) << np.uint32(V % 32)  # only ids that there are not
    with pytest.raises((KernelError, ValueError), match=r"row_slot|draw|target|mask"):
        made.sample(logits, asked)
    assert made.sample(logits, samples([0, 1], [0, 0])).ids.tolist() == [5, 5]
    assert made.sample(logits, samples([0, 1], [1, 1])).ids.tolist() == [6, 6]


@on_every_sampler
@pytest.mark.parametrize("where", ["prompt", "completion", "bias", "banned"])
def test_an_id_outside_the_vocabulary_is_refused(sampler, where):
    wrong, made = np.array([1, V], np.int32), sampler(SLOTS, V)
    ids = {name: wrong if name == where else NO_IDS for name in ("prompt", "completion", "bias", "banned")}
    values = np.zeros(len(ids["bias"]), np.float32)
    sampling = SequenceSampling(frequency=1.0, bias_ids=ids["bias"], bias_values=values, banned_ids=ids["banned"])
    with pytest.raises((KernelError, ValueError), match="outside the vocabulary"):
        made.set_sequence(0, ids["prompt"], ids["completion"], sampling)
