"""Changes of a case: anywhere in its trees, and behind that in the bytes. All of it decided by one random generator."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

from fuzz_formats import Deep, Gguf, Obj, Safetensors, render

NASTY = (
    -(2**63), -(2**31), -65536, -2, -1, 0, 1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 255, 256, 4096, 65535, 65536, 2**24,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1, 10**30,
    2**2001,
)  # fmt: skip
FLOATS = (0.0, -0.0, -1.0, 0.5, 1e-46, 1e-8, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "", "\0", "a\0b", "../x", "/etc/passwd", "..", "\ud800", "\ufeff", "é" * 40, "x" * 3000, "(a+)+$", "a{1,9999}",
    ".*", "[", "(?i)x", "model.safetensors", "lm_head.weight",
    "model.embed_tokens.weight", "__metadata__", "F32", "BF16",
    "I64", "llama", "gemma3", "linear", "yarn", "true", "CAUSAL_LM", "LORA", "\\", "base_model.model.",
)  # fmt: skip
BYTES = (b"", b"\xff\xfe", b"\xed\xa0\x80", b"a\0", b"\xf4\x90\x80\x80", b"x" * 300)


@dataclass
class Case:
    """``files`` by name as trees; ``edits`` of the bytes, in order: ``(file number, kind, place, value)``."""

    files: dict[str, Any]
    edits: list[tuple[int, str, int, Any]] = field(default_factory=list)

    def render(self) -> dict[str, bytes]:
        made = {name: render(tree) for name, tree in self.files.items()}
        raws = {name: item.raw for name, item in made.items()}
        names = sorted(raws)
        for number, kind, place, value in self.edits:
            if not names:
                break
            name = names[number % len(names)]
            raws[name] = _edited(raws[name], made[name].fields, kind, place, value)
        return raws


def _edited(raw: bytes, fields: list[tuple[int, int]], kind: str, place: int, value: Any) -> bytes:
    at = place % (len(raw) + 1)
    if kind == "field":
        if not fields:
            return raw
        at, size = fields[place % len(fields)]
        return raw[:at] + (value % (1 << 8 * size)).to_bytes(size, "little") + raw[at + size :]
    if kind == "cut":
        return raw[:at]
    if kind == "insert":
        return raw[:at] + value + raw[at:]
    return raw[:at] + value + raw[at + len(value) :]


def _places(tree: Any, found: list[tuple[Any, Any]]) -> None:
    """Every (container, key) of a tree."""
    if isinstance(tree, dict):
        items: Any = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
        if len(items) > 40:  # a vocabulary: as worth changing as any other list
            items = [*items[:3], *items[-3:]]
    else:
        return
    for key, value in items:
        found.append((tree, key))
        _places(value, found)


def _scalar(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return rng.choice([not value, None, 1, "true"])
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, value * 2, -value, float(value % 10**9), *rng.choices(NASTY, k=4)])
    if isinstance(value, float):
        return rng.choice(FLOATS)
    if isinstance(value, bytes):
        at = rng.randrange(len(value) + 1)
        some = bytes(rng.randrange(256) for _ in range(rng.choice([1, 2, 8])))
        return rng.choice([value[:at] + some + value[at + len(some) :], value[:at], value + some, *BYTES])
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice(
            [value[:at], value + rng.choice(TEXTS), value[:at] + "." + value[at:], *rng.choices(TEXTS, k=4)]
        )
    return rng.choice([0, 1, "", "x", True, 1.5, [], Obj()])


def _other_kind(rng: random.Random) -> Any:
    return rng.choice([None, True, 0, -1, 1.5, "x", [], [1], ["a", 2], Obj(), Obj([["a", 1]]), rng.choice(NASTY),
                       rng.choice(FLOATS),
                       Deep(rng.choice([5, 900, 5000, 100_000])), rng.choice(TEXTS)])  # fmt: skip


def _change_tree(files: dict[str, Any], rng: random.Random) -> None:
    places: list[tuple[Any, Any]] = []
    _places(files, places)
    container, key = rng.choice(places)
    value = container[key]
    inside = isinstance(container, list)
    top = container is files
    if isinstance(value, list) and rng.random() < 0.7:
        how = rng.choice(["copy", "drop", "swap", "move", "empty"])
        if value and all(type(item) is int for item in value) and rng.random() < 0.4:  # sizes: of nothing, and of much
            value[rng.randrange(len(value))] = rng.choice(NASTY)
            value[rng.randrange(len(value))] = 0
        elif not value or how == "empty":
            value[:] = []
        elif how == "copy":
            value.insert(rng.randrange(len(value) + 1), copy.deepcopy(rng.choice(value)))
        elif how == "drop":
            del value[rng.randrange(len(value))]
        else:
            a, b = rng.randrange(len(value)), rng.randrange(len(value))
            value[a], value[b] = (value[b], value[a]) if how == "swap" else (value[a], copy.deepcopy(value[a]))
    elif top and not isinstance(value, bytes):
        if rng.random() < 0.3:
            del files[key]
    elif isinstance(value, Safetensors | Gguf):
        pass
    elif isinstance(container, Gguf | Safetensors) and key in ("header", "pairs", "tensors", "data", "version"):
        container[key] = _scalar(value, rng) if isinstance(value, bytes) else value
        if key == "version":
            container[key] = rng.choice([1, 2, 3, 4, 3 << 24, 2**32 - 1])
    elif inside and rng.random() < 0.1:
        del container[key]
    elif isinstance(container, Obj) or rng.random() < 0.12:
        container[key] = _other_kind(rng) if not isinstance(container, Obj) else [rng.choice(TEXTS), _other_kind(rng)]
    else:
        container[key] = _scalar(value, rng)


def _edit(rng: random.Random) -> tuple[int, str, int, Any]:
    kind = rng.choice(["field"] * 5 + ["cut", "insert", "over"])
    value: Any = rng.choice(NASTY) if kind == "field" else rng.randbytes(rng.choice([1, 1, 2, 8]))
    return rng.randrange(64), kind, rng.randrange(1 << 20), value


def mutated(case: Case, rng: random.Random) -> Case:
    """A copy with one to six changes."""
    made = Case(copy.deepcopy(case.files), list(case.edits))
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 6])):
        if rng.random() < 0.75 and made.files:
            _change_tree(made.files, rng)
        elif len(made.edits) < 6:
            made.edits.append(_edit(rng))
    return made
