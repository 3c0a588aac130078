"""``ModelPlan``: how a checkpoint is loaded and what computes it, made from its metadata; and the parts of a plan that
do not depend on the implementation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.kernels.program import ModelInterface, Program
from truffula.model.spec import ModelSpec
from truffula.types import EndToken
from truffula.weights.checkpoint import Checkpoint
from truffula.weights.tying import Tie, TyingDecision, decide, equal_as_stored, read_flag

if TYPE_CHECKING:
    from truffula.model.fallback.plan import TransformersModel

QUANTISED = "quantised"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Implementation:
    """What computes a model.

    ``native``: a backend's kernels. ``fallback``: transformers' code, whole batches. ``serial``: transformers' code,
    one sequence at a time. ``reason`` is one line for the operator.
    """

    kind: Literal["native", "fallback", "serial"]
    reason: str


class PackingFails(Exception):
    """A model of transformers whose packed sequences differ from each alone; the text is the reason.

    Found when it is loaded. It is then planned again, to be computed one sequence at a time.
    """


@dataclass(frozen=True)
class ModelSize:
    """Facts about a model, for reports."""

    model_type: str
    layers: int
    hidden: int


@dataclass(frozen=True)
class ModelPlan:
    """The plan for loading a model. Made without reading tensor data, unless embedding and head must be compared.

    ``stored_bytes``: size of the used tensors in the files. ``saved_bytes``: memory saved by tying. ``stored_dtype``:
    the float dtype of most of these bytes, or ``quantised``. ``unused``: names of tensors that are not used.
    ``stored_types``: the storage type of each used tensor (``BF16``, ``Q4_1``), of a computed one that of its values.
    ``tables``: the tensors that embedding and head use, by kind of site; one tensor when tied. ``program`` was made
    from ``native_spec`` or, when that is None, describes ``transformers``.
    """

    size: ModelSize
    program: Program
    implementation: Implementation
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
    native_spec: ModelSpec | None = None
    transformers: TransformersModel | None = None

    @property
    def spec(self) -> ModelSpec:
        """``native_spec`` of a model that has one."""
        assert self.native_spec is not None
        return self.native_spec

    @property
    def interface(self) -> ModelInterface:
        """The part of ``program`` that does not depend on ops."""
        return self.program

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(token.id for token in self.end_tokens)


@dataclass(frozen=True)
class Tables:
    """The names of the tensors of embedding and head in a checkpoint, and whether they exist.

    A head exists when the checkpoint has any tensor of its module: a quantised head has no ``.weight``.
    """

    embed: str
    head: str
    has_embed: bool
    has_head: bool

    def used(self, tying: TyingDecision) -> dict[str, str]:
        """The tensor of each, by kind of site."""
        return {
            "embed": self.head if tying.tie is Tie.REVERSED else self.embed,
            "head": self.embed if tying.tie is Tie.TIED else self.head,
        }

    def saved_bytes(self, checkpoint: Checkpoint, tying: TyingDecision) -> int:
        """Memory saved by tying."""
        return 0 if tying.tie is Tie.SEPARATE else checkpoint.tensors[self.used(tying)["embed"]].nbytes


def decide_tying(checkpoint: Checkpoint, tables: Tables, class_default: bool | None) -> tuple[TyingDecision, list[str]]:
    """The tying decision for the tensors of the checkpoint, and warnings."""
    flag, warnings = read_flag(checkpoint.config)
    embed, head = checkpoint.tensors.get(tables.embed), checkpoint.tensors.get(tables.head)
    same_shape = embed is None or head is None or embed.shape == head.shape
    compared = flag is not False and embed is not None and head is not None
    decision = decide(
        flag,
        has_embed=tables.has_embed,
        has_head=tables.has_head,
        equal=compared and equal_as_stored(checkpoint, tables.embed, tables.head),
        # GGUF has no flag and expresses tying by a missing head, so the class default gives no warning.
        class_default=None if checkpoint.format == "gguf" else class_default,
        same_shape=same_shape,
        embed_name=tables.embed,
        head_name=tables.head,
    )
    if tables.has_head and head is None and decision.tie is not Tie.TIED:
        raise CheckpointError(
            f"{tables.head} is missing; the head is stored in another form, possibly quantised.", param=tables.head
        )
    return decision, [*warnings, *([decision.warning] if decision.warning else [])]


def stored_types(checkpoint: Checkpoint, used: Iterable[str]) -> dict[str, str]:
    """The storage type of each tensor; see ``ModelPlan``."""
    return {name: checkpoint.tensors[name].values or checkpoint.tensors[name].dtype for name in used}


def stored_dtype(checkpoint: Checkpoint, used: Iterable[str]) -> str:
    """The dtype of most bytes of the tensors ``used``; see ``ModelPlan``."""
    sizes: Counter[str] = Counter()
    for name in used:
        info = checkpoint.tensors[name]
        sizes[FLOATS.get(info.dtype, QUANTISED)] += info.nbytes
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


def end_tokens(
    checkpoint: Checkpoint, model_type: str, vocab_size: int, eos_default: Any
) -> tuple[tuple[EndToken, ...], list[str]]:
    """Tokens that end a completion: those of generation_config.json, then those of config.json, without duplicates.

    When both have none, the default of the config's class is used, as in transformers; a GGUF file has no class.
    """
    key, warnings, gguf = "eos_token_id", [], checkpoint.format == "gguf"
    generation, place = _ids(checkpoint.generation_config, key, "generation_config.json")
    configured, where = _ids(checkpoint.config, key, "config.json")
    if not where and not generation and not gguf:
        configured, where = _ids({key: eos_default}, key, f"the class default of {model_type}:")
    extra = [item for item in configured if item not in generation]
    if generation and extra:
        warnings.append(
            f"config.json names the end token {extra}, which generation_config.json does not list; both end a "
            "completion."
        )
    found = dict.fromkeys(generation, "GGUF metadata" if gguf else place) | dict.fromkeys(extra, where)
    outside = [item for item in found if not 0 <= item < vocab_size]
    if outside:
        warnings.append(f"eos_token_id {outside} lies outside the vocabulary of {vocab_size} ids; left out.")
    return tuple(EndToken(item, found[item]) for item in found if item not in outside), warnings


def bos_id(checkpoint: Checkpoint, bos_default: Any) -> int | None:
    """The token that begins a text, of config.json, generation_config.json or the class default."""
    key = "bos_token_id"
    ids, where = _ids(checkpoint.config, key, "config.json")
    if not where:
        ids, _ = _ids(checkpoint.generation_config, key, "generation_config.json")
    return ids[0] if ids else bos_default if key not in checkpoint.config else None
