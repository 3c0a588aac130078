"""``ParallelSpec``: parts that read the same input, such as attention and Mamba-2 in one layer (Falcon-H1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from truffula.kernels.program import Pointwise, Ref
from truffula.model.rows import LayerRows

if TYPE_CHECKING:
    from truffula.model.builder import LayerBuilder
    from truffula.model.spec import ModuleNames, Part


@dataclass(frozen=True)
class ScaledPart:
    """``part``, whose input is multiplied by ``before`` and whose result by ``after``."""

    part: Part
    before: float = 1.0
    after: float = 1.0


@dataclass(frozen=True)
class ParallelSpec:
    """The sum of the results of ``parts``, of which at most one caches. The layer norms their input, not their sum."""

    parts: tuple[ScaledPart, ...]

    @property
    def window(self) -> int | None:
        return next((each.part.window for each in self.parts if each.part.kv_widths), None)

    @property
    def kind(self) -> str:
        return " beside ".join(each.part.kind for each in self.parts)

    @property
    def kv_widths(self) -> tuple[int, ...]:
        return next((each.part.kv_widths for each in self.parts if each.part.kv_widths), ())

    def first_module(self, names: ModuleNames) -> str:
        return self.parts[0].part.first_module(names)

    def last_module(self, names: ModuleNames) -> str:
        return self.parts[-1].part.last_module(names)

    def rows(self, rows: LayerRows) -> None:
        for each in self.parts:
            each.part.rows(rows)

    def write(self, build: LayerBuilder, x: Ref) -> None:
        for each in self.parts:
            taken = x
            if each.before != 1.0:
                taken = build.buffer("scaled", x.width)
                build.append(Pointwise(name="scaled", kind="scale", x=x, out=taken, params=(each.before,)))
            each.part.write(replace(build, scale=build.scale * each.after, last=each is self.parts[-1]), taken)
