"""Programs, random weights and steps without checkpoint and engine: for ``verify``, tests and benches of backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from truffula.kernels.adapters import SiteTensors, low_rank, make_image
from truffula.kernels.backend import Executable, PullWeight, QuantisedArray
from truffula.kernels.inputs import Capacity, StepInputs
from truffula.kernels.program import Linear, Program, WeightDecl
from truffula.lora.image import NO_FACTS, AdapterFacts, KvPrefix
from truffula.model.decoder import build_program
from truffula.model.load import arranged
from truffula.model.names import WeightNames
from truffula.model.read import read_config
from truffula.testing.files import Array as Array
from truffula.testing.files import as_dtype as as_dtype
from truffula.weights.gguf.quants import dequantize
from truffula.weights.quantised.packing import BY_KIND, FLOAT8
from truffula.weights.tying import Tie, TyingDecision

Float32 = npt.NDArray[np.float32]


def decoder_program(config: Mapping[str, Any]) -> Program:
    """The program of a config.json, with tied tables.

    Raises:
        UnsupportedModel: The config requires an unsupported feature; names the key.
    """
    spec = read_config(config).spec
    return build_program(spec, WeightNames.canonical(spec), TyingDecision(Tie.TIED, "tied"))


def random_weights(program: Program, *, seed: int = 0, dtype: str = "float32") -> dict[str, list[Array]]:
    """Weight name → its parts. Matrices are scaled by 1/sqrt(I), vectors near 1, those that are below 0 (the decay of a
    state) near -1; fused weights have several parts."""
    rng = np.random.default_rng(seed)
    made: dict[str, list[Array]] = {}
    for decl in program.weights:
        if len(decl.shape) == 3:
            stored = [rng.standard_normal(part.stored, np.float32) * decl.shape[2] ** -0.5 for part in decl.parts]
            parts = [arranged(part, values, decl.shape) for part, values in zip(decl.parts, stored, strict=True)]
            made[decl.name] = [as_dtype(part, dtype) for part in parts]
            continue
        if len(decl.shape) == 1:
            whole = 1.0 + 0.1 * rng.standard_normal(decl.shape, np.float32)
            whole = -whole if decl.parts[0].transform == "minus_exp" else whole
        else:
            whole = rng.standard_normal(decl.shape, np.float32) * decl.shape[1] ** -0.5
        rows = _part_rows(program, decl)
        made[decl.name] = [as_dtype(part, dtype) for part in np.split(whole, np.cumsum(rows)[:-1])]
    return made


def random_blocks(kind: str, outputs: int, inputs: int, *, seed: int = 0) -> QuantisedArray:
    """A matrix [outputs, inputs] of random blocks of ``kind`` (``Q4_0``) with small scales; the floats of FP8 are
    normally distributed, but for the first row, which has all of them.
    """
    format = BY_KIND[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (outputs, -(-inputs // format.size), format.nbytes), np.uint8)
    for at in range(format.scales):
        blocks[..., 2 * at : 2 * at + 2] = np.array([2.0**-7], np.float16).view(np.uint8)
    if kind == "NF4":
        blocks[..., :4] = np.array([2.0**-4], np.float32).view(np.uint8)
    if kind == "FP4_16":
        blocks[..., :8] = np.array([2.0**-5, 1.0], np.float32).view(np.uint8)
        blocks[..., 8:12] &= 0x3F  # scales of 2^-9 to 1.9
    if kind in FLOAT8:
        values = rng.standard_normal((outputs - 1, *blocks.shape[1:]), np.float32) * 90
        blocks[1:] = values.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        blocks[(blocks & 0x7F) == 0x7F] = 0  # NaN
        blocks[..., :4] = np.array([2.0**-11], np.float32).view(np.uint8)
    unpack = lambda some: dequantize(format, some.reshape(-1), (len(some), format.size))
    return QuantisedArray(kind, blocks, (outputs, inputs), unpack)


def _part_rows(program: Program, decl: WeightDecl) -> list[int]:
    if len(decl.parts) == 1:
        return [decl.shape[0]]
    linears = (op for op in program.ops if isinstance(op, Linear))
    op = next(op for op in linears if decl.id in (op.weight, op.epilogue.bias))
    return [item.hi - item.lo for item in op.slices]


def pull_from(weights: Mapping[str, list[Array]]) -> PullWeight:
    """A ``PullWeight`` over ``random_weights``."""
    return lambda decl: weights[decl.name]


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter before packing."""

    generation: str
    rank: int
    sites: tuple[SiteTensors, ...]


