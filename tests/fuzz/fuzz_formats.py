"""Files as trees that can be changed anywhere, right or wrong, and written out: JSON, safetensors, GGUF.

A case is a dict of file names to trees. ``render`` gives each file's bytes and where its counts, lengths, offsets and
types lie, so that they can be overwritten one by one.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any


class Obj(list):
    """A JSON object as a list of ``[key, value]``: keys may be there twice."""


class Safetensors(dict):
    """``header`` (an Obj), ``data`` (bytes)."""


class Gguf(dict):
    """``pairs`` of ``[key, type, value]``, ``tensors`` of ``[name, sizes, type, offset]``; version, align, data.

    Strings are bytes; the value of an array is ``[item type, items]``."""


class Deep(int):
    """So many nested lists."""


@dataclass
class Rendered:
    raw: bytes
    fields: list[tuple[int, int]] = field(default_factory=list)  # offset, bytes

    def number(self, layout: str, value: int) -> None:
        size = struct.calcsize(layout)
        self.fields.append((len(self.raw), size))
        self.raw += (int(value) % (1 << 8 * size)).to_bytes(size, "little")

    def string(self, text: Any) -> None:
        raw = text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogatepass")
        self.number("<Q", len(raw))
        self.raw += raw


def as_tree(value: Any) -> Any:
    """Plain JSON values with Obj for dicts."""
    if isinstance(value, dict):
        return Obj([key, as_tree(item)] for key, item in value.items())
    return [as_tree(item) for item in value] if isinstance(value, list | tuple) else value


def json_bytes(tree: Any) -> bytes:
    if isinstance(tree, Obj):
        pairs = [item for item in tree if isinstance(item, list) and len(item) == 2]
        return (
            b"{"
            + b",".join(json_bytes(k if isinstance(k, bytes) else str(k)) + b":" + json_bytes(v) for k, v in pairs)
            + b"}"
        )
    if isinstance(tree, Deep):
        return b"[" * tree + b"]" * tree
    if isinstance(tree, list | tuple):
        return b"[" + b",".join(map(json_bytes, tree)) + b"]"
    if isinstance(tree, bytes):
        return b'"' + tree.replace(b"\\", b"/").replace(b'"', b"'") + b'"'
    if isinstance(tree, int) and not isinstance(tree, bool) and abs(tree) >= 1 << 2000:
        return b"1" + b"0" * 5000  # more digits than Python converts
    return json.dumps(tree, ensure_ascii=isinstance(tree, str) and bool(tree) and tree[0] > "m").encode(
        "utf-8", "surrogatepass"
    )


def _data(tree: Any) -> bytes:
    data = tree.get("data")
    return data if isinstance(data, bytes) else b""


NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 7: "<B", 10: "<Q", 11: "<q"}


def _gguf_value(out: Rendered, kind: Any, value: Any) -> None:
    kind = kind if isinstance(kind, int) else 8
    if kind == 9 and isinstance(value, list) and len(value) == 2 and isinstance(value[1], list):
        out.number("<I", value[0] if isinstance(value[0], int) else 4)
        out.number("<Q", len(value[1]))
        for item in value[1]:
            _gguf_value(out, value[0], item)
    elif kind in NUMBERS and isinstance(value, int):
        out.number(NUMBERS[kind], value)
    elif kind in (6, 12):
        number = float(value) if isinstance(value, int | float) and abs(value) < 1e300 else float("inf")
        layout = "<f" if kind == 6 and abs(number) < 3e38 else "<f" if kind == 6 and number in (number, 0) else "<d"
        try:
            out.raw += struct.pack(layout, number)
        except (OverflowError, struct.error):
            out.raw += struct.pack("<I", 0x7F800000) if kind == 6 else struct.pack("<Q", 0x7FF0000000000000)
    elif isinstance(value, Obj | list | dict | type(None)):
        out.raw += b"\0" * 8
    else:
        out.string(value)


def render(tree: Any) -> Rendered:
    """The bytes of one file."""
    out = Rendered(b"")
    if isinstance(tree, Safetensors):
        header = json_bytes(tree["header"])
        header += b" " * (-len(header) % 8)
        out.number("<Q", len(header))
        out.raw += header + _data(tree)
    elif isinstance(tree, Gguf):
        out.raw += b"GGUF"
        out.number("<I", tree["version"])
        out.number("<Q", len(tree["tensors"]))
        out.number("<Q", len(tree["pairs"]))
        for key, kind, value in (pair for pair in tree["pairs"] if isinstance(pair, list) and len(pair) == 3):
            out.string(key)
            kind = kind if isinstance(kind, int) else 8
            out.number("<I", kind)
            _gguf_value(out, kind, value)
        for item in (item for item in tree["tensors"] if isinstance(item, list) and len(item) == 4):
            name, sizes, kind, offset = item
            sizes = [size for size in sizes if isinstance(size, int)] if isinstance(sizes, list) else []
            out.string(name)
            out.number("<I", len(sizes))
            for size in sizes:
                out.number("<Q", size)
            out.number("<I", kind if isinstance(kind, int) else 0)
            out.number("<Q", offset if isinstance(offset, int) else 0)
        align = tree["align"] if isinstance(tree["align"], int) and 0 < tree["align"] < 4096 else 32
        out.raw += bytes(-len(out.raw) % align) + _data(tree)
    elif isinstance(tree, bytes):
        out.raw = tree
    else:
        out.raw = json_bytes(tree)
    return out
