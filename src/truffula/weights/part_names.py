"""The file names of a split GGUF model: ``NAME-00001-of-00003.gguf`` and so on."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf", re.ASCII)


@dataclass(frozen=True)
class PartName:
    """What the name of a part says. ``number`` counts from 1; ``stem`` may hold folders."""

    stem: str
    number: int
    total: int

    @classmethod
    def of(cls, name: str) -> PartName | None:
        """None where ``name`` is not a part's."""
        found = _PART.fullmatch(name)
        part = found and cls(found["stem"], int(found["number"]), int(found["total"]))
        return part if part and 1 <= part.number <= part.total else None

    def names(self) -> list[str]:
        """The names of all parts, in order."""
        return [f"{self.stem}-{i:05d}-of-{self.total:05d}.gguf" for i in range(1, self.total + 1)]
