"""Gives the native binding nonsense, in a process of its own: ``python binding_fuzz.py PART EXAMPLES [ISA]``.

Each refusal must be one of the errors below. A crash ends the process, which is how the tests that start it know.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_program import Shape, llama_program

from truffula.errors import KernelError
from truffula.kernels.adapters import ALIGN
from truffula.kernels.cpu import _native
from truffula.kernels.cpu.backend import CpuBackend
from truffula.kernels.inputs import Capacity, SampleInputs, SequenceSampling, StepInputs
from truffula.testing.programs import Part, attach, fill_step, pull_from, random_adapter, random_weights

REFUSALS = (ValueError, TypeError, RuntimeError, OverflowError, MemoryError)
S = 4
CAPACITY = Capacity(
    max_tokens=24,
    max_seqs=4,
    max_logit_rows=16,
    max_segments=4,
    num_blocks=20,
    block_size=S,
    max_blocks_per_seq=6,
    num_states=20,
)
NASTY = st.sampled_from(
    [-(2**31), -(2**31) + 1, -65536, -2, -1, 0, 1, 2, 3, 5, 16, 24, 25, 63, 80, 127, 65536, 2**30, 2**31 - 2, 2**31 - 1]
)
ARRAYS = (
    "token_ids", "position", "rope_pos", "rope_length", "slot_mapping", "block_tables", "q_start", "kv_len", "seg",
    "seg_r", "seg_weight", "logit_rows", "span_start", "state_in", "state_out",
)  # fmt: skip
settled = lambda examples: settings(
    max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def fuzz_steps(examples: int, isa: str) -> None:
    """Any numbers in any array of a step, and any counts: refused or run, and a good step behind it is unharmed."""
    program = llama_program(Shape(window=5))
    executable = CpuBackend(threads=2, isa=isa).load(
        program, "float32", pull_from(random_weights(program)), CAPACITY, debug=False
    )
    slots = [attach(executable, random_adapter(program, rank=rank, seed=rank)) for rank in (3, 17)]
    parts = [Part((1, 2, 3, 4, 5), 0, (1, 2), slots[0]), Part((6,), 0, (3,), slots[1]), Part((7, 8), 0, (4,), None)]
    inputs = executable.inputs
    fill_step(inputs, parts, S)
    executable.run()
    good = executable.logits()
    change = st.tuples(st.sampled_from(ARRAYS), st.integers(0, 2**16), NASTY)
    counts = st.dictionaries(st.sampled_from("TNRGZ"), NASTY, max_size=2)

    @settled(examples)
    @given(st.lists(change, max_size=4), counts)
    def steps(changes: list[tuple[str, int, int]], changed: dict[str, int]) -> None:
        fill_step(inputs, parts, S)
        for name, place, value in changes:
            array = getattr(inputs, name).reshape(-1)
            # Mostly where a small step looks.
            array[place % (array.size if place % 2 else min(8, array.size))] = value
        for name, value in changed.items():
            setattr(inputs, name, value)
        try:
            executable.run()
            executable.logits()
        except KernelError:
            pass
        for name in ARRAYS:
            getattr(inputs, name)[...] = 0
        fill_step(inputs, parts, S)
        executable.run()
        assert np.array_equal(executable.logits(), good)

    steps()


WIDTHS = st.sampled_from([1, 2, 4, 8, 15, 16, 17, 32, 33])
small = st.integers(-1, 6)
numbers = st.one_of(small, WIDTHS, NASTY, st.just(2**40), st.just(2**63 - 1), st.just(-(2**63)))
# (buffer, first column, width), mostly of the buffers there are.
plausible = st.tuples(st.integers(0, 5), st.sampled_from([0, 0, 0, 4, 16]), st.sampled_from([16, 16, 16, 8, 32]))
columns = st.one_of(plausible, plausible, plausible, st.tuples(numbers, numbers, numbers), st.just(()), st.just((1, 2)))
maybe = st.one_of(st.none(), columns)
floats = st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e-30])
ids = st.one_of(st.integers(0, 5), st.integers(0, 5), numbers)
maybe_id = st.one_of(st.none(), ids)
booleans = st.booleans()
DTYPES = ("float32", "float32", "uint16", "float16", "float64", "int32")


@st.composite
def arrays(draw: Any) -> np.ndarray:
    """Mostly matrices, sometimes not, of a dtype that may not be taken, sometimes with strides."""
    shape = draw(st.lists(st.sampled_from([16, 16, 8, 1, 2, 0, 17]), min_size=2, max_size=2 + draw(st.integers(0, 1))))
    array = np.ones(shape, draw(st.sampled_from(DTYPES)))
    return draw(st.sampled_from([array, array, array, array.T, array[::2], array[..., ::-1]]))


matrices = arrays()
tokens = st.lists(st.one_of(st.integers(0, 9), NASTY), max_size=3).map(lambda some: np.array(some, np.int32))
samplings = st.builds(
    SequenceSampling, temperature=floats, top_k=small, top_p=floats, min_p=floats, typical_p=floats, repetition=floats,
    n_logprobs=small, n_prompt_logprobs=small, seed=st.integers(0, 9), warped=booleans, bias_ids=tokens,
    bias_values=st.lists(floats, max_size=3).map(lambda some: np.array(some, np.float32)), banned_ids=tokens,
    min_tokens=st.integers(0, 2),
)  # fmt: skip


formats = st.sampled_from(
    ["float32", "bfloat16", "q8_0", "q4_0", "q4_1", "q5_0", "fp8_128", "fp8_32", "nf4", "fp4_16", "", "Q8_0"]
)
numbers32 = st.one_of(st.integers(-1, 5), NASTY)


@st.composite
def sample_inputs(draw: Any) -> SampleInputs:
    """Samples of a step of two rows, with any numbers."""
    samples = SampleInputs.allocate(CAPACITY, 32)
    for r in range(2):
        samples.row_slot[r], samples.target[r] = draw(numbers32), draw(numbers32)
        samples.mask_row[r], samples.draw[r] = draw(small), draw(st.integers(0, 2))
    samples.mask[:] = draw(st.sampled_from([0, 1, 2**32 - 1]))
    return samples


words = st.sampled_from(
    [None, "", "first", *sorted({w for f in _native.op_fields().values() for v in f.values() for w in v or ()})]
)


def aligned(nbytes: int) -> np.ndarray:
    """Zeros that begin on a line of 64 bytes."""
    memory = np.zeros(nbytes + ALIGN, np.uint8)
    start = -memory.ctypes.data % ALIGN
    return memory[start : start + nbytes]


# Rank 3 at a site of 16 inputs: A in one panel of 16 lines, B in one of 3, in float32 and in bfloat16.
IMAGE = aligned(4096)
images = st.sampled_from([IMAGE, IMAGE, IMAGE, IMAGE[64:], IMAGE[1:], IMAGE[:64], IMAGE[:0]])
ONE = int(np.float64(1.0).view(np.int64))


def part(site: int, fmt: int, *, outputs: int = 16, gathers: bool = False, panels: int = 1) -> list[int]:
    """A good row of a table, for a site of 16 inputs: of a table's rows, or of a product."""
    lines, size = (3, 4) if fmt == 0 else (2, 2)
    a = 16 * 3 * size if gathers else 16 * 16 * size
    return [site, 0, ONE, fmt, 0, a, 3, 16, 0, fmt, 1024, panels * 64 * lines, outputs, 3, 0]