def random_adapter(
    program: Program, *, rank: int = 4, seed: int = 0, dtype: str = "float32", sites: tuple[int, ...] | None = None
) -> AdapterTensors:
    """A random adapter on ``sites`` (None: all linears), with a visible effect."""
    rng = np.random.default_rng(seed)
    tensors = []
    for site in program.sites:
        if site.kind != "linear" if sites is None else site.id not in sites:
            continue
        a = rng.standard_normal((rank, site.in_features), np.float32) * site.in_features**-0.5
        b = rng.standard_normal((site.out_features, rank), np.float32) * rank**-0.5
        tensors.append(low_rank(site.id, as_dtype(a, dtype), as_dtype(b, dtype), float(rng.uniform(0.2, 0.5))))
    return AdapterTensors(f"random-{seed}", rank, tuple(tensors))


def attach(executable: Executable, adapter: AdapterTensors) -> int:
    """The slot of ``adapter``, packed in this process for ``executable``."""
    return executable.adapter(make_image(executable.layout, adapter.sites, generation=adapter.generation))


@dataclass(frozen=True)
class Part:
    """One sequence's share of a step: ``ids`` at positions ``start ..`` with its ``blocks``; ``slot`` is its adapter.

    ``logits``: ``last`` or ``all``, the rows whose logits are computed. ``rope_length`` 0: what the sequence has after
    the step.
    """

    ids: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    slot: int | None = None
    logits: str = "last"
    rope_length: int = 0


