"""Adapters on the device: the bytes of an image as they lie, and a table of descriptors that kernels read.

An adapter costs its bytes and 64 for each slice of a product; it is not padded, and its rank has no limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from truffula.kernels.adapters import (
    AdapterImage,
    AdapterLayout,
    Bias,
    ColumnScale,
    LowRank,
    Rows,
    SiteTensors,
    check_place,
    check_served,
    dtype_name,
    require_served,
    tensors_of,
)
from truffula.kernels.inputs import Array, StepInputs
from truffula.kernels.program import Linear, Logits, Program, SiteSlice
from truffula.kernels.reference.linear import OpAdapter, Segment, lay_out_sites
from truffula.kernels.reference.slots import AdapterSlots
from truffula.kernels.reference.weights import view

WORDS = 8
"""Of a descriptor: see ``linear_kernels``."""
_CODES = {"F32": 0, "F16": 1, "BF16": 2}


@dataclass
class _Resident:
    """An adapter: its sites by op, its bytes, its descriptors, and the columns of h that it needs. ``by_torch`` are the
    ops that kernels do not serve it at."""

    sites: dict[int, list[SiteTensors]]
    image: AdapterImage
    data: Tensor
    descriptors: Tensor
    width: int
    by_torch: frozenset[int]


def slices_of(program: Program) -> dict[int, tuple[SiteSlice, ...]]:
    """Of each op whose adapters kernels serve, the slices that have a site."""
    found: dict[int, tuple[SiteSlice, ...]] = {}
    for index, op in enumerate(program.ops):
        if isinstance(op, Linear) and op.slices:
            found[index] = op.slices
        elif isinstance(op, Logits) and op.site is not None:
            found[index] = (SiteSlice(op.site, 0, op.out.width),)
    return found


class DeviceAdapters(AdapterSlots):
    """Besides the descriptors, the parts that no kernel serves, as the torch backend has them (``segments``)."""

    def __init__(self, program: Program, layout: AdapterLayout, device: torch.device) -> None:
        super().__init__(layout, device)
        self.first: dict[int, int] = {}
        """Of an op with slices, the number of its first descriptor."""
        self._slices, self._descriptors = slices_of(program), 0
        for index, slices in self._slices.items():
            self.first[index] = self._descriptors
            self._descriptors += len(slices)
        self._resident: dict[int, _Resident] = {}

    def bytes_of(self, image: AdapterImage) -> int:
        """The copy on the device, the descriptors, and what torch converts to float32 or sorts."""
        sites, by_torch = self._places(image)
        parts = [part for op in by_torch for tensors in sites[op] for part in tensors.parts]
        made = sum(
            4 * array.size
            for part in parts
            for array in tensors_of(part)
            if isinstance(part, Rows) or dtype_name(array) != "F32"
        )
        return image.data.size + 8 * WORDS * self._descriptors + made

    @torch.inference_mode()
    def add(self, image: AdapterImage) -> int:
        require_served(image, self._layout)
        sites, by_torch = self._places(image)
        data = torch.from_numpy(image.data).to(self._device)
        table, width = self._describe(image, data.data_ptr(), sites, by_torch)
        descriptors = torch.from_numpy(table).to(self._device)
        resident = _Resident(sites, image, data, descriptors, width, by_torch)
        slot = next(number for number in range(len(self._slots) + 1) if number not in self._slots)
        self._resident[slot], self._slots[slot] = resident, self._in_torch(resident, by_torch)
        return slot

    def _places(self, image: AdapterImage) -> tuple[dict[int, list[SiteTensors]], frozenset[int]]:
        """The sites of each op, and the ops that kernels do not serve them at."""
        sites: dict[int, list[SiteTensors]] = {}
        for tensors in image.sites():
            place = check_place(self._layout, tensors.site)
            check_served(place, tensors.parts)
            sites.setdefault(place.op, []).append(tensors)
        by_torch = (op for op, each in sites.items() if op not in self._slices or not all(map(_in_kernels, each)))
        return sites, frozenset(by_torch)

    def drop(self, slot: int) -> None:
        super().drop(slot)
        del self._resident[slot]

    def clear(self) -> None:
        super().clear()
        self._resident.clear()

    def address(self, slot: int) -> int:
        """Of the descriptors on the device."""
        return self._resident[slot].descriptors.data_ptr()

    def width(self, slots: Iterable[int]) -> int:
        """Columns of h: the most of any of ``slots``."""
        return max((self._resident[slot].width for slot in slots), default=0)

    def by_torch(self, inputs: StepInputs) -> dict[int, list[int]]:
        """Of each op, the segments of a step whose adapter acts there with parts that no kernel serves."""
        found: dict[int, list[int]] = {}
        for index, slot in enumerate(inputs.seg[: inputs.G, 2].tolist()):
            for op in self._resident[slot].by_torch:
                found.setdefault(op, []).append(index)
        return found

    def all_by_torch(self, op: int, inputs: StepInputs) -> tuple[list[Segment], list[Segment]]:
        """The segments of a step, of token rows and of rows of logits, with the parts of all adapters at ``op``: they
        may act on the same rows. What torch needs of those that kernels serve is not kept."""
        slots = dict(self._slots)
        for slot in set(inputs.seg[: inputs.G, 2].tolist()):
            if op in self._resident[slot].sites and not any(key[0] == op for key in slots[slot]):
                slots[slot] = {**slots[slot], **self._in_torch(self._resident[slot], {op})}
        return self.segments(inputs, inputs.seg[:, :2], slots), self.segments(inputs, inputs.seg_r, slots)

    def serve_by_torch(self, slot: int) -> None:
        """Make all parts of an adapter usable for torch, beside their descriptors."""
        self._slots[slot] = self._in_torch(self._resident[slot], self._resident[slot].sites)

    def _in_torch(self, resident: _Resident, ops: Iterable[int]) -> Mapping[tuple[int, int], OpAdapter]:
        image, data = resident.image, resident.data
        start = image.data.ctypes.data

        def place(array: Array) -> Tensor:
            begin = array.ctypes.data - start
            return data[begin : begin + array.nbytes].view(view(array).dtype).view(array.shape)

        return lay_out_sites((site for op in ops for site in resident.sites[op]), self._layout, place)

    def _describe(
        self, image: AdapterImage, base: int, sites: Mapping[int, list[SiteTensors]], by_torch: frozenset[int]
    ) -> tuple[Array, int]:
        """The descriptors int64 [n, WORDS] (zeros: the adapter does not act there), and the columns of h."""
        table = np.zeros((max(1, self._descriptors), WORDS), np.int64)
        address: Callable[[Array], int] = lambda array: base + array.ctypes.data - image.data.ctypes.data
        widest = 0
        for op, each in sites.items():
            if op in by_torch:
                continue
            columns: dict[int, int] = {}  # of h, by the address of A: fused modules share one
            width = 0
            numbers = {item.site: self.first[op] + at for at, item in enumerate(self._slices[op])}
            for tensors in each:
                row = table[numbers[tensors.site]]
                for part in tensors.parts:
                    if isinstance(part, LowRank):
                        a, rank = address(part.a), part.a.shape[0]
                        row[0] = 0 if a in columns else a
                        columns.setdefault(a, width)
                        width += rank if row[0] else 0
                        kinds = _CODES[dtype_name(part.a)] + 4 * _CODES[dtype_name(part.b)]
                        row[1:6] = address(part.b), rank, columns[a], kinds, int(np.float32(part.scale).view(np.int32))
                    elif isinstance(part, ColumnScale):
                        row[6] = address(part.factor)
                    elif isinstance(part, Bias):
                        row[7] = address(part.values)
            widest = max(widest, width)
        return table, widest


def _in_kernels(tensors: SiteTensors) -> bool:
    """Whether ``finish`` serves all parts of a site."""
    ranks = sum(isinstance(part, LowRank) for part in tensors.parts)
    return ranks <= 1 and all(isinstance(part, LowRank | ColumnScale | Bias) for part in tensors.parts)
