"""Which modules the names and regular expressions of a configuration mean, by PEFT's rules.

They are matched by Python's ``re`` as PEFT does (``peft.tuners.tuners_utils.check_target_module_exists``), under a
limit of computing time: the file is not trusted, and a short hostile pattern can keep a backtracking engine busy for
ever. ``re`` handles signals while it matches, so a timer of CPU time ends it with an error of that adapter.
"""

from __future__ import annotations

import contextlib
import math
import re
import signal
import warnings
from collections.abc import Collection, Iterator, Mapping
from types import FrameType
from typing import Any, Literal

import numpy as np

from truffula.errors import AdapterError
from truffula.lora.fields import LoraSettings

MAX_PATTERN_CHARS = 16_384
MATCHING_CPU_S = 5.0
"""Of one adapter's patterns together: a thousand modules times a thousand patterns take less than one."""

# The first numbered segment, and there must be two names before it, as PEFT has it.
_FIRST_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\.")
_PLAIN = re.compile(r"[A-Za-z0-9_.]+\Z")


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


def compiled(source: str, field: str, template: str = "{}") -> re.Pattern[str]:
    """``source`` compiled, within ``template``.

    Raises:
        AdapterError: It is too long, or not a valid pattern; the error says where, and ``param`` is ``field``.
    """
    try:
        if len(source) > MAX_PATTERN_CHARS:
            raise OverflowError(f"{len(source)} characters; the limit is {MAX_PATTERN_CHARS}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sets that a later Python may interpret differently
            re.compile(source)  # alone, so that the position in an error is within it
            return re.compile(template.format(source))
    except (re.error, OverflowError, RecursionError) as error:
        shown = source if len(source) <= 80 else source[:77] + "..."
        raise AdapterError(
            f"{field}: {shown!r} is not a valid regular expression: {error}.", param=field, pattern=shown
        ) from error


class PatternTable:
    """``rank_pattern`` or ``alpha_pattern``: the first hit in file order wins.

    ``conflicts`` collects the modules that two patterns give different values: the file's order (sorted by PEFT when
    saving) then decides, and it need not be the order of training.
    """

    def __init__(self, entries: Mapping[str, Any], field: str) -> None:
        self._entries = entries
        self._patterns = {source: compiled(source, field, r"(.*\.)?({})$") for source in entries}
        self._used: set[str] = set()
        self.conflicts: list[tuple[str, str, str]] = []  # module, the pattern that won, the one that lost

    def value(self, module: str, default: Any) -> Any:
        """The value for ``module``, or ``default``."""
        hits = [source for source, pattern in self._patterns.items() if pattern.match(module)]
        if not hits:
            return default
        self._used.update(hits)
        chosen = self._entries[hits[0]]
        self.conflicts += [(module, hits[0], loser) for loser in hits[1:] if self._entries[loser] != chosen]
        return chosen

    def unused(self, others: Collection[str] = ()) -> list[str]:
        """Patterns that have hit no module so far, nor one of ``others``."""
        left = [source for source in self._entries if source not in self._used]
        return [source for source in left if not any(self._patterns[source].match(module) for module in others)]


class Ranks:
    """The rank and the scale of a module by ``settings``: r and lora_alpha, or what the patterns say."""

    def __init__(self, settings: LoraSettings) -> None:
        self._settings = settings
        self.ranks = PatternTable(settings.rank_pattern or {}, "rank_pattern")
        self.alphas = PatternTable(settings.alpha_pattern or {}, "alpha_pattern")

    def of(self, module: str) -> tuple[int, float]:
        rank = self.ranks.value(module, self._settings.r)
        alpha = self.alphas.value(module, self._settings.lora_alpha)
        return rank, float(np.float32(alpha / (math.sqrt(rank) if self._settings.use_rslora else rank)))


class Targets:
    """``targeted(module)`` for module paths without ``base_model.model.``.

    ``linear`` modules are those that ``all-linear`` means: every linear layer but the output head.
    """

    def __init__(self, settings: LoraSettings, linear: frozenset[str]) -> None:
        self._settings = settings
        target, exclude = settings.target_modules, settings.exclude_modules
        self._linear = linear if isinstance(target, str) and target.lower() == "all-linear" else None
        self._include = compiled(target, "target_modules") if isinstance(target, str) and self._linear is None else None
        self._exclude = compiled(exclude, "exclude_modules") if isinstance(exclude, str) else None
        # What is saved whole has no LoRA.
        saved = settings.modules_to_save or ()
        self._saved = [compiled(entry, "modules_to_save", r"(^|.*\.){}($|\..*)") for entry in saved]
        given = settings.layers_pattern or []
        self._layer_lists = [given] if isinstance(given, str) else given
        for pattern in self._layer_lists:
            if not _PLAIN.match(pattern):
                raise AdapterError(
                    f"layers_pattern: {pattern[:60]!r} is not a plain name such as 'layers' or 'model.layers'.",
                    param="layers_pattern",
                )

    def targeted(self, module: str) -> bool:
        if self._excluded(module):
            return False
        if self._include is not None:
            return self._include.fullmatch(module) is not None
        if self._linear is not None:
            return module in self._linear
        entries = self._settings.target_modules or ()
        # A full name is exempt from layers_to_transform.
        return module in entries or (is_named(module, entries) and self._in_layers(module))

    def unused_entries(self, modules: frozenset[str]) -> list[str]:
        """Entries of a target list that name none of ``modules``."""
        entries = self._settings.target_modules
        if not isinstance(entries, list):
            return []
        return [entry for entry in entries if not any(is_named(module, (entry,)) for module in modules)]

    def _excluded(self, module: str) -> bool:
        if any(pattern.match(module) for pattern in self._saved):
            return True
        if self._exclude is not None:
            return self._exclude.fullmatch(module) is not None
        return is_named(module, self._settings.exclude_modules or ())

    def _in_layers(self, module: str) -> bool:
        layers = self._settings.layers_to_transform
        if layers is None or layers == []:
            return True
        patterns = [re.compile(rf"(?:^|.*?\.){name}\.(\d+)\.") for name in self._layer_lists]
        found = next((hit for pattern in patterns or [_FIRST_INDEX] if (hit := pattern.match(module))), None)
        return found is not None and int(found[1]) in ((layers,) if isinstance(layers, int) else layers)


def tied_tables(settings: LoraSettings) -> Literal["targets", "saved"] | None:
    """What ``ensure_weight_tying`` gives to the head, too, on a tied base: the pair of the embedding, or its saved
    weight. PEFT knows only these two names of tables."""
    names = ("embed_tokens", "lm_head")
    if not settings.ensure_weight_tying:
        return None
    if any(entry.rpartition(".")[2] in names for entry in settings.modules_to_save or ()):
        return "saved"
    target = settings.target_modules
    if isinstance(target, str):
        found = any(compiled(target, "target_modules").fullmatch(name) for name in names)
    else:
        found = any(entry.rpartition(".")[2] in names for entry in target or ())
    return "targets" if found else None


def is_named(module: str, entries: Collection[str]) -> bool:
    """Whether an entry of a list is ``module`` or the end of it, at a dot."""
    return any(module == entry or module.endswith(f".{entry}") for entry in entries)
