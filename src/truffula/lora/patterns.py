"""Regular expressions from untrusted files, matched by Python's ``re`` as PEFT does, under a limit of computing time.

An adapter's configuration holds patterns (``target_modules`` as a string, the keys of ``rank_pattern``), and a short
hostile one can keep a backtracking engine busy for ever. ``re`` handles signals while it matches, so a timer of CPU
time ends it with an error of that adapter.
"""

from __future__ import annotations

import contextlib
import re
import signal
import warnings
from collections.abc import Collection, Iterator, Mapping
from types import FrameType
from typing import Any

from truffula.errors import AdapterError

MAX_PATTERN_CHARS = 16_384
MATCHING_CPU_S = 5.0
"""Of one adapter's patterns together: a thousand modules times a thousand patterns take about one."""

_PLAIN = re.compile(r"[A-Za-z0-9_.\-]*\Z")


@contextlib.contextmanager
def matching_limit(cpu_s: float = MATCHING_CPU_S) -> Iterator[None]:
    """Raises ``AdapterError`` inside when compiling and matching take more than ``cpu_s`` seconds of computing.

    For the main thread of a process, which alone receives signals.
    """

    def expired(number: int, frame: FrameType | None) -> None:
        raise AdapterError(
            f"The patterns of adapter_config.json (target_modules, exclude_modules, rank_pattern, alpha_pattern) take "
            f"more than {cpu_s:g} seconds to match. Simplify them, or list the modules by name.",
            param="target_modules",
        )

    before = signal.signal(signal.SIGVTALRM, expired)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def compiled(source: str, field: str, before: str = "", after: str = "") -> re.Pattern[str]:
    """``source`` between ``before`` and ``after``, compiled.

    Raises:
        AdapterError: It is too long, or not a valid pattern; the error says where, and ``param`` is ``field``.
    """
    if len(source) > MAX_PATTERN_CHARS:
        raise _refused(source, field, f"{len(source)} characters; the limit is {MAX_PATTERN_CHARS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sets that a later Python may interpret differently
            return re.compile(before + source + after)
    except re.error as error:
        raise _refused(
            source, field, f"not a valid regular expression: {_where(source, len(before), error)}"
        ) from error
    except OverflowError as error:
        raise _refused(source, field, f"not a valid regular expression: {error}") from error
    except RecursionError as error:
        raise _refused(source, field, "nested too deeply") from error


def _refused(source: str, field: str, reason: str) -> AdapterError:
    shown = source if len(source) <= 80 else source[:77] + "..."
    return AdapterError(f"{field}: pattern {shown!r}: {reason}.", param=field, pattern=shown)


def _where(source: str, shift: int, error: re.error) -> str:
    """What is wrong in ``source`` and where; the engine saw ``shift`` more characters in front of it."""
    try:
        re.compile(source)
    except re.error as own:
        error, shift = own, 0  # its position is within ``source``
    at = min(max((error.pos or 0) - shift, 0), len(source))
    return f"{error.msg} at character {at + 1}, {source[at : at + 20]!r}" if source[at:] else f"{error.msg} at its end"


class Suffix:
    """A pattern of ``rank_pattern``/``alpha_pattern`` as PEFT reads it: ``re.match(r"(.*\\.)?(p)$", module)``."""

    def __init__(self, source: str, field: str) -> None:
        self.source = source
        self._pattern = compiled(source, field, r"(.*\.)?(", ")$")
        # Most patterns are plain names: comparing the module's end with their last part is faster.
        self._end = source.rpartition(".")[2] if _PLAIN.match(source) else ""

    def match(self, module: str) -> bool:
        return module.endswith(self._end) and self._pattern.match(module) is not None


class PatternTable:
    """``rank_pattern`` or ``alpha_pattern``: the first hit in file order wins.

    ``conflicts`` collects the modules that two patterns give different values: the file's order (sorted by PEFT when
    saving) then decides, and it need not be the order of training.
    """

    def __init__(self, entries: Mapping[str, Any], field: str) -> None:
        self._rows = [(Suffix(source, field), value) for source, value in entries.items()]
        self._used: set[str] = set()
        self.conflicts: list[tuple[str, str, str]] = []  # module, the pattern that won, the one that lost

    def value(self, module: str, default: Any) -> Any:
        """The value for ``module``, or ``default``."""
        hits = [(row.source, value) for row, value in self._rows if row.match(module)]
        if not hits:
            return default
        winner, chosen = hits[0]
        self._used.add(winner)
        for loser, value in hits[1:]:
            self._used.add(loser)
            if value != chosen:
                self.conflicts.append((module, winner, loser))
        return chosen

    def unused(self, others: Collection[str] = ()) -> list[str]:
        """Patterns that have hit no module so far, nor one of ``others``."""
        left = [row for row, _ in self._rows if row.source not in self._used]
        return [row.source for row in left if not any(row.match(module) for module in others)]
