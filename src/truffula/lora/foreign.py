"""Messages for files that are not a complete PEFT adapter: what they seem to be and what to do. Reads names only."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from truffula.errors import AdapterError, did_you_mean, nearest
from truffula.lora.paths import CONFIG, PICKLE, TENSORS
from truffula.lora.shards import lacking, tensor_files

MLX = (
    "In MLX's format A and B are transposed and the scale is stored as such: lora_A = lora_a.T, lora_B = lora_b.T, "
    "lora_alpha = scale * rank. docs/adapters.md has a script that converts an MLX folder."
)
_PAIR_FILES = (CONFIG, TENSORS)
_ADAPTER_FILES = ("adapter_model", "adapters.safetensors")
_GGUF = (
    "LoRA adapters in GGUF are not served: give the PEFT folder that it was converted from, with "
    f"{CONFIG} and {TENSORS}."
)

# What wrappers add to a tensor's name → the wrapper, and how the adapter is saved without it.
_WRAPPERS = {
    r"\b_orig_mod\.": ("a wrapper of torch.compile", "model._orig_mod.save_pretrained(FOLDER)"),
    r"\bmodule\.": (
        "a wrapper of DistributedDataParallel, DataParallel or DeepSpeed",
        "model.module.save_pretrained(FOLDER)",
    ),
    r"\b_fsdp_wrapped_module\.": (
        "a wrapper of FSDP",
        "with a FULL_STATE_DICT, from accelerator.get_state_dict",
    ),
    r"\b_checkpoint_wrapped_module\.": (
        "a wrapper of activation checkpointing (checkpoint_wrapper)",
        "with the unwrapped model",
    ),
    r"\b_forward_module\.": ("a wrapper of Lightning Fabric", "fabric_model.module.save_pretrained(FOLDER)"),
    r"\bbase_model\.model\.(?=base_model\.model\.)": (
        "a PEFT model that was wrapped by PEFT twice",
        "get_peft_model once, on the plain model",
    ),
}
_ANY_WRAPPER = re.compile("|".join(_WRAPPERS))
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".7z", ".rar", ".gz")
_NUMBER = re.compile(r"\d+")


def _rewrite(tensors: str, module: str) -> str:
    """A shell command that writes the dict ``tensors`` as the adapter's file: a Python expression, which may use ``s``
    (safetensors.torch) and ``module``. It does not write to a file that it reads.
    """
    write = f"import {module}, safetensors.torch as s; s.save_file({tensors}, 'new.safetensors', {{'format': 'pt'}})"
    return f'python -c "{write}" && mv new.safetensors {TENSORS}'


def refuse_wrapped(keys: Sequence[str]) -> None:
    """Raises ``AdapterError`` when tensor names hold what a training wrapper adds, with the command that removes it."""
    paths = {key: key.partition(".lora_")[0] + "." for key in keys}
    if not _ANY_WRAPPER.search("\n".join(paths.values())):
        return
    found = [pattern for pattern in _WRAPPERS if any(re.search(pattern, path) for path in paths.values())]
    if not found:
        return
    pattern = "|".join(found)
    carrying = [key for key, path in paths.items() if re.search(pattern, path)]
    wrappers = " and ".join(_WRAPPERS[each][0] for each in found)
    ways = "; ".join(_WRAPPERS[each][1] for each in found)
    command = _rewrite(f"{{re.sub(r'{pattern}', '', k): v for k, v in s.load_file('{TENSORS}').items()}}", "re")
    raise AdapterError(
        f"{len(carrying)} of {len(keys)} tensor names were written from inside {wrappers} ({min(carrying)[:200]}). The "
        f"tensors are usable, but PEFT does not find them under these names either. Save the adapter again ({ways}), "
        f"or rename them, in the adapter's folder: {command}",
        param=min(carrying),
    )


def describe_folder(folder: Path) -> tuple[str, str] | None:
    """Why ``folder`` is not a complete PEFT adapter, and the name of the missing file; None when both files are there.

    Looks at names, and at those of its subfolders. Raises ``OSError`` when it can't be listed.
    """
    names = {path.name for path in folder.iterdir()}
    return None if _is_complete(names) else describe_names(names, subfolders_with_adapters(folder))


def subfolders_with_adapters(folder: Path) -> list[str]:
    """Names of the direct subfolders that hold the files of an adapter. Raises ``OSError``."""
    return [
        p.name
        for p in folder.iterdir()
        if (p / CONFIG).is_file() and ((p / TENSORS).is_file() or _is_complete({file.name for file in p.iterdir()}))
    ]


def _is_complete(names: Collection[str]) -> bool:
    return CONFIG in names and bool(tensor_files(names))


def describe_names(names: Collection[str], adapters_inside: Iterable[str] = ()) -> tuple[str, str] | None:
    """As ``describe_folder``, for a listing. ``adapters_inside`` are the subfolders that are adapters themselves."""
    if _is_complete(names):
        return None
    missing_file = TENSORS if CONFIG in names else CONFIG
    return _seems(names, latest_first(adapters_inside)) or _lacks(names), missing_file


def meant_as_adapter(folder: Path) -> bool:
    """Whether a folder was meant as an adapter, complete or not, or contains some. Raises ``OSError``."""
    named = any(path.name == CONFIG or path.name.startswith(_ADAPTER_FILES) for path in folder.iterdir())
    return named or bool(subfolders_with_adapters(folder))


def _seems(names: Collection[str], inside: list[str]) -> str | None:
    """What a folder that lacks one of the two files seems to be."""
    if "adapters.safetensors" in names:
        return f"This is an MLX adapter (adapters.safetensors); PEFT's format is served. {MLX}"
    if why := lacking(names):
        return f"There is no {TENSORS}, and {why}. Take all files from where the adapter comes from."
    if PICKLE in names:
        expression = f"{{k: v.contiguous() for k, v in torch.load('{PICKLE}', weights_only=True).items()}}"
        command = _rewrite(expression, "torch")
        return (
            f"There is only {PICKLE}, a pickle, which can run code when it is read. Convert it where you trust it: "
            f"load it with PEFT and save_pretrained, or in its folder: {command}"
        )
    if inside:
        what = "a trainer's output folder" if inside[0].startswith("checkpoint") else "a folder of adapters"
        return (
            f"The folder itself is not an adapter, but these subfolders are: {', '.join(inside[:6])}. It looks like "
            f"{what}. Give one of them, such as FOLDER/{inside[0]}, or FOLDER as --adapter-dir."
        )
    if pickles := sorted(name for name in names if name.endswith((".pt", ".pth", ".ckpt")) and "adapter" in name):
        return (
            f"There is no {TENSORS}, but {pickles[0]}, a pickle as torchtune writes it, which can run code when it is "
            "read. Save the adapter in PEFT's format: torchtune's FullModelHFCheckpointer with safe_serialization=True "
            f"writes {TENSORS} and {CONFIG}."
        )
    if gguf := sorted(name for name in names if name.endswith(".gguf")):
        return f"There is no {TENSORS}, but {gguf[0]}. {_GGUF}"
    weights = [n for n in names if n.startswith(("model", "pytorch_model")) and n.endswith((".safetensors", ".bin"))]
    if "config.json" in names or weights:
        what = "config.json" if "config.json" in names else weights[0]
        missing = CONFIG if CONFIG not in names else TENSORS
        return (
            f"There is no {missing}, but a {what}: this looks like a full model (an adapter merged into its base?), "
            "not an adapter. Serve it as a model: truffula serve FOLDER."
        )
    return None


def _lacks(names: Collection[str]) -> str:
    if TENSORS in names:
        what = f"There is {TENSORS} but no {CONFIG}, which defines the adapter's rank and scale"
    elif CONFIG in names:
        what = f"There is {CONFIG} but no {TENSORS} beside it: the adapter's weights are missing"
    else:
        what = f"There is no {CONFIG} in the folder" if names else "The folder is empty"
    return f"{what}. An adapter is a folder with {CONFIG} and {TENSORS}, as PEFT's save_pretrained writes them."


def describe_file(path: Path) -> str:
    """Why a file is not an adapter, and what to give instead."""
    name = path.name
    if name in _PAIR_FILES:
        folder = "the folder that holds it" if str(path.parent) in ("", ".") else str(path.parent)
        return f"{path} is a file of an adapter. Give its folder: {folder}."
    if name.endswith(".gguf"):
        return f"{path} is a GGUF file. {_GGUF}"
    what = "a file"
    if name.endswith(_ARCHIVES):
        what = "an archive. Unpack it"
    elif name.endswith(_PICKLES):
        what = "a pickle, which can run code when it is read; it is never read. Save the adapter as safetensors"
    return f"{path} is {what}. Give the adapter's folder, with {CONFIG} and {TENSORS}."


def close_path(path: Path) -> str:
    """`` Did you mean …?`` with a folder beside ``path`` of a similar name; empty when there is none."""
    try:
        beside = [near.name for near in path.parent.iterdir() if near.is_dir()]
    except OSError:
        return ""
    near = nearest(path.name, beside)
    return did_you_mean(near and path.parent / near)


def latest_first(names: Iterable[str]) -> list[str]:
    """checkpoint-20 before checkpoint-10; names without a number first, in their order."""
    numbered = [(int(found[0]) if (found := _NUMBER.search(name)) else 1 << 62, name) for name in names]
    return [name for _, name in sorted(numbered, key=lambda item: (-item[0], item[1]))]
