"""``TextSet``: what the texts of a request are made and read with: the base's, or an adapter's own."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from truffula.errors import AdapterLoadError, InvalidRequest, TruffulaError
from truffula.service.answers import AnswerFormats
from truffula.text.chat_template import ChatTemplates
from truffula.text.ends import EndTokens
from truffula.text.own_texts import Base, Examined, dropped, examined, find_source, load_own
from truffula.text.tokenizer import Tokenizer, digest_of
from truffula.types import AdapterRef, GenerateRequest, TextSource
from truffula.weights.text_files import ModelTexts
from truffula.weights.texts import read_texts

if TYPE_CHECKING:
    from truffula.service.core import Service

MAX_OWN = 4
"""Adapters' tokenizers that are kept, the last used."""
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


class _Folder(NamedTuple):
    """``digest`` of an adapter's text files, "" for the base's, in the state ``fingerprint``; ``changed``: there was
    another before."""

    fingerprint: str
    digest: str
    changed: bool


class TextSets:
    """The text sets of adapters in folders of this machine, by the state of their folders. Safe to use from several
    threads."""

    def __init__(self, core: Service, path: Path | None, digest: str, clock: Callable[[], float]) -> None:
        self._core, self._path, self._digest, self._clock = core, path, digest, clock
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], _Folder] = OrderedDict()  # by folder and root
        self._made: OrderedDict[str, TextSet] = OrderedDict()  # by checksum
        self._refused: OrderedDict[str, tuple[float, TruffulaError]] = OrderedDict()

    def known(self, adapter: AdapterRef | None) -> TextSet | None:
        """The text set of a request for ``adapter``; None where its files must be read first. Raises as ``find``."""
        sets = []
        for ref in parts_of(adapter):
            with self._lock:
                folder = self._known.get((ref.locator, ref.root))
            if ref.kind != "local":
                found: TextSet | None = self._core.base
            elif folder is None or folder.fingerprint != ref.fingerprint:
                return None
            else:
                found = self._found(ref, folder)
            if found is None:
                return None
            sets.append((ref.name, found))
        return self.common(sets)

    def find(self, ref: AdapterRef) -> TextSet | TextSource:
        """Reads the folder of an adapter: its text set, or the texts that are to be made (``make``).

        Raises ``AdapterError`` for files that cannot be used, ``AdapterLoadError`` for those that cannot be read,
        ``InvalidRequest`` for a generation that may have had others.
        """
        if ref.kind != "local":
            return self._core.base
        source = find_source(ref.locator, ref.root, self._digest)
        digest, place = "" if source is None else source.digest, (ref.locator, ref.root)
        with self._lock:
            before = self._known.pop(place, None)
            changed = before is not None and (before.changed or before.digest != digest)
            self._known[place] = folder = _Folder(ref.fingerprint, digest, changed)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return self._found(ref, folder) or TextSource(*place, digest)

    def _found(self, ref: AdapterRef, folder: _Folder) -> TextSet | None:
        """The text set of ``ref``; None where it is to be made. Raises why it was refused."""
        if ref.wanted and folder.changed:
            raise InvalidRequest(
                f"The tokenizer or the chat template in the folder of {ref.name!r} changed since the server started, "
                "and which of them a generation had is not known. Leave @sha: out.", param="model", adapter=ref.name,
            )  # fmt: skip
        if not folder.digest:
            return self._core.base
        with self._lock:
            until, error = self._refused.get(folder.digest, (0.0, None))
            if error is not None and self._clock() < until:
                raise TruffulaError.from_info(error.info())
            if (found := self._made.get(folder.digest)) is None:
                return None
            self._made.move_to_end(folder.digest)
        # Read from its own folder: another adapter's with equal files may have been removed.
        return replace(found, source=TextSource(ref.locator, ref.root, folder.digest))

    def make(self, source: TextSource, found: Examined | None = None) -> TextSet:
        """The text set of ``source``; ``found`` in a text worker, by default here. Raises as ``find``."""
        core = self._core
        base = core.base
        texts = ModelTexts({}, {}) if self._path is None else read_texts(self._path)
        if digest_of(texts.tokenizer) != self._digest:
            raise AdapterLoadError("The base's tokenizer was replaced; restart to read that of an adapter beside it.")
        tokenizer = base.tokenizer
        if found is None or not found.same_tokenizer:
            tokenizer = load_own(source, texts)
            ids = core.info.vocab_size + core.info.more_ids
            found = found or examined(
                tokenizer, Base(base.tokenizer, base.templates.sources, core.replaced_templates, ids)
            )
        made = core.text_set(base.tokenizer if found.same_tokenizer else tokenizer, found, source)
        with self._lock:
            self._made[source.digest] = made
            for digest in dropped([(key, bool(one.own_tokenizer)) for key, one in self._made.items()], MAX_OWN):
                self._made.pop(digest, None)
        return made

    def refuse(self, source: TextSource, error: TruffulaError) -> None:
        """Keep why ``source`` cannot be used."""
        with self._lock:
            self._refused[source.digest] = self._clock() + ERROR_KEPT_S, error
            while len(self._refused) > MAX_OWN:
                self._refused.popitem(last=False)

    def now(self, adapter: AdapterRef | None) -> TextSet:
        """The text set of a request for ``adapter``, in this process. Raises as ``find``."""
        if (known := self.known(adapter)) is not None:
            return known
        found = [(ref.name, self.find(ref)) for ref in parts_of(adapter)]
        return self.common([(name, one if isinstance(one, TextSet) else self.make(one)) for name, one in found])

    def common(self, sets: Sequence[tuple[str, TextSet]]) -> TextSet:
        """The text set of adapters that act together, with their names. Raises ``InvalidRequest`` unless it is one."""
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


def parts_of(adapter: AdapterRef | None) -> list[AdapterRef]:
    """The adapters of a request that have files."""
    if adapter is None:
        return []
    return [ref for part in adapter.parts for ref in parts_of(part.ref)] or [adapter]
