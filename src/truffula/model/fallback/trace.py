"""What a transformers model does in one forward pass: its attention calls, its cache, and the inputs of its linears.

The pass runs without weights, on the meta device where the code allows it, with shapes as they will be. Masks are not
tensors in it: a mask function of transformers is asked which keys a query far inside a sequence sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

from truffula.errors import UnsupportedModel
from truffula.model.fallback.skeleton import Skeleton

_CACHES = ("cache", "past_key_values", "cache_params", "state", "mems")
"""Names of a model's cache, in its output and as an argument. The second was the first's before transformers 5.24."""
_TRACED = "truffula_traced"
_TOKENS = 37  # unlike any width, so that an axis of tokens is recognised
_KEPT = 5  # of them, the rows whose logits are computed
_QUERY = 2**17, 2**24  # between these lies the position whose visible keys tell the window: behind the longest sequence
_PAGED_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer"}
# Arguments of attention functions that are served, or that change nothing.
_SERVED = {"scaling", "sliding_window", "softcap", "s_aux", "dropout", "position_ids", "use_cache", "is_causal"} | {
    "output_attentions", "output_hidden_states", "output_router_logits", "cache_position", "return_dict",
}  # fmt: skip


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function: widths, and the ``window`` of its mask (None: all keys before the query).

    ``problem`` is the reason why pages cannot serve it, or empty. ``sees_later``: a query sees keys after itself.
    """

    heads: int
    kv_heads: int
    dim_k: int
    dim_v: int
    window: int | None
    problem: str = ""
    sees_later: bool = False


@dataclass(frozen=True)
class Cache:
    """The cache that a model returns, and takes back by the same ``name``; empty when it has none."""

    name: str
    made: Any


NO_CACHE = Cache("", None)


@dataclass(frozen=True)
class Trace:
    """One pass.

    ``cache_widths``: numbers of a sequence's cache per token, and besides. ``linears``: modules whose input had a row
    per token, in order, and those with a row per logit (True): adapters can act there. ``problem`` is why pages cannot
    serve the model, or empty.
    """

    calls: tuple[AttentionCall, ...]
    cache: Cache
    cache_widths: tuple[int, int]
    linears: Mapping[str, bool]
    problem: str


def trace(skeleton: Skeleton) -> Trace:
    """The trace of ``skeleton``.

    Raises:
        UnsupportedModel: The model cannot be run without weights, so that its memory is not known before it is loaded.
    """
    for device in ("meta", "cpu"):  # on the CPU memory that is never written to costs none
        try:
            return _traced(skeleton, device)
        except Exception as error:  # noqa: BLE001  (foreign code raises anything)
            failure = error
    raise UnsupportedModel(
        f"model_type {skeleton.model_type!r}: the memory of its cache cannot be planned, because "
        f"{skeleton.model_class.__name__} of transformers does not run without weights: "
        f"{' '.join(str(failure).split())}",
        param="model_type",
        value=skeleton.model_type,
    ) from failure


def _traced(skeleton: Skeleton, device: str) -> Trace:
    attention: str | None = _TRACED
    try:
        recorder, linears, cache = _run(skeleton, attention, device)
        layers = {type(layer).__name__ for layer in getattr(cache.made, "layers", [])}
        problem = _problem(skeleton, recorder.calls, layers)
    except Exception as error:  # noqa: BLE001  (of code that expects a mask: a reason, not a failure)
        attention = None
        recorder, linears, cache = _run(skeleton, attention, device)
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        problem = f"its code fails without an attention mask, which a packed batch does not have ({why})"
    longer = _run(skeleton, attention, device, tokens=2 * _TOKENS)[2]
    first, second = _numbers(cache.made, set()), _numbers(longer.made, set())
    per_token = -(-(second - first) // _TOKENS)
    widths = per_token, max(0, first - per_token * _TOKENS)
    return Trace(tuple(recorder.calls), Cache(cache.name, None), widths, linears, problem)


class _Recorder:
    """The attention function and the mask function of a traced pass."""

    def __init__(self, max_positions: int) -> None:
        self.calls: list[AttentionCall] = []
        self._query = min(max(_QUERY[0], max_positions), _QUERY[1])

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **given: Any
    ) -> tuple[Tensor, None]:
        mask = attention_mask
        others = sorted(k for k, v in given.items() if v is not None and v is not False and k not in _SERVED)
        tokens = query.shape[2]
        window, problem = None, ""
        if not isinstance(mask, _Visible):
            problem = f"{type(module).__name__} attends without a mask"
        elif mask.problem:
            problem = mask.problem
        elif others:
            problem = f"{type(module).__name__} needs {', '.join(others)} in its attention"
        elif query.shape[0] != 1 or key.shape[2] != tokens or value.shape[2] != tokens:
            problem = f"{type(module).__name__} attends to {key.shape[2]} keys where the step has {tokens} tokens"
        else:
            window = mask.window
        later = isinstance(mask, _Visible) and mask.later
        widths = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
        self.calls.append(AttentionCall(*widths, window, problem, later))
        return query.new_empty(query.shape[0], tokens, query.shape[1], value.shape[3]), None

    def mask(self, *_: Any, mask_function: Callable[..., Any], **__: Any) -> _Visible:
        return _Visible.of(mask_function, self._query)