def fill_step(inputs: StepInputs, parts: list[Part], block_size: int) -> None:
    """Write a step. ``parts`` must be sorted as ``StepInputs`` requires: by slot, base last.

    All KV groups use the same block ids. A sequence's state row has the number of its first block.
    """
    i = inputs
    i.T = i.R = i.G = i.Z = 0
    i.N = len(parts)
    for n, part in enumerate(parts):
        count, lo, lo_r = len(part.ids), i.T, i.R
        position = np.arange(part.start, part.start + count)
        i.token_ids[lo : lo + count] = part.ids
        i.position[lo : lo + count] = position
        i.rope_pos[:, lo : lo + count] = position
        i.rope_length[lo : lo + count] = part.rope_length or part.start + count
        blocks = np.asarray(part.blocks)
        i.slot_mapping[:, lo : lo + count] = blocks[position // block_size] * block_size + position % block_size
        i.block_tables[:, n] = -1
        i.block_tables[:, n, : len(blocks)] = blocks
        i.q_start[n], i.q_start[n + 1], i.kv_len[n] = lo, lo + count, part.start + count
        i.seq_slot[n] = n
        wanted = np.arange(lo if part.logits == "all" else lo + count - 1, lo + count)
        i.logit_rows[lo_r : lo_r + len(wanted)] = wanted
        i.T, i.R = lo + count, lo_r + len(wanted)
        if len(i.state_in):
            i.state_in[n], i.state_out[n] = blocks[0] if part.start else 0, blocks[0]
            i.span_start[n + 1], i.Z = i.T, n + 1
        if part.slot is None:
            continue
        if i.G and i.seg[i.G - 1, 2] == part.slot:
            i.seg[i.G - 1, 1], i.seg_r[i.G - 1, 1] = i.T, i.R
        else:
            i.seg[i.G], i.seg_r[i.G], i.seg_weight[i.G] = (lo, i.T, part.slot), (lo_r, i.R), 1.0
            i.G += 1


def capacity_for(tokens: int, *, block_size: int = 16) -> Capacity:
    """The capacity for one sequence of ``tokens`` tokens with logits for every row, and one spare block."""
    blocks = -(-tokens // block_size) + 1
    return Capacity(
        max_tokens=tokens,
        max_seqs=1,
        max_logit_rows=tokens,
        max_segments=1,
        num_blocks=blocks + 1,
        block_size=block_size,
        max_blocks_per_seq=blocks,
        num_states=blocks + 1,
    )


@dataclass
class Driver:
    """Runs one sequence. Its blocks are not in ascending order, so that errors in block tables show.

    ``slot`` is the adapter's slot, or None for the base, ``facts`` and ``prefix`` what an engine knows of it.
    ``computed`` is the number of computed tokens. ``taps``: the outputs of ops in the last ``feed``, of those whose
    numbers it has.
    """

    executable: Executable
    capacity: Capacity
    slot: int | None = None
    facts: AdapterFacts = NO_FACTS
    prefix: KvPrefix | None = None
    taps: dict[int, Float32] = field(default_factory=dict)
    computed: int = 0
    _acts_from: int | None = 0

    def __post_init__(self) -> None:
        ids = range(1, self.capacity.num_blocks)
        self._blocks = (*ids[1::2], *ids[0::2])[: self.capacity.max_blocks_per_seq]

    def feed(self, ids: Sequence[int], *, chunk: int | None = None) -> Float32:
        """Append ``ids``, in steps of at most ``chunk``, and return their float32 logits ``[len(ids), V]``. The first
        are the prompt."""
        every = list(ids)
        if not self.computed:
            self._acts_from = self.facts.acts_from(every)
            if self.prefix is not None:
                self._write(self.prefix)
            else:
                every = [*self.facts.virtual_ids, *every]
        rows, length, start = [], self.computed + len(every), 0
        taps: dict[int, list[Float32]] = {op: [] for op in self.taps}
        while start < len(every):
            stop = min(start + (chunk or len(every)), len(every))
            if self._acts_from is not None and self.computed < self._acts_from:
                stop = min(stop, self._acts_from)
            rows.append(self._step(every[start:stop], length))
            for op, seen in taps.items():
                seen.append(self.executable.tap(op))
            start = stop
        own = len(every) - len(ids)
        self.taps = {op: np.concatenate(seen)[own:] for op, seen in taps.items()}
        return np.concatenate(rows)[own:]

    def greedy(self, prompt: Sequence[int], count: int, *, chunk: int | None = None) -> tuple[list[int], Float32]:
        """``count`` greedy tokens after ``prompt``, one per step, and their logits ``[count, V]``."""
        rows = [self.feed(prompt, chunk=chunk)[-1]]
        tokens = [int(rows[-1].argmax())]
        while len(tokens) < count:
            rows.append(self.feed(tokens[-1:])[-1])
            tokens.append(int(rows[-1].argmax()))
        return tokens, np.stack(rows)

    def _write(self, prefix: KvPrefix) -> None:
        size, self.computed = self.capacity.block_size, prefix.values.shape[2]
        position = np.arange(self.computed)
        slots = (np.asarray(self._blocks)[position // size] * size + position % size).astype(np.int32)
        for op, (keys, values) in zip(prefix.ops, prefix.values, strict=True):
            self.executable.write_kv(op, slots, keys, values)

    def _step(self, ids: Sequence[int], rope_length: int) -> Float32:
        acts = self._acts_from is not None and self.computed >= self._acts_from
        part = Part(tuple(ids), self.computed, self._blocks, self.slot if acts else None, "all", rope_length)
        fill_step(self.executable.inputs, [part], self.capacity.block_size)
        self.executable.run()
        self.computed += len(ids)
        return self.executable.logits()
