"""The executables of models that transformers computes, step by step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fallback_types import small_config, write_small

from truffula.errors import KernelError
from truffula.kernels.adapters import (
    AdapterLayout,
    Bias,
    ColumnScale,
    InputScale,
    Place,
    Replace,
    Rows,
    SiteTensors,
    low_rank,
    make_image,
)
from truffula.kernels.inputs import Capacity, SequenceSampling, StepInputs
from truffula.kernels.program import ModuleSlice, Site
from truffula.kernels.reference import ReferenceBackend
from truffula.kernels.reference.slots import AdapterSlots
from truffula.model.fallback import probe
from truffula.model.fallback.adapters import AdapterHooks, layout_of_sites
from truffula.model.fallback.backend import TransformersBackend
from truffula.model.fallback.paged import PagedExecutable
from truffula.model.fallback.serial import SerialExecutable
from truffula.model.load import WeightReader, plan_model
from truffula.model.plan import PackingFails
from truffula.testing.programs import Part, fill_step
from truffula.weights.open import open_checkpoint

CAPACITY = Capacity(
    max_tokens=16, max_seqs=2, max_logit_rows=16, max_segments=1, num_blocks=6, block_size=4, max_blocks_per_seq=3
)


def test_a_sequence_keeps_its_cache_when_blocks_of_its_slots_former_sequence_are_taken(tmp_path):
    opened = open_checkpoint(write_small(tmp_path, small_config("mamba", num_hidden_layers=1)))
    plan = plan_model(opened)
    backend = TransformersBackend(plan.transformers, ReferenceBackend())
    executable = backend.load(plan.program, "float32", WeightReader(opened, plan), CAPACITY)
    passes = []
    executable.model.register_forward_hook(lambda *_: passes.append(1))

    def start(slot: int, *ids: int) -> None:
        executable.set_sequence(slot, np.array(ids, np.int32), np.zeros(0, np.int32), SequenceSampling())

    def step(*parts: Part) -> int:
        passes.clear()
        fill_step(executable.inputs, list(parts), CAPACITY.block_size)
        executable.run()
        return len(passes)

    start(0, 5, 6, 7)
    assert step(Part((5, 6, 7), 0, (1,))) == 1
    start(0, 8, 9)  # the former sequence has ended; its block goes to the next in another slot
    assert step(Part((8, 9), 0, (2,))) == 1
    start(1, 3)
    assert step(Part((10,), 2, (2,)), Part((3,), 0, (1,))) == 2
    assert step(Part((11,), 3, (2,)), Part((4,), 1, (1,))) == 1  # their caches, states of a fixed size, are stacked
    executable.close()


@pytest.mark.parametrize("kind", ["mamba", "rwkv"])
def test_stacked_sequences_come_and_go(tmp_path, kind):
    """Each gets the logits that it has alone, with an adapter on one of them; rwkv's code cannot stack."""
    opened = open_checkpoint(write_small(tmp_path, small_config(kind, num_hidden_layers=2)))
    plan = plan_model(opened)
    backend = TransformersBackend(plan.transformers, ReferenceBackend())
    capacity = replace(CAPACITY, max_seqs=4, max_logit_rows=16, num_blocks=20)
    executable = backend.load(plan.program, "float32", WeightReader(opened, plan), capacity)
    assert executable.stacks == (kind == "mamba")
    rng = np.random.default_rng(0)
    texts = rng.integers(5, 100, (4, 9)).tolist()
    sites = [site for site in plan.interface.sites if site.kind == "linear"]
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32) / 3
    parts = [low_rank(site.id, draw(2, site.in_features), draw(site.out_features, 2), 1.0) for site in sites]
    image = make_image(executable.layout, parts, generation="a")
    adapters = [executable.adapter(image), None, None, None]
    seen = [0, 0, 0, 0]

    def step(*chunks: tuple[int, int]) -> list[np.ndarray]:
        """The last logits of each sequence, continued by so many tokens."""
        ids = [tuple(texts[slot][seen[slot] : seen[slot] + count]) for slot, count in chunks]
        blocks = [tuple(range(1 + 4 * slot, 4 + 4 * slot)) for slot, _ in chunks]
        parts = [Part(i, seen[s], b, adapters[s]) for i, b, (s, _) in zip(ids, blocks, chunks, strict=True)]
        fill_step(executable.inputs, parts, capacity.block_size)
        executable.inputs.seq_slot[: len(chunks)] = [slot for slot, _ in chunks]
        executable.run()
        for slot, count in chunks:
            seen[slot] += count
        return list(executable.logits())

    def start(slot: int) -> None:
        seen[slot] = 0
        executable.set_sequence(slot, np.array(texts[slot], np.int32), np.zeros(0, np.int32), SequenceSampling())

    for slot in range(4):
        start(slot)
    wanted = {}
    for slot in range(4):
        for count in range(9):
            wanted[slot, count + 1] = step((slot, 1))[0]
    for slot in range(4):
        start(slot)
    for chunks in (
        [(0, 3), (1, 3), (2, 2)], [(0, 1), (2, 1)], [(0, 1), (1, 1), (2, 1), (3, 5)], [(1, 2), (3, 2)],
        [(0, 1), (1, 1), (2, 1), (3, 1)], [(2, 3), (3, 1)],
    ):  # fmt: skip
        for (slot, _), logits in zip(chunks, step(*chunks), strict=True):
            np.testing.assert_allclose(logits, wanted[slot, seen[slot]], atol=2e-4)
    start(0)
    start(1)
    step((0, 3), (1, 3))
    texts[1] = texts[3]  # the slot's next sequence begins while the other one of the pass rests
    start(1)
    step((1, 3))
    for logits, right in zip(step((0, 1), (1, 1)), (wanted[0, 4], wanted[3, 4]), strict=True):
        np.testing.assert_allclose(logits, right, atol=2e-4)
    seen[1] -= 2  # and a step runs again
    step((1, 1))
    for logits, right in zip(step((0, 1), (1, 1)), (wanted[0, 5], wanted[3, 4]), strict=True):
        np.testing.assert_allclose(logits, right, atol=2e-4)
    start(2)
    step((2, 3))
    adapters[2] = adapters[0]  # as activated LoRA acts from a token on
    first = step((2, 1))[0]
    seen[2] -= 1
    np.testing.assert_allclose(step((2, 1))[0], first, atol=2e-4)
    executable.close()


