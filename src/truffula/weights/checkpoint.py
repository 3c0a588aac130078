"""``Checkpoint``: the interface to a model's files, independent of their format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy.typing as npt

from truffula.errors import CheckpointError
from truffula.kernels.backend import ComputedArray, QuantisedArray
from truffula.weights.mapped import MappedFile

Array = npt.NDArray[Any]


class TensorInfo(msgspec.Struct, frozen=True, gc=False):
    """One tensor as stored.

    ``shape`` is in row-major (PyTorch) order, ``dtype`` as the format names it (``BF16``, ``Q4_1``), ``offset`` and
    ``nbytes`` are of its data within ``file``. A tensor that is computed from several stored ones has them as
    ``parts``; ``nbytes`` is then their sum, ``file`` and ``offset`` those of the first, ``dtype`` the name of the form
    (``GPTQ-4``), and ``values`` the dtype of what is computed (``F16``), or the kind of blocks that ``blocks`` makes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    nbytes: int
    parts: tuple[TensorInfo, ...] = ()
    values: str = ""


class Checkpoint(ABC):
    """An opened model, without its texts (``texts.read_texts``).

    ``config`` is config.json, or its equivalent made from GGUF metadata.
    ``generation_config`` is the file of that name, ``{}`` when there is none. ``tensors`` maps a name to its
    ``TensorInfo``; ``files`` are the files of the tensors, held open until ``close``. GGUF names, metadata and
    conventions are translated to Hugging Face's, so the users of this interface do not depend on the format.
    ``unused`` are stored tensors without effect here, which are not among ``tensors``. ``warnings`` are for the
    operator. ``no_adapters``: why adapters that were trained on the model do not fit these weights, if so.
    """

    path: Path
    format: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: tuple[MappedFile, ...]
    warnings: tuple[str, ...]
    unused: tuple[str, ...] = ()
    no_adapters: str = ""

    @abstractmethod
    def read(self, name: str) -> Array:
        """The tensor: a mapped view in its stored dtype or, of a quantised format, a new dequantised float32 array.

        A view must not be written to: a write would last only until its pages are released.
        """

    def blocks(self, name: str) -> QuantisedArray | None:
        """The tensor as its stored blocks, rows in the order of ``read``; None unless it is a matrix in simple blocks
        of 32 with finite scales.
        """
        return None

    def computed(self, name: str) -> ComputedArray | None:
        """The tensor as rows that are computed when they are read; None for one that is stored as it is."""
        return None

    def info(self, name: str) -> TensorInfo:
        """The entry of ``tensors``. Raises ``CheckpointError`` for an unknown name."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}.", param=name)
        return self.tensors[name]

    def raw(self, name: str) -> Array:
        """``[nbytes]`` uint8 view of a stored tensor's bytes in the file, before any conversion."""
        return self.bytes_of(self.info(name))

    def bytes_of(self, info: TensorInfo) -> Array:
        """``raw`` of a tensor that may be one of the ``parts`` of another."""
        file = next(file for file in self.files if file.path == info.file)
        return file.view(info.offset, info.nbytes)

    def close(self) -> None:
        for file in self.files:
            file.close()
