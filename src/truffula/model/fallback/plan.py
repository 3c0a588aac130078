"""The plan of a model that transformers computes: an interface for the engine, and the tensors that it is loaded from.

Its ``Program`` has weights and no ops: each tensor of the checkpoint that is used is one weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from truffula.errors import UnsupportedModel
from truffula.kernels.program import (
    KvGroup,
    KvPlane,
    ModuleSlice,
    Output,
    Program,
    Ref,
    Site,
    WeightDecl,
    WeightPart,
)
from truffula.model.fallback.names import StoredNames, convert, match_names
from truffula.model.fallback.skeleton import Skeleton, make_skeleton
from truffula.model.fallback.trace import Trace, trace
from truffula.model.plan import (
    Implementation,
    ModelPlan,
    ModelSize,
    bos_id,
    decide_tying,
    end_tokens,
    stored_dtype,
    stored_types,
)
from truffula.weights.checkpoint import Checkpoint
from truffula.weights.tying import Tie, TyingDecision


@dataclass(frozen=True)
class TransformersModel:
    """A model of transformers, ready to be loaded.

    ``sources`` are the tensors to load: the name that transformers renames → the name in the checkpoint. ``serial`` is
    the reason why sequences are computed one at a time, or empty. ``scalars`` are the sources without a shape.
    """

    skeleton: Skeleton
    trace: Trace
    names: StoredNames
    tied: bool
    sources: dict[str, str]
    serial: str
    scalars: frozenset[str]

    @property
    def class_name(self) -> str:
        return str(self.skeleton.model_class.__name__)

    @property
    def implementation(self) -> Implementation:
        by = f"transformers' {self.class_name} computes {self.skeleton.model_type}"
        if not self.trace.linears:
            by += " (without adapters, which are refused)"
        if self.serial:
            return Implementation("serial", f"{by}, one sequence at a time: {self.serial}")
        return Implementation("fallback", f"{by}, with paged attention")

    def program(self, shapes: dict[str, tuple[int, ...]]) -> Program:
        """The interface with the weights, by the shapes of the checkpoint's tensors."""
        vocab_size = int(self.skeleton.text.vocab_size)
        weights = tuple(
            WeightDecl(index, name, shapes[name], (WeightPart(name),), frozenset({"matmul"}))
            for index, name in enumerate(dict.fromkeys(self.sources.values()))
        )
        return Program(
            name=self.skeleton.model_type,
            vocab_size=vocab_size,
            max_positions=self.skeleton.max_positions,
            sites=_sites(self.skeleton, self.trace, self.names),
            kv_groups=_serial_groups(self.trace) if self.serial else _paged_groups(self.trace),
            output=Output("logits", vocab_size),
            buffers=(),
            weights=weights,
            rope_tables=(),
            ops=(),
            result=Ref(0, 0, vocab_size),
            notes=self.skeleton.notes,
        )


def plan_transformers(checkpoint: Checkpoint, serial: str = "") -> ModelPlan:
    """The plan of a checkpoint whose model transformers computes; one sequence at a time with ``serial``, the reason.

    Raises:
        UnsupportedModel: transformers has no such model, or cannot run it; names the key.
        CheckpointError: A tensor is missing, unknown, or of the wrong shape; names it.
        TyingError: See ``decide_tying``.
    """
    skeleton = make_skeleton(checkpoint.config)
    names = match_names(skeleton.built(), checkpoint.tensors)
    tables = names.tables
    defaults = CONFIG_MAPPING[skeleton.model_type]()
    tying, warnings = decide_tying(checkpoint, tables, getattr(defaults, "tie_word_embeddings", None))
    model = _complete(checkpoint, skeleton, names, tying, serial)
    program = model.program({name: checkpoint.tensors[name].shape or (1,) for name in model.sources.values()})
    text = defaults.get_text_config()
    ends, end_warnings = end_tokens(checkpoint, skeleton.model_type, program.vocab_size, text.eos_token_id)
    used = set(model.sources.values())
    return ModelPlan(
        transformers=model,
        size=ModelSize(skeleton.model_type, skeleton.text.num_hidden_layers, skeleton.text.hidden_size),
        implementation=model.implementation,
        program=program,
        tying=tying,
        warnings=(*checkpoint.warnings, *skeleton.warnings, *skeleton.notes, *warnings, *end_warnings),
        end_tokens=ends,
        bos_token_id=bos_id(checkpoint, text.bos_token_id),
        max_model_len=program.max_positions,
        stored_bytes=sum(checkpoint.tensors[name].nbytes for name in used),
        unused=(*checkpoint.unused, *(name for name in checkpoint.tensors if name not in used)),
        saved_bytes=tables.saved_bytes(checkpoint, tying),
        stored_dtype=stored_dtype(checkpoint, used),
        stored_types=stored_types(checkpoint, used),
        tables=tables.used(tying),
    )


