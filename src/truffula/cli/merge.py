"""``truffula merge`` and ``truffula fold``: several adapters into one, and one into its base."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from truffula.cli.output import note, out, progress, warn
from truffula.config import EngineConfig
from truffula.errors import ConfigError
from truffula.lora.compose import check_weight
from truffula.lora.folder import open_adapter
from truffula.lora.merging import MergePart, merge_adapters
from truffula.lora.sources import AdapterDirectory
from truffula.text.own_texts import text_files
from truffula.types import MergeMethod

LINEAR = "linear"


def run_merge(
    adapters: Sequence[str],
    weights: str | None,
    strategy: str,
    density: float | None,
    sign: str,
    rank: int | None,
    output: Path,
) -> None:
    """Merge ``adapters`` into a PEFT folder at ``output`` and print what it holds."""
    factors = _weights(weights, len(adapters))
    method = _method(strategy, density, sign, rank)
    with ExitStack() as stack:
        parts = [
            MergePart(name, stack.enter_context(open_adapter(adapter_folder(name))), factor)
            for name, factor in zip(adapters, factors, strict=True)
        ]
        merged = merge_adapters(parts, method, rank)
        for text in merged.warnings:
            warn(text)
        texts = _texts(adapters)
        with new_folder(output) as made:
            merged.write(made)
            for name, content in texts.items():
                (made / name).write_bytes(content)
    ranks = sorted(set(merged.ranks.values()))
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    out().print(f"{output}: {len(merged.ranks)} modules, {shown}, {merged.nbytes} bytes", highlight=False)


def _texts(adapters: Sequence[str]) -> Mapping[str, bytes]:
    """The tokenizer and the chat template of adapters in folders, which must have the same; those without any have
    their base's. Raises ``ConfigError``."""
    found = {name: text_files(name, "") for name in adapters if Path(name).is_dir()}
    texts = {name: files for name, files in found.items() if files}
    first = next(iter(texts), "")
    for name, files in texts.items():
        if wrong := sorted(one for one in {*files, *texts[first]} if files.get(one) != texts[first].get(one)):
            raise ConfigError(
                f"{first} and {name} have different files {', '.join(wrong)}: a merged adapter has one tokenizer and "
                "one chat template. Remove them from the folders of adapters that were trained with those of the base.",
                param="adapters",
            )
    if texts and len(texts) < len(adapters):
        warn(f"{', '.join(texts[first])} are those of {first}; other adapters have no such files.")
    return texts.get(first, {})


def run_fold(config: EngineConfig, adapter: str, output: Path, *, dequantize: bool) -> None:
    """Fold ``adapter`` into the model of ``config`` and write the model at ``output``."""
    from truffula.lora.folding import fold_adapter
    from truffula.weights.sources import resolve_source

    folder = adapter_folder(adapter)
    with progress() as report:
        base = resolve_source(
            config.model, cache_dir=config.cache_dir, offline=config.offline, revision=config.revision, progress=report
        )
        with new_folder(output) as made:
            folded = fold_adapter(base, folder, made, dequantize=dequantize, progress=report)
    for text in folded.warnings:
        warn(text)
    if texts := text_files(str(folder), ""):
        warn(f"The adapter's {', '.join(texts)} are not copied: the model has its own.")
    if folded.untied:
        note("The adapter changes only one of the tied embedding and head: they are separate tensors now.")
    out().print(f"{output}: {folded.changed} of {folded.tensors} tensors changed", highlight=False)


def adapter_folder(source: str) -> Path:
    """The folder of an adapter: a path, or a Hub id, which is downloaded.

    Raises ``ConfigError`` for what is neither, and as ``lora.hub.download``.
    """
    ref = AdapterDirectory().locate(source, source)
    if ref.kind == "local":
        return Path(ref.locator)
    if ref.kind != "hub":
        raise ConfigError(f"{source} is not on this machine; download the adapter first.", param="adapter")
    from truffula.cli.options import resolve
    from truffula.lora.hub import download
    from truffula.lora.worker import LoadLimits

    config = resolve({}, model=source).engine
    cache = None if config.cache_dir is None else str(config.cache_dir)
    most = LoadLimits().file_bytes
    return download(ref.locator, ref.revision, cache_dir=cache, offline=config.offline, max_file_bytes=most)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that becomes ``path`` when all of it is written. Raises ``ConfigError`` when there is one already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"--output {path} exists; name a new folder.", param="output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            yield made
            made.chmod(0o755)
            made.replace(path)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror or error}.", param="output") from error


def _weights(given: str | None, count: int) -> list[float]:
    if given is None:
        return [1.0] * count
    try:
        found = [float(text) for text in given.split(",")]
    except ValueError:
        raise ConfigError(f"--weights is {given!r}; give numbers separated by commas.", param="weights") from None
    if len(found) != count:
        raise ConfigError(f"--weights is {given!r}; {count} adapters need {count} numbers.", param="weights")
    for weight in found:
        check_weight(weight, "--weights")
    return found


def _method(strategy: str, density: float | None, sign: str, rank: int | None) -> MergeMethod | None:
    """None for a linear merge. Raises ``ConfigError`` for options that do not fit the strategy."""
    if strategy == LINEAR:
        if density is not None:
            raise ConfigError("--density has no effect on a linear merge; leave it out.", param="density")
        if rank is not None and rank < 1:
            raise ConfigError(f"--rank is {rank}; it must be at least 1.", param="rank")
        return None
    if rank is not None:
        raise ConfigError(f"--rank has no effect on {strategy}, which keeps the adapters' rank.", param="rank")
    if density is None:
        raise ConfigError(f"{strategy} needs --density, the share of values to keep.", param="density")
    try:
        return msgspec.convert({"strategy": strategy, "density": density, "sign": sign}, MergeMethod)
    except msgspec.ValidationError as error:
        raise ConfigError(f"The merge is invalid: {error}.", param="strategy") from error
