"""From a ``Checkpoint`` to what can be loaded: ``plan_model`` reads metadata only, ``puller`` hands out the weights.

Every name of the checkpoint is accounted for, every weight is handed out exactly once, with the shape the config gives
and finite values; anything else is an error that names file and tensor. Tying is asked of ``weights/tying.py``, once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from truffula.errors import CheckpointError, KernelError, UnsupportedModel
from truffula.kernels.backend import Array, QuantisedArray
from truffula.kernels.program import Embed, Logits, Program, WeightDecl, WeightPart
from truffula.model.decoder import build_program
from truffula.model.names import WeightNames, resolve_names
from truffula.model.read import ReadConfig, read_config
from truffula.model.spec import ModelSpec
from truffula.types import EndToken
from truffula.weights.checkpoint import Checkpoint, TensorInfo
from truffula.weights.finite import first_non_finite
from truffula.weights.tying import Tie, TyingDecision, decide, equal_as_stored, read_flag

QUANTISED = "quantised"
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class ModelPlan:
    """What would be loaded, and how. Made without reading tensor data, unless two tables must be compared.

    ``stored_bytes`` are those of the tensors the program uses, ``saved_bytes`` what tying spares (the table that is not
    held twice), ``stored_dtype`` the float type that most of those bytes have (or ``quantised``), ``unused`` names left
    out knowingly, ``stored_types`` how each tensor that is used is stored (``BF16``, ``Q4_1``).
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

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(token.id for token in self.end_tokens)


def plan_model(checkpoint: Checkpoint) -> ModelPlan:
    """Plan how ``checkpoint`` is served.

    Raises:
        UnsupportedModel: config.json asks for something we don't do; names the key.
        CheckpointError: a tensor is missing, left over, of a wrong shape or type; names it.
        TyingError: neither table is there, or the head is missing though the flag says untied.
    """
    read = read_config(checkpoint.config)
    spec = read.spec
    names = resolve_names(spec, checkpoint.tensors)
    tying, warnings = _decide(checkpoint, read, names)
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
        unused=(*names.unused, *dropped),
        saved_bytes=0 if tying.tie is Tie.SEPARATE else table.nbytes,
        stored_dtype=_stored_dtype(checkpoint, used),
        stored_types={name: checkpoint.tensors[name].dtype for name in used},
    )


def _decide(checkpoint: Checkpoint, read: ReadConfig, names: WeightNames) -> tuple[TyingDecision, list[str]]:
    """Ask the one place that decides, with what the files hold."""
    flag = read_flag(checkpoint.config)
    embed, head = checkpoint.tensors.get(names.embed), checkpoint.tensors.get(names.head)
    same_shape, equal = True, None
    if embed is not None and head is not None:
        same_shape = embed.shape == head.shape
        equal = same_shape and equal_as_stored(checkpoint, names.embed, names.head)
    decision = decide(
        flag.value,
        has_embed=names.has_embed,
        has_head=names.has_head,
        equal=equal,
        # GGUF has no flag and means tied by leaving the head out: nothing to warn about, whatever a class assumes.
        class_default=None if checkpoint.format == "gguf" else read.tie_default,
        same_shape=same_shape,
        embed_name=names.embed,
        head_name=names.head,
    )
    if names.has_head and head is None and decision.tie is not Tie.TIED:
        raise CheckpointError(
            f"{names.head} is missing; the head is stored in another form, possibly quantised.", param=names.head
        )
    return decision, [*flag.warnings, *([decision.warning] if decision.warning else [])]


def _check_shapes(checkpoint: Checkpoint, spec: ModelSpec, names: WeightNames, program: Program) -> None:
    """Every tensor against the shape its own slice has by the config: over a fused weight two errors could add up."""
    for row in spec.rows:
        parts = names.parts.get(row.key, ())
        heights = [item.rows for item in row.slices] if len(parts) > 1 else [row.rows]
        for part, height in zip(parts, heights, strict=False):
            _check_tensor(checkpoint, part.name, (height, *row.shape[1:]), "")
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
    _check_dtype(checkpoint, info)


