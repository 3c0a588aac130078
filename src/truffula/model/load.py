"""Loading a checkpoint: ``plan_model`` reads its metadata and makes a plan, ``WeightReader`` reads the weights.

Every tensor name of the checkpoint is accounted for. Every weight is read exactly once, has the shape that the config
gives and finite values; anything else is an error that names file and tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from truffula.errors import CheckpointError, KernelError, UnsupportedModel
from truffula.kernels.backend import Array, ComputedArray, Part, make_shape
from truffula.kernels.mapped import release_pages
from truffula.kernels.program import Embed, Logits, ModelInterface, Program, WeightDecl, WeightPart
from truffula.model.decoder import build_program
from truffula.model.names import WeightNames, resolve_names
from truffula.model.read import ReadConfig, read_config
from truffula.model.spec import ModelSpec
from truffula.types import EndToken, Progress
from truffula.weights.checkpoint import Checkpoint, TensorInfo
from truffula.weights.finite import first_non_finite
from truffula.weights.tying import Tie, TyingDecision, decide, equal_as_stored, read_flag

QUANTISED = "quantised"
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class ModelPlan:
    """The plan for loading a model. Made without reading tensor data, unless embedding and head must be compared.

    ``stored_bytes``: size of the used tensors in the files. ``saved_bytes``: memory saved by tying. ``stored_dtype``:
    the float dtype of most of these bytes, or ``quantised``. ``unused``: names of tensors that are not used.
    ``stored_types``: the storage type of each used tensor (``BF16``, ``Q4_1``), of a computed one that of its values.
    ``tables``: the tensors that embedding
    and head use, by kind of site; one tensor when tied.
    """

    spec: ModelSpec
    program: Program
    tying: TyingDecision
    warnings: tuple[str, ...]
    end_tokens: tuple[EndToken, ...]
    bos_token_id: int | None
    max_model_len: int
    stored_bytes: int
    unused: tuple[str, ...]
    saved_bytes: int
    stored_dtype: str = "float32"
    stored_types: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, str] = field(default_factory=dict)

    @property
    def interface(self) -> ModelInterface:
        """The part of ``program`` that does not depend on ops."""
        return self.program

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(token.id for token in self.end_tokens)


def plan_model(checkpoint: Checkpoint) -> ModelPlan:
    """The plan of a checkpoint.

    Raises:
        UnsupportedModel: config.json requires an unsupported feature; names the key.
        CheckpointError: A tensor is missing, unknown, or of the wrong shape or type; names it.
        TyingError: Embedding and head are both missing, or the head is missing although the flag says untied.
    """
    read = read_config(checkpoint.config)
    spec = read.spec
    names = resolve_names(spec, checkpoint.tensors)
    tying, warnings = _decide_tying(checkpoint, read, names)
    program = build_program(spec, names, tying)
    _check_shapes(checkpoint, spec, names, program)
    ends, end_warnings = _end_tokens(checkpoint, read)
    used = {part.name for decl in program.weights for part in decl.parts}
    dropped = [name for name in checkpoint.tensors if name not in used and name not in names.unused]
    table = checkpoint.tensors[program.weights[0].parts[0].name]
    return ModelPlan(
        spec=spec,
        program=program,
        tying=tying,
        warnings=(*checkpoint.warnings, *read.warnings, *names.warnings, *warnings, *end_warnings),
        end_tokens=ends,
        bos_token_id=_bos_id(checkpoint, read),
        max_model_len=spec.max_positions,
        stored_bytes=sum(checkpoint.tensors[name].nbytes for name in used),
        unused=(*checkpoint.unused, *names.unused, *dropped),
        saved_bytes=0 if tying.tie is Tie.SEPARATE else table.nbytes,
        stored_dtype=_stored_dtype(checkpoint, used),
        stored_types={name: checkpoint.tensors[name].values or checkpoint.tensors[name].dtype for name in used},
        tables={
            "embed": names.head if tying.tie is Tie.REVERSED else names.embed,
            "head": names.embed if tying.tie is Tie.TIED else names.head,
        },
    )


def _decide_tying(checkpoint: Checkpoint, read: ReadConfig, names: WeightNames) -> tuple[TyingDecision, list[str]]:
    """The tying decision for the tensors of the checkpoint, and warnings."""
    flag, warnings = read_flag(checkpoint.config)
    embed, head = checkpoint.tensors.get(names.embed), checkpoint.tensors.get(names.head)
    same_shape = embed is None or head is None or embed.shape == head.shape
    compared = flag is not False and embed is not None and head is not None
    decision = decide(
        flag,
        has_embed=names.has_embed,
        has_head=names.has_head,
        equal=compared and equal_as_stored(checkpoint, names.embed, names.head),
        # GGUF has no flag and expresses tying by a missing head, so the class default gives no warning.
        class_default=None if checkpoint.format == "gguf" else read.tie_default,
        same_shape=same_shape,
        embed_name=names.embed,
        head_name=names.head,
    )
    if names.has_head and head is None and decision.tie is not Tie.TIED:
        raise CheckpointError(
            f"{names.head} is missing; the head is stored in another form, possibly quantised.", param=names.head
        )
    return decision, [*warnings, *([decision.warning] if decision.warning else [])]


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
    tables = [op.table if isinstance(op, Embed) else op.weight for op in program.ops if isinstance(op, Embed | Logits)]
    for name in dict.fromkeys(part.name for table in tables for part in program.weights[table].parts):
        more = f" vocab_size is {spec.vocab_size}: rows beyond it cannot be assigned to tokens."
        _check_tensor(checkpoint, name, (spec.vocab_size, spec.hidden), more)


def _check_tensor(checkpoint: Checkpoint, name: str, wanted: tuple[int, ...], more: str) -> None:
    info = checkpoint.tensors[name]
    if info.shape != wanted:
        raise CheckpointError(
            f"{name} in {info.file.name} has shape {list(info.shape)}; the config says {list(wanted)}.{more}",
            tensor=name,
            file=str(info.file),
            shape=list(info.shape),
            wanted=list(wanted),
        )
    if info.dtype not in _FLOATS and not info.parts and checkpoint.format != "gguf":
        raise CheckpointError(
            f"{name} in {info.file.name} is stored as {info.dtype}; supported are {', '.join(_FLOATS)}.",
            tensor=name,
            file=str(info.file),
            dtype=info.dtype,
        )


def _stored_dtype(checkpoint: Checkpoint, used: set[str]) -> str:
    sizes: Counter[str] = Counter()
    for name in sorted(used):
        info = checkpoint.tensors[name]
        sizes[_FLOATS.get(info.dtype, QUANTISED)] += info.nbytes
    return sizes.most_common(1)[0][0]


# Special ids


def _ids(config: Mapping[str, Any], key: str, file: str) -> tuple[list[int], str]:
    """The token ids under ``key`` of a config, at its top level or in text_config, and the place; no ids and ""."""
    text = config.get("text_config")
    for path, level in (("", config), ("text_config.", text if isinstance(text, Mapping) else {})):
        value = level.get(key)
        if value is None:
            continue
        found = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in found):
            raise UnsupportedModel(
                f"{file} {path}{key} is {value!r}; expected a token id or a list of token ids.", param=key
            )
        return found, f"{file} {path}{key}"
    return [], ""


def _end_tokens(checkpoint: Checkpoint, read: ReadConfig) -> tuple[tuple[EndToken, ...], list[str]]:
    """Tokens that end a completion: those of generation_config.json, then those of config.json, without duplicates.

    When both have none, the default of the config's class is used, as in transformers; a GGUF file has no class.
    """
    key, warnings, gguf = "eos_token_id", [], checkpoint.format == "gguf"
    generation, place = _ids(checkpoint.generation_config, key, "generation_config.json")
    configured, where = _ids(checkpoint.config, key, "config.json")
    if not where and not generation and not gguf:
        configured, where = _ids({key: read.eos_default}, key, f"the class default of {read.spec.model_type}:")
    extra = [item for item in configured if item not in generation]
    if generation and extra:
        warnings.append(
            f"config.json names the end token {extra}, which generation_config.json does not list; both end a "
            "completion."
        )
    found = dict.fromkeys(generation, "GGUF metadata" if gguf else place) | dict.fromkeys(extra, where)
    outside = [item for item in found if not 0 <= item < read.spec.vocab_size]
    if outside:
        warnings.append(f"eos_token_id {outside} lies outside the vocabulary of {read.spec.vocab_size} ids; left out.")
    return tuple(EndToken(item, found[item]) for item in found if item not in outside), warnings


def _bos_id(checkpoint: Checkpoint, read: ReadConfig) -> int | None:
    key = "bos_token_id"
    ids, where = _ids(checkpoint.config, key, "config.json")
    if not where:
        ids, _ = _ids(checkpoint.generation_config, key, "generation_config.json")
    return ids[0] if ids else read.bos_default if key not in checkpoint.config else None


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
        """The parts of ``decl``, checked. Raises ``CheckpointError`` naming tensor and count of non-finite values."""
        if decl.id in self._read:
            raise KernelError(f"{decl.name} was read twice.")
        parts = [self._part(part, decl.shape) for part in decl.parts]
        if not make_shape(decl, [part.shape for part in parts]):
            shapes = [list(part.shape) for part in parts]
            raise KernelError(f"{decl.name} has parts {shapes} in the files, {list(decl.shape)} in the program.")
        self._read.add(decl.id)
        return parts

    def _part(self, part: WeightPart, shape: tuple[int, ...]) -> Part:
        info = self.checkpoint.tensors[part.name]
        as_stored = part.transform == "none"
        blocks = self.checkpoint.blocks(part.name) if info.dtype in self.block_kinds and as_stored else None
        by_rows = as_stored and (len(shape) < 3 or part.expert is not None)
        computed = self.checkpoint.computed(part.name) if by_rows else None
        if blocks is not None:
            values: Part = blocks
        elif computed is not None:
            values = _checked_rows(computed, info)
        else:
            values = arranged(part, self._values(part, info), shape)
        self._done_bytes += info.nbytes
        if self.progress is not None:
            self.progress(part.name, self._done_bytes, self.plan.stored_bytes)
        return values

    def _values(self, part: WeightPart, info: TensorInfo) -> Array:
        stored = self.checkpoint.read(part.name)
        _require_finite(stored, info)
        if part.transform == "conv":
            stored = stored[:, 0, :]
        if stored.dtype != np.float64 and part.transform != "plus_one":
            return stored
        values = stored.astype(np.float32)
        release_pages(stored)
        return values + np.float32(1) if part.transform == "plus_one" else values

    def finish(self) -> None:
        """Raise ``KernelError`` when a weight of the program was not read: its values would be undefined."""
        left = [decl.name for decl in self.plan.program.weights if decl.id not in self._read]
        if left:
            raise KernelError(f"{len(left)} weights were not read: {', '.join(left[:10])}.")


def _checked_rows(computed: ComputedArray, info: TensorInfo) -> ComputedArray:
    """``computed``; reading rows with values that are not finite raises ``CheckpointError``."""

    def read(lo: int, hi: int) -> Array:
        values = computed.read(lo, hi)
        _require_finite(values, info, lo)
        return values

    return ComputedArray(computed.shape, computed.dtype, read)


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
    """A part of a weight of ``shape`` from the values of its tensor: of matrices a view, of their biases a copy."""
    if len(shape) == 1:
        if part.transform == "alternating":
            values = values.reshape(len(values), -1, 2).swapaxes(1, 2)
        return values.reshape(-1) if part.stored else values
    if part.stored and part.expert is None:
        experts, _, width = shape
        values = (
            values.reshape(experts, width, -1) if "columns" in part.transform else values.reshape(experts, -1, width)
        )
    if "columns" in part.transform:
        values = values.swapaxes(-1, -2)
    step = {"even_columns": 0, "odd_columns": 1}.get(part.transform)
    return values if step is None else values[:, step::2]
