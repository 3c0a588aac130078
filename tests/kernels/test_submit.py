"""The step contract of ``kernels/backend.py``, on every backend and on the hash model at depth 1 and 2."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hash_model import Faults, HashModel, Misuse
from kernel_backends import BEST
from llama_program import Shape, llama_program
from test_validate_program import vector_program

from truffula.errors import DeviceLost, GenerationError, KernelError
from truffula.kernels.backend import Executable
from truffula.kernels.inputs import NO_IDS, RELAY, Capacity, SequenceSampling
from truffula.testing.programs import Part, fill_step, pull_from, random_adapter, random_weights

S, V = 4, Shape().vocab
CAPACITY = Capacity(
    max_tokens=24, max_seqs=4, max_logit_rows=16, max_segments=4, num_blocks=20, block_size=S, max_blocks_per_seq=6
)
PROMPTS = ((1, 2, 3, 4, 5), (6, 7))
BLOCKS = ((1, 2, 3), (4, 5, 6))


def loaded(name: str) -> Executable:
    program = llama_program()
    return BEST[name].load(program, "float32", pull_from(random_weights(program)), CAPACITY)


MAKERS: dict[str, Callable[[], Executable]] = {
    **{name: lambda name=name: loaded(name) for name in BEST},
    "hash": lambda: HashModel(CAPACITY, V),
    "hash, depth 2": lambda: HashModel(CAPACITY, V, depth=2),
}
on_every_executable = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def fill(executable: Executable, step: int, ids: list[tuple[int, ...]]) -> None:
    """Both sequences' prompts in step 0; then one token of each."""
    starts = [0 if step == 0 else len(prompt) + step - 1 for prompt in PROMPTS]
    parts = [Part(of, start, blocks) for of, start, blocks in zip(ids, starts, BLOCKS, strict=True)]
    fill_step(executable.inputs, parts, S)
    executable.samples.row_slot[:2], executable.samples.target[:2] = (0, 1), -1
    executable.samples.draw[:2] = step


def begin(executable: Executable, **sampling) -> None:
    for slot, prompt in enumerate(PROMPTS):
        executable.set_sequence(slot, np.array(prompt, np.int32), NO_IDS, SequenceSampling(seed=slot, **sampling))


def generate(executable: Executable, steps: int) -> list[list[int]]:
    ids: list[tuple[int, ...]] = list(PROMPTS)
    drawn = []
    for step in range(steps):
        fill(executable, step, ids)
        drawn.append(executable.submit().result().ids.tolist())
        ids = [(token,) for token in drawn[-1]]
    return drawn


WARM = {"temperature": 1.0, "frequency": 1.0, "repetition": 1.3}


@on_every_executable
def test_a_relayed_token_is_the_one_drawn_last(make):
    """Also when the step that draws it is unfinished, as far as the executable's depth goes."""
    known = make()
    begin(known, **WARM)
    wanted = generate(known, 6)
    executable = make()
    begin(executable, **WARM)
    ids: list[tuple[int, ...]] = list(PROMPTS)
    pending, drawn = [], []
    for step in range(6):
        fill(executable, step, ids)
        pending.append(executable.submit())
        if len(pending) == executable.depth:
            drawn.append(pending.pop(0).result().ids.tolist())
        ids = [(RELAY,), (RELAY,)]
    drawn += [step.result().ids.tolist() for step in pending]
    assert drawn == wanted


@on_every_executable
def test_a_token_may_be_relayed_that_was_drawn_before_a_restart(make):
    executable = make()
    begin(executable, **WARM)
    first, second = generate(executable, 2)
    for slot, prompt in enumerate(PROMPTS):
        known = np.array([first[slot]], np.int32)
        executable.set_sequence(slot, np.array(prompt, np.int32), known, SequenceSampling(seed=slot, **WARM))
    fill(executable, 1, [(RELAY,), (RELAY,)])
    assert executable.submit().result().ids.tolist() == second