def _check_dtype(checkpoint: Checkpoint, info: TensorInfo) -> None:
    if info.dtype in _FLOATS or checkpoint.format == "gguf":
        return
    raise CheckpointError(
        f"{info.name} in {info.file.name} is stored as {info.dtype}; supported are {', '.join(_FLOATS)}.",
        tensor=info.name,
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


def _ids(value: Any, key: str, where: str) -> list[int]:
    """An id, a list of ids, or nothing."""
    found = value if isinstance(value, list) else [] if value is None else [value]
    for item in found:
        if isinstance(item, bool) or not isinstance(item, int):
            raise UnsupportedModel(
                f"{where}: {key} is {value!r}; expected a token id or a list of token ids.", param=key
            )
    return cast("list[int]", found)


def _special(config: Mapping[str, Any], key: str) -> tuple[str, Any]:
    """What the config says of ``key``, and where: at its own level, or in its text part; "" where it does not."""
    text = config.get("text_config")
    for where, level in (("", config), ("text_config.", text if isinstance(text, Mapping) else {})):
        if level.get(key) is not None:
            return f"config.json {where}{key}", level[key]
    return "", None


def _end_tokens(checkpoint: Checkpoint, read: ReadConfig) -> tuple[tuple[EndToken, ...], list[str]]:
    """Tokens that end a completion: those of generation_config.json and those of config.json, each once, in that order.

    Where neither names one, the default of the config's class counts, as in transformers; a GGUF file has no class.
    """
    key, warnings = "eos_token_id", []
    gguf = checkpoint.format == "gguf"
    generation = _ids(checkpoint.generation_config.get(key), key, "generation_config.json")
    where, value = _special(checkpoint.config, key)
    if not where and not generation and not gguf:
        where, value = f"the default {key} of {read.spec.model_type}", read.eos_default
    configured = _ids(value, key, "config.json")
    extra = [item for item in configured if item not in generation]
    if generation and extra:
        warnings.append(
            f"config.json names the end token {extra}, which generation_config.json does not list; both end a "
            "completion."
        )
    found = dict.fromkeys(generation, "GGUF metadata" if gguf else f"generation_config.json {key}")
    found |= dict.fromkeys(extra, where)
    outside = [item for item in found if not 0 <= item < read.spec.vocab_size]
    if outside:
        warnings.append(f"eos_token_id {outside} lies outside the vocabulary of {read.spec.vocab_size} ids; left out.")
    return tuple(EndToken(item, found[item]) for item in found if 0 <= item < read.spec.vocab_size), warnings


def _bos_id(checkpoint: Checkpoint, read: ReadConfig) -> int | None:
    where, value = _special(checkpoint.config, "bos_token_id")
    ids = _ids(value if where else checkpoint.generation_config.get("bos_token_id"), "bos_token_id", "config.json")
    return ids[0] if ids else read.bos_default if "bos_token_id" not in checkpoint.config else None


# Weights


class Puller:
    """A ``PullWeight``: called once per weight, it yields the weight's parts in order.

    A part is a view of the mapped file in its stored dtype, or, when it is transformed, a fresh float32 array (the
    pages of its file are released at the next call; those of a view are the backend's to keep or to drop). Matrices
    stored in one of ``block_kinds`` come as their blocks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: ModelPlan,
        *,
        progress: Callable[[str, int, int | None], None] | None = None,
        block_kinds: frozenset[str] = frozenset(),
    ) -> None:
        self.checkpoint, self.plan, self.progress, self.block_kinds = checkpoint, plan, progress, block_kinds
        self._filled: set[int] = set()
        self._release: list[str] = []
        self._done_bytes = 0

    def __call__(self, decl: WeightDecl) -> Sequence[Array | QuantisedArray]:
        """The parts of ``decl``, checked. Raises ``CheckpointError`` naming tensor and count of non-finite values."""
        if decl.id in self._filled:
            raise KernelError(f"{decl.name} was pulled twice.")
        self._let_go()
        parts = [self._part(part) for part in decl.parts]
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        if shape != decl.shape:
            raise KernelError(f"{decl.name} came out as {shape}, declared as {decl.shape}.")
        self._filled.add(decl.id)
        return parts

    def _part(self, part: WeightPart) -> Array | QuantisedArray:
        info = self.checkpoint.tensors[part.name]
        blocks = self._blocks(part) if info.dtype in self.block_kinds else None
        made = self._array(part, info) if blocks is None else blocks
        self._done_bytes += info.nbytes
        if self.progress is not None:
            self.progress(part.name, self._done_bytes, self.plan.stored_bytes)
        return made

    def _blocks(self, part: WeightPart) -> QuantisedArray | None:
        """As stored; None where only the values will do."""
        blocks = self.checkpoint.blocks(part.name) if part.transform == "none" else None
        if blocks is None:
            return None
        self._release.append(part.name)
        return blocks

    def _array(self, part: WeightPart, info: TensorInfo) -> Array:
        array = self.checkpoint.read(part.name)
        found = first_non_finite(array)
        if found is not None:
            count, index = found
            raise CheckpointError(
                f"{part.name} in {info.file.name} holds {count} NaN or infinite values, the first at {index}.",
                tensor=part.name,
                file=str(info.file),
                count=count,
            )
        if array.dtype == np.float64:
            array = array.astype(np.float32)
            self._release.append(part.name)
        if part.transform != "none":
            array = np.asarray(array, np.float32) + np.float32(1)
            self._release.append(part.name)
        return array

    def _let_go(self) -> None:
        for name in self._release:
            self.checkpoint.release(name)
        self._release.clear()

    def finish(self) -> None:
        """Say that loading is over. Raises ``KernelError`` when a weight was never pulled: it would be undefined."""
        self._let_go()
        left = [decl.name for decl in self.plan.program.weights if decl.id not in self._filled]
        if left:
            raise KernelError(f"{len(left)} weights were not filled: {', '.join(left[:10])}.")


def puller(
    checkpoint: Checkpoint,
    plan: ModelPlan,
    *,
    progress: Callable[[str, int, int | None], None] | None = None,
    block_kinds: frozenset[str] = frozenset(),
) -> Puller:
    """The weights of ``plan``, to be given to ``Backend.load``; call ``finish()`` behind it."""
    return Puller(checkpoint, plan, progress=progress, block_kinds=block_kinds)
