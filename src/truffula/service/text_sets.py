"""``TextSet``: what the texts of a request are made and read with: the base's, or an adapter's own."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from truffula.errors import AdapterLoadError, InvalidRequest, TruffulaError
from truffula.service.answers import AnswerFormats
from truffula.text.chat_template import ChatTemplates
from truffula.text.ends import EndTokens
from truffula.text.own_texts import Base, Examined, examined, find_source, load_own
from truffula.text.tokenizer import Tokenizer, digest_of
from truffula.types import AdapterRef, GenerateRequest, TextSource
from truffula.weights.text_files import ModelTexts
from truffula.weights.texts import read_texts

if TYPE_CHECKING:
    from truffula.service.core import Service

MAX_OWN = 4
"""Adapters' texts that are kept, the last used."""
MAX_KNOWN = 1 << 14
ERROR_KEPT_S = 60.0
"""How long texts that were refused are refused again without reading them."""


@dataclass(frozen=True)
class TextSet:
    """``source`` is None of the base. ``own_tokenizer``: the checksum of the adapter's files where they make another
    tokenizer than the base's; "" otherwise."""

    tokenizer: Tokenizer | None
    templates: ChatTemplates
    answers: AnswerFormats
    ends: EndTokens
    source: TextSource | None = None
    own_tokenizer: str = ""

    def end_ids(self, request: GenerateRequest) -> frozenset[int]:
        """Ids that end a completion of ``request`` unless it ignores them."""
        if request.messages is None:
            return self.ends.ids
        turn_end = self.ends.turn_ends.get(self.templates.choose(request))
        return self.ends.ids if turn_end is None else self.ends.ids | {turn_end.id}


class TextSets:
    """The text sets of adapters in folders of this machine, by the state of their folders. Safe to use from several
    threads."""

    def __init__(self, core: Service, path: Path | None, digest: str, clock: Callable[[], float]) -> None:
        self._core, self._path, self._digest, self._clock = core, path, digest, clock
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str, str], str] = OrderedDict()  # folder and its state → checksum, or ""
        self._made: OrderedDict[str, TextSet] = OrderedDict()  # by checksum
        self._refused: OrderedDict[str, tuple[float, TruffulaError]] = OrderedDict()

    def known(self, adapter: AdapterRef | None) -> TextSet | None:
        """The text set of a request for ``adapter``; None where its files must be read first. Raises as ``find``."""
        sets = []
        for ref in _parts(adapter):
            with self._lock:
                digest = self._known.get(_state(ref)) if ref.kind == "local" else ""
            found = None if digest is None else self.made(digest)
            if found is None:
                return None
            sets.append((ref.name, found))
        return self._common(adapter, sets)

    def find(self, adapter: AdapterRef | None) -> list[TextSource]:
        """Reads the folders of ``adapter`` that are not known; the texts that are to be made (``make``).

        Raises ``AdapterError`` for files that cannot be used, ``AdapterLoadError`` for those that cannot be read.
        """
        missing = []
        for ref in _parts(adapter):
            if ref.kind != "local":
                continue
            source = find_source(ref.locator, ref.root, self._digest)
            digest = "" if source is None else source.digest
            with self._lock:
                self._known[_state(ref)] = digest
                while len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)
            if source is not None and self.made(digest) is None:
                missing.append(source)
        return missing

    def made(self, digest: str) -> TextSet | None:
        """The text set of a checksum; "" is the base's. Raises why it was refused."""
        if not digest:
            return self._core.base
        with self._lock:
            until, error = self._refused.get(digest, (0.0, None))
            if error is not None and self._clock() < until:
                raise TruffulaError.from_info(error.info())
            if (found := self._made.get(digest)) is not None:
                self._made.move_to_end(digest)
            return found

    def make(self, source: TextSource, found: Examined | None = None) -> TextSet:
        """The text set of ``source``; ``found`` in a text worker, by default here. Raises as ``find``."""
        core = self._core
        base = core.base
        texts = ModelTexts({}, {}) if self._path is None else read_texts(self._path)
        if digest_of(texts.tokenizer) != self._digest:
            raise AdapterLoadError("The base's tokenizer was replaced; restart to read that of an adapter beside it.")
        tokenizer = None
        if found is None or not found.same_tokenizer:
            tokenizer = load_own(source, texts)
            ids = core.info.vocab_size + core.info.more_ids
            how = Base(base.tokenizer, base.templates.sources, core.replaced_templates, ids)
            found = found or examined(tokenizer, source, how, texts)
        made = core.text_set(base.tokenizer if found.same_tokenizer else tokenizer, found, source)
        with self._lock:
            self._made[source.digest] = made
            while len(self._made) > MAX_OWN:
                self._made.popitem(last=False)
        return made

    def refuse(self, source: TextSource, error: TruffulaError) -> None:
        """Keep why ``source`` cannot be used."""
        with self._lock:
            self._refused[source.digest] = self._clock() + ERROR_KEPT_S, error
            while len(self._refused) > MAX_OWN:
                self._refused.popitem(last=False)

    def now(self, adapter: AdapterRef | None) -> TextSet:
        """The text set of a request for ``adapter``, in this process. Raises as ``find``."""
        if (found := self.known(adapter)) is not None:
            return found
        for source in self.find(adapter):
            self.make(source)
        return self.now(adapter)

    def _common(self, adapter: AdapterRef | None, sets: list[tuple[str, TextSet]]) -> TextSet:
        """The text set of adapters that act together, which must be one."""
        if not sets:
            return self._core.base
        (_, first), *others = sets
        for name, other in others:
            same = first.own_tokenizer == other.own_tokenizer and first.templates.sources == other.templates.sources
            if not same:
                raise InvalidRequest(
                    f"Adapters {sets[0][0]!r} and {name!r} have tokenizers or chat templates of their own, which "
                    "differ. Name one of them alone.", param="adapters", adapter=name,
                )  # fmt: skip
        return first


def _parts(adapter: AdapterRef | None) -> list[AdapterRef]:
    """The adapters of a request that have files."""
    if adapter is None:
        return []
    return [ref for part in adapter.parts for ref in _parts(part.ref)] or [adapter]


def _state(ref: AdapterRef) -> tuple[str, str, str]:
    return ref.locator, ref.root, ref.fingerprint