TABLES = [np.array([part(site, fmt, gathers=g)]) for site in range(3) for fmt in (0, 2) for g in (False, True)]
TABLES += [np.array([part(1, 0), part(2, 2), part(2, 0)]), np.array([part(3, 0, outputs=8)])]
TABLES += [np.array([part(4, fmt, panels=2)]) for fmt in (0, 2)]


def other(site: int, kind: int, tensor: tuple[int, ...], values: tuple[int, ...] = (0,) * 6) -> list[int]:
    """A good row of another kind: the tensors' dtype, offset, bytes and axes."""
    return [site, kind, ONE, *tensor, *values]


OTHERS = [
    [other(site, 1, (0, 0, 64, 16, 0, 0)) for site in range(3)],  # ColumnScale
    [other(0, 2, (0, 0, 64, 16, 0, 0)), other(1, 1, (0, 64, 64, 16, 0, 0))],  # InputScale
    [other(site, 3, (0, 0, 64, 16, 0, 0)) for site in range(3)],  # Bias
    *([other(site, 4, (0, 0, 1024, 16, 16, 0))] for site in range(3)),  # Replace a matrix, a table
    [other(0, 4, (2, 0, 512, 16, 16, 0)), other(0, 2, (0, 0, 64, 16, 0, 0))],
    *([other(site, 4, (0, 0, 64, 16, 0, 0))] for site in range(3)),  # and a norm's weight
    *([other(site, 5, (3, 0, 4, 1, 0, 0), (0, 64, nbytes, 1, 16, 0))] for site in range(3) for nbytes in (64, 1024)),
    [other(4, 1, (0, 0, 128, 16, 0, 0)), other(4, 4, (2, 0, 1024, 16, 16, 0)), part(4, 0, panels=2)],
]
TABLES += [np.array(rows) for rows in OTHERS] + [np.array([part(0, 0), *rows]) for rows in OTHERS]


