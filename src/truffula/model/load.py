"""Loading a checkpoint: ``plan_model`` reads its metadata and makes a plan, ``WeightReader`` reads the weights.

Every tensor name of the checkpoint is accounted for. Every weight is read exactly once, has the shape that the config
gives and finite values; anything else is an error that names file and tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from truffula.environment import prepare_compute
from truffula.errors import CheckpointError, ConfigError, KernelError
from truffula.kernels.backend import Array, ComputedArray, Part, QuantisedArray, make_shape
from truffula.kernels.mapped import release_pages
from truffula.kernels.program import Embed, Logits, Program, WeightDecl, WeightPart
from truffula.kernels.weight_decl import BLOCK_ROWS
from truffula.model.decoder import build_program
from truffula.model.names import WeightNames, resolve_names
from truffula.model.plan import (
    FLOATS,
    Implementation,
    ModelSize,
    Tables,
    bos_id,
    decide_tying,
    end_tokens,
    stored_dtype,
    stored_types,
)
from truffula.model.plan import QUANTISED as QUANTISED
from truffula.model.plan import ModelPlan as ModelPlan
from truffula.model.read import check_file, is_native, read_config, require_transformers
from truffula.model.spec import ModelSpec
from truffula.types import Progress
from truffula.weights.checkpoint import Checkpoint, TensorInfo
from truffula.weights.finite import first_non_finite
from truffula.weights.quantised.packing import BY_KIND


def plan_model(
    checkpoint: Checkpoint, implementation: str = "auto", *, serial: str = "", more_ids: int = 0
) -> ModelPlan:
    """The plan of a checkpoint. ``implementation`` is that of the option: ``auto``, ``native`` or ``transformers``.

    With ``serial``, the reason, a model of transformers is planned to be computed one sequence at a time. ``more_ids``:
    rows for adapters' added tokens.

    Raises:
        UnsupportedModel: config.json requires an unsupported feature; names the key.
        CheckpointError: A tensor is missing, unknown, or of the wrong shape or type; names it.
        TyingError: Embedding and head are both missing, or the head is missing although the flag says untied.
        MissingDependency: Transformers computes the model, and is not installed.
        ConfigError: The model cannot have ``more_ids``.
    """
    if is_native(checkpoint.config, implementation):
        return _plan_native(checkpoint, more_ids)
    if more_ids:
        raise ConfigError(
            "transformers' code computes this model, to which adapters cannot add tokens (--adapter-tokens). Leave the "
            "option out.", param="adapter_tokens",
        )  # fmt: skip
    warnings = check_file(checkpoint.config)
    require_transformers(checkpoint.config)
    prepare_compute()
    from truffula.model.fallback.plan import plan_transformers

    plan = plan_transformers(checkpoint, serial)
    for name in plan.stored_types:
        _check_tensor(checkpoint, name, checkpoint.tensors[name].shape or (1,), "")
    return dataclasses.replace(plan, warnings=(*warnings, *plan.warnings))


def _plan_native(checkpoint: Checkpoint, more_ids: int) -> ModelPlan:
    read = read_config(checkpoint.config)
    spec = read.spec
    names = resolve_names(spec, checkpoint.tensors)
    tables = Tables(names.embed, names.head, names.has_embed, names.has_head)
    tying, warnings = decide_tying(checkpoint, tables, read.tie_default)
    program = build_program(spec, names, tying, more_ids)
    _check_shapes(checkpoint, spec, names, program)
    ends, end_warnings = end_tokens(checkpoint, spec.model_type, spec.vocab_size, read.eos_default)
    used = dict.fromkeys(part.name for decl in program.weights for part in decl.parts if part.name)
    dropped = [name for name in checkpoint.tensors if name not in used and name not in names.unused]
    return ModelPlan(
        native_spec=spec,
        size=ModelSize(spec.model_type, len(spec.layers), spec.hidden),
        implementation=Implementation("native", f"truffula's own implementation of {spec.model_type}"),
        program=program,
        tying=tying,
        warnings=(*checkpoint.warnings, *read.warnings, *names.warnings, *warnings, *end_warnings),
        end_tokens=ends,
        bos_token_id=bos_id(checkpoint, read.bos_default),
        max_model_len=spec.max_positions,
        stored_bytes=sum(checkpoint.tensors[name].nbytes for name in used),
        unused=(*checkpoint.unused, *names.unused, *dropped),
        saved_bytes=tables.saved_bytes(checkpoint, tying),
        stored_dtype=stored_dtype(checkpoint, used),
        stored_types=stored_types(checkpoint, used),
        tables=tables.used(tying),
    )


def _check_shapes(checkpoint: Checkpoint, spec: ModelSpec, names: WeightNames, program: Program) -> None:
    """Check the shape of every tensor, not of whole fused weights, in which two errors could cancel out."""
    for row in spec.rows:
        parts = names.parts.get(row.key, ())
        if parts and parts[0].stored:
            for part in parts:
                _check_tensor(checkpoint, part.name, part.stored, "")
            continue
        heights = [item.rows for item in row.slices] if len(parts) > 1 else [row.rows]
        for part, height in zip(parts, heights, strict=False):
            _check_tensor(checkpoint, part.name, row.stored_shape(height), "")
    tables = [op.table for op in program.ops if isinstance(op, Embed) and op.site is not None]
    tables += [op.weight for op in program.ops if isinstance(op, Logits)]
    for name in dict.fromkeys(part.name for table in tables for part in program.weights[table].parts[:1]):
        more = f" vocab_size is {spec.vocab_size}: rows beyond it cannot be assigned to tokens."
        _check_tensor(checkpoint, name, (spec.vocab_size, spec.embed_width or spec.hidden), more)


def _check_tensor(checkpoint: Checkpoint, name: str, wanted: tuple[int, ...], more: str) -> None:
    info = checkpoint.tensors[name]
    if (info.shape or (1,)) != wanted:  # a number without a shape is a vector of one
        raise CheckpointError(
            f"{name} in {info.file.name} has shape {list(info.shape)}; the config says {list(wanted)}.{more}",
            tensor=name,
            file=str(info.file),
            shape=list(info.shape),
            wanted=list(wanted),
        )
    if info.dtype not in FLOATS and not info.parts and checkpoint.format != "gguf":
        raise CheckpointError(
            f"{name} in {info.file.name} is stored as {info.dtype}; supported are {', '.join(FLOATS)}.",
            tensor=name,
            file=str(info.file),
            dtype=info.dtype,
        )


# Weights


class WeightReader:
    """A ``PullWeight`` over a checkpoint: called once per weight, it returns the weight's parts in order.

    A part is a view of the mapped file in its stored dtype or, when its values are converted, a new float32 array.
    Matrices stored in one of ``block_kinds`` are returned as their blocks. Call ``finish`` when the backend has loaded
    the program.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: ModelPlan,
        *,
        progress: Progress | None = None,
        block_kinds: frozenset[str] = frozenset(),
    ) -> None:
        self.checkpoint, self.plan, self.progress, self.block_kinds = checkpoint, plan, progress, block_kinds
        self._read: set[int] = set()
        self._done_bytes = 0

    def __call__(self, decl: WeightDecl) -> Sequence[Part]:
        """The parts of ``decl``. Raises ``CheckpointError`` naming tensor and count of non-finite values: now, or of a
        ``ComputedArray`` when its rows are read."""
        if decl.id in self._read:
            raise KernelError(f"{decl.name} was read twice.")
        parts = [self._part(part, decl.shape) for part in decl.parts if part.name]
        parts += [zeros_like(parts[0], part.stored) for part in decl.parts if not part.name]
        parts = joined(decl, parts)
        if not make_shape(decl, [part.shape for part in parts]):
            shapes = [list(part.shape) for part in parts]
            raise KernelError(f"{decl.name} has parts {shapes} in the files, {list(decl.shape)} in the program.")
        self._read.add(decl.id)
        return parts

    def _part(self, part: WeightPart, shape: tuple[int, ...]) -> Part:
        values = read_part(self.checkpoint, part, shape, self.block_kinds)
        self._done_bytes += self.checkpoint.tensors[part.name].nbytes
        if self.progress is not None:
            self.progress(part.name, self._done_bytes, self.plan.stored_bytes)
        return values

    def finish(self) -> None:
        """Raise ``KernelError`` when a weight of the program was not read: its values would be undefined."""
        left = [decl.name for decl in self.plan.program.weights if decl.id not in self._read]
        if left:
            raise KernelError(f"{len(left)} weights were not read: {', '.join(left[:10])}.")


