"""A model folder in Hugging Face's layout: config.json, safetensors in one file or in shards, tokenizer files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from truffula.errors import CheckpointError, some
from truffula.weights.checkpoint import Array, Checkpoint
from truffula.weights.safetensors import SafetensorsFile, as_array
from truffula.weights.text_files import generation_config, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Names of output heads. A head that is in the index and in no shard is allowed: a tied model may be saved with the
# index of the untied model it was made from. Any other such tensor is an error.
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|output)\.")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?!00000)(?P<total>\d{5})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class FolderCheckpoint(Checkpoint):
    """A ``Checkpoint`` over a folder. Opening reads only JSON and headers."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(_config_file(path), infinity=True)
        self.generation_config: dict[str, Any] = generation_config(path)
        warnings: list[str] = []
        found = _open_weights(path, warnings)
        if not found:
            raise CheckpointError(f"{path}: its safetensors files hold no tensor.", param=str(path))
        self.files = tuple(dict.fromkeys(file.file for file in found.values()))
        self.tensors = {name: file.tensors[name] for name, file in found.items()}
        self.warnings = tuple(warnings)

    def read(self, name: str) -> Array:
        return as_array(self.info(name), self.raw(name))


def _config_file(path: Path) -> Path:
    config = path / "config.json"
    if config.is_file():
        return config
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{path} holds an adapter, not a base model; serve it with --adapter.", param=str(path))
    gguf = sorted(file.name for file in path.glob("*.gguf"))
    hint = f" To serve the GGUF file, give its path: {path / gguf[0]}." if gguf else ""
    raise CheckpointError(f"{path} has no config.json, so it is not a model folder.{hint}", param=str(path))


def _open_weights(folder: Path, warnings: list[str]) -> dict[str, SafetensorsFile]:
    """The file of each tensor, by tensor name."""
    if (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            warnings.append(f"{folder} holds both {INDEX} and {SINGLE}; the shards named by the index are used.")
        return _open_index(folder, warnings)
    if (folder / SINGLE).is_file():
        return _with_unlisted([SafetensorsFile(folder / SINGLE)], {}, warnings)
    shards = _complete_shards(folder)
    if not shards:
        raise _no_weights(folder)
    warnings.append(f"{folder} has no {INDEX}; its {len(shards)} shards are complete and are read together.")
    return _with_unlisted([SafetensorsFile(path) for path in shards], {}, warnings)


def _open_index(folder: Path, warnings: list[str]) -> dict[str, SafetensorsFile]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensors to files.", param=str(index))
    wanted: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        wanted.setdefault(_safe_name(index, tensor, name), []).append(tensor)
    files = {name: _open_shard(folder, name, tensors) for name, tensors in sorted(wanted.items())}
    listed: dict[str, SafetensorsFile] = {}
    for tensor, name in weight_map.items():
        if tensor in files[name].tensors:
            listed[tensor] = files[name]
            continue
        others = [other for other, file in files.items() if tensor in file.tensors]
        if others or not _HEAD.search(tensor):
            where = f"; it is in {others[0]}, so the index is wrong" if others else ""
            raise CheckpointError(
                f"{index} says that {tensor} is in {name}, but it is not there{where}.", param=tensor, file=name
            )
        warnings.append(f"{index} places {tensor} in {name}, which does not hold it; it is treated as missing.")
    return _with_unlisted(files.values(), listed, warnings)


def _with_unlisted(
    files: Iterable[SafetensorsFile], listed: Mapping[str, SafetensorsFile], warnings: list[str]
) -> dict[str, SafetensorsFile]:
    """The file of each tensor of ``files``: where the index lists it, else the only one that holds it."""
    home = dict(listed)
    for file in files:
        name = file.path.name
        for tensor in file.tensors:
            if tensor not in home:
                home[tensor] = file
                if listed:
                    warnings.append(f"{tensor} is in {name} but not in {INDEX}.")
            elif home[tensor] is not file and tensor in listed:
                warnings.append(f"{tensor} is in {name} too; {home[tensor].path.name}, which the index names, is read.")
            elif home[tensor] is not file:
                raise CheckpointError(
                    f"{tensor} is in {home[tensor].path.name} and in {name}, and no {INDEX} says which is meant.",
                    param=tensor,
                )
    return home


def _safe_name(index: Path, tensor: str, name: Any) -> str:
    """``name`` if it is a safetensors file inside the folder. Raises ``CheckpointError`` otherwise."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f"{index}: {tensor} maps to {name!r}, which is not a file name.", param=tensor)
    pure = PurePosixPath(name.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or ":" in pure.parts[0]:
        raise CheckpointError(
            f"{index}: {tensor} maps to {name!r}, outside the folder; only files beside the index are read.",
            param=tensor,
        )
    if pure.suffix != ".safetensors":
        raise CheckpointError(f"{index}: {tensor} maps to {name!r}; only safetensors files are read.", param=tensor)
    return name


def _open_shard(folder: Path, name: str, tensors: list[str]) -> SafetensorsFile:
    if not (folder / name).is_file():
        raise CheckpointError(
            f"{folder / name} is missing: {INDEX} places {len(tensors)} tensors in it, the first {tensors[0]}.",
            param=str(folder / name),
        )
    return SafetensorsFile(folder / name)


def _complete_shards(folder: Path) -> list[Path]:
    """The shards of a folder without an index, in order; empty when there are none.

    Raises ``CheckpointError`` when they are not one complete set.
    """
    names = [file.name for file in sorted(folder.glob("*.safetensors")) if not _is_variant(file.name)]
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    if not shards:
        return []
    stem, total = shards[0]["stem"], int(shards[0]["total"])
    wanted = [f"{stem}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    found = [match[0] for match in shards]
    if found != wanted:
        missing = sorted(set(wanted) - set(found))
        others = sorted(set(found) - set(wanted))
        which = f"{some(missing)} missing" if missing else f"{some(others)} not of the set of {wanted[0]}"
        raise CheckpointError(
            f"{folder} has no {INDEX}, and its shards are no complete set: {which}.", param=str(folder)
        )
    return [folder / name for name in wanted]


def _is_variant(name: str) -> bool:
    """Whether ``name`` is a copy of the weights in the vendor's format or another precision; these are not read."""
    return name.startswith("consolidated") or bool(re.search(r"\.(fp16|fp32|bf16|non_ema|ema)[.-]", name))


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    others = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(_PICKLES) and name != "training_args.bin"]
    if pickles and not others:
        return CheckpointError(
            f"{folder} holds only {pickles[0]}: pickled weights can run code when loaded and are never read. "
            f"Convert them once, if you trust their source:\n  {conversion_command(folder)}",
            param=str(folder),
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return CheckpointError(f"{folder} holds no {SINGLE}; give the path of the file: {folder / gguf[0]}.")
    found = f" It holds {', '.join(others[:5])}; rename the one that is the whole model." if others else ""
    return CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}.{found}", param=str(folder))


def holds_weights(folder: Path) -> bool:
    """Whether a folder has any file of weights, in a format that is read or not."""
    kinds = (".safetensors", ".safetensors.index.json", ".gguf", *_PICKLES)
    return any(file.name.endswith(kinds) for file in folder.iterdir())


def conversion_command(folder: Path) -> str:
    """The shell command that turns a folder of pickled weights into one of safetensors beside it."""
    source, target = str(folder), f"{str(folder).rstrip('/')}-safetensors"
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"M.from_pretrained({source!r}, weights_only=True).save_pretrained({target!r}); "
        f"T.from_pretrained({source!r}).save_pretrained({target!r})"
    )
    return f"python -c {shlex.quote(code)}"
