"""The launches of a program: for each op that kernels serve, a function that launches them.

Everything that does not change from step to step (addresses, strides, tiles) is fixed when a program is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from truffula.kernels.inputs import Capacity, StepInputs
from truffula.kernels.program import (
    Attention,
    Embed,
    Epilogue,
    Linear,
    Logits,
    Norm,
    Pointwise,
    Program,
    Ref,
    Rope,
    RopeRows,
    TakeRows,
)
from truffula.kernels.reference.kv import KvPlanes
from truffula.kernels.reference.weights import Weight
from truffula.kernels.triton import attention_kernels, linear_kernels, row_kernels
from truffula.kernels.triton.device import Device
from truffula.kernels.triton.served import has_kernel
from truffula.kernels.triton.tiles import Tiles
from truffula.kernels.triton.work import PIECE_ROWS

Launch = Callable[[], None]


@dataclass
class StepState:
    """What launches read of a step besides its memory: its inputs, whether adapters act, the columns and planes of h,
    and the rows of sums of each kind of attention."""

    inputs: StepInputs
    adapted: bool = False
    width: int = 0
    planes: int = 0
    partial_rows: dict[tuple[int | None, bool, int], int] = field(default_factory=dict)


class Launcher:
    """Makes the launches. ``buffer`` gives all rows of a buffer's columns; ``there`` are the step's arrays on the
    device."""

    def __init__(
        self,
        program: Program,
        weights: list[Weight],
        planes: KvPlanes,
        capacity: Capacity,
        device: Device,
        tiles: Tiles,
        buffer: Callable[[Ref], Tensor],
        there: dict[str, Tensor],
        first_descriptor: dict[int, int],
        step: StepState,
    ) -> None:
        self._program, self._weights, self._planes, self._block_size = program, weights, planes, capacity.block_size
        self._device, self._tiles, self._buffer, self._there = device, tiles, buffer, there
        self._first, self._step = first_descriptor, step
        self._none = torch.zeros(1, device=device.torch_device)  # the operand of a kernel that does not read it
        self._workspaces: dict[str, Tensor] = {}
        for name, floats in workspaces(program, capacity, tiles).items():
            self._workspace(name, floats)

    def launch_of(self, index: int) -> Launch | None:
        """The launch of op number ``index``; None: torch computes it."""
        op = self._program.ops[index]
        if not has_kernel(self._program, op):
            return None
        match op:
            case Embed():
                return self._embed(op)
            case Norm():
                return self._norm(op)
            case Linear():
                return self._linear(index, op.x, op.weight, op.out, op.epilogue, None)
            case Logits():
                epilogue = Epilogue(bias=op.bias, scale=op.scale)
                return self._linear(index, op.x, op.weight, op.out, epilogue, op.softcap)
            case Pointwise():
                return self._pointwise(op)
            case RopeRows():
                return self._rope_rows(op)
            case Rope():
                return self._rope(op)
            case Attention():
                return self._attention(op)
            case TakeRows():
                return self._take_rows(op)
        raise AssertionError(op)

    # --- what launches have in common ---------------------------------------------------------------------------------

    def _run(self, kernel: Any, *args: Any, **constants: Any) -> Launch:
        return partial(self._launch, kernel, *args, **constants)

    def _launch(self, kernel: Any, *args: Any, **constants: Any) -> None:
        """Only where products need it for speed may a compiler join a product and a sum, which rounds once: elsewhere
        bits would depend on which it joins in a variant of a kernel."""
        self._device.launch(kernel, *args, enable_fp_fusion=kernel is linear_kernels.product, **constants)

    def _of_r(self, ref: Ref) -> bool:
        return self._program.buffers[ref.buffer].rows == "R"

    def _operand(self, ref: Ref | None) -> tuple[Tensor, int]:
        """A buffer and the distance of its rows."""
        if ref is None:
            return self._none, 0
        tensor = self._buffer(ref)
        return tensor, tensor.stride(0)

    def _vector(self, weight: int | None) -> Tensor:
        return self._none if weight is None else self._weights[weight].whole

    def _workspace(self, name: str, floats: int) -> Tensor:
        """At least so many floats that only one op uses. Those of adapters grow with their ranks, each time to twice
        their number, as torch keeps what they leave."""
        found = self._workspaces.get(name)
        if found is None or len(found) < floats:
            floats = floats if found is None else max(floats, 2 * len(found))
            found = torch.empty(floats, dtype=torch.float32, device=self._device.torch_device)
            self._workspaces[name] = found
        return found

    # --- ops ----------------------------------------------------------------------------------------------------------

    def _embed(self, op: Embed) -> Launch:
        table = self._weights[op.table].whole
        (add, stride_add), (out, stride_out) = self._operand(op.add), self._operand(op.out)
        scale = 1.0 if op.scale is None else float(torch.tensor(op.scale, dtype=table.dtype))
        return self._run(
            row_kernels.embed, table, self._there["token_ids" if op.source == "token" else "position"], add, out,
            self._there["counts"], scale, len(table) - 1, stride_add, stride_out, D=op.out.width,
            B=power_of_two(op.out.width), OFFSET=op.offset if op.source == "position" else 0,
            SCALE=op.scale is not None, ADD=op.add is not None,
        )  # fmt: skip

    def _take_rows(self, op: TakeRows) -> Launch:
        (x, stride_x), (out, stride_out) = self._operand(op.x), self._operand(op.out)
        rows, counts = self._there["logit_rows"], self._there["counts"]
        width = op.out.width
        return self._run(
            row_kernels.take_rows, x, rows, out, counts, stride_x, stride_out, D=width, B=power_of_two(width)
        )

    def _norm(self, op: Norm) -> Launch:
        (x, stride_x), (out, stride_out) = self._operand(op.x), self._operand(op.out)
        (gate, stride_gate), (plus, stride_plus) = self._operand(op.gate), self._operand(op.plus)
        width = op.x.width // op.groups
        shared = op.weight is None or self._program.weights[op.weight].shape[0] == width
        return self._run(
            row_kernels.norm, x, self._vector(op.weight), self._vector(op.bias), gate, plus, out, self._there["counts"],
            stride_x, stride_gate, stride_plus, stride_out, op.eps, OF_R=self._of_r(op.x), GROUPS=op.groups, D=width,
            B=power_of_two(width), RMS=op.kind == "rms", FIRST=op.cast == "first", WEIGHT=op.weight is not None,
            BIAS=op.bias is not None, SHARED=shared, GATE=op.gate_activation, PLUS=op.plus is not None,
            num_warps=8 if width > 2048 else 4,
        )  # fmt: skip

    def _rope_rows(self, op: RopeRows) -> Launch:
        table = self._program.rope_tables[op.table]
        inv_freq = torch.tensor(table.inv_freq, dtype=torch.float32).to(self._device.torch_device)
        out, stride = self._operand(op.out)
        pairs = len(inv_freq)
        return self._run(
            row_kernels.rope_rows, self._there["rope_pos"][0], inv_freq, out, self._there["counts"], table.factor,
            stride, P=pairs, B=power_of_two(pairs),
        )  # fmt: skip

    def _rope(self, op: Rope) -> Launch:
        (x, stride_x), (rows, stride_rows) = self._operand(op.x), self._operand(op.rows)
        return self._run(
            row_kernels.rope, x, rows, self._there["counts"], stride_x, stride_rows, HEADS=op.heads, WIDTH=op.head_dim,
            START=op.start, PAIRS=op.dims // 2, B=power_of_two(op.dims // 2), HALF=op.layout == "half",
        )  # fmt: skip

    def _pointwise(self, op: Pointwise) -> Launch:
        (x, stride_x), (y, stride_y), (out, stride_out) = map(self._operand, (op.x, op.y, op.out))
        p0, p1, p2 = (*op.params, 0.0, 0.0, 0.0)[:3]
        return self._run(
            row_kernels.pointwise, x, y, out, self._vector(op.weight), self._there["position"], self._there["counts"],
            stride_x, stride_y, stride_out, p0, p1, p2, OF_R=self._of_r(op.x), D=op.x.width,
            B=min(1024, power_of_two(op.x.width)), KIND=op.kind, ACT=op.activation, WEIGHT=op.weight is not None,
            SHARE=op.x.width // op.y.width if op.y else 1,
        )  # fmt: skip

    def _linear(self, index: int, x_ref: Ref, weight: int, out_ref: Ref, e: Epilogue, softcap: float | None) -> Launch:
        w, tiles, there, step = self._weights[weight].whole, self._tiles, self._there, self._step
        outputs, inputs = w.shape
        slices = self._first.get(index)
        count = 0 if slices is None else len(self._bounds(index))
        bounds = self._none if slices is None else self._bounds(index).to(self._device.torch_device)
        of_r, e0 = self._of_r(x_ref), slices or 0
        letter = "r" if of_r else "t"
        (x, stride_x), (out, stride_out), (residual, stride_res) = map(self._operand, (x_ref, out_ref, e.residual))
        split, chunk = tiles.cut(outputs, inputs)
        in_place = split == 1 and not e.glu and out.dtype == torch.float32 and e.residual is None
        exact = "ieee" if w.dtype == torch.float32 else "tf32x3"
        lists = [there[f"{name}_{letter}"] for name in ("pieces", "shrinks", "entries", "weights")]
        bias = self._vector(e.bias)

        def launch() -> None:
            rows = step.inputs.R if of_r else step.inputs.T
            parts, ns = split if rows <= tiles.split_rows else 1, count if step.adapted else 0
            ws = out if in_place else self._workspace("product", parts * rows * outputs)
            stride_ws, part_ws = (stride_out, 0) if in_place else (outputs, rows * outputs)
            plane = rows * step.width
            h = self._workspace("shrunk", max(1, parts * step.planes * plane))
            pieces, shrinks, entries, weights = lists
            tile = tiles.tile(rows, self._device.tensor_core_rows)
            self._launch(
                linear_kernels.product, x, w, ws, h, there["counts"], shrinks, entries, e0, stride_x, stride_ws,
                part_ws, step.width, plane, step.planes * plane, OF_R=of_r, O=outputs, I=inputs, NS=ns, SPLIT=split,
                CHUNK=chunk, PARTS=parts, BM=tile.rows, BN=tiles.columns, BK=tiles.k, BS=PIECE_ROWS, BR=16,
                PRECISION=exact, SHRINK_PRECISION=tiles.precision, num_warps=tile.warps, num_stages=tiles.stages,
            )  # fmt: skip
            self._launch(
                linear_kernels.finish, ws, h, there["counts"], pieces, entries, weights, bounds, e0, bias, residual,
                out, stride_ws, part_ws, step.width, plane, step.planes * plane, stride_res, stride_out,
                e.clip or 0.0, e.scale, e.glu_limit or 0.0, e.glu_offset, softcap or 1.0, OF_R=of_r, O=outputs, NS=ns,
                PARTS=parts, GLU=e.glu, BIAS=e.bias is not None, CLIP=e.clip is not None, ACT=e.activation,
                LIMIT=e.glu_limit is not None, RESIDUAL=e.residual is not None, SOFTCAP=softcap is not None,
                BM=PIECE_ROWS, BN=tiles.columns, BR=16, PRECISION=tiles.precision,
            )  # fmt: skip

        return launch

    def _bounds(self, index: int) -> Tensor:
        """int32 [slices, 2]: columns of each."""
        op = self._program.ops[index]
        slices = [(item.lo, item.hi) for item in op.slices] if isinstance(op, Linear) else []
        if isinstance(op, Logits):
            slices = [(0, op.out.width)]
        return torch.tensor(slices, dtype=torch.int32)

    def _attention(self, op: Attention) -> Launch:
        there, tiles, step, kv = self._there, self._tiles, self._step, tuple(self._planes[p] for p in op.planes)
        key, cut = attention_key(op, tiles), tiles.attention(op.heads // op.kv_heads)
        name = attention_name(key)
        (q, stride_q), (out, stride_out) = self._operand(op.q), self._operand(op.out)
        slopes = torch.tensor(op.alibi or (0.0,), dtype=torch.float32).to(self._device.torch_device)
        sinks, tables = self._vector(op.sinks), there["block_tables"][op.group]
        writes = [self._write(ref, plane, op.group) for ref, plane in zip((op.k, op.v), kv, strict=True) if ref]
        group, exact = op.heads // op.kv_heads, "ieee" if kv[0].dtype == torch.float32 else "tf32x3"
        dims = power_of_two(op.dim_v)
        warps = 8 if dims > 128 or self._device.tensor_core_rows < 64 else 4  # as registers hold its sums

        def launch() -> None:
            for write in writes:
                write()
            rows = step.partial_rows[key] * op.heads
            space = self._workspace("attention", max(1, rows) * (op.dim_v + 2))
            partial_, tops, dens = space.split_with_sizes(
                [max(1, rows) * op.dim_v, max(1, rows), len(space) - max(1, rows) * (op.dim_v + 1)]
            )
            self._launch(
                attention_kernels.attention, q, *kv, tables, there["q_start"], there["kv_len"], there[f"items_{name}"],
                there[f"counts_{name}"], partial_, tops, dens, sinks, slopes, out, op.scale, op.softcap or 1.0,
                stride_q, stride_out, tables.stride(0), HEADS=op.heads, KV_HEADS=op.kv_heads, DK=op.dim_k, DV=op.dim_v,
                BDK=max(16, power_of_two(op.dim_k)), BDV=dims,  # tensor cores add 16 products at least
                S=self._block_size, SPLIT=cut.split, BQ=cut.queries,
                BM=power_of_two(cut.queries * group), BN=tiles.keys, WINDOW=op.window or 0, CHUNKED=op.chunked,
                SOFTCAP=op.softcap is not None, SINKS=op.sinks is not None,
                ALIBI=0 if not op.alibi else 2 if op.alibi_rounded else 1, PRECISION=exact,
                num_warps=warps, num_stages=2,
            )  # fmt: skip
            if rows:
                self._launch(
                    attention_kernels.merge, partial_, tops, dens, there[f"merges_{name}"],
                    there[f"counts_{name}"][1:], sinks, out, stride_out, HEADS=op.heads, DV=op.dim_v, BDV=dims,
                    BQ=cut.queries, SINKS=op.sinks is not None,
                )  # fmt: skip

        return launch

    def _write(self, ref: Ref, plane: Tensor, group: int) -> Launch:
        x, stride = self._operand(ref)
        slots, width = self._there["slot_mapping"][group], plane.shape[-1]
        counts = self._there["counts"]
        return self._run(row_kernels.write_rows, x, slots, plane, counts, stride, W=width, B=power_of_two(width))


def attention_key(op: Attention, tiles: Tiles) -> tuple[int | None, bool, int]:
    """Ops with one key share their lists of items: the window, and the queries of an item."""
    return op.window, op.chunked, tiles.attention(op.heads // op.kv_heads).queries


def attention_name(key: tuple[int | None, bool, int]) -> str:
    return "_".join(str(part) for part in key)


def power_of_two(width: int) -> int:
    """The least one that is at least ``width`` and 16."""
    return max(16, 1 << (width - 1).bit_length())


def workspaces(program: Program, capacity: Capacity, tiles: Tiles) -> dict[str, int]:
    """The most floats of a step's sums of products and of attention."""
    products = attention = 0
    for op in program.ops:
        if isinstance(op, Linear | Logits):
            outputs, inputs = program.weights[op.weight].shape
            rows = capacity.max_tokens if isinstance(op, Linear) else capacity.max_logit_rows
            split, _ = tiles.cut(outputs, inputs)
            products = max(products, max(rows, split * min(rows, tiles.split_rows)) * outputs)
        elif isinstance(op, Attention):
            attention = max(attention, tiles.partial_rows * op.heads * (op.dim_v + 2))
    return {"product": products, "attention": attention}