def zeros_like(part: Part, shape: tuple[int, ...]) -> Part:
    """Zeros as ``part`` is stored."""
    if isinstance(part, QuantisedArray):
        blocks = np.zeros((shape[0], *part.blocks.shape[1:]), part.blocks.dtype)
        start = np.frombuffer(BY_KIND[part.kind].zeros, np.uint8)
        blocks[..., : start.size] = start
        return QuantisedArray(part.kind, blocks, shape, part.unpack)
    return np.zeros(shape, part.dtype)


def joined(decl: WeightDecl, parts: list[Part]) -> list[Part]:
    """``parts``; those of a vector of experts, gate and up in tensors of their own, as one: an expert's follow one
    another."""
    if len(decl.shape) != 1 or len(parts) < 2 or not decl.parts[0].stored:
        return parts
    each = [np.asarray(part).reshape(item.stored) for item, part in zip(decl.parts, parts, strict=True)]
    return [np.concatenate(each, axis=1).reshape(-1)]


def read_part(
    checkpoint: Checkpoint, part: WeightPart, shape: tuple[int, ...], block_kinds: frozenset[str] = frozenset(),
    *, checked: bool = True,
) -> Part:  # fmt: skip
    """A part of a weight of ``shape``; ``checked``: ``CheckpointError`` for values that are not finite."""
    if not part.name:
        return np.zeros(part.stored, np.float32)
    info = checkpoint.tensors[part.name]
    as_stored = part.transform == "none" and part.order is None
    as_blocks = part.in_blocks and (info.values or info.dtype) in block_kinds
    blocks = checkpoint.blocks(part.name) if as_blocks else None
    if blocks is not None and part.transform != "none":
        swapped = (*info.shape[:-2], info.shape[-1], info.shape[-2])
        blocks = blocks.output_rows(BLOCK_ROWS[part.transform]) if blocks.shape == swapped else None
    if blocks is not None and part.order is not None:
        blocks = dataclasses.replace(blocks, blocks=part.order.sorted(blocks.blocks))
    by_rows = as_stored and (len(shape) < 3 or part.expert is not None)
    computed = checkpoint.computed(part.name) if by_rows else None
    if blocks is not None:
        return blocks
    if computed is None and by_rows and len(shape) > 1 and info.dtype in ("F32", "F16", "BF16"):
        view = checkpoint.read(part.name)
        computed = ComputedArray(view.shape, view.dtype, lambda lo, hi: view[lo:hi])
    if computed is not None:
        return _checked_rows(computed, info) if checked else computed
    stored = checkpoint.read(part.name)
    if checked and by_rows and len(shape) > 1 and info.dtype in ("F32", "F16", "BF16"):  # a view
        return _checked_rows(ComputedArray(stored.shape, stored.dtype, lambda lo, hi: stored[lo:hi]), info)
    if checked:
        _require_finite(stored, info)
    return arranged(part, transformed(part, stored), shape)


