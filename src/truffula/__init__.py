"""truffula: one base language model and thousands of LoRA adapters, served in one batch.

>>> from truffula import LLM, SamplingParams           # doctest: +SKIP
>>> llm = LLM("smollm2", adapters={"pirate": "./pirate"})  # doctest: +SKIP

Importing this package is cheap: what is heavy is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "AdapterRef", "Constraint", "SamplingParams", "TruffulaError", "__version__"]

if TYPE_CHECKING:
    from truffula.errors import TruffulaError
    from truffula.items import Constraint
    from truffula.llm import LLM
    from truffula.params import SamplingParams
    from truffula.types import AdapterRef

_HOMES = {
    "LLM": "truffula.llm",
    "SamplingParams": "truffula.params",
    "AdapterRef": "truffula.types",
    "Constraint": "truffula.items",
    "TruffulaError": "truffula.errors",
}


def __getattr__(name: str) -> Any:
    import importlib

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'truffula' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