@pytest.mark.parametrize("kind", ["persimmon", "jetmoe", "mamba"])
def test_the_probe_finds_what_one_sequence_shows_another(tmp_path, kind, monkeypatch):
    """Also where the model's own rounding makes any difference, such as a choice of other experts."""
    opened = open_checkpoint(write_small(tmp_path, small_config(kind, num_hidden_layers=2)))
    plan = plan_model(opened)
    backend = TransformersBackend(plan.transformers, ReferenceBackend())
    capacity = replace(CAPACITY, block_size=16, max_tokens=32)
    executable = backend.load(plan.program, "bfloat16", WeightReader(opened, plan), capacity)
    assert isinstance(executable, PagedExecutable) or executable.stacks
    run = executable.run

    def leak() -> None:
        """The second sequence's first keys become those of the first; where there are no keys, its first token."""
        i = executable.inputs
        if i.N > 1 and isinstance(executable, SerialExecutable):
            i.token_ids[i.q_start[1]] = i.token_ids[0]
        run()
        if i.N > 1 and isinstance(executable, PagedExecutable):
            for plane in executable._planes._planes.values():
                plane[i.block_tables[0, 1, 0], 0] = plane[i.block_tables[0, 0, 0], 0]

    monkeypatch.setattr(executable, "run", leak)
    monkeypatch.setattr(probe, "_limit", lambda *_: 1e3)
    if isinstance(executable, PagedExecutable):
        with pytest.raises(PackingFails, match="change another sequence"):
            probe.probe_paged(executable)
    else:
        probe.probe_serial(executable)
        assert not executable.stacks
    executable.close()


