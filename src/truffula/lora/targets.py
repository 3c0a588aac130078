"""Which modules a configuration targets, by PEFT's rules (peft.tuners.tuners_utils.check_target_module_exists)."""

from __future__ import annotations

import re

from truffula.errors import AdapterError
from truffula.lora.fields import LoraSettings
from truffula.lora.patterns import compiled

# The first numbered segment, and there must be two names before it, as PEFT has it.
_FIRST_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\.")
_PLAIN = re.compile(r"[A-Za-z0-9_.]+\Z")


class Targets:
    """``targeted(module)`` for module paths without ``base_model.model.``.

    ``linear`` modules are those that ``all-linear`` means: every linear layer but the output head.
    """

    def __init__(self, settings: LoraSettings, linear: frozenset[str]) -> None:
        self._settings = settings
        self._linear = linear
        self._include: re.Pattern[str] | None = None
        self._exclude: re.Pattern[str] | None = None
        target = settings.target_modules
        self.all_linear = isinstance(target, str) and target.lower() == "all-linear"
        if isinstance(target, str) and not self.all_linear:
            self._include = compiled(target, "target_modules")
        if isinstance(settings.exclude_modules, str):
            self._exclude = compiled(settings.exclude_modules, "exclude_modules")
        for pattern in settings.layers_pattern:
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
        if self.all_linear:
            return module in self._linear
        entries = self._settings.target_modules or ()
        if module in entries:
            return True  # a full name is exempt from layers_to_transform
        return any(module.endswith(f".{entry}") for entry in entries) and self._in_layers(module)

    def unused_entries(self, modules: frozenset[str]) -> list[str]:
        """Entries of a target list that name none of ``modules``."""
        entries = self._settings.target_modules
        if not isinstance(entries, tuple):
            return []
        return [e for e in entries if not any(m == e or m.endswith(f".{e}") for m in modules)]

    def _excluded(self, module: str) -> bool:
        if self._exclude is not None:
            return self._exclude.fullmatch(module) is not None
        return any(module == entry or module.endswith(f".{entry}") for entry in self._settings.exclude_modules)

    def _in_layers(self, module: str) -> bool:
        layers = self._settings.layers_to_transform
        if layers is None or layers == ():
            return True
        layer = self._layer(module)
        return layer is not None and layer in ((layers,) if isinstance(layers, int) else layers)

    def _layer(self, module: str) -> int | None:
        if not self._settings.layers_pattern:
            found = _FIRST_INDEX.match(module)
            return int(found.group(1)) if found else None
        for pattern in self._settings.layers_pattern:
            found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if found:
                return int(found.group(1))
        return None