@on_every_executable
def test_a_result_may_be_asked_for_again_and_a_step_submitted_again(make):
    executable = make()
    begin(executable, **WARM)
    fill(executable, 0, list(PROMPTS))
    step = executable.submit()
    assert step.result().ids.tolist() == step.result().ids.tolist()
    assert step.done()
    drawn = step.result().ids.tolist()
    fill(executable, 0, list(PROMPTS))
    assert executable.submit().result().ids.tolist() == drawn
    assert generate(executable, 3)[0] == drawn


@pytest.mark.parametrize("name", BEST)
@pytest.mark.parametrize("wrong", ["seg", "token", "row_slot", "relay"])
def test_a_step_that_fails_raises_its_error_with_its_result_and_draws_nothing(name, wrong):
    sane = loaded(name)
    begin(sane, **WARM)
    wanted = generate(sane, 3)
    executable = loaded(name)
    begin(executable, **WARM)
    ids = list(PROMPTS)
    for step in range(3):
        fill(executable, step, ids)
        match wrong:
            case "seg":
                executable.inputs.G, executable.inputs.seg[0] = 1, (0, 1, 3)
            case "token":
                executable.inputs.token_ids[0] = V + 1
            case "row_slot":
                executable.samples.row_slot[1] = 3
            case "relay":
                executable.inputs.seq_slot[0], executable.inputs.token_ids[0] = 3, RELAY
        failed = executable.submit()
        assert failed.done()
        with pytest.raises((KernelError, IndexError)):
            failed.result()
        fill(executable, step, ids)
        assert executable.submit().result().ids.tolist() == wanted[step]
        ids = [(token,) for token in wanted[step]]