@pytest.mark.parametrize("change", [{"block_size": 1, "max_blocks_per_seq": 12}, {"max_logit_rows": 1}])
def test_sequences_are_not_stacked_where_two_cannot_be_tried(tmp_path, change):
    opened = open_checkpoint(write_small(tmp_path, small_config("rwkv", num_hidden_layers=2)))
    plan = plan_model(opened)
    backend = TransformersBackend(plan.transformers, ReferenceBackend())
    executable = backend.load(plan.program, "float32", WeightReader(opened, plan), replace(CAPACITY, **change))
    assert not executable.stacks
    executable.close()


def test_an_adapter_on_a_module_that_sees_other_rows_is_an_error():
    """An expert, say, which gets some of the rows: whose they are is not known."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    site = Site(0, "linear", 0, 4, 4, (ModuleSlice("0", 0, 4, 4),))
    layout = AdapterLayout("float32", (Place("0", 0, 4, 4),))
    hooks, adapters = AdapterHooks(model, [site], ()), AdapterSlots(layout, torch.device("cpu"))
    part = low_rank(0, np.ones((1, 4), np.float32), np.ones((4, 1), np.float32), 1.0)
    inputs = StepInputs.allocate(CAPACITY, 1)
    inputs.G, inputs.seg[0] = 1, (0, 2, adapters.add(make_image(layout, [part], generation="a")))
    inputs.seg_weight[0] = 1.0
    segments, x = adapters.segments(inputs, inputs.seg[:, :2]), torch.ones(5, 4)
    hooks.prepare(5, segments, 0, [])
    assert (model(x) - x @ model[0].weight.T).detach().round().tolist() == [[4.0] * 4] * 2 + [[0.0] * 4] * 3
    hooks.prepare(0, segments, 0, [])  # a step that draws nothing: a layer of the head sees no row
    assert model(x[:0]).shape == (0, 4)
    hooks.prepare(6, segments, 0, [])
    with pytest.raises(KernelError, match="0 saw 5 rows in a pass of 6"):
        model(x)
    # All rows are of one sequence: kv_b_proj of latent attention sees its cached ones too.
    hooks.prepare(None, segments, None, segments)
    assert (model(x) - x @ model[0].weight.T).detach().round().tolist() == [[4.0] * 4] * 5


@torch.inference_mode()
def test_every_part_acts_behind_a_modules_own_bias():
    """Rows of a segment alone, by the site contract of kernels/adapters.py; a table's scale is behind its adapter."""
    rng = np.random.default_rng(0)
    model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Linear(4, 3))
    model[0].embed_scale = 2.0
    sites = [
        Site(0, "embed", None, 6, 4, (ModuleSlice("0", 0, 4, 4),)),
        Site(1, "linear", 0, 4, 3, (ModuleSlice("1", 0, 3, 3),)),
    ]
    layout = layout_of_sites(SimpleNamespace(sites=sites))
    hooks, adapters = AdapterHooks(model, sites, ()), AdapterSlots(layout, torch.device("cpu"))
    row, c, u, b = (rng.standard_normal(n).astype(np.float32) for n in ((1, 4), 3, 4, 3))
    own = rng.standard_normal((3, 4)).astype(np.float32)
    parts = [
        SiteTensors(0, (Rows(np.array([5], np.int32), row),)),
        SiteTensors(1, (ColumnScale(c), InputScale(u), Bias(b), Replace(own))),
    ]
    inputs = StepInputs.allocate(CAPACITY, 1)
    inputs.G, inputs.seg[0] = 1, (0, 2, adapters.add(make_image(layout, parts, generation="a")))
    inputs.seg_weight[0] = 1.0
    ids = torch.tensor([5, 1, 5])
    hooks.prepare(3, (), 0, ())
    base = model(ids).detach().numpy()
    hooks.prepare(3, adapters.segments(inputs, inputs.seg[:, :2]), 0, ())
    got = model(ids).detach().numpy()
    x = 2.0 * np.stack([row[0], model[0].weight.detach().numpy()[1]])
    wanted = c * ((x * u) @ own.T) + model[1].bias.detach().numpy() + b
    np.testing.assert_allclose(got[:2], wanted, rtol=1e-5, atol=1e-5)
    assert np.array_equal(got[2], base[2])