@dataclass(frozen=True)
class _Visible:
    """The keys that a query sees: those of the last ``window`` positions, or all before it."""

    window: int | None
    later: bool
    problem: str

    @classmethod
    def of(cls, mask_function: Callable[..., Any], last: int) -> _Visible:
        """Of the query at position ``last``, compared with the one before."""
        with torch.device("cpu"):
            keys = torch.arange(last + 2)

            def seen_from(query: int) -> tuple[int, int, int]:
                """The first and last keys that the query sees, and how many."""
                mask = torch.as_tensor(mask_function(0, 0, torch.tensor(query), keys))
                seen = mask.expand(len(keys)).nonzero()[:, 0]
                return (int(seen[0]), int(seen[-1]), len(seen)) if len(seen) else (0, -1, 0)

            (first, latest, count), before = seen_from(last), seen_from(last - 1)
        window = None if first == 0 else last - first + 1
        regular = latest == last and count == last - first + 1 and before[2] > 0 and before[0] == max(0, first - 1)
        later = latest > last
        return cls(window, later, "" if regular else "its mask is neither causal nor a sliding window")


def _run(
    skeleton: Skeleton, attention: str | None, device: str, tokens: int = _TOKENS
) -> tuple[_Recorder, Mapping[str, bool], Cache]:
    """One pass: the recorded calls, ``Trace.linears``, and the cache with the name of its argument."""
    recorder = _Recorder(skeleton.max_positions)
    AttentionInterface.register(_TRACED, recorder.attention)
    AttentionMaskInterface.register(_TRACED, recorder.mask)
    model = skeleton.built(attention=attention)
    model.set_experts_implementation("batched_mm")  # the others read expert ids, which a meta tensor has not
    if device != "meta":
        model.to_empty(device=device)
        for buffer in model.buffers():
            buffer.zero_()
    rows: dict[str, set[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            module.register_forward_hook(_note_rows(rows, name))
    kept = {"logits_to_keep": torch.arange(_KEPT)} if "logits_to_keep" in skeleton.arguments else {}
    with torch.device(device), torch.no_grad():
        out = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=True, **kept)
    names = [name for name in _CACHES if name in out and name in skeleton.arguments]
    cache = Cache(names[0], out[names[0]]) if names else NO_CACHE
    linears = {name: found == {_KEPT} for name, found in rows.items() if found in ({tokens}, {_KEPT})}
    return recorder, linears, cache


def _note_rows(rows: dict[str, set[int]], name: str) -> Callable[..., None]:
    """A hook that adds the rows of a module's input to its ``rows``; -1 unless they lie along one axis and the output
    is one tensor."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        shape = args[0].shape if isinstance(module, nn.Embedding) else args[0].shape[:-1]
        plain = shape.numel() in shape and isinstance(output, Tensor)
        rows.setdefault(name, set()).add(shape.numel() if plain else -1)

    return hook


def _problem(skeleton: Skeleton, calls: list[AttentionCall], layers: set[str]) -> str:
    """Why pages cannot serve the model, as far as its structure shows; empty when they may."""
    if not calls:
        return "its code does not use transformers' attention interface"
    if stateful := sorted(layers - _PAGED_LAYERS):
        return f"its cache is more than keys and values ({', '.join(stateful)})"
    if "position_ids" not in skeleton.arguments:
        return "its forward takes no position_ids"
    return next((call.problem for call in calls if call.problem), "")


def _numbers(item: Any, seen: set[int]) -> int:
    """The numbers in all tensors of a cache object."""
    if id(item) in seen:
        return 0
    seen.add(id(item))
    if isinstance(item, Tensor):
        return item.numel()
    if isinstance(item, list | tuple | set):
        return sum(_numbers(part, seen) for part in item)
    if isinstance(item, dict):
        return sum(_numbers(part, seen) for part in item.values())
    if type(item).__module__.startswith("transformers") and not hasattr(item, "model_type"):
        return sum(_numbers(part, seen) for part in vars(item).values())
    return 0
