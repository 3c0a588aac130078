"""Matches the tensor names of a checkpoint with the weights of a model: prefixes, wrappers, fused and split names.

Shapes are not used. Each name is exactly one of: a part of a weight, embedding or head, a tensor of a part that is not
served, or a tensor that a named rule ignores. Any other name is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from truffula.errors import CheckpointError, some
from truffula.kernels.program import WeightPart
from truffula.model.rows import WeightRow
from truffula.model.spec import ModelSpec

# Prefixes of wrappers: DistributedDataParallel, torch.compile, FSDP, PEFT. The latter two also occur inside names.
_OUTER = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
_INNER = ("._fsdp_wrapped_module.", "._orig_mod.")

# Recomputed here, or buffers of training. A stored inv_freq may be wrong (saved after a cast to bfloat16).
IGNORABLE = re.compile(
    r"(^|\.)(rotary_emb\.(cos_cached|sin_cached)|rotary_emb(_local)?\.([a-z_]+_)?inv_freq"
    r"|rotary_pos_emb\..*|position_ids|num_batches_tracked)$"
)
_SHOW = 10


@dataclass(frozen=True)
class WeightNames:
    """The tensor names of each weight of a spec in one checkpoint.

    ``parts`` has every row except the tables of embedding and head; ``embed`` and ``head`` are the names of their
    tensors, existing or not, ``has_embed`` and ``has_head`` whether they exist (a head exists when the checkpoint has
    *any* tensor of its module besides its bias: a quantised head has no ``.weight``). ``unused`` are tensors that are
    deliberately not used.
    """

    prefix: str
    parts: Mapping[str, tuple[WeightPart, ...]]
    embed: str
    head: str
    has_embed: bool
    has_head: bool
    unused: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @classmethod
    def canonical(cls, spec: ModelSpec, *, has_head: bool = True) -> WeightNames:
        """The names that transformers writes for this spec, for programs without a checkpoint."""
        return resolve_names(spec, {item.name for item in written_tensors(spec, has_head=has_head)})


class WrittenTensor(msgspec.Struct, frozen=True, gc=False):
    """A tensor as transformers writes it. ``module_name`` is its name as the row knows it, without the prefix."""

    name: str
    module_name: str
    row: WeightRow
    shape: tuple[int, ...]


def written_tensors(spec: ModelSpec, *, has_head: bool) -> Iterator[WrittenTensor]:
    """The tensors of a checkpoint of ``spec``, with the weight of the head or without."""
    prefix, head = written_names(spec)
    for row in spec.rows:
        if row.experts:
            for part in row.layouts[0].parts(row):
                yield WrittenTensor(prefix + part.name, part.name, row, part.stored)
            continue
        if row.kind == "head" and row.param == "weight" and not has_head:
            continue
        for item in row.slices:
            module = head if row.kind == "head" else prefix + item.module
            yield WrittenTensor(row.tensor(module), row.tensor(item.module), row, row.stored_shape(item.rows))


def written_names(spec: ModelSpec) -> tuple[str, str]:
    """The prefix of the body's names in files of transformers, and the module of the head."""
    nested = spec.names.body == "model.language_model." and len(spec.names.prefixes) > 2
    return spec.names.prefixes[2 if nested else 0]


