"""``Service``: what a request means, before and behind the engine. No threads, no event loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from truffula.lora.sources import AdapterPolicy
from truffula.types import AdapterRef


@dataclass(frozen=True)
class ServiceLimits:
    """The operator's bounds on one request. ``base_names`` are the words that mean the base model."""

    max_choices: int = 128
    base_names: tuple[str, ...] = ()
    template_seconds: float = 2.0
    template_chars: int = 4_000_000


class Service:
    policy: AdapterPolicy

    def resolve_adapter(self, name: str | None, source: str | None = None) -> AdapterRef | None:
        raise NotImplementedError

    def open(self, request: object) -> Sequence[object]:
        raise NotImplementedError