@st.composite
def tables(draw: Any) -> np.ndarray:
    """Mostly a good table with a number or two that are anything."""
    made = draw(st.sampled_from(TABLES)).copy()
    for _ in range(draw(st.integers(0, 2))):
        number = draw(st.one_of(small, WIDTHS, NASTY, st.just(2**40), st.just(2**63 - 1), st.just(-(2**63))))
        made.reshape(-1)[draw(st.integers(0, made.size - 1))] = number
    return draw(st.sampled_from([made, made, made, made, made[:, :9], made[0], made[:0], made.astype(np.int32)]))


CALLS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "add_buffer": {"offset": numbers, "stride": numbers, "logit_rows": booleans, "rounded": booleans},
    "add_vector": {"values": st.sampled_from([np.ones(16, np.float32), np.ones(0, np.float32), np.ones((4, 4))])},
    "add_state": {"width": numbers},
    "add_matrix": {"outputs": numbers, "inputs": numbers, "format": formats, "panels": booleans, "half": numbers},
    "fill": {"weight": ids, "array": matrices, "first": numbers},
    "Embed": {"table": ids, "out": columns, "add": maybe, "source": words, "offset": numbers, "scale": floats},
    "Norm": {"x": columns, "out": columns, "gate": maybe, "plus": maybe, "weight": maybe_id, "bias": maybe_id,
             "groups": ids, "kind": words, "cast": words, "gate_activation": words, "eps": floats},
    "Linear": {"x": columns, "out": columns, "residual": maybe, "weight": ids,
               "bias": maybe_id, "clip": floats, "scale": floats,
               "softcap": floats, "activation": words, "glu": booleans, "glu_limit": floats, "glu_offset": floats},
    "Pointwise": {"x": columns, "y": maybe, "out": columns, "kind": words, "activation": words,
                  "params": st.sampled_from([[], [0.0], [float("nan"), 1.0], [2.0] * 3, [2.0] * 40]),
                  "weight": maybe_id},
    "RopeRows": {"inv_freq": st.sampled_from([[], [1.0] * 4, [1.0] * 8]), "factor": floats, "border": numbers,
                 "long_freq": st.sampled_from([[], [1.0] * 4, [1.0] * 8]), "growth": floats, "out": columns},
    "Rope": {"x": columns, "rows": columns, "heads": ids, "head_dim": numbers, "start": ids, "dims": numbers,
             "layout": words},
    "Attention": {"q": columns, "k": columns, "v": columns, "out": columns, "group": ids,
                  "planes": st.lists(ids, min_size=1, max_size=3), "heads": numbers, "kv_heads": numbers,
                  "dim_k": numbers, "dim_v": numbers,
                  "scale": floats, "window": numbers, "softcap": floats, "sinks": maybe_id,
                  "alibi": st.sampled_from([[], [0.5], [0.5] * 2, [float("nan")] * 16]), "alibi_rounded": booleans,
                  "chunked": booleans},
    "CausalConv": {"x": columns, "out": columns, "weight": ids, "state": ids, "bias": maybe_id, "activation": words},
    "Mamba2": {"x": columns, "b": columns, "c": columns, "dt": columns, "out": columns, "state": ids, "rate": ids,
               "dt_bias": ids, "skip": ids, "heads": numbers, "head_dim": numbers, "groups": numbers,
               "state_size": numbers, "dt_limit": st.sampled_from([[0.0, 1.0], [0.0], [1.0, 0.0], [float("nan")] * 2])},
    "GatedDelta": {"q": columns, "k": columns, "v": columns, "decay": columns, "beta": columns, "out": columns,
                   "state": ids, "rate": ids, "dt_bias": ids, "heads": numbers, "key_heads": numbers, "dim_k": numbers,
                   "dim_v": numbers, "scale": floats, "eps": floats, "beta_scale": floats},
    "TakeRows": {"x": columns, "out": columns},
    "seal": {"inputs": st.just("inputs"), "arena_floats": st.one_of(numbers, st.just(4096), st.just(4096)),
             "logits_buffer": ids, "vocab": st.one_of(numbers, st.just(32)), "planned_width": small},
    "run": {},
    "logits": {"vocab": numbers},
    "tap": {"op": ids},
    "add_site": {"site": ids, "op": ids, "first": numbers, "outputs": numbers},
    "add_adapter": {"table": tables(), "data": st.one_of(images, images, images, matrices)},
    "adapter_width": {"table": tables(), "data": st.one_of(images, images, images, matrices)},
    "drop_adapter": {"slot": ids},
    "release_kv": {"group": ids, "blocks": tokens},
    "release_states": {"rows": tokens},
    "set_sequence": {"slot": ids, "prompt_ids": tokens,
                     "completion_ids": tokens, "sampling": samplings},
    "sample": {"samples": sample_inputs()},
}  # fmt: skip
call = st.sampled_from(sorted(CALLS)).flatmap(lambda name: st.tuples(st.just(name), st.fixed_dictionaries(CALLS[name])))
# Calls that ``prepared`` executables take: fuzzing spoils a field or two of some.
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("Embed", {"table": 1, "out": (0, 0, 16), "add": None, "source": "token", "offset": 0, "scale": 1.0}),
    ("Embed", {"table": 2, "out": (1, 16, 16), "add": (0, 0, 16), "source": "position", "offset": 3, "scale": 2.0}),
    ("Norm", {"x": (0, 0, 16), "out": (1, 0, 16), "gate": None, "plus": (2, 0, 16), "weight": 0, "bias": 0,
                  "groups": 1, "kind": "layer", "cast": "last", "gate_activation": "none", "eps": 1.0}),
    ("Norm", {"x": (4, 0, 15), "out": (4, 0, 15), "gate": (5, 0, 15), "plus": None, "weight": None, "bias": None,
                  "groups": 3, "kind": "rms", "cast": "first", "gate_activation": "sigmoid", "eps": 1.0}),
    ("Linear", {"x": (0, 0, 16), "out": (1, 0, 16), "residual": (2, 0, 16), "weight": 2, "bias": 0,
                    "clip": 1.0, "scale": 2.0, "softcap": 3.0, "activation": "silu", "glu": False,
                    "glu_limit": -1.0, "glu_offset": 0.0}),
    ("Linear", {"x": (1, 16, 16), "out": (2, 24, 8), "residual": None, "weight": 3, "bias": 0,
                    "clip": 0.0, "scale": 1.0, "softcap": 0.0, "activation": "gelu", "glu": True,
                    "glu_limit": -1.0, "glu_offset": 0.0}),
    ("Linear", {"x": (4, 0, 16), "out": (5, 0, 16), "residual": None, "weight": 4, "bias": None, "clip": 0.0,
                    "scale": 1.0, "softcap": 0.0, "activation": "none", "glu": True,
                    "glu_limit": -1.0, "glu_offset": 0.0}),
    ("Linear", {"x": (4, 16, 16), "out": (5, 16, 16), "residual": None, "weight": 5, "bias": None, "clip": 0.0,
                    "scale": 1.0, "softcap": 0.0, "activation": "none", "glu": False,
                    "glu_limit": -1.0, "glu_offset": 0.0}),
    ("Pointwise", {"x": (0, 0, 32), "y": (1, 0, 32), "out": (2, 0, 32), "kind": "add", "activation": "none",
                   "params": [], "weight": None}),
    ("Pointwise", {"x": (4, 1, 17), "y": None, "out": (5, 15, 17), "kind": "act", "activation": "gelu_tanh",
                   "params": [], "weight": None}),
    ("RopeRows", {"inv_freq": [1.0] * 4, "factor": 1.0, "border": 0, "long_freq": [], "growth": 1.0,
                  "out": (3, 24, 8)}),
    ("Rope", {"x": (0, 0, 32), "rows": (3, 24, 8), "heads": 2, "head_dim": 16, "start": 8, "dims": 8,
                  "layout": "half"}),
    ("Attention", {"q": (0, 0, 16), "k": (1, 0, 8), "v": (1, 8, 5), "out": (2, 0, 10), "group": 0,
                       "planes": [0, 1], "heads": 2, "kv_heads": 1, "dim_k": 8, "dim_v": 5, "scale": 1.0, "window": 3,
                       "softcap": 1.0, "sinks": None, "alibi": [], "alibi_rounded": False, "chunked": False}),
    ("Attention", {"q": (0, 0, 16), "k": (1, 0, 16), "v": (1, 16, 16), "out": (2, 0, 16), "group": 0,
                       "planes": [2, 3], "heads": 16, "kv_heads": 16, "dim_k": 1, "dim_v": 1,
                       "scale": 1.0, "window": 0, "softcap": 0.0, "sinks": 0, "alibi": [0.5] * 16,
                       "alibi_rounded": True,
                       "chunked": False}),
    ("CausalConv", {"x": (0, 0, 16), "out": (2, 16, 16), "weight": 6, "state": 0, "bias": 0, "activation": "silu"}),
    ("Mamba2", {"x": (0, 0, 16), "b": (1, 0, 2), "c": (1, 2, 2), "dt": (0, 16, 16), "out": (2, 0, 16), "state": 0,
                "rate": 0, "dt_bias": 0, "skip": 0, "heads": 16, "head_dim": 1, "groups": 1, "state_size": 2,
                "dt_limit": [0.0, float("inf")]}),
    ("GatedDelta", {"q": (0, 0, 2), "k": (0, 2, 2), "v": (0, 4, 16), "decay": (1, 0, 16), "beta": (1, 16, 16),
                    "out": (2, 0, 16), "state": 0, "rate": 0, "dt_bias": 0, "heads": 16, "key_heads": 1, "dim_k": 2,
                    "dim_v": 1, "scale": 1.0, "eps": 1e-6, "beta_scale": 2.0}),
    ("TakeRows", {"x": (0, 0, 16), "out": (4, 0, 16)}),
    *(("add_site", {"site": op % 3, "op": op, "first": 0, "outputs": 16}) for op in range(6)),
    *(("add_site", {"site": 3, "op": op, "first": 5, "outputs": 8}) for op in range(6)),
    *(("add_site", {"site": 4, "op": op, "first": 3, "outputs": 16}) for op in range(6)),
]  # fmt: skip
GOOD_BEHIND: list[tuple[str, dict[str, Any]]] = [
    *(("add_adapter", {"table": table, "data": IMAGE}) for table in TABLES),
    ("set_sequence", {"slot": 0, "prompt_ids": np.array([1, 2], np.int32), "completion_ids": np.array([2], np.int32),
                      "sampling": SequenceSampling(repetition=2.0, temperature=1.0)}),
    ("sample", {"samples": SampleInputs.allocate(CAPACITY, 32)}),
    ("drop_adapter", {"slot": 0}),
    ("release_kv", {"group": 0, "blocks": np.array([1, 2, 19], np.int32)}),
    ("release_states", {"rows": np.array([1, 3, 19], np.int32)}),
    ("tap", {"op": 1}),
    ("logits", {"vocab": 32}),
    ("fill", {"weight": 4, "array": np.ones((9, 16), np.float16), "first": 3}),
]  # fmt: skip


