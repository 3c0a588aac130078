"""The adapters of an executable, by slot."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count

import torch

from truffula.errors import KernelError
from truffula.kernels.adapters import AdapterImage, AdapterLayout
from truffula.kernels.inputs import Array, StepInputs
from truffula.kernels.reference.linear import OpAdapter, Segment, lay_out

Slots = dict[int, Mapping[tuple[int, int], OpAdapter]]


class AdapterSlots:
    """Takes images of one layout; see ``Executable`` for slots."""

    def __init__(self, layout: AdapterLayout, device: torch.device) -> None:
        self._layout, self._device = layout, device
        self._slots: Slots = {}

    def bytes_of(self, image: AdapterImage) -> int:
        """The copy of the image on another device."""
        return 0 if self._device.type == "cpu" else image.data.size

    @torch.inference_mode()
    def add(self, image: AdapterImage) -> int:
        """A slot for the adapter. Raises ``KernelError`` for an image of another layout."""
        laid_out = lay_out(image, self._layout, self._device)
        slot = next(number for number in count() if number not in self._slots)
        self._slots[slot] = laid_out
        return slot

    def drop(self, slot: int) -> None:
        if self._slots.pop(slot, None) is None:
            raise KernelError(f"adapter slot {slot} is not in use.", param="slot")

    def clear(self) -> None:
        self._slots.clear()

    def segments(self, inputs: StepInputs, spans: Array, slots: Slots | None = None) -> list[Segment]:
        """The segments of a step that have rows; ``spans`` are their rows, ``seg`` or ``seg_r``. ``slots``: in place of
        those here."""
        made, slots = [], self._slots if slots is None else slots
        for index in range(inputs.G):
            lo, hi, slot = int(spans[index, 0]), int(spans[index, 1]), int(inputs.seg[index, 2])
            if slot not in slots:
                raise KernelError(f"segment {index} names adapter slot {slot}, which is empty.", param="seg")
            if lo < hi:
                made.append(Segment(lo, hi, slots[slot], float(inputs.seg_weight[index])))
        return made
