"""A ``Checkpoint`` over a quantised one: every module has one plain weight, whatever the scheme."""

from __future__ import annotations

from collections.abc import Mapping

from truffula.errors import CheckpointError
from truffula.weights.checkpoint import Array, Checkpoint, TensorInfo
from truffula.weights.quantised.logical import Logical, Parts, Scheme


class QuantisedCheckpoint(Checkpoint):
    """``tensors`` has plain tensors as ``opened`` has them, and for each quantised module one logical tensor, whose
    ``parts`` are the stored ones. The tensors that are stored decide which modules are quantised, not the config's
    lists of modules.
    """

    def __init__(self, opened: Checkpoint, scheme: Scheme) -> None:
        self.path, self.format, self.files = opened.path, opened.format, opened.files
        self.config, self.generation_config = opened.config, opened.generation_config
        self._opened, self._logical = opened, dict[str, Logical]()
        tensors: dict[str, TensorInfo] = {}
        unused: list[str] = []
        for parts in _modules(opened, scheme.suffixes):
            if not parts.module or not scheme.is_quantised(parts):
                kept = parts.infos.values()
                tensors |= {info.name: info for info in kept}
                continue
            left_out = [suffix for suffix in parts.infos if suffix in scheme.unused]
            unused += [parts.infos[suffix].name for suffix in left_out]
            used = {suffix: info for suffix, info in parts.infos.items() if suffix not in scheme.unused}
            if not used:  # the scales of a KV cache may belong to a module without a weight
                continue
            logical = scheme.open(Parts(opened, parts.module, used))
            if logical.name in tensors or logical.name in self._logical:
                raise CheckpointError(f"{logical.name} is stored twice, plain and quantised.", param=logical.name)
            self._logical[logical.name] = logical
            tensors[logical.name] = _info(logical, tuple(used.values()))
        self.tensors: Mapping[str, TensorInfo] = tensors
        self.unused = (*opened.unused, *unused)
        self.warnings = (*opened.warnings, *self._warnings(scheme))

    def _warnings(self, scheme: Scheme) -> list[str]:
        if not self._logical:
            return [f"config.json says that weights are quantised ({scheme.method}), but none is stored so."]
        return [f"{scheme.method}: {note}" for note in scheme.notes]

    def read(self, name: str) -> Array:
        logical = self._logical.get(name)
        return self._opened.read(name) if logical is None else logical.rows(0, logical.shape[0])

    def logical(self, name: str) -> Logical | None:
        return self._logical.get(name)


def _modules(opened: Checkpoint, suffixes: tuple[str, ...]) -> list[Parts]:
    """The stored tensors grouped by their names without suffix, in order; a tensor without one stands alone."""
    longest = sorted(suffixes, key=len, reverse=True)
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in opened.tensors.items():
        suffix = next((item for item in longest if name.endswith(item)), None)
        if suffix is None:
            found[f"\0{name}"] = {"": info}
        else:
            found.setdefault(name.removesuffix(suffix), {})[suffix] = info
    return [Parts(opened, "" if module.startswith("\0") else module, infos) for module, infos in found.items()]


def _info(logical: Logical, parts: tuple[TensorInfo, ...]) -> TensorInfo:
    first = parts[0]
    nbytes = sum(part.nbytes for part in parts)
    return TensorInfo(logical.name, logical.shape, logical.kind, first.file, first.offset, nbytes, parts)