def _complete(
    checkpoint: Checkpoint, skeleton: Skeleton, names: StoredNames, tying: TyingDecision, serial: str
) -> TransformersModel:
    """The model with its tying decided, and every tensor checked against it."""
    tied = tying.tie is not Tie.SEPARATE
    skeleton = skeleton.tied(tied)
    sources = {name: stored for name, stored in names.stored.items() if not (tied and name == names.head_from)}
    if tying.tie is Tie.REVERSED:
        assert names.head_from is not None
        sources[names.embed] = names.stored[names.head_from]
    tensors = {
        name: torch.empty(checkpoint.tensors[stored].shape, dtype=torch.float32, device="meta")
        for name, stored in sources.items()
    }
    convert(skeleton.built(), tensors, torch.float32, "meta", tied=names.head if tied else "")
    traced = trace(skeleton)
    if any(call.sees_later for call in traced.calls):
        raise UnsupportedModel(
            f"config.json: {skeleton.model_class.__name__} of transformers attends to later tokens with this config: "
            "it is no causal language model (is_decoder must be true for such classes).",
            param="is_decoder",
            value=str(getattr(skeleton.text, "is_decoder", None)),
        )
    serial = serial or traced.problem
    if serial and not traced.cache.name:
        raise UnsupportedModel(
            f"config.json: {skeleton.model_class.__name__} of transformers can only compute one sequence at a time "
            f"({serial}), and has no cache to continue it with.",
            param="model_type",
            value=skeleton.model_type,
        )
    scalars = frozenset(name for name, stored in sources.items() if not checkpoint.tensors[stored].shape)
    return TransformersModel(skeleton, traced, names, tied, sources, serial, scalars)


def _sites(skeleton: Skeleton, traced: Trace, names: StoredNames) -> tuple[Site, ...]:
    """Linear modules that saw a row per token, the input table and the head. Adapters cannot reach other modules."""
    sites: list[Site] = []
    modules = dict(skeleton.built().named_modules())
    embed, head = names.embed.removesuffix(".weight"), names.head.removesuffix(".weight")
    for name in traced.linears:
        if f"{name}.weight" in names.converted:
            continue
        module = modules[name]
        kind: Literal["linear", "embed", "head"] = "head" if name == head else "linear"
        if isinstance(module, nn.Embedding):
            if name != embed:
                continue
            kind, inputs, outputs = "embed", module.num_embeddings, module.embedding_dim
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
        elif isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
        else:
            continue
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        parts = (ModuleSlice(name, 0, outputs, outputs),)
        # Its modules are given token ids only.
        sites.append(Site(len(sites), kind, layer, inputs, outputs, parts, virtual_scale=None))
    return tuple(sites)


def _paged_groups(traced: Trace) -> tuple[KvGroup, ...]:
    """Two planes for each attention call, in a group for each window; planes are numbered in the order of the calls."""
    windows = list(dict.fromkeys(call.window for call in traced.calls))
    groups = []
    for group, window in enumerate(windows):
        planes = [
            KvPlane(2 * index + half, index, width)
            for index, call in enumerate(traced.calls)
            if call.window == window
            for half, width in enumerate((call.kv_heads * call.dim_k, call.kv_heads * call.dim_v))
        ]
        groups.append(KvGroup(group, tuple(planes), window))
    return tuple(groups)


def _serial_groups(traced: Trace) -> tuple[KvGroup, ...]:
    """One plane as wide as the cache grows per token: blocks account for the cache objects, which hold the values."""
    return (KvGroup(0, (KvPlane(0, 0, max(1, traced.cache_widths[0])),)),)