@st.composite
def mostly(draw: Any, good: list[tuple[str, dict[str, Any]]]) -> tuple[str, dict[str, Any]]:
    """One of ``good``; now and then with a field or two that are anything."""
    name, arguments = draw(st.sampled_from(good))
    spoilt = draw(st.one_of(st.just([]), st.lists(st.sampled_from(sorted(arguments)), max_size=2)))
    return name, {**arguments, **{key: draw(CALLS[name][key]) for key in spoilt}}


def attempt(native: Any, inputs: StepInputs, name: str, arguments: dict[str, Any]) -> bool:
    if name == "seal":
        arguments = {**arguments, "inputs": inputs}
    try:
        if name in _native.op_fields():
            native.add(name, **arguments)
        else:
            getattr(native, name)(**arguments)
    except REFUSALS:
        return False
    return True


def prepared(isa: str, debug: bool) -> tuple[Any, StepInputs]:
    """An executable with buffers 0..3 of token rows and 4, 5 of logit rows, and one weight of each kind, filled."""
    inputs = StepInputs.allocate(CAPACITY, 1)
    native = _native.Executable(isa, 2, CAPACITY, "float32", 1, debug)
    at = 0
    for number in range(6):
        rows = CAPACITY.max_logit_rows if number >= 4 else CAPACITY.max_tokens
        native.add_buffer(offset=at, stride=32, logit_rows=number >= 4, rounded=number % 2 == 1)
        at += rows * 32
    native.add_vector(np.ones(16, np.float32))
    kinds = (("float32", False, 0), ("bfloat16", True, 0), ("float32", True, 8), ("bfloat16", True, 16),
             ("float32", True, 0))  # fmt: skip
    for fmt, panels, half in kinds:
        outputs = 2 * half or 16
        weight = native.add_matrix(outputs, 16, fmt, panels, half)
        native.fill(weight, np.ones((outputs, 16), np.float32), 0)
    native.add_vector(np.ones(3 * 16, np.float32))
    native.add_state(2 * 16)
    fill_step(inputs, [Part((1, 2, 3, 4, 5), 0, (1, 2)), Part((6, 7), 0, (3,))], S)
    return native, inputs


