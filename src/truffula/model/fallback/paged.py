"""Whole batches through a transformers model: all tokens of a step in one row, keys and values in our pages."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from truffula.errors import KernelError
from truffula.kernels.inputs import Capacity, Int32
from truffula.kernels.program import Attention, ModelInterface, Ref
from truffula.kernels.reference import attention as pages
from truffula.kernels.reference.kv import KvPlanes, LazyTensors
from truffula.model.fallback.executable import TransformersExecutable
from truffula.model.fallback.plan import TransformersModel
from truffula.model.fallback.trace import AttentionCall

PAGED = "truffula_paged"
"""The attention implementation. It has no mask function, so that transformers builds no masks."""
_OWNER = "truffula_executable"


def register() -> None:
    """Make ``PAGED`` known to transformers."""
    AttentionInterface.register(PAGED, _paged_attention)


def _paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **given: Any
) -> tuple[Tensor, None]:
    """transformers' signature: ``query [1, H, T, D]``, ``key`` and ``value`` likewise; returns ``[1, T, H, D]``."""
    executable: PagedExecutable = module.__dict__[_OWNER]
    return executable.attention(query, key, value, given), None


class PagedExecutable(TransformersExecutable):
    """``Executable`` over packed rows ``[1, T]`` with the position of each token.

    The n-th attention call of a pass belongs to planes 2n and 2n + 1 of the interface.
    """

    def __init__(
        self,
        described: TransformersModel,
        model: Any,
        interface: ModelInterface,
        capacity: Capacity,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(described, model, interface, capacity, device)
        self._memory = LazyTensors(device)
        self._planes = KvPlanes(interface.kv_groups, capacity, dtype, self._memory)
        self._group_of = {group.window: group.id for group in interface.kv_groups}
        self._plans: dict[int, list[pages.Batch]] = {}
        self._slots: list[Tensor] = []
        self._calls = 0
        for module in model.modules():
            module.__dict__[_OWNER] = self

    @torch.inference_mode()
    def run(self) -> None:
        i = self.inputs
        self.hooks.prepare(i.T, self.adapters.segments(i, i.seg[:, :2]), i.R, self.adapters.segments(i, i.seg_r))
        self._plans, self._calls = {}, 0
        self._slots = [self.long(slots[: i.T]) for slots in i.slot_mapping]
        positions = self.long(i.position[: i.T])[None]
        logits, _ = self.forward(i.token_ids[None, : i.T], i.logit_rows[: i.R], position_ids=positions, use_cache=False)
        if self._calls != len(self.described.trace.calls):
            raise KernelError(
                f"{self.described.class_name} called attention {self._calls} times in a pass of {i.T} tokens; "
                f"{len(self.described.trace.calls)} calls were planned."
            )
        self._logits = logits[0].cpu().numpy()

    def attention(self, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
        """Write the keys and values of the call to their pages, then attend to those of each row's sequence."""
        calls, number = self.described.trace.calls, self._calls
        self._calls += 1
        if number >= len(calls) or key.shape[1] != calls[number].kv_heads:
            raise KernelError(f"{self.described.class_name} attends in another way than in the planned pass.")
        call = calls[number]
        group = self._group_of[call.window]
        k, v = self._planes[2 * number], self._planes[2 * number + 1]
        pages.write(k, self._slots[group], _by_row(key))
        pages.write(v, self._slots[group], _by_row(value))
        if group not in self._plans:
            size, zero_slot = self.capacity.block_size, self._planes.zero_slot
            self._plans[group] = pages.plan(self.inputs, group, call.window, False, size, zero_slot, self.device)
        scale = given.get("scaling")
        op = _op(call, call.dim_k**-0.5 if scale is None else float(scale), given.get("softcap"))
        sinks = given.get("s_aux")
        out = pages.compute(op, _by_row(query), k, v, self._plans[group], None if sinks is None else sinks.float())
        return out.view(1, -1, call.heads, call.dim_v)

    def release_kv(self, group: int, blocks: Int32) -> None:
        self._planes.release(group, blocks)

    def close(self) -> None:
        if self.model is not None:
            for module in self.model.modules():
                module.__dict__.pop(_OWNER, None)
        super().close()
        self._planes.close()
        self._memory.close()


def _by_row(heads: Tensor) -> Tensor:
    """``[1, H, T, D]`` as ``[T, H, 1, D]``."""
    return heads.transpose(0, 2)


@cache
def _op(call: AttentionCall, scale: float, softcap: float | None) -> Attention:
    """The op of the torch backend that computes a call; its buffers are not used."""
    return Attention(
        name="attention", q=_NO_REF, k=_NO_REF, v=_NO_REF, out=_NO_REF, group=0, planes=(0, 1), heads=call.heads,
        kv_heads=call.kv_heads, dim_k=call.dim_k, dim_v=call.dim_v, scale=scale, window=call.window, softcap=softcap,
    )  # fmt: skip


_NO_REF = Ref(0, 0, 0)
