"""A ``Checkpoint`` over a quantised one: every module has one plain weight, whatever the scheme."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from truffula.errors import CheckpointError
from truffula.kernels.backend import ComputedArray, QuantisedArray
from truffula.kernels.mapped import release_pages
from truffula.weights.checkpoint import Array, Checkpoint, TensorInfo
from truffula.weights.gguf.quants import values_of_blocks
from truffula.weights.quantised.logical import FLOATS, Logical, Parts, Scheme
from truffula.weights.quantised.packing import BY_KIND


class QuantisedCheckpoint(Checkpoint):
    """``tensors`` has plain tensors as ``opened`` has them, and for each quantised module one logical tensor, whose
    ``parts`` are the stored ones. The tensors that are stored decide which modules are quantised, not the config's
    lists of modules.
    """

    def __init__(self, opened: Checkpoint, scheme: Scheme) -> None:
        self.path, self.format, self.files = opened.path, opened.format, opened.files
        self.config, self.generation_config = opened.config, opened.generation_config
        self._opened = opened
        self._logical: dict[str, Logical] = {}
        tensors: dict[str, TensorInfo] = {}
        unused: list[str] = []
        for module, infos in _modules(opened, scheme).items():
            unused += [info.name for suffix, info in infos.items() if suffix in scheme.unused]
            parts = Parts(opened, module, {key: info for key, info in infos.items() if key not in scheme.unused})
            if not parts.infos or not scheme.is_quantised(parts):
                tensors |= {info.name: info for info in parts.infos.values()}
                continue
            logical = scheme.open(parts)
            parts.finish()
            if 0 in logical.shape:
                raise parts.error(
                    next(iter(parts.infos)), f"is part of a weight {list(logical.shape)}, which is empty."
                )
            plain = logical.name in opened.tensors and logical.name not in [info.name for info in parts.infos.values()]
            if plain or logical.name in self._logical:
                raise CheckpointError(f"{logical.name} is stored in two ways: {', '.join(parts.infos)}.", param=module)
            self._logical[logical.name] = logical
            tensors[logical.name] = _info(logical, tuple(parts.infos.values()))
        self.tensors: Mapping[str, TensorInfo] = tensors
        self.unused = (*opened.unused, *unused)
        self.warnings = (*opened.warnings, *self._warnings(scheme))

    def _warnings(self, scheme: Scheme) -> list[str]:
        if not self._logical:
            return [f"config.json says that weights are quantised ({scheme.method}), but none is stored so."]
        return [f"{scheme.method}: {note}" for note in scheme.notes]

    def read(self, name: str) -> Array:
        computed = self.computed(name)
        return self._opened.read(name) if computed is None else computed.dequantise()

    def computed(self, name: str) -> ComputedArray | None:
        logical = self._logical.get(name)
        if logical is None:
            return None
        stored = self.tensors[name].parts

        def read(lo: int, hi: int) -> Array:
            rows = logical.rows(lo, hi)
            if hi >= logical.shape[0]:
                for part in stored:
                    release_pages(self.bytes_of(part))
            return rows

        return ComputedArray(logical.shape, logical.dtype, read)

    def blocks(self, name: str) -> QuantisedArray | None:
        logical = self._logical.get(name)
        if logical is None or not logical.packed:
            return None
        format = BY_KIND[logical.packed]
        made = logical.blocks(format.size, format.nbytes)
        if made is None:
            return None
        for part in self.tensors[name].parts:
            release_pages(self.bytes_of(part))
        return QuantisedArray(format.name, made, logical.packed_shape, partial(values_of_blocks, format))


def _modules(opened: Checkpoint, scheme: Scheme) -> dict[str, dict[str, TensorInfo]]:
    """The stored tensors by module and suffix; a name without a suffix is a module of its own, with the suffix ""."""
    longest = sorted(scheme.suffixes, key=len, reverse=True)
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in opened.tensors.items():
        suffix = next((item for item in longest if name.endswith(item)), "")
        found.setdefault(name[: len(name) - len(suffix)], {})[suffix] = info
    return found


def _info(logical: Logical, parts: tuple[TensorInfo, ...]) -> TensorInfo:
    first, values = parts[0], logical.packed or {dtype: name for name, dtype in FLOATS.items()}[logical.dtype]
    nbytes = sum(part.nbytes for part in parts)
    return TensorInfo(logical.name, logical.shape, logical.kind, first.file, first.offset, nbytes, parts, values)
