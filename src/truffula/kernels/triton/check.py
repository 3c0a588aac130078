"""Compares each kind of launch with torch on random numbers, before the first step: on hardware where kernels have not
been tried, one that is wrong must not answer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from truffula.kernels.adapters import SiteTensors, low_rank, make_image
from truffula.kernels.arena import refs, written_by
from truffula.kernels.program import Attention, Linear, Logits, Op, Program, Ref, Rope
from truffula.kernels.triton.device import lost

if TYPE_CHECKING:
    from truffula.kernels.triton.executable import TritonExecutable

LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Of the norm of the difference, relative to the result's."""
ROWS, KEYS = (3, 100, 300), 600
"""Rows of a step, and keys before them, as far as there is room: each way to cut a product is taken."""
RANK = 9


def wrong_kernels(executable: TritonExecutable) -> dict[int, str]:
    """The ops whose launch gives other numbers than torch, and what is wrong. Uses the memory of KV blocks.

    Raises:
        DeviceLost: The device failed.
    """
    kinds: dict[Any, list[int]] = {}
    for index, op in enumerate(executable.program.ops):
        if executable.launches[index] is not None:
            kinds.setdefault(_kind(executable.program, op), []).append(index)
    first = [same[0] for same in kinds.values()]
    slot = executable.adapter(make_image(executable.layout, _adapter(executable.program, first), generation="check"))
    executable.resident.serve_by_torch(slot)
    found: dict[int, str] = {}
    for rows, adapted in itertools.product(ROWS, (True, False)):
        # With few keys an item of attention has all of them; with many their sums are merged.
        _fill(executable, rows, KEYS if adapted else 0, slot)
        executable.inputs.G = int(adapted)
        step = executable.begin_step()
        for same in kinds.values():
            step.op = same[0]
            if same[0] not in found and (wrong := _difference(executable, executable.program.ops[same[0]], step)):
                found |= dict.fromkeys(same, wrong)
    executable.drop_adapter(slot)
    return found


@torch.inference_mode()
def _difference(executable: TritonExecutable, op: Op, step: Any) -> str:
    """What is wrong with the launch of ``op``; empty: nothing."""
    buffers, out = executable.fixed, written_by(op)
    generator = torch.Generator(device=buffers.whole(out).device).manual_seed(step.op)
    for ref in refs(op):
        buffers.get(ref).normal_(generator=generator)
    if isinstance(op, Attention):
        for plane in op.planes:
            executable.planes[plane][:-1].normal_(generator=generator)  # the last block stays zero
    before = buffers.get(op.x).clone() if isinstance(op, Rope) else None
    value = executable.torch_value(op, step)
    wanted = buffers.get(out).float() if value is None else value.float()
    if before is not None:
        buffers.put(out, before)
    launch = executable.launches[step.op]
    assert launch is not None
    try:
        launch()
        distance = float((buffers.get(out).float() - wanted).norm() / wanted.norm().clamp(min=1e-9))
    except Exception as error:  # whatever a compiler raises: torch computes the op then
        if executable.has_failed(error):
            raise lost(executable.where.torch_device, error) from error
        return f"{type(error).__name__}: {error}"
    limit = LIMITS[executable.dtype]
    return "" if distance <= limit else f"the result differs from torch's by {distance:.1e} of its norm, over {limit}"


def _adapter(program: Program, ops: list[int]) -> list[SiteTensors]:
    rng = np.random.default_rng(0)
    sites = {item.site for index in ops if isinstance(op := program.ops[index], Linear) for item in op.slices}
    sites |= {op.site for index in ops if isinstance(op := program.ops[index], Logits) and op.site is not None}
    made = []
    for number in sorted(sites):
        site = program.sites[number]
        a = rng.standard_normal((RANK, site.in_features), np.float32) * site.in_features**-0.5
        b = rng.standard_normal((site.out_features, RANK), np.float32) * RANK**-0.5
        made.append(low_rank(number, a.astype(np.float16), b.astype(np.float16), 0.7))
    return made


def _fill(executable: TritonExecutable, rows: int, keys: int, slot: int) -> None:
    """One sequence with ``keys`` before its rows, of which the first two thirds use the adapter.
    Blocks are not in ascending order."""
    i, c = executable.inputs, executable.capacity
    blocks = min(c.num_blocks - 1, c.max_blocks_per_seq)
    rows = min(rows, c.max_tokens, blocks * c.block_size)
    before = min(keys, blocks * c.block_size - rows)
    position = np.arange(before, before + rows, dtype=np.int32)
    order = np.arange(blocks, 0, -1, dtype=np.int32)
    i.T, i.N, i.R, i.G, i.Z = rows, 1, min(rows, c.max_logit_rows), 1, 0
    i.token_ids[:rows] = np.arange(rows) % executable.program.vocab_size
    i.position[:rows] = position
    i.rope_pos[:, :rows] = position
    i.rope_length[:rows] = before + rows
    i.slot_mapping[:, :rows] = order[position // c.block_size] * c.block_size + position % c.block_size
    i.block_tables[:, 0, :blocks] = order
    i.q_start[:2], i.kv_len[0], i.seq_slot[0] = (0, rows), before + rows, 0
    i.logit_rows[: i.R] = np.arange(i.R)
    i.seg[0], i.seg_r[0], i.seg_weight[0] = (0, 1 + 2 * rows // 3, slot), (0, min(1 + 2 * rows // 3, i.R)), 1.0


def _kind(program: Program, op: Any) -> tuple[Any, ...]:
    """Ops of one kind are launched alike, but for addresses."""
    return (type(op).__name__, *_fields(program, op))


def _fields(program: Program, value: Any) -> Iterator[Any]:
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if field.name in ("name", "layer", "probe", "site", "planes", "group"):
            continue
        if isinstance(item, Ref):
            buffer = program.buffers[item.buffer]
            yield field.name, item.width, buffer.rows, buffer.dtype
        elif dataclasses.is_dataclass(item):
            yield from _fields(program, item)
        elif field.name in ("weight", "bias", "sinks") or (field.name == "table" and "out" in vars(value)):
            decl = None if item is None or item >= len(program.weights) else program.weights[item]
            yield field.name, decl and (decl.shape, decl.dtype)
        elif field.name == "slices":
            yield tuple((part.lo, part.hi) for part in item)
        else:
            yield field.name, item
