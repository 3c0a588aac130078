"""The files of an adapter's tensors: one, or shards ``adapter_model-00001-of-0000N.safetensors`` that are read as one.

Shards may have an index (``adapter_model.safetensors.index.json``), which must agree with what they hold. A source that
cannot list its files, a URL, must have one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from truffula.errors import AdapterError
from truffula.lora.paths import TENSORS
from truffula.weights.text_files import parse_json

INDEX = f"{TENSORS}.index.json"
MAX_INDEX_BYTES = 64 << 20
MAX_SHARDS = 999
_SHARD = re.compile(r"adapter_model-(\d{1,6})-of-(\d{1,6})\.safetensors\Z")


def tensor_files(names: Collection[str]) -> list[str]:
    """The files of an adapter's tensors, of a folder with these ``names``, in order: the one file where there is one,
    as in PEFT. Empty where there is none, or shards are missing (``lacking``)."""
    return [TENSORS] if TENSORS in names else [] if lacking(names) else sorted(filter(_SHARD.match, names), key=_number)


def lacking(names: Collection[str]) -> str:
    """What is wrong with the shards among ``names``; "" where they are complete, or there are none."""
    shards = sorted(filter(_SHARD.match, names), key=_number)
    if not shards:
        return f"there are no shards beside {INDEX}" if INDEX in names else ""
    counts = {int(_SHARD.sub(r"\2", name)) for name in shards}
    count = max(counts)
    numbers = [_number(name) for name in shards]
    if len(counts) > 1 or len(set(numbers)) < len(numbers):
        return f"there are shards of several adapters: {shards[0]}, {shards[-1]}"
    if count > MAX_SHARDS:
        return f"{shards[0]} is one of {count} shards; the limit is {MAX_SHARDS}"
    missing = sorted({*range(1, count + 1)} - {*numbers})
    return f"of {count} shards {len(missing)} are missing, the first is number {missing[0]}" if missing else ""


def check_total(sizes: Iterable[int], most: int) -> None:
    """Raise ``AdapterError`` unless all files of tensors together have at most the bytes that one may have."""
    if (total := sum(sizes)) > most:
        raise AdapterError(
            f"Its shards have {total} bytes together; the limit is {most} (--max-adapter-file).", param=TENSORS
        )


def _number(name: str) -> int:
    return int(_SHARD.sub(r"\1", name))


def indexed_files(index: bytes) -> list[str]:
    """The shards that an index names, in order. Raises ``AdapterError``."""
    names = {*weight_map(index).values()}
    if (why := lacking(names)) or not (found := tensor_files(names)) or len(found) < len(names):
        stray = sorted(str(name)[:80] for name in names if not _SHARD.match(name))
        why = why or f"it names {stray[:3]}"
        raise AdapterError(
            f"{INDEX} does not name the shards of an adapter: {why}. Save the adapter again.", param=INDEX
        )
    return found


def weight_map(index: bytes) -> dict[str, str]:
    try:
        found = parse_json(index)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{INDEX} is not valid JSON: {error}.", param=INDEX) from error
    made = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(made, dict) or not made or not all(isinstance(name, str) for name in made.values()):
        raise AdapterError(f"{INDEX}: weight_map must map tensors to files.", param=INDEX)
    return made