def resolve_names(spec: ModelSpec, names: Iterable[str]) -> WeightNames:
    """Match the names of a checkpoint with the rows of ``spec``.

    Raises:
        CheckpointError: No known prefix, two prefixes, missing or unknown tensors (up to ten are listed).
    """
    stored = unwrapped(names)
    if not stored:
        raise CheckpointError("The checkpoint holds no tensors.", param="tensors")
    prefix, head = _prefix(spec, stored)
    taken: set[str] = set()
    parts: dict[str, tuple[WeightPart, ...]] = {}
    missing: list[str] = []
    warnings: list[str] = []
    for row in _body_rows(spec):
        if row.experts:
            placed = _find_experts(row, prefix, stored)
            missing += [part.name for part in placed if part.name not in stored]
            taken.update(part.name for part in placed)
            renamed = (stored.get(part.name, part.name) for part in placed)
            parts[row.key] = tuple(
                part if part.name == name else msgspec.structs.replace(part, name=name)
                for part, name in zip(placed, renamed, strict=True)
            )
            continue
        found = _find(row, prefix, stored)
        if found is None:
            missing += [name for name in _split_names(row, prefix) if name not in stored]
            continue
        if row.fused is not None and len(row.slices) > 1 and len(found) == 1:
            leaves = " | ".join(item.module.rsplit(".", 1)[-1] for item in row.slices)
            warnings.append(f"{found[0]} is stored fused; read as {leaves}.")
        taken.update(found)
        orders = [item.order for item in row.slices] if len(found) == len(row.slices) else [None]
        parts[row.key] = tuple(
            WeightPart(stored[name], row.transform, stored=row.stored, order=order)
            for name, order in zip(found, orders, strict=True)
        )
    if spec.head_bias and (bias := f"{head}.bias") in stored:
        taken.add(bias)
        parts["head.bias"] = (WeightPart(stored[bias]),)
    elif spec.head_bias:
        missing.append(bias)
    embed = f"{prefix}{spec.names.embed}.weight"
    heads = [name for name in stored if name.startswith(f"{head}.") and name not in taken]
    left = [name for name in stored if name not in taken and name != embed and name not in heads]
    without_effect = (*spec.names.skip, *spec.names.unused, *(prefix + item for item in spec.names.unused))
    layers = [prefix + spec.layer_prefix(index) for index in range(len(spec.layers))]
    buffers = {layer + buffer for buffer in spec.names.buffers for layer in layers}
    unused = {name for name in left if name.startswith(without_effect) or IGNORABLE.search(name) or name in buffers}
    unknown = [name for name in left if name not in unused]
    unknown += [name for name in heads if name != f"{head}.weight"]
    _require_complete(spec, missing, unknown, stored)
    if any(name.startswith(spec.names.skip) for name in unused):
        warnings.append(
            f"{spec.model_type}: only the text part is served; image inputs and their tensors are left out."
        )
    return WeightNames(
        prefix=prefix,
        parts=parts,
        embed=stored.get(embed, embed),
        head=stored.get(f"{head}.weight", f"{head}.weight"),
        has_embed=embed in stored,
        has_head=any(name != f"{head}.bias" for name in heads),
        unused=tuple(stored[name] for name in left if name in unused),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _body_rows(spec: ModelSpec) -> list[WeightRow]:
    return [row for row in spec.rows if row.kind not in ("embed", "head")]


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names without wrapper prefixes → names as stored."""
    stored: dict[str, str] = {}
    for name in names:
        bare = name
        while bare.startswith(_OUTER):
            bare = next(bare.removeprefix(outer) for outer in _OUTER if bare.startswith(outer))
        for inner in _INNER:
            bare = bare.replace(inner, ".")
        if bare in stored:
            raise CheckpointError(f"{name} and {stored[bare]} are the same tensor under two names.", tensor=name)
        stored[bare] = name
    return stored


def _prefix(spec: ModelSpec, stored: Mapping[str, str]) -> tuple[str, str]:
    """The prefix of the body's names in this checkpoint, and the module of the head."""
    first = spec.layer_prefix(0)
    firsts = [name for name in stored if first in name]
    matching = [
        (prefix, head) for prefix, head in spec.names.prefixes if any(n.startswith(prefix + first) for n in firsts)
    ]
    if len({prefix for prefix, _ in matching}) == 1:
        # Some classes call their head differently in files and as a module.
        heads = [head for _, head in matching if any(name.startswith(f"{head}.") for name in stored)]
        return matching[0][0], (heads or [matching[0][1]])[0]
    if matching:
        shown = " and ".join(repr(prefix) for prefix, _ in matching)
        raise CheckpointError(
            f"The checkpoint holds two language models, under {shown}; expected one.",
            prefixes=[prefix for prefix, _ in matching],
        )
    tried = ", ".join(f"{prefix}{first}*" for prefix, _ in spec.names.prefixes)
    raise CheckpointError(
        f"No tensor of layer 0 of a {spec.model_type} model is in the checkpoint (looked for {tried}); "
        f"it begins with {', '.join(sorted(stored)[:3])}.",
        tensors=sorted(stored)[:_SHOW],
    )


def _split_names(row: WeightRow, prefix: str) -> list[str]:
    if row.experts:
        return [prefix + part.name for part in row.layouts[0].parts(row)]
    return [prefix + row.tensor(item.module) for item in row.slices]


def _find_experts(row: WeightRow, prefix: str, stored: Mapping[str, str]) -> list[WeightPart]:
    """The tensors of a row of experts in the layout of which the checkpoint has the most."""
    forms = [list(layout.parts(row, prefix)) for layout in row.layouts]
    return max(forms, key=lambda parts: sum(part.name in stored for part in parts) / len(parts))


def _find(row: WeightRow, prefix: str, stored: Mapping[str, str]) -> list[str] | None:
    """The names of a row's tensors: all of the split names, or the fused name; None when neither is complete."""
    split = _split_names(row, prefix)
    if all(name in stored for name in split):
        return split
    aliased = [prefix + row.tensor(item.alias or item.module) for item in row.slices]
    if all(name in stored for name in aliased):
        return aliased
    fused = prefix + row.tensor(row.fused) if row.fused is not None else None
    # Some of the split names beside a fused one are an error: the fused name is then reported as unknown.
    return [fused] if fused in stored and not any(name in stored for name in split) else None  # type: ignore[list-item]


def _require_complete(spec: ModelSpec, missing: list[str], unknown: list[str], stored: Mapping[str, str]) -> None:
    if missing:
        text = f"{len(missing)} tensors of this {spec.model_type} model are missing: {some(missing)}."
        if any(".lora_A." in name or ".base_layer." in name for name in stored):
            text += " These look like an unmerged PEFT save: merge the adapter, or serve base and adapter separately."
        elif unknown:
            text += f" Unknown tensors instead: {some(unknown)}."
        raise CheckpointError(text, tensors=missing[:_SHOW], count=len(missing))
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors belong to no part of this {spec.model_type} model ({len(spec.layers)} layers): "
            f"{some(unknown)}. Serving without them would answer from a different model.",
            tensors=unknown[:_SHOW],
            count=len(unknown),
        )
