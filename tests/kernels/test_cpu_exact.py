"""The native backend, bit for bit within an instruction table: a row's logits depend on its sequence and its adapter.

Not on the other rows or how many there are, threads, the cutting of a prompt, where blocks lie, or what ran before. A
token computed behind cached keys and values shows that those too are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_backends import BETWEEN, ISAS, needs_native, on_every_table
from llama_program import Shape, llama_program

from truffula.kernels.backend import Executable
from truffula.kernels.cpu.backend import CpuBackend
from truffula.kernels.inputs import Capacity
from truffula.testing.programs import Part, attach, fill_step, pull_from, random_adapter, random_weights

pytestmark = needs_native
SIZES = (1, 2, 5, 6, 7, 11, 12, 13, 47, 48, 49, 100, 512)
# Widths that are no multiple of a vector, of a tile or of one another.
PLAIN = Shape(hidden=40, heads=6, kv_heads=2, head_dim=10, feed_forward=50, vocab=61)
NARROW = Shape(hidden=36, heads=3, kv_heads=3, head_dim=12, feed_forward=34, vocab=70, window=21, softcap=3.0)
ADAPTERS = ((1, "float32"), (3, "bfloat16"), (16, "float16"), (40, "bfloat16"), (7, "float32"))
S = 8
CAPACITY = Capacity(
    max_tokens=1600, max_seqs=512, max_logit_rows=1600, max_segments=64, num_blocks=1200, block_size=S,
    max_blocks_per_seq=200,
)  # fmt: skip
LIGHT = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@dataclass
class Model:
    """One executable with its adapters. ``free`` hands out blocks in no order; ``slots`` has None, the base, at its
    end."""

    executable: Executable
    slots: list[int | None]
    free: list[int] = field(default_factory=list)

    def blocks(self, tokens: int) -> tuple[int, ...]:
        return tuple(self.free.pop() for _ in range(-(-tokens // S)))

    def forget(self, seed: int) -> None:
        self.free = np.random.default_rng(seed).permutation(np.arange(1, CAPACITY.num_blocks)).tolist()

    def run(self, parts: Sequence[Part]) -> list[np.ndarray]:
        """Logits of each part, in the order given; sorted inside as a step wants it."""
        order = sorted(range(len(parts)), key=lambda n: (parts[n].slot is None, parts[n].slot or 0))
        fill_step(self.executable.inputs, [parts[n] for n in order], S)
        self.executable.run()
        counts = [len(parts[n].ids) if parts[n].logits == "all" else 1 for n in order]
        pieces = np.split(self.executable.logits(), np.cumsum(counts)[:-1])
        assert all(np.isfinite(piece).all() for piece in pieces)
        return [piece for _, piece in sorted(zip(order, pieces, strict=True), key=lambda pair: pair[0])]

    def whole(self, ids: Sequence[int], slot: int | None, cuts: Sequence[int] = ()) -> np.ndarray:
        """All logits of a sequence that is fed in pieces."""
        blocks = self.blocks(len(ids))
        edges = [0, *sorted(cuts), len(ids)]
        pieces = [self.run([Part(tuple(ids[lo:hi]), lo, blocks, slot, "all")])[0] for lo, hi in pairwise(edges)]
        return np.concatenate(pieces)


def load(isa: str, dtype: str, shape: Shape, threads: int = 2) -> Model:
    program = llama_program(shape)
    weights = pull_from(random_weights(program, dtype="bfloat16" if dtype == "bfloat16" else "float32"))
    executable = CpuBackend(threads=threads, isa=isa).load(program, dtype, weights, CAPACITY)
    images = [random_adapter(program, rank=rank, seed=rank, dtype=stored) for rank, stored in ADAPTERS]
    model = Model(executable, [*(attach(executable, image) for image in images), None])
    model.forget(0)
    return model


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((isa, dtype, shape), id=f"{isa}-{dtype}-{name}", marks=[pytest.mark.slow] * (isa in BETWEEN))
        for isa in ISAS
        for dtype in ("float32", "bfloat16")
        for shape, name in ((PLAIN, "plain"), (NARROW, "narrow"))
    ],
)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(case):
    model = load(*case)
    yield model
    model.executable.close()


@pytest.fixture
def model(loaded):
    loaded.forget(0)
    return loaded


def ids_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 61, count).tolist()


def same(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


def test_in_batches_of_every_size(model):
    """512 sequences decode alone, then in batches of all sizes, each time with other neighbours."""
    rng = np.random.default_rng(1)
    count = SIZES[-1]
    slots = [model.slots[n % len(model.slots)] for n in range(count)]
    starts = rng.integers(0, 3, count).tolist()
    prompts = [Part(tuple(ids_of(n, start + 1)), 0, model.blocks(4), slot) for n, (start, slot) in
               enumerate(zip(starts, slots, strict=True))]  # fmt: skip
    model.run(prompts)
    parts = [Part((n % 61,), len(prompt.ids), prompt.blocks, prompt.slot) for n, prompt in enumerate(prompts)]
    alone = [model.run([part])[0] for part in parts]
    for size in SIZES:
        chosen = rng.permutation(count)[:size]
        for n, row in zip(chosen, model.run([parts[n] for n in chosen]), strict=True):
            same(row, alone[n])


def test_rows_of_a_prompt_of_every_length(model):
    """As many rows as a tile, one more, one less: each the same as when it comes alone."""
    ids = ids_of(5, 110)
    for slot in (model.slots[1], model.slots[3], None):
        single = model.whole(ids, slot, cuts=range(1, len(ids)))
        for size in SIZES[:-1]:
            same(model.whole(ids[:size], slot), single[:size])
        model.forget(size)


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_on_any_number_of_threads(case, model, threads):
    other = load(*case, threads=threads)
    for count in (1, 3, 20, 120):
        crowd = [Part(tuple(ids_of(n + count, 1 + n % 7)), 0, model.blocks(8), slot, "all") for n, slot in
                 enumerate((model.slots * count)[:count])]  # fmt: skip
        for got, wanted in zip(other.run(crowd), model.run(crowd), strict=True):
            same(got, wanted)
    long = ids_of(9, 400)
    same(other.whole(long, other.slots[2]), model.whole(long, model.slots[2]))
    other.executable.close()


@LIGHT
@given(
    st.lists(st.integers(1, 89), max_size=8, unique=True), st.integers(0, 5), st.integers(0, 5),
    st.integers(0, 10**6),
)  # fmt: skip
def test_cut_anywhere_beside_anybody(model, cuts, mine, beside, seed):
    """Any cuts, any blocks, a neighbour with any adapter that is at another place each step."""
    model.forget(seed)
    ids, slot = ids_of(seed, 90), model.slots[mine]
    wanted = model.whole(ids, slot)
    blocks, others = model.blocks(90), model.blocks(200)
    got, start = [], 0
    for lo, hi in pairwise([0, *sorted(cuts), 90]):
        own = Part(tuple(ids[lo:hi]), lo, blocks, slot, "all")
        neighbour = Part(tuple(ids_of(seed + lo, 1 + lo % 20)), start, others, model.slots[beside])
        got.append(model.run([own, neighbour] if lo % 2 else [neighbour, own])[1 - lo % 2])
        start += len(neighbour.ids)
    same(np.concatenate(got), wanted)


@pytest.mark.parametrize("size", [511, 512, 513, 1100])
def test_long_contexts_cut_anywhere(model, size):
    """Keys are worked on in partitions of 512: the cuts of a prompt are not the cuts of its keys."""
    ids, slot = ids_of(3, size), model.slots[1]
    wanted = model.whole(ids, slot)
    for cuts in ([size - 1], [100, 511, size - 2], [*range(97, size, 97)]):
        model.forget(size)
        same(model.whole(ids, slot, cuts=sorted({cut for cut in cuts if 0 < cut < size})), wanted)


@on_every_table
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_windows_wider_than_a_partition(isa, dtype):
    """Where a partition begins follows from positions alone, not from the first key that a chunk sees."""
    model = load(isa, dtype, Shape(hidden=16, heads=2, kv_heads=1, feed_forward=18, window=700))
    ids = ids_of(3, 1500)
    wanted = model.whole(ids, None)
    for cuts in ([1400], [700, 1001, 1499], [*range(97, 1500, 97)]):
        model.forget(cuts[0])
        same(model.whole(ids, None, cuts=cuts), wanted)
    model.executable.close()


def test_long_and_short_decode_together(model):
    lengths = (1200, 3, 600, 512, 40)
    tables = [model.blocks(length + 1) for length in lengths]
    for n, (length, table) in enumerate(zip(lengths, tables, strict=True)):
        model.run([Part(tuple(ids_of(n, length)), 0, table, model.slots[n])])
    parts = [Part((7,), length, tables[n], model.slots[n]) for n, length in enumerate(lengths)]
    alone = [model.run([part])[0] for part in parts]
    for got, wanted in zip(model.run(parts), alone, strict=True):
        same(got, wanted)


def test_base_rows_do_not_know_of_adapters(model):
    parts = [Part(tuple(ids_of(n, 1 + n % 9)), 0, model.blocks(16), model.slots[n % 6], "all") for n in range(50)]
    with_adapters = model.run(parts)
    without = model.run([Part(part.ids, 0, part.blocks, None, "all") for part in parts])
    for part, got, plain in zip(parts, with_adapters, without, strict=True):
        if part.slot is None:
            same(got, plain)
        else:
            assert not np.array_equal(got, plain)


def test_recomputed_elsewhere_after_its_blocks_were_taken(model):
    """A sequence that grew token by token is preempted, overwritten, and comes back in one piece."""
    ids, slot = ids_of(8, 60), model.slots[3]
    blocks = model.blocks(60)
    first = model.run([Part(tuple(ids[:33]), 0, blocks, slot, "all")])[0]
    grown = [model.run([Part((ids[n],), n, blocks, slot, "all")])[0] for n in range(33, 60)]
    model.run([Part(tuple(ids_of(99, 60)), 0, blocks, model.slots[0])])
    same(model.whole(ids, slot), np.concatenate([first, *grown]))


def test_run_again(model):
    crowd = [Part(tuple(ids_of(n, 5 + n)), 0, model.blocks(40), model.slots[n % 6], "all") for n in range(20)]
    first = model.run(crowd)
    for _ in range(3):
        for got, wanted in zip(model.run(crowd), first, strict=True):
            same(got, wanted)


def test_an_adapter_in_another_slot(case, model):
    """What held the slot before, and which slot it is, changes nothing."""
    ids, program = ids_of(2, 30), llama_program(case[2])
    wanted = model.whole(ids, model.slots[3])
    again, larger = (random_adapter(program, rank=rank, seed=rank, dtype="bfloat16") for rank in (40, 90))
    slot = attach(model.executable, larger)
    model.whole(ids, slot)
    model.executable.drop_adapter(slot)
    slot = attach(model.executable, again)
    same(model.whole(ids, slot), wanted)
    model.executable.drop_adapter(slot)