@on_every_executable
def test_a_mask_may_be_written_until_its_wait_returns(make):
    """The error of the wait is the step's, which drew nothing and may be submitted again."""
    free = make()
    begin(free, **WARM)
    wanted = generate(free, 1)[0]
    executable = make()
    begin(executable, **WARM)
    only = (wanted[0] + 1) % V
    fill(executable, 0, list(PROMPTS))
    samples = executable.samples
    waits = []

    def fail() -> None:
        raise GenerationError("no mask")

    def write() -> None:
        waits.append(only)
        samples.mask[1] = 0
        samples.mask[1, only // 32] = 1 << only % 32

    samples.mask_row[:2] = 1, -1
    failed = executable.submit(fail)
    with pytest.raises(GenerationError, match="no mask"):
        failed.result()
    fill(executable, 0, list(PROMPTS))
    samples = executable.samples
    samples.mask_row[:2] = 1, -1
    assert executable.submit(write).result().ids.tolist() == [only, wanted[1]]
    assert waits == [only]


@on_every_executable
def test_scores_are_the_models_own(make):
    """A row with a target gives its logprob whatever the sequence's parameters, and draws nothing."""
    executable = make()
    begin(executable, temperature=0.5, top_k=1, n_prompt_logprobs=V, warped=True, frequency=9.0)
    fill(executable, 0, list(PROMPTS))
    executable.samples.target[:2] = 3, 4
    output = executable.submit().result()
    assert output.ids.tolist() == [3, 4]
    raw = executable.logits().astype(np.float64)
    logs = raw - np.log(np.exp(raw).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(output.logprob, [logs[0, 3], logs[1, 4]], rtol=1e-5)
    np.testing.assert_allclose(output.top_logprobs, -np.sort(-logs, axis=1), rtol=1e-4)


@on_every_executable
def test_a_step_without_rows_has_an_empty_output(make):
    executable = make()
    begin(executable)
    fill(executable, 0, list(PROMPTS))
    executable.inputs.R = 0
    output = executable.submit().result()
    assert (output.ids.shape, output.top_ids.shape) == ((0,), (0, 0))


@pytest.mark.parametrize("name", BEST)
def test_a_program_of_vectors_gives_them(name):
    program = vector_program()
    executable = BEST[name].load(program, "float32", pull_from(random_weights(program)), CAPACITY)
    fill(executable, 0, list(PROMPTS))
    output = executable.submit().result()
    assert output.vectors is not None and np.array_equal(output.vectors, executable.logits())
    assert output.vectors.shape == (2, program.output.width) and np.isfinite(output.vectors).all()
    assert (output.ids.tolist(), output.finite.tolist()) == ([-1, -1], [True, True])


@pytest.mark.parametrize("name", BEST)
@pytest.mark.parametrize("slot", [-1, CAPACITY.max_seqs])
def test_a_slot_that_there_is_not_is_refused(name, slot):
    with pytest.raises(KernelError, match="slot"):
        loaded(name).set_sequence(slot, NO_IDS, NO_IDS, SequenceSampling())


# The hash model as a guard


def hash_model(depth: int = 2, **faults) -> HashModel:
    model = HashModel(CAPACITY, V, depth=depth)
    model.faults = Faults(**faults)
    begin(model)
    return model


def test_misuse_is_noticed():
    with pytest.raises(Misuse, match="before set_sequence"):
        generate(HashModel(CAPACITY, V), 1)
    model = hash_model()
    fill(model, 0, list(PROMPTS))
    model.submit()
    fill(model, 1, [(RELAY,), (RELAY,)])
    model.submit()
    with pytest.raises(Misuse, match="unfinished"):
        model.submit()
    for spoil, message in (
        (lambda m: m.inputs.token_ids.__setitem__(0, 9), "written to"),
        (lambda m: m.samples.draw.__setitem__(0, 9), "written to"),
    ):
        model = hash_model(1)
        fill(model, 0, list(PROMPTS))
        step = model.submit()
        spoil(model)
        with pytest.raises(Misuse, match=message):
            step.result()
    model = hash_model()
    fill(model, 0, list(PROMPTS))
    model.inputs.seq_slot[:2] = 1
    with pytest.raises(Misuse, match="one slot"):
        model.submit()
    model = hash_model()
    fill(model, 0, [(RELAY,), PROMPTS[1]])
    step = model.submit()
    with pytest.raises(Misuse, match="has drawn none"):
        step.result()


def test_a_fault_ends_its_step_and_the_unfinished_ones_behind_it():
    wanted = generate(hash_model(), 3)
    model = hash_model(raise_on_step=2)
    fill(model, 0, list(PROMPTS))
    first = model.submit()
    fill(model, 1, [(RELAY,), (RELAY,)])
    second = model.submit()
    assert first.result().ids.tolist() == wanted[0]
    fill(model, 2, [(RELAY,), (RELAY,)])
    third = model.submit()
    assert not (second.done() or third.done())
    with pytest.raises(KernelError, match="scripted"):
        second.result()
    assert third.done()
    with pytest.raises(KernelError, match="scripted"):
        third.result()
    fill(model, 1, [(token,) for token in wanted[0]])
    assert model.submit().result().ids.tolist() == wanted[1]
    fill(model, 2, [(token,) for token in wanted[1]])
    assert model.submit().result().ids.tolist() == wanted[2]


def test_a_fault_may_follow_one_sequence():
    model = hash_model(raise_on_token=7, error=MemoryError())
    fill(model, 0, list(PROMPTS))
    with pytest.raises(MemoryError):
        model.submit().result()
    fill_step(model.inputs, [Part(PROMPTS[0], 0, BLOCKS[0])], S)
    assert model.submit().result().finite.all()


def test_a_lost_device_stays_lost():
    model = hash_model(lost_on_step=2)
    fill(model, 0, list(PROMPTS))
    assert model.submit().result().finite.all()
    for _ in range(2):
        fill(model, 0, list(PROMPTS))
        with pytest.raises(DeviceLost):
            model.submit().result()


def test_an_adapter_may_be_dropped_behind_an_unfinished_step():
    model = hash_model()
    slot = model.adapter(random_adapter(llama_program()))
    assert model.adapter_ready(slot)
    fill_step(model.inputs, [Part(PROMPTS[0], 0, BLOCKS[0], slot)], S)
    step = model.submit()
    model.drop_adapter(slot)
    assert step.result().finite.all()
    fill_step(model.inputs, [Part(PROMPTS[0], 0, BLOCKS[0], slot)], S)
    with pytest.raises(Misuse, match="dropped"):
        model.submit()
