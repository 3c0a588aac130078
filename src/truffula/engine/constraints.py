"""Grammars: which tokens a sequence may draw next, by llguidance. Knows token ids and their bytes, no text.

    GrammarCompiler   one per engine: the vocabulary, the compiled grammars, the threads that compile
    Matcher           one per sequence: its place in its grammar; advanced by ``Sequence.commit`` alone
    MaskWriter        writes the masks of a step in a thread, while the executable computes the forward pass

A matcher is advanced when a token is committed, and never back: a step that fails, is discarded or runs again has
changed nothing. llguidance is imported when the first grammar arrives, in a thread that compiles.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, cast

from truffula.errors import GrammarError, InvalidRequest, TruffulaError, is_rust_panic
from truffula.items import Grammar
from truffula.kernels.host import usable_cpus
from truffula.kernels.inputs import Uint32
from truffula.types import MAX_VOCABULARIES, Vocabulary

if TYPE_CHECKING:
    import llguidance

MAX_GRAMMARS = 128
"""Compiled grammars that are kept, the most recently used."""
COMPILE_THREADS = 2
MAX_LEXER_STATES = 20_000
"""Of one compiled grammar, at 1 to 2 KB each. All its requests share them; they are made as they are needed."""
MAX_ITEMS_IN_ROW = 1_000
"""Ways to continue an answer. The time of a token grows with their square where a grammar is ambiguous: 0.1 s here."""
SLOW_MASK_S = 0.01
"""After a step whose masks took longer than this, the masks of the next one are timed one by one."""
MAX_SLOW_S = 0.25
"""Processor seconds of slow masks after which a sequence ends: all others of its steps wait for them."""
_ALL = 0xFFFF_FFFF
_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'


def parser_limits() -> llguidance.LLParserLimits:
    """The limits of a grammar, for compiling it and for each mask: what is beyond them ends its request."""
    import llguidance

    return llguidance.LLParserLimits(
        max_items_in_row=MAX_ITEMS_IN_ROW, max_lexer_states=MAX_LEXER_STATES, verbose_errors=False
    )


def without_forcing(source: str) -> str:
    """``source`` with llguidance's forced tokens switched off.

    Where a grammar allows one text only, llguidance would tokenize that text and allow its first token only. That needs
    the model's tokenizer, which is text; so the model chooses how to spell it.
    """
    if not source.lstrip().startswith("{"):
        return source + _NO_FORCING
    value = json.loads(source)
    for part in value["grammars"]:
        lark = part.get("lark_grammar")
        if lark is None:
            lark = f"start: %json {json.dumps(part.pop('json_schema'))}"
        part["lark_grammar"] = lark + _NO_FORCING
    return json.dumps(value)


class _TokenBytes:
    """What ``LLTokenizer`` needs of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_ids: list[int], end_ids: list[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special_ids
        self.end_ids = end_ids
        self.eos_token_id = end_ids[0] if end_ids else None

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("no tokens are forced (without_forcing)")


class Matcher:
    """The place of one sequence in its grammar.

    ``eos_ids`` end a text for llguidance, ``stop_ids`` end this request. An id of either may be drawn when the grammar
    is satisfied and only then, except for an EOS id that the grammar itself names. While the grammar also allows other
    ids, EOS ids are not drawn under ``ignore_eos``, and no end id before ``min_tokens``.

    ``finished``: nothing may follow; ``stop_id`` is the end id that was drawn, if one was. ``error``: why the sequence
    cannot continue, ``too_slow`` when its masks took more than ``MAX_SLOW_S``. ``compiled`` is the grammar, at its
    beginning.
    """

    def __init__(
        self,
        compiled: llguidance.LLMatcher,
        eos_ids: frozenset[int],
        stop_ids: frozenset[int],
        *,
        ignore_eos: bool,
        min_tokens: int,
    ) -> None:
        self.compiled = compiled
        self.inner = compiled.deep_copy()
        self._eos_ids = eos_ids
        self._stop_ids = stop_ids - eos_ids
        self._ignore_eos = ignore_eos
        self._min_tokens = min_tokens
        self._count = 0
        self._slow_s = 0.0
        self.too_slow = False
        self.finished = False
        self.stop_id: int | None = None
        self.error: TruffulaError | None = None

    def advance(self, token: int) -> None:
        """Record the next token of the completion."""
        is_end = token in self._eos_ids or token in self._stop_ids
        ends = is_end and self.inner.is_accepting()
        self._count += 1
        if self.finished or not (ends or self.inner.consume_token(token)):
            self._fail(f"token {token} cannot follow")
        elif ends or self.inner.is_stopped():
            self.finished = True
            self.stop_id = token if is_end else None

    def write_timed(self, row: Uint32) -> bool:
        """Write the mask of the next token; returns whether that took long. Ends the sequence when it does so often."""
        began = time.thread_time()
        self.inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        took = time.thread_time() - began
        if took <= SLOW_MASK_S:
            return False
        self._slow_s += took
        if self._slow_s > MAX_SLOW_S:
            self.too_slow = True
            self._fail(
                f"the ids that may follow took {self._slow_s:.2f} s to find, while other requests waited; allow fewer "
                "ways to read the same text"
            )
        return True

    def finish_mask(self, row: Uint32) -> None:
        """Apply the rules for end ids to the mask that llguidance has written to ``row``."""
        accepting = self.inner.is_accepting()
        if self.inner.is_error() or (self.inner.is_stopped() and not accepting):
            self._fail("no token of the vocabulary can follow")
        elif self._stop_ids or (accepting and (self._ignore_eos or self._count < self._min_tokens)):
            self._mask_end_ids(row, accepting)
        if self.error is not None:
            row[:] = _ALL  # the step has to draw something; the sequence ends without it

    def _mask_end_ids(self, row: Uint32, accepting: bool) -> None:
        early = self._count < self._min_tokens
        _set_bits(row, self._stop_ids, allowed=accepting and not early)
        if accepting and (self._ignore_eos or early):
            _set_bits(row, self._eos_ids, allowed=False)
        if row.any():
            return
        if accepting:
            _set_bits(row, self._eos_ids | self._stop_ids, allowed=True)
        else:
            self._fail("only a stop id of the request could follow, and the grammar is not satisfied")

    def _fail(self, reason: str) -> None:
        found = self.inner.get_error().partition("\n")[0][:500]
        self.error = self.error or GrammarError(f"The answer cannot continue its grammar: {found or reason}.")


def _set_bits(row: Uint32, ids: frozenset[int], *, allowed: bool) -> None:
    for token in ids:
        word, bit = int(row[token // 32]), 1 << token % 32
        row[token // 32] = word | bit if allowed else word & ~bit


class _LazyTokenizer:
    """llguidance's index of a vocabulary, built by the first thread that needs it.

    Building it takes 0.1 s for 50,000 tokens and holds the GIL.
    """

    def __init__(self, tokens: _TokenBytes) -> None:
        self._tokens: _TokenBytes | None = tokens
        self._lock = threading.Lock()
        self._built: llguidance.LLTokenizer | None = None

    def get(self) -> llguidance.LLTokenizer:
        import llguidance

        with self._lock:
            if self._built is None:
                tokens = self._tokens
                assert tokens is not None
                wrapper = cast(llguidance.TokenizerWrapper, tokens)
                slices = llguidance.LLTokenizer.json_slices()
                self._built = llguidance.LLTokenizer(wrapper, eos_token=tokens.end_ids, slices=slices)
                self._tokens = None
            return self._built


_Compiled: TypeAlias = "tuple[llguidance.LLMatcher, frozenset[int]]"
"""A grammar at its beginning, and the end ids of its vocabulary."""


def _compile(tokenizer: _LazyTokenizer, eos_ids: frozenset[int], grammar: Grammar) -> _Compiled:
    with _library_errors("The grammar cannot be compiled"):
        import llguidance

        source = without_forcing(grammar.source)
        inner = llguidance.LLMatcher(tokenizer.get(), source, log_level=0, limits=parser_limits())
        inner.compute_bitmask()  # the copies share what this has computed
    if inner.is_error():
        raise GrammarError(f"The grammar cannot be compiled: {inner.get_error()[:500]}")
    return inner, eos_ids


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Raises ``GrammarError`` where llguidance raises or panics (a ``BaseException``) within the block."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_rust_panic(error):
            raise
        raise GrammarError(f"{what}: {type(error).__name__}: {str(error)[:500]}") from error


class GrammarCompiler:
    """Compiles grammars in threads and keeps the most recently used. Its methods are for the engine's thread.

    ``eos_ids`` are those of the model's configuration, besides which the vocabulary may name others.
    """

    def __init__(self, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._config_eos_ids = frozenset(eos_ids)
        self._vocabularies: dict[str, tuple[_LazyTokenizer, frozenset[int]]] = {}  # with its end ids
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()
        self._pending: dict[str, Future[_Compiled]] = {}
        self._too_slow: OrderedDict[str, TruffulaError] = OrderedDict()  # why a grammar is not served again
        self._threads: ThreadPoolExecutor | None = None

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the tokens that grammars of this vocabulary are compiled for. Of a key only the first call counts;
        adapters' that were set longest ago are dropped."""
        size = self._vocab_size
        if (known := self._vocabularies.get(vocabulary.key)) is not None:
            self._vocabularies[vocabulary.key] = self._vocabularies.pop(vocabulary.key, known)
            return
        eos_ids = frozenset(i for i in {*vocabulary.end_ids, *self._config_eos_ids} if 0 <= i < size)
        tokens = vocabulary.tokens[:size] + [b""] * (size - len(vocabulary.tokens))
        special = {i for i in vocabulary.special_ids if 0 <= i < size} | eos_ids
        made = _LazyTokenizer(_TokenBytes(tokens, sorted(special), sorted(eos_ids)))
        self._vocabularies[vocabulary.key] = made, eos_ids
        while len(self._vocabularies) > MAX_VOCABULARIES:
            del self._vocabularies[next(key for key in self._vocabularies if key)]

    def start(self, grammar: Grammar) -> bool:
        """Begin to compile ``grammar``; False when it is compiled already.

        Raises:
            InvalidRequest: No vocabulary was set, or the model has no end id.
            GrammarError: An earlier answer in this grammar was too slow.
        """
        if grammar.key in self._too_slow:
            raise self._too_slow[grammar.key]
        tokenizer, eos_ids = self._vocabularies.get(grammar.vocabulary, (None, frozenset()))
        if tokenizer is None:
            raise InvalidRequest("The engine has no vocabulary, which a grammar needs.", param="grammar")
        if not eos_ids:
            raise InvalidRequest("The model has no end-of-sequence token, which a grammar needs.", param="grammar")
        if grammar.key in self._compiled:
            return False
        if grammar.key not in self._pending:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(COMPILE_THREADS, "truffula-grammar")
            self._pending[grammar.key] = self._threads.submit(_compile, tokenizer, eos_ids, grammar)
        return True

    def is_compiling(self) -> bool:
        return bool(self._pending)

    def take_finished(self) -> Iterator[tuple[str, TruffulaError | None]]:
        """Each key whose compilation has ended, with the error of one that failed. ``matcher`` serves it until the
        next is taken.
        """
        for key in [key for key, future in self._pending.items() if future.done()]:
            future = self._pending.pop(key)
            error = future.exception()
            if error is None:
                self._compiled[key] = future.result()
                if len(self._compiled) > MAX_GRAMMARS:
                    self._compiled.popitem(last=False)
            elif not isinstance(error, TruffulaError):
                raise error
            yield key, error

    def matcher(self, grammar: Grammar, stop_ids: frozenset[int], *, ignore_eos: bool, min_tokens: int) -> Matcher:
        """A matcher at the beginning of ``grammar``, which is compiled."""
        self._compiled.move_to_end(grammar.key)
        return Matcher(*self._compiled[grammar.key], stop_ids, ignore_eos=ignore_eos, min_tokens=min_tokens)

    def drop_failed(self, grammar: Grammar, matcher: Matcher) -> None:
        """Compile ``grammar`` again for later requests if llguidance failed in ``matcher``; refuse it if it was slow.

        The matchers of a compiled grammar share its lexer: once that has ``MAX_LEXER_STATES``, all of them fail.
        """
        if matcher.too_slow and matcher.error is not None:
            self._too_slow[grammar.key] = matcher.error
            if len(self._too_slow) > MAX_GRAMMARS:
                self._too_slow.popitem(last=False)
        if matcher.inner.is_error() and self._compiled.get(grammar.key, (None,))[0] is matcher.compiled:
            del self._compiled[grammar.key]

    def close(self) -> None:
        """Wait for what is being compiled. Idempotent."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)


class MaskWriter:
    """Writes masks in a thread, one step's after another's."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._executor: llguidance.LLExecutor | None = None
        self._timed = False  # whether the masks of the next step are timed

    def begin(self, mask: Uint32, matchers: Sequence[Matcher]) -> Callable[[], None]:
        """Begin to write row i of ``mask`` for ``matchers[i]``; the result waits until all are written, or raises."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "truffula-masks")
        return self._thread.submit(self._write, mask, matchers).result

    def _write(self, mask: Uint32, matchers: Sequence[Matcher]) -> None:
        with _library_errors("The masks of a step cannot be computed"):
            if self._executor is None:
                import llguidance

                self._executor = llguidance.LLExecutor(usable_cpus())
            if self._timed:
                self._timed = sum(one.write_timed(mask[row]) for row, one in enumerate(matchers)) > 0
            else:
                began = time.monotonic()
                rows = [(matcher.inner, row) for row, matcher in enumerate(matchers)]
                self._executor.unsafe_compute_mask_ptr(rows, mask.ctypes.data, mask[0].nbytes, len(mask))
                self._timed = time.monotonic() - began > SLOW_MASK_S
            for row, matcher in enumerate(matchers):
                matcher.finish_mask(mask[row])

    def close(self) -> None:
        """Wait for the masks that are being written. Idempotent."""
        if self._thread is not None:
            self._thread.shutdown()