def transformed(part: WeightPart, stored: Array) -> Array:
    """The values of a tensor that is stored as ``part`` says: a view, or new float32 values."""
    if part.transform == "conv":
        stored = stored[:, 0, :]
    values = stored.T if part.transform == "transpose" else stored
    if stored.dtype != np.float64 and part.transform not in ("plus_one", "minus_exp"):
        return values
    values = values.astype(np.float32)
    release_pages(stored)
    if part.transform == "minus_exp":
        return -np.exp(values)
    return values + np.float32(1) if part.transform == "plus_one" else values


def _checked_rows(rows: ComputedArray, info: TensorInfo) -> ComputedArray:
    """``rows``; reading some with values that are not finite raises ``CheckpointError``."""

    def read(lo: int, hi: int) -> Array:
        values = rows.read(lo, hi)
        if first_non_finite(values) is not None:
            _require_finite(rows.read(lo, rows.shape[0]), info, lo)  # counts those in later rows, too
        return values

    return ComputedArray(rows.shape, rows.dtype, read)


def _require_finite(values: Array, info: TensorInfo, row: int = 0) -> None:
    """Raise ``CheckpointError`` naming the tensor when ``values``, its rows from ``row`` on, are not all finite."""
    found = first_non_finite(values)
    if found is not None:
        first = (found.first[0] + row, *found.first[1:]) if found.first else ()
        scales = ", computed from its scales" if info.parts else ""
        raise CheckpointError(
            f"{info.name} in {info.file.name} holds {found.number} NaN or infinite values{scales}, the first at "
            f"{first}.",
            tensor=info.name,
            file=str(info.file),
            count=found.number,
        )


def arranged(part: WeightPart, values: Array, shape: tuple[int, ...]) -> Array:
    """A part of a weight of ``shape`` from the values of its tensor: of matrices a view, unless their rows are sorted,
    of their biases a copy."""
    if part.order is not None:
        return part.order.sorted(values)
    if len(shape) == 1:
        if part.transform == "alternating":
            values = values.reshape(len(values), -1, 2).swapaxes(1, 2)
        return values.reshape(-1)
    if part.stored and part.expert is None:
        experts, _, width = shape
        values = (
            values.reshape(experts, width, -1) if "columns" in part.transform else values.reshape(experts, -1, width)
        )
    if "columns" in part.transform:
        values = values.swapaxes(-1, -2)
    step = {"even_columns": 0, "odd_columns": 1}.get(part.transform)
    return values if step is None else values[:, step::2]
