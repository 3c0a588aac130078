"""A loader of real adapters for ``Rig``."""

from __future__ import annotations

from pathlib import Path

from rig import HandLoader

from truffula.lora.worker import LoadRequest, LoadResponse, Setup, load
from truffula.types import AdapterRef


class FolderLoader(HandLoader):
    """Loads real adapters, at once and in this process, by the loading worker's own code."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        super().__init__()
        self._setup = setup
        self._staging = folder

    def _result(self, ticket: int, ref: AdapterRef) -> LoadResponse:
        return load(LoadRequest(ticket=ticket, ref=ref), self._setup, [self._staging])
