"""Which checkpoint tensor fills which parameter, by transformers' own renaming rules, and the conversion itself.

transformers fills what is missing with random values and ignores what it does not know; here both are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from truffula.errors import CheckpointError, UnsupportedModel, some
from truffula.model.names import IGNORABLE, unwrapped
from truffula.model.plan import Tables

_SHOW = 10
_NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.)")


@dataclass(frozen=True)
class StoredNames:
    """The tensors of a checkpoint by their names without wrapper prefixes.

    ``stored`` gives the name in the files. ``embed`` and ``head`` are the parameters of the two tables; ``embed_from``
    and ``head_from`` the tensors that fill them, None where there is none; ``has_head`` whether there is any tensor of
    the head. ``unused`` are tensors that a named rule ignores. ``converted`` are parameters whose values transformers
    computes from the files': the rows of an adapter would need the same.
    """

    stored: Mapping[str, str]
    embed: str
    head: str
    embed_from: str | None
    head_from: str | None
    has_head: bool
    unused: tuple[str, ...]
    converted: frozenset[str]

    @property
    def tables(self) -> Tables:
        """The two tables by their names in the files; those of the model where there is no tensor."""
        embed = self.stored.get(self.embed_from or "", self.embed)
        head = self.stored.get(self.head_from or "", self.head)
        return Tables(embed, head, self.embed_from is not None, self.has_head)


def match_names(model: Any, names: Iterable[str]) -> StoredNames:
    """Match the names of a checkpoint with the parameters of ``model`` (on the meta device).

    Raises:
        CheckpointError: Tensors that belong to no part of the model, or two tensors for one parameter.
        UnsupportedModel: transformers does not say where the model's tables lie.
    """
    stored = unwrapped(names)
    target_of = _renamed(model)
    state = model.state_dict()
    embed, head = _table(model, "get_input_embeddings"), _table(model, "get_output_embeddings")
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    filled: dict[str, str] = {}
    unused: list[str] = []
    unknown: list[str] = []
    has_head, parts = False, dict[str, list[str]]()
    for name in stored:
        target, merged = target_of(name)
        if merged:
            parts.setdefault(target, []).append(name)
        has_head = has_head or (target.startswith(f"{head.rpartition('.')[0]}.") and not target.endswith(".bias"))
        if target not in state:
            ignorable = IGNORABLE.search(name) or any(rule.search(target) for rule in ignored)
            (unused if ignorable else unknown).append(name)
        elif not merged and target in filled:
            raise CheckpointError(f"{name} and {filled[target]} both fill {target}.", tensor=name)
        else:
            filled[target] = name
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors belong to no part of {type(model).__name__} of transformers: {some(unknown)}. "
            "Serving without them would answer from a different model.",
            tensors=unknown[:_SHOW],
            count=len(unknown),
        )
    for target, merged_names in parts.items():
        _check_numbers(target, merged_names)
    used = {name: stored[name] for name in stored if name not in unused}
    left_out = tuple(stored[name] for name in unused)
    tables = filled.get(embed), filled.get(head)
    return StoredNames(used, embed, head, *tables, has_head, left_out, frozenset(parts))


def _check_numbers(target: str, names: Iterable[str]) -> None:
    """Raise unless the tensors that are stacked to one, such as those of experts, are numbered from 0 on: transformers
    stacks them in their order, whatever their numbers."""
    forms: dict[str, list[list[int]]] = {}
    for name in names:
        forms.setdefault(_NUMBER.sub("#", name), []).append([int(number) for number in _NUMBER.findall(name)])
    for form, numbers in forms.items():
        for column in zip(*numbers, strict=True):
            if len(found := set(column)) > 1 and found != set(range(len(found))):
                missing = min(set(range(len(found))) - found)
                raise CheckpointError(
                    f"{len(found)} tensors {form} fill {target}, and number {missing} is not among them.", tensor=target
                )


def convert(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str, *, tied: str) -> None:
    """Fill the parameters of ``model`` from ``tensors``, which may be on the meta device: then only shapes are checked.

    ``tied`` is the parameter of a tied head, which no tensor fills, or empty.

    Raises:
        CheckpointError: A parameter that no tensor fills, or a tensor of the wrong shape; names it.
    """
    config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": device},
        weight_mapping=get_model_conversion_mapping(model),
    )
    logging.disable_progress_bar()  # the engine reports progress itself
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    name = type(model).__name__
    if info.mismatched_keys:
        key, found, wanted = sorted(info.mismatched_keys, key=lambda item: str(item[0]))[0]
        raise CheckpointError(
            f"{key} has shape {list(found)}; {name} of transformers with this config has {list(wanted)}.",
            tensor=key,
            shape=list(found),
            wanted=list(wanted),
        )
    if info.conversion_errors or info.error_msgs:
        texts = [str(text).strip().splitlines()[-1] for text in (*info.conversion_errors.values(), *info.error_msgs)]
        raise CheckpointError(f"The tensors cannot be converted for {name} of transformers: {some(texts)}.")
    allowed = {tied, *model.all_tied_weights_keys}
    missing = sorted(key for key in info.missing_keys if key not in allowed)
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors of {name} of transformers are missing: {some(missing)}.",
            tensors=missing[:_SHOW],
            count=len(missing),
        )
    if config.device_map == {"": "meta"}:
        return
    model.mark_tied_weights_as_initialized(info)
    model._move_missing_keys_from_meta_to_device(info.missing_keys - {tied}, config.device_map, None, None)
    model._initialize_missing_keys(False)  # buffers that are computed, such as rotary frequencies
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)


def _renamed(model: Any) -> Callable[[str], tuple[str, bool]]:
    """A function from a tensor's name to its parameter, and whether several tensors fill that one."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix

    def target_of(name: str) -> tuple[str, bool]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        return target, pattern is not None

    return target_of


def _table(model: Any, getter: str) -> str:
    """The parameter of the input or the output table."""
    table = getattr(model, getter)()
    found = next((name for name, module in model.named_modules() if module is table), None)
    if table is None or found is None:
        raise UnsupportedModel(
            f"{type(model).__name__} of transformers does not name its tables ({getter}).", param="model_type"
        )
    return f"{found}.weight"
