"""The limits of an engine, and the check of a request against them before it is queued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from truffula.engine.kv_layout import KvLayout
from truffula.errors import InsufficientMemory, InvalidRequest, Overloaded, PromptTooLong
from truffula.kernels.program import RopeRegime
from truffula.types import EngineRequest


@dataclass(frozen=True)
class EngineLimits:
    """Fixed at start. ``kv_windows`` and ``kv_block_bytes`` have an entry per KV group (see ``KvLayout``; without
    ``kv_block_bytes`` KV is not in the byte budget). Each group has ``num_blocks`` block ids, the scratch block among
    them. A model with sequence states has ``num_states`` state rows, row 0 among them, of ``state_bytes`` each.

    The last ``more_ids`` of the ``vocab_size`` ids are adapters' own.
    ``prefetch_adapters``: how many adapters may be loading for waiting requests at a time. ``patience``: in how
    many steps an adapter that runs nothing may be refused for lack of room, before the one that runs most is preempted.
    """

    max_model_len: int
    step_tokens: int
    step_logit_rows: int
    max_running: int
    max_waiting: int
    block_size: int
    num_blocks: int
    prefix_cache: bool
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    prefetch_adapters: int = 64
    rope_regime: RopeRegime | None = None
    kv_windows: tuple[int | None, ...] = (None,)
    kv_block_bytes: tuple[int, ...] = ()
    num_states: int = 0
    state_bytes: int = 0
    patience: int = 16
    more_ids: int = 0

    @property
    def most_running(self) -> int:
        """Sequences that may run. Each gets a token and a row in each step, so no more than a step has of either."""
        return min(self.max_running, self.step_tokens, self.step_logit_rows)

    @property
    def base_ids(self) -> int:
        """The ids of the base."""
        return self.vocab_size - self.more_ids

    def kv_layout(self, depth: int) -> KvLayout:
        """How KV divides into groups and blocks when ``depth`` steps may be unfinished."""
        block_bytes = self.kv_block_bytes or (0,) * len(self.kv_windows)
        rows = depth + 1 if self.num_states else 0
        return KvLayout(self.block_size, depth * self.step_tokens, self.kv_windows, block_bytes, rows, self.state_bytes)


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        return
    try:
        array = np.asarray(ids)
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise ValueError
    except (ValueError, OverflowError):
        raise InvalidRequest(f"{name} contains a value that is not a token id.", param=name) from None
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise InvalidRequest(
            f"{name} holds token id {bad}, outside 0 .. {vocab_size - 1}.",
            param=name,
            token_id=bad,
            vocab_size=vocab_size,
        )


def check_request(request: EngineRequest, limits: EngineLimits, longest: int, waiting: int) -> int:
    """Returns the number of tokens, prompt and completion, at which ``request`` ends at the latest.

    ``longest``: tokens whose KV fits in memory when the request runs alone. ``waiting``: requests that wait now.

    ``max_tokens`` None uses all positions that are left; one above that ends there with ``length``.

    Raises:
        InvalidRequest: No prompt, or an id outside the vocabulary.
        PromptTooLong: No position is left for a completion token.
        InsufficientMemory: Its KV would not fit even if it ran alone.
        Overloaded: As many requests wait as may.
    """
    if not request.prompt_ids:
        raise InvalidRequest("The prompt is empty; give at least one token.", param="prompt")
    check_vocabulary(request, limits.vocab_size if request.adapter is not None else limits.base_ids)
    total = most_tokens(request, limits, longest)
    if waiting >= limits.max_waiting:
        raise Overloaded(
            f"{waiting} requests are waiting; the limit is {limits.max_waiting}. Try again later.",
            waiting=waiting, limit=limits.max_waiting,
        )  # fmt: skip
    return total


def check_vocabulary(request: EngineRequest, vocab_size: int) -> None:
    """Raise ``InvalidRequest`` for an id outside a vocabulary of ``vocab_size`` ids."""
    params = request.params
    _check_ids("prompt", request.prompt_ids, vocab_size)
    _check_ids("resume_ids", request.resume_ids, vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_ids("logit_bias", list(params.logit_bias), vocab_size)


def most_tokens(request: EngineRequest, limits: EngineLimits, longest: int, virtual: int = 0) -> int:
    """The number of tokens at which ``request`` ends at the latest: ``virtual`` ones of its adapter, the prompt and the
    completion. Raises ``PromptTooLong`` and ``InsufficientMemory``: see ``check_request``.
    """
    params, prompt = request.params, virtual + len(request.prompt_ids)
    own = f" after {virtual} virtual tokens of its adapter" if virtual else ""
    room = limits.max_model_len - prompt
    if room < (0 if params.max_tokens == 0 else 1):
        raise PromptTooLong(
            f"The prompt has {prompt - virtual} tokens{own}; the model's limit is {limits.max_model_len}, prompt and "
            "completion together.",
            param="prompt", prompt_tokens=prompt - virtual, max_model_len=limits.max_model_len,
        )  # fmt: skip
    # The last token needs no KV.
    if params.max_tokens is None:
        total = min(limits.max_model_len, max(prompt + 1, longest + 1))
    else:
        total = prompt + min(params.max_tokens, room)
    if total - 1 > longest:
        raise InsufficientMemory(
            f"{prompt - virtual} prompt tokens{own} and up to {total - prompt} more do not fit in the KV cache: its "
            f"longest sequence has {longest} tokens. Ask for fewer tokens, or raise --memory.",
            param="max_tokens", tokens=total, longest=longest,
        )  # fmt: skip
    return total
