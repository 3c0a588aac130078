"""The native CPU backend: its memory plan and loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from truffula.errors import ConfigError, KernelError
from truffula.kernels.adapters import AdapterLayout, layout_of
from truffula.kernels.arena import plan_arena
from truffula.kernels.backend import MemoryLimit, MemoryPlan, PullWeight
from truffula.kernels.cpu.executable import CpuExecutable
from truffula.kernels.cpu.formats import BLOCK_KINDS, WeightOptions
from truffula.kernels.cpu.library import as_kernel_errors, instruction_sets, library
from truffula.kernels.cpu.lowering import add_ops
from truffula.kernels.cpu.weights import Rounding, load_one, load_weights, planned_weights, roles
from truffula.kernels.host import free_memory
from truffula.kernels.inputs import Capacity, SampleInputs, StepInputs
from truffula.kernels.program import Attention, ExpertLinear, GatedDelta, Linear, Logits, Mla, Op, Program
from truffula.kernels.validate import validate

DTYPES: tuple[str, ...] = ("bfloat16", "float32")


class CpuBackend:
    """``isa`` names an instruction set of ``instruction_sets()``, or is ``auto``, the first of them.

    ``quantize`` q8_0 rounds float matrices at load. ``exact``: blocks of quantised files are dequantised, instead of
    multiplied in int8.
    """

    name = "cpu"
    device = "cpu"
    dtypes = DTYPES

    def __init__(
        self, threads: int | None = None, isa: str = "auto", *, quantize: str = "none", exact: bool = False
    ) -> None:
        sets = instruction_sets()
        if isa not in ("auto", *sets):
            raise ConfigError(f"cpu_isa is {isa!r}; this machine has {', '.join(('auto', *sets))}.", param="cpu_isa")
        if quantize not in ("none", "q8_0"):
            raise ConfigError(f"quantize is {quantize!r}; it must be none or q8_0.", param="quantize")
        self._quantize, self._exact = quantize, exact
        self.block_kinds = frozenset() if exact else frozenset(BLOCK_KINDS)
        self._threads = threads or 1
        self.isa = sets[0] if isa == "auto" else isa

    def free_memory(self) -> MemoryLimit:
        return free_memory()

    def _weight_options(self, dtype: str) -> WeightOptions:
        return WeightOptions(dtype, self._quantize, blocks=not self._exact)

    def plan(
        self,
        program: Program,
        dtype: str,
        capacity: Capacity,
        stored_types: Mapping[str, str] = MappingProxyType({}),
    ) -> MemoryPlan:
        """Weights as they are packed; the activations of a full step; KV blocks with their padding."""
        weights = planned_weights(program, self._weight_options(dtype), stored_types)
        by_format: dict[str, int] = {}
        for fmt, nbytes in weights:
            by_format[fmt] = by_format.get(fmt, 0) + nbytes
        arena = plan_arena(program, capacity, reuse=True)
        logits = 4 * capacity.max_logit_rows * program.vocab_size
        scratch = self._scratch_bytes(program, capacity, [fmt for fmt, _ in weights])
        return MemoryPlan(
            weight_bytes=sum(by_format.values()),
            weight_formats=by_format,
            arena_bytes=max(0, 4 * arena.floats - logits) + scratch,
            logits_bytes=2 * logits,
            kv_block_bytes=tuple(
                sum(_kv_block_bytes(op, group.id, capacity.block_size, dtype) for op in program.ops)
                for group in program.kv_groups
            ),
            state_bytes=sum(library().state_row_bytes(state.width) for state in program.states),
        )

    def _scratch_bytes(self, program: Program, capacity: Capacity, formats: Sequence[str]) -> int:
        """The most scratch memory of a step: x converted for products, what adapters compute of it, queries in the
        space of latents, and per thread that of attention and of the sampler."""
        native = library()
        converted = attention = delta = experts = absorbed = 0
        for op in program.ops:
            if isinstance(op, Linear | Logits):
                rows = capacity.max_logit_rows if isinstance(op, Logits) else capacity.max_tokens
                inputs = program.weights[op.weight].shape[1]
                converted = max(converted, native.converted_bytes(self.isa, rows, inputs, formats[op.weight]))
            elif isinstance(op, ExpertLinear):
                fmt, (_, outputs, inputs) = formats[op.weight], program.weights[op.weight].shape
                rows = capacity.max_tokens * op.x.width // inputs
                converted = max(converted, native.converted_bytes(self.isa, rows, inputs, fmt))
                half = outputs // 2 if op.epilogue.glu else 0
                experts = max(experts, native.expert_scratch_bytes(outputs, inputs, fmt, half, self._threads))
            elif isinstance(op, Attention):
                nbytes = native.attention_scratch_bytes(*_attention_shape(op), capacity.block_size)
                attention = max(attention, nbytes)
            elif isinstance(op, Mla):
                width = op.rank + op.rope
                absorbed = max(absorbed, 4 * capacity.max_tokens * op.heads * width)
                attention = max(attention, native.latent_scratch_bytes(op.heads, width, op.rank, capacity.block_size))
            elif isinstance(op, GatedDelta):
                delta = max(delta, native.delta_scratch_bytes(op.dim_k))
        products = 4 * _adapter_width(program, formats) * max(capacity.max_tokens, capacity.max_logit_rows)
        sampling = int(native.SAMPLE_SCRATCH_BYTES) * program.vocab_size
        return converted + products + absorbed + self._threads * (attention + delta + experts + sampling)

    def adapter_layout(self, program: Program) -> AdapterLayout:
        return layout_of(program, "panels")

    def faster_dtype(self) -> tuple[str, str]:
        return "bfloat16", "a step reads half as many bytes as in float32"

    def load(
        self, program: Program, dtype: str, pull: PullWeight, capacity: Capacity, *, debug: bool = False
    ) -> CpuExecutable:
        """Validate, pull and pack every weight, make the native op list.

        Raises:
            KernelError: The program is wrong, a weight does not have its declared shape, or the dtype is not served.
        """
        validate(program)
        if dtype not in DTYPES:
            raise KernelError(f"dtype {dtype!r} is not supported; use {' or '.join(DTYPES)}.", param="dtype")
        inputs = StepInputs.allocate(capacity, len(program.kv_groups))
        arena = plan_arena(program, capacity, reuse=not debug)
        with as_kernel_errors():
            native = library().Executable(self.isa, self._threads, capacity, dtype, len(program.kv_groups), debug)
            for buffer, offset, stride in zip(program.buffers, arena.offsets, arena.strides, strict=True):
                rounded = dtype == "bfloat16" and buffer.dtype == "model"
                native.add_buffer(offset=offset, stride=stride, logit_rows=buffer.rows == "R", rounded=rounded)
            formats = load_weights(native, program, self._weight_options(dtype), pull)
            for state in program.states:
                native.add_state(state.width)
            add_ops(native, program, dtype)
            layout = self.adapter_layout(program)
            for site, place in enumerate(layout.places):
                if place is not None:
                    native.add_site(
                        site=site, op=place.op, first=place.first, outputs=place.outputs, expert=place.expert
                    )
            width = _adapter_width(program, formats)
            native.seal(
                inputs,
                arena_floats=arena.floats,
                logits_buffer=program.result.buffer,
                vocab=program.output.width,
                planned_width=width,
            )
        samples = SampleInputs.allocate(capacity, program.vocab_size)
        return CpuExecutable(native, layout, inputs, samples, program.output, width)

    def rounding(self, program: Program, pull: PullWeight) -> Rounding:
        """The error of ``quantize`` on ``program``'s weights; holds one of them at a time.

        Raises:
            KernelError: A weight cannot be rounded; ``load`` raises it too.
        """
        capacity = Capacity(
            max_tokens=1, max_seqs=1, max_logit_rows=1, max_segments=1, num_blocks=2, block_size=1, max_blocks_per_seq=1
        )
        found = Rounding()
        with as_kernel_errors():
            for decl, role in zip(program.weights, roles(program), strict=True):
                native = library().Executable(self.isa, self._threads, capacity, "float32", 1, False)
                load_one(native, decl, role, self._weight_options("float32"), pull, found)
        return found


def _adapter_width(program: Program, formats: Sequence[str]) -> int:
    """Floats per row of a step for what an adapter computes of it at one op: products with A up to the planned rank,
    or x as it scales it. Adapters of more are charged for that. 0 where no adapter can act."""
    widest = int(library().PLANNED_RANK) if program.sites else 0
    for op in program.ops:
        if isinstance(op, Linear | ExpertLinear) and op.slices:
            inputs = program.weights[op.weight].shape[-1]
            widest = max(widest, int(library().scaled_x_floats(inputs, formats[op.weight])))
    return widest


def _kv_block_bytes(op: Op, group: int, block_size: int, dtype: str) -> int:
    """Bytes of a block of what an op of a KV group caches; 0 of any other op."""
    if isinstance(op, Attention) and op.group == group and op.k is not None:
        return int(library().kv_block_bytes(*_attention_shape(op), block_size, dtype))
    if isinstance(op, Mla) and op.group == group:
        return int(library().latent_block_bytes(op.latent.width, block_size, dtype))
    return 0


def _attention_shape(op: Attention) -> tuple[int, int, int, int]:
    return op.heads, op.kv_heads, op.dim_k, op.dim_v
