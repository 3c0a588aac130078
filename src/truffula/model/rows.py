"""``WeightRow``: one logical weight of a model; ``LayerRows``: how a part of a layer lists its own.

Shape letters: ``O`` output rows of a weight, ``I`` its input width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from truffula.kernels.program import BufferDtype

if TYPE_CHECKING:
    from truffula.model.spec import ModuleNames

RowKind = Literal["embed", "linear", "vector", "conv", "head"]
Transform = Literal["none", "plus_one", "conv"]


@dataclass(frozen=True)
class NormSpec:
    """A norm and the module that holds its weight, named relative to its layer (the final norm: to the body).

    ``plus_one``: the file stores w, and 1 + w is applied, in float32 (Gemma). ``cast`` as in ``program.Norm``.
    """

    module: str
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    cast: Literal["first", "last"] = "first"
    plus_one: bool = False
    bias: bool = False


@dataclass(frozen=True)
class RowSlice:
    """``rows`` output rows of a logical weight that are one module in checkpoints and one site for adapters.

    ``module`` is relative to the body: ``layers.3.self_attn.q_proj``.
    """

    module: str
    rows: int


@dataclass(frozen=True)
class WeightRow:
    """One logical weight of the model. Loading, adapter matching and slicing all use this row.

    ``slices`` stacked along axis 0 make the weight; the checkpoint holds either ``<slice module>.<param>`` for each or,
    when ``fused`` is given, one ``<fused>.<param>`` with all their rows in this order; LoRA addresses each slice by its
    module and all of them together by ``fused``. ``width`` is the input width I (0 for a vector; the taps of a
    convolution). ``key`` is its name in the decoder. The tying decision assigns the tensors of embedding and head.
    """

    key: str
    kind: RowKind
    slices: tuple[RowSlice, ...]
    width: int
    layer: int | None = None
    param: Literal["weight", "bias"] = "weight"
    fused: str | None = None
    transform: Transform = "none"
    dtype: BufferDtype = "model"

    @property
    def rows(self) -> int:
        return sum(item.rows for item in self.slices)

    @property
    def shape(self) -> tuple[int, ...]:
        """``[O, I]`` or ``[O]``."""
        return (self.rows, self.width) if self.width else (self.rows,)

    def stored_shape(self, rows: int) -> tuple[int, ...]:
        """The shape in files of a tensor with ``rows`` of the rows."""
        return (rows, 1, self.width) if self.transform == "conv" else (rows, *self.shape[1:])


class LayerRows:
    """Collects the rows of one layer. Modules are given relative to the layer, or to the body outside layers.

    ``index`` is the layer's number, None outside layers; ``hidden`` is the width of the residual stream.
    """

    def __init__(self, names: ModuleNames, hidden: int, index: int | None = None) -> None:
        self.names, self.hidden, self.index = names, hidden, index
        self.prefix = "" if index is None else names.layer.format(i=index)
        self.found: list[WeightRow] = []

    def linear(
        self, key: str, parts: Sequence[tuple[str, int]], width: int, *, bias: bool = False, fused: str | None = None
    ) -> None:
        """A matrix ``[O, width]`` of stacked ``parts`` (module, rows), with its bias ``[O]``."""
        slices = tuple(RowSlice(self.prefix + module, count) for module, count in parts)
        whole, key = None if fused is None else self.prefix + fused, self.prefix + key
        self.found.append(WeightRow(key, "linear", slices, width, self.index, fused=whole))
        if bias:
            self.found.append(WeightRow(f"{key}.bias", "linear", slices, 0, self.index, param="bias", fused=whole))

    def conv(self, key: str, module: str, columns: int, taps: int, *, bias: bool) -> None:
        """The weight of a depthwise convolution, with its bias ``[columns]``."""
        key, slices = self.prefix + key, (RowSlice(self.prefix + module, columns),)
        self.found.append(WeightRow(key, "conv", slices, taps, self.index, transform="conv"))
        if bias:
            self.found.append(WeightRow(f"{key}.bias", "vector", slices, 0, self.index, param="bias"))

    def norm(self, key: str, norm: NormSpec | None, width: int | None = None) -> None:
        """The vectors of a norm over ``width`` columns (all of the residual stream by default); none without a norm."""
        if norm is None:
            return
        key, slices = self.prefix + key, (RowSlice(self.prefix + norm.module, width or self.hidden),)
        # 1 + w is kept in float32: rounding it to bfloat16 would lose the low bits of a small w.
        transform: Transform = "plus_one" if norm.plus_one else "none"
        dtype: BufferDtype = "float32" if norm.plus_one else "model"
        self.found.append(WeightRow(key, "vector", slices, 0, self.index, transform=transform, dtype=dtype))
        if norm.bias:
            self.found.append(WeightRow(f"{key}.bias", "vector", slices, 0, self.index, param="bias"))
