"""``Logical``: one plain tensor over the stored tensors of a quantised module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from truffula.errors import CheckpointError
from truffula.kernels.host import usable_cpus
from truffula.weights.checkpoint import Array, Checkpoint, TensorInfo

FLOAT32, FLOAT16, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
FLOATS: Mapping[str, np.dtype[Any]] = {"F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16}
_PIECE_VALUES = 1 << 20
"""Values per piece of a read: a few times 4 MB are in use for each thread."""


@dataclass(frozen=True)
class Logical:
    """A tensor of ``shape`` in ``dtype``, which ``compute(lo, hi)`` gives as rows ``lo .. hi``.

    ``kind`` names the stored form (``GPTQ-4``). ``compute`` is called from several threads. A weight that native
    kernels can multiply as it is has the kind of its blocks as ``packed`` (``Q4_0``), and ``pack(lo, hi)`` makes them,
    or returns None where the numbers do not fit. ``swapped``: blocks run along the last dimension but one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    kind: str
    compute: Callable[[int, int], Array]
    packed: str = ""
    pack: Callable[[int, int], Array | None] | None = None
    swapped: bool = False

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """``shape``, with the dimension of the blocks last."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.swapped else self.shape

    def rows(self, lo: int, hi: int) -> Array:
        """Rows ``lo .. hi``, computed in pieces by the threads of this machine."""
        lo, hi = max(0, lo), min(hi, self.shape[0])
        out = np.empty((max(0, hi - lo), *self.shape[1:]), self.dtype)

        def piece(start: int, stop: int) -> None:
            out[start - lo : stop - lo] = self.compute(start, stop)

        self._in_pieces(piece, lo, hi)
        return out

    def blocks(self, size: int, nbytes: int) -> Array | None:
        """uint8 ``[..., blocks of a row, nbytes]``: ``packed_shape`` in blocks of ``size`` values of the kind
        ``packed``, the last of a row filled up; None where they do not fit.
        """
        *rows, width = self.packed_shape
        out = np.empty((*rows, -(-width // size), nbytes), np.uint8)
        fitting: list[bool] = []

        def piece(start: int, stop: int) -> None:
            assert self.pack is not None
            made = self.pack(start, stop)
            fitting.append(made is not None)
            if made is not None:
                out[start:stop] = made

        self._in_pieces(piece, 0, self.shape[0])
        return out if all(fitting) else None

    def _in_pieces(self, work: Callable[[int, int], None], lo: int, hi: int) -> None:
        step = max(1, _PIECE_VALUES // max(1, int(np.prod(self.shape[1:]))))
        pieces = [(start, min(start + step, hi)) for start in range(lo, hi, step)]
        if len(pieces) < 2:
            for start, stop in pieces:
                work(start, stop)
            return
        with ThreadPoolExecutor(usable_cpus()) as pool:
            for done in [pool.submit(work, start, stop) for start, stop in pieces]:
                done.result()


class Parts:
    """The stored tensors of one module, by suffix; ``module`` is their common name without it.

    Its methods raise ``CheckpointError`` naming the tensor.
    """

    def __init__(self, opened: Checkpoint, module: str, infos: Mapping[str, TensorInfo]) -> None:
        self.opened, self.module, self.infos = opened, module, infos
        self._needed: set[str] = set()

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.infos

    def error(self, suffix: str, why: str) -> CheckpointError:
        name = f"{self.module}{suffix}"
        file = next(iter(self.infos.values())).file
        return CheckpointError(f"{name} in {file.name} {why}", param=name, tensor=name, file=str(file))

    def need(self, suffix: str, *dtypes: str, ndim: int | None = None) -> TensorInfo:
        """The stored tensor, which must be of one of ``dtypes``."""
        self._needed.add(suffix)
        info = self.infos.get(suffix)
        if info is None:
            others = ", ".join(f"{self.module}{found}" for found in self.infos)
            raise self.error(suffix, f"is missing: the quantised module has only {others}.")
        if dtypes and info.dtype not in dtypes:
            raise self.error(suffix, f"is stored as {info.dtype}; expected {' or '.join(dtypes)}.")
        if ndim is not None and len(info.shape) != ndim:
            raise self.error(suffix, f"has shape {list(info.shape)}; expected {ndim} dimensions.")
        return info

    def require(self, suffix: str, *shapes: tuple[int, ...]) -> None:
        """Raise unless the tensor has one of ``shapes``."""
        shape = self.infos[suffix].shape
        if shape not in shapes:
            wanted = " or ".join(str(list(item)) for item in shapes)
            raise self.error(suffix, f"has shape {list(shape)}; the other tensors of the module need {wanted}.")

    def floats(self, suffix: str) -> np.dtype[Any]:
        """The dtype of a tensor that must hold floats of 16 or 32 bits."""
        return FLOATS[self.need(suffix, *FLOATS).dtype]

    def finish(self) -> None:
        """Raise for the first tensor that was not needed: it may change the values of the weight."""
        for suffix in self.infos:
            if suffix not in self._needed:
                others = ", ".join(f"{self.module}{found}" for found in self.infos if found in self._needed)
                raise self.error(suffix, f"is not supported in a quantised module that is made of {others}.")

    def read(self, suffix: str) -> Array:
        return self.opened.read(self.infos[suffix].name)


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """How the modules of a model are quantised.

    ``method`` is the config's name for it, ``notes`` are for the operator. ``suffixes``: the ends of the names of
    stored tensors that may belong to a quantised module. ``unused``: of these, the ends of tensors that have no effect
    here.
    """

    method: str
    notes: tuple[str, ...] = ()
    suffixes: ClassVar[tuple[str, ...]] = ()
    unused: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def is_quantised(self, parts: Parts) -> bool:
        """Whether the stored tensors are those of a quantised module, complete or not."""

    @abstractmethod
    def open(self, parts: Parts) -> Logical:
        """The module's weight. Reads shapes and dtypes only, and raises ``CheckpointError`` when they are wrong."""