def fuzz_programs(examples: int, isa: str) -> None:
    """Any ops over plausible buffers and weights, sealed and run."""

    @settled(examples)
    @given(st.lists(mostly(GOOD), min_size=1, max_size=6), st.lists(mostly(GOOD_BEHIND), max_size=5), booleans)
    def programs(ops: list[Any], behind: list[Any], debug: bool) -> None:
        native, inputs = prepared(isa, debug)
        for name, arguments in ops:
            attempt(native, inputs, name, arguments)
        attempt(
            native,
            inputs,
            "seal",
            {"arena_floats": (4 * 24 + 2 * 16) * 32, "logits_buffer": 5, "vocab": 32, "planned_width": 64},
        )
        attempt(native, inputs, "run", {})
        for name, arguments in behind:
            if attempt(native, inputs, name, arguments) and name == "add_adapter":
                inputs.G, inputs.seg[0], inputs.seg_r[0] = 1, (0, 5, 0), (0, 1)
                attempt(native, inputs, "run", {})
        attempt(native, inputs, "run", {})
        attempt(native, inputs, "logits", {"vocab": 8})

    programs()


def fuzz_calls(examples: int, isa: str) -> None:
    """Any calls in any order, on an executable of any capacity; arrays of any kind in the inputs."""
    capacities = st.fixed_dictionaries(
        {name: st.one_of(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), NASTY)
         for name in ("max_tokens", "max_seqs", "max_logit_rows", "max_segments", "num_blocks", "block_size",
                      "max_blocks_per_seq", "num_states")}
    )  # fmt: skip
    odd = st.sampled_from(
        [np.zeros(500, np.int32), np.zeros(1000, np.int32)[::2], np.zeros(500, np.int64), np.zeros(3, np.int32), None,
         [0] * 500, np.zeros(500, np.float32)]
    )  # fmt: skip

    @settled(examples)
    @given(capacities, st.integers(-1, 5), formats, small, booleans, st.lists(call, max_size=12),
           st.dictionaries(st.sampled_from(ARRAYS), odd, max_size=2))  # fmt: skip
    def calls(
        sizes: dict[str, int], threads: int, fmt: str, groups: int, debug: bool, made: list[Any], odd: dict[str, Any]
    ) -> None:
        try:
            native = _native.Executable(isa, threads, SimpleNamespace(**sizes), fmt, groups, debug)
        except REFUSALS:
            return
        inputs: Any = StepInputs.allocate(CAPACITY, 2)
        for name, array in odd.items():
            setattr(inputs, name, array)
        for name, arguments in made:
            attempt(native, inputs, name, arguments)

    calls()


if __name__ == "__main__":
    part, count = sys.argv[1], int(sys.argv[2])
    {"steps": fuzz_steps, "programs": fuzz_programs, "calls": fuzz_calls}[part](count, *(sys.argv[3:] or ["auto"]))
    print("done")
