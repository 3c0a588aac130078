"""Folds an adapter into its base: writes the model folder whose weights are those that base and adapter make together.

Every part that is served acts on a site, which is rows of one of the program's weights; the reader's transforms say
where these rows are in the checkpoint's tensors (``program.WeightPart``). A tensor is computed in float32 and rounded
once, to the dtype that it is stored in. All others are copied bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from truffula.errors import AdapterError, UnsupportedModel
from truffula.kernels.adapters import Bias, ColumnScale, InputScale, LowRank, Part, Replace, Rows, SiteTensors
from truffula.kernels.backend import Array, expert_matrices
from truffula.kernels.inputs import Float32
from truffula.kernels.weight_decl import WeightDecl, WeightPart
from truffula.lora.base import BaseWeights, SiteWeight, base_source
from truffula.lora.peft import BaseFacts, PeftAdapter, validate_adapter
from truffula.model.load import arranged, joined, plan_model
from truffula.model.names import resolve_names
from truffula.model.plan import ModelPlan
from truffula.types import Progress
from truffula.weights.checkpoint import Checkpoint, TensorInfo
from truffula.weights.folder import INDEX, SINGLE
from truffula.weights.open import open_checkpoint
from truffula.weights.safetensors import DTYPES, SafetensorsFile, write_tensors
from truffula.weights.tying import FLAG, Tie

_NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_COPIED_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True)
class Folded:
    """What was written: numbers of tensors; ``untied``: embedding and head are two tensors now."""

    tensors: int
    changed: int
    untied: bool
    warnings: tuple[str, ...]


def fold_adapter(
    base: Path, adapter: Path, output: Path, *, dequantize: bool = False, progress: Progress | None = None
) -> Folded:
    """Write the model at ``base`` with ``adapter`` folded into it into the folder ``output``, which is made if need be.

    ``dequantize``: of a quantised base write plain weights.

    Raises ``UnsupportedModel`` for a base that is no folder of safetensors or that transformers' code computes,
    ``AdapterError`` for an adapter that is not served, or does more than change weights.
    """
    output.mkdir(exist_ok=True)
    with closing(open_checkpoint(base)) as checkpoint:
        plan = _foldable(checkpoint, dequantize)
        source = base_source(plan, checkpoint)
        with closing(BaseWeights(source)) as weights:
            found = validate_adapter(adapter, plan.program.sites, base=BaseFacts(plan.size.model_type, weights))
            _check_foldable(found)
            fold = _Fold(checkpoint, plan, found.sites, source.sites)
            tensors = dict(fold.tables())
            config = _config(checkpoint, untied=fold.untied)
            written = _write(checkpoint, output, fold, tensors, progress)
    (output / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _copy_other_files(base, output)
    return Folded(written, len(fold.changed), fold.untied, found.warnings)


def _foldable(checkpoint: Checkpoint, dequantize: bool) -> ModelPlan:
    if checkpoint.format == "gguf":
        raise UnsupportedModel(
            "A GGUF file is not a base to fold into: what is written is a folder of safetensors. Take the model's "
            "original folder.",
            param="base",
        )
    plan = plan_model(checkpoint)
    if plan.transformers is not None:
        raise UnsupportedModel(
            f"{plan.size.model_type} is computed by transformers' code; fold with PEFT's merge_and_unload.",
            param="model_type",
        )
    if not dequantize and any(info.parts for info in checkpoint.tensors.values()):
        raise UnsupportedModel(
            "The base is quantised, and weights with an adapter in them cannot be stored in its format. Fold into the "
            "original model, or write plain weights with --dequantize.",
            param="dequantize",
        )
    return plan


def _check_foldable(found: PeftAdapter) -> None:
    if found.facts.invocation:
        raise AdapterError(
            "The adapter acts from its invocation tokens on (alora_invocation_tokens), which weights cannot express.",
            param="alora_invocation_tokens",
        )
    if found.facts.vocab_size:
        raise AdapterError(
            f"The adapter has a vocabulary of its own, of {found.facts.vocab_size} tokens. Fold it with the model "
            "that it was trained on, resized: PEFT's merge_and_unload.", param="vocab_size",
        )  # fmt: skip
    if found.facts.virtual_ids:
        raise AdapterError(
            "The adapter puts virtual tokens before the prompt, which weights cannot express.", param="peft_type"
        )


@dataclass
class _Change:
    """The parts of the adapter that act on rows ``lo .. hi`` of a weight (of experts: of ``expert``'s matrix)."""

    lo: int
    hi: int
    expert: int
    kind: str
    parts: tuple[Part, ...]


@dataclass
class _Fold:
    """Which tensors of the checkpoint change, and how. Tied tables are handled apart."""

    checkpoint: Checkpoint
    plan: ModelPlan
    adapter: Sequence[SiteTensors]
    places: Mapping[int, SiteWeight]
    changed: set[str] = field(default_factory=set)
    untied: bool = False

    def __post_init__(self) -> None:
        self._changes: dict[int, list[_Change]] = {}
        self._tables: dict[str, tuple[Part, ...]] = {}  # of a tied base, by kind of site
        program = self.plan.program
        tied = self.plan.tying.tie is not Tie.SEPARATE
        for tensors in self.adapter:
            site, place = program.sites[tensors.site], self.places[tensors.site]
            of_embed = site.kind == "embed"  # there a bias is added to rows of the table
            of_weight = tuple(part for part in tensors.parts if of_embed or not isinstance(part, Bias))
            biases = tuple(part for part in tensors.parts if not of_embed and isinstance(part, Bias))
            if biases:
                self._add_bias(place, site.module, biases)
            if of_weight and site.kind in ("embed", "head") and tied:
                self._tables[site.kind] = of_weight
            elif of_weight:
                decl, lo, expert = program.weights[place.weight], place.lo, 0
                if len(decl.shape) == 3:
                    expert, lo = divmod(lo, decl.shape[1])
                change = _Change(lo, lo + place.hi - place.lo, expert, site.kind, of_weight)
                self._changes.setdefault(place.weight, []).append(change)
        self._decls = {part.name: decl for decl in program.weights if decl.id in self._changes for part in decl.parts}

    def _add_bias(self, place: SiteWeight, module: str, biases: tuple[Part, ...]) -> None:
        if place.bias is None:
            raise AdapterError(
                f"The adapter has a bias on {module}, and the base has none there to add it to.", param="bias"
            )
        change = _Change(place.lo, place.hi, 0, "bias", biases)
        self._changes.setdefault(place.bias, []).append(change)

    def value(self, info: TensorInfo) -> Array:
        """The values of a tensor in the dtype it is written in."""
        stored = self.checkpoint.read(info.name)
        decl = self._decls.get(info.name)
        if decl is not None:
            values = np.array(stored, np.float32)
            if _change_tensor(decl, info.name, values, self._changes[decl.id], self.checkpoint.tensors):
                self.changed.add(info.name)
                return rounded(values, self._dtype(info), info.name)
        return rounded(np.asarray(stored, np.float32), self._dtype(info), info.name) if info.parts else stored

    def declared(self, info: TensorInfo) -> tuple[str, tuple[int, ...]]:
        return self._dtype(info), info.shape

    def _dtype(self, info: TensorInfo) -> str:
        if not info.parts:
            return info.dtype
        name = str(self.checkpoint.config.get("torch_dtype") or self.checkpoint.config.get("dtype") or "bfloat16")
        return {"float32": "F32", "float16": "F16"}.get(name.removeprefix("torch."), "BF16")

    def tables(self) -> Iterator[tuple[str, Array]]:
        """The tensors of tied tables that the adapter changes, or separates, by name."""
        if not self._tables:
            return
        names = resolve_names(self.plan.spec, self.checkpoint.tensors)
        shared = self.checkpoint.tensors[self.plan.tables["embed"]]
        made: dict[str, Array] = {}
        for kind, name in (("embed", names.embed), ("head", names.head)):
            values = np.array(self.checkpoint.read(shared.name), np.float32)
            _change_rows(_Change(0, len(values), 0, kind, self._tables.get(kind, ())), values, 0)
            made[name] = rounded(values, self._dtype(shared), name)
        self.untied = not np.array_equal(made[names.embed], made[names.head])
        for name, values in made.items():
            if self.untied or name in self.checkpoint.tensors:
                self.changed.add(name)
                yield name, values


# ---- rows of a weight in its tensors


def _change_tensor(
    decl: WeightDecl, name: str, values: Float32, changes: Sequence[_Change], infos: Mapping[str, TensorInfo]
) -> bool:
    """Apply ``changes`` of weight ``decl`` to the ``values`` of its tensor ``name``; whether some concern it."""
    if len(decl.shape) == 1:
        found = [_change_vector(decl, name, values.reshape(-1), change, infos) for change in changes]
        return any(found)
    changed = False
    for expert, first, rows, order in _matrices(decl, name, values, infos):
        for change in changes:
            lo, hi = max(change.lo, first), min(change.hi, first + len(rows))
            if change.expert != expert or lo >= hi:
                continue
            changed = True
            if order is None:
                _change_rows(change, rows[lo - first : hi - first], lo - change.lo)
                continue
            some = rows[order[lo - first : hi - first]]
            _change_rows(change, some, lo - change.lo)
            rows[order[lo - first : hi - first]] = some
    return changed


def _matrices(
    decl: WeightDecl, name: str, values: Float32, infos: Mapping[str, TensorInfo]
) -> Iterator[tuple[int, int, Float32, Array | None]]:
    """The parts of ``decl`` in tensor ``name``, as views of its ``values``: expert, number of the first row, rows, and
    the place of each row in them, where the tensor has rows in another order.
    """
    first = 0
    for part in decl.parts:
        if part.name == name:
            stored = values.T if part.transform == "transpose" else values
            if len(decl.shape) == 3:
                view = arranged(structs.replace(part, order=None), stored, decl.shape)
                for expert, lo, rows in expert_matrices(replace(decl, parts=(part,)), [view]):
                    yield expert, lo, np.asarray(rows), None
            else:
                order = None if part.order is None else part.order.sorted(np.arange(len(stored)))
                yield 0, first, stored, order
        first += infos[part.name].shape[part.transform == "transpose"]


def _change_vector(
    decl: WeightDecl, name: str, flat: Float32, change: _Change, infos: Mapping[str, TensorInfo]
) -> bool:
    """Apply a change of a norm or a bias; whether it concerns the tensor.

    Where the vector's entries are in the tensors is found by reading numbers in their place.
    """
    starts = np.cumsum([0, *(int(np.prod(infos[part.name].shape)) for part in decl.parts)])
    numbered: list[Any] = []
    for part, lo, hi in zip(decl.parts, starts, starts[1:], strict=False):
        numbers = np.arange(lo, hi).reshape(infos[part.name].shape)
        numbered.append(arranged(structs.replace(part, transform=_of_vector(part)), numbers, decl.shape))
    places = np.concatenate([np.asarray(one).reshape(-1) for one in joined(decl, numbered)])[change.lo : change.hi]
    changed = False
    for part, lo, hi in zip(decl.parts, starts, starts[1:], strict=False):
        own = (places >= lo) & (places < hi)
        if part.name != name or not own.any():
            continue
        at, changed = places[own] - lo, True
        for item in change.parts:
            if isinstance(item, Bias):
                flat[at] += _numbers(item.values)[own]
            elif isinstance(item, Replace):
                flat[at] = _numbers(item.weight).reshape(-1)[own] - np.float32(part.transform == "plus_one")
    return changed


def _of_vector(part: WeightPart) -> Any:
    return "alternating" if part.transform == "alternating" else "none"


def _change_rows(change: _Change, rows: Float32, first: int) -> None:
    """Apply a change to ``rows`` of a matrix, which are those from ``first`` on of the site's."""
    last = first + len(rows)
    table = change.kind == "embed"
    for part in change.parts:
        if isinstance(part, Replace):
            rows[:] = part.weight[first:last]
        elif isinstance(part, Rows):
            own = (part.ids >= first) & (part.ids < last)
            rows[part.ids[own] - first] = part.values[own]
    for part in change.parts:
        if isinstance(part, InputScale):
            rows *= _numbers(part.factor)
    for part in change.parts:
        if isinstance(part, LowRank):
            a, b = _numbers(part.a), _numbers(part.b)
            delta = (b @ a[:, first:last]).T if table else b[first:last] @ a
            rows += np.float32(part.scale) * delta
    for part in change.parts:
        if isinstance(part, ColumnScale):
            factor = _numbers(part.factor)
            rows *= factor if table else factor[first:last, None]
        elif isinstance(part, Bias) and table:
            rows += _numbers(part.values)


def _numbers(array: Array) -> Float32:
    return np.asarray(array, np.float32)


def rounded(values: Float32, dtype: str, name: str) -> Array:
    """``values`` in the dtype of that name. Raises ``AdapterError`` for what it cannot hold."""
    with np.errstate(over="ignore"):
        made = values.astype(DTYPES[dtype])
    if not np.isfinite(made.astype(np.float32)).all():
        raise AdapterError(f"{name} has values that {dtype} cannot hold once the adapter is in it.", param=name)
    return made


# ---- files


def _write(
    checkpoint: Checkpoint, output: Path, fold: _Fold, tables: Mapping[str, Array], progress: Progress | None
) -> int:
    """Write the tensors in files of the same names; returns their number."""
    total, done = sum(info.nbytes for info in checkpoint.tensors.values()), 0
    files: dict[Path, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        files.setdefault(info.file, []).append(name)
    home = next(iter(files))
    homeless = [name for name in tables if name not in checkpoint.tensors]
    weight_map: dict[str, str] = {}
    nbytes = 0
    for path, names in files.items():
        others = [] if any(info.parts for info in checkpoint.tensors.values()) else _unread(path, names)
        file = SafetensorsFile(path)
        declared: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in (*names, *others, *(homeless if path == home else ())):
            table = tables.get(name)
            if table is not None:
                declared[name] = _NAMES[table.dtype], table.shape
            else:
                declared[name] = fold.declared(checkpoint.tensors.get(name) or file.tensors[name])

        def arrays(listed: Sequence[str], file: SafetensorsFile) -> Iterator[Array]:
            nonlocal done
            for name in listed:
                info = checkpoint.tensors.get(name)
                yield tables[name] if name in tables else file.read(name) if info is None else fold.value(info)
                done += 0 if info is None else info.nbytes
                if progress is not None:
                    progress("writing", done, total)

        try:
            write_tensors(output / path.name, declared, arrays(list(declared), file), file.metadata or {"format": "pt"})
        finally:
            file.close()
        weight_map |= dict.fromkeys(declared, path.name)
        nbytes += sum(int(np.prod(shape)) * DTYPES[dtype].itemsize for dtype, shape in declared.values())
    if list(files) != [checkpoint.path / SINGLE] or (checkpoint.path / INDEX).is_file():
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        (output / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(weight_map)


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _unread(path: Path, read: Sequence[str]) -> list[str]:
    """The tensors of a file that the checkpoint does not show: of parts that are not served."""
    with closing(SafetensorsFile(path)) as file:
        return [name for name in file.tensors if name not in set(read)]


def _config(checkpoint: Checkpoint, *, untied: bool) -> dict[str, Any]:
    """``config.json`` of what is written."""
    config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    if any(info.parts for info in checkpoint.tensors.values()):
        config.pop("quantization_config", None)
        config.pop("compression_config", None)
    if untied:
        for level in (config, *(value for value in config.values() if isinstance(value, dict))):
            if level is config or FLAG in level:
                level[FLAG] = False
    return dict(config)


def _copy_other_files(base: Path, output: Path) -> None:
    """Copy what is beside the weights: tokenizer, templates, generation_config.json."""
    for path in sorted(base.iterdir()):
        if path.is_dir() and path.name in _COPIED_FOLDERS:
            shutil.copytree(path, output / path.name)
        elif path.is_file() and path.name != "config.json" and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(path, output / path.name)
