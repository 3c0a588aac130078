"""``Service``: requests in text to engine requests, engine events to deltas. No threads, no event loop, no I/O."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from truffula.errors import ErrorInfo, GrammarError, InvalidRequest, NoTokenizer, TemplateError, TruffulaError
from truffula.items import Grammar
from truffula.lora.sources import AdapterDirectory
from truffula.params import EngineParams, SamplingParams
from truffula.service.answers import AnswerFormats
from truffula.service.choices import ChoiceState, merged, rank
from truffula.service.files import LoadedTexts, texts_of, without_tokenizer
from truffula.service.prompts import Prompt, checked_ids, fitting, ids_of, make_prompt, need_tokenizer
from truffula.service.text_sets import TextSet, TextSets
from truffula.text.chat_template import ChatTemplates
from truffula.text.ends import EndTokens, Render
from truffula.text.own_texts import Examined
from truffula.text.tokenizer import Tokenizer, check_text
from truffula.types import (
    AdapterRef,
    ChoiceTotals,
    EngineInfo,
    EngineRequest,
    GenerateRequest,
    TextDelta,
    TextSource,
    TokenEvent,
)

logger = logging.getLogger(__name__)

CALL_SCORES = 4
"""The prompts of one call may have this many times ``max_prompt_scores`` together."""


@dataclass(frozen=True)
class ServiceLimits:
    """The operator's bounds on one request. ``base_names`` are the words that mean the base model.

    ``max_prompt_scores`` counts prompt tokens and their alternatives in one answer: a hundred bytes each as JSON.
    """

    max_choices: int = 128
    base_names: tuple[str, ...] = ()
    max_prompt_scores: int = 2**22


class RequestState:
    """One request between its engine sequences and its client. Push the events of ``engine_requests`` in any order.

    ``prompt_tokens`` counts what the engine gets. ``open_ids`` are engine requests that have not ended; ``take_aborts``
    those that ended early for the client (a stop string) and must be ended in the engine.
    """

    def __init__(
        self,
        request: GenerateRequest,
        request_id: str,
        engine_requests: list[EngineRequest],
        choices: list[ChoiceState],
        prompt_tokens: int,
        ignored: tuple[str, ...] = (),
    ) -> None:
        self.request = request
        self.ignored = ignored
        self.request_id = request_id
        self.engine_requests = engine_requests
        self.prompt_tokens = prompt_tokens
        self._choices = dict(zip((r.request_id for r in engine_requests), choices, strict=True))
        self.open_ids = set(self._choices)
        self.generations: dict[str, None] = {}  # of its adapters: what answers
        self._aborts: list[str] = []
        # best_of: nothing is known to be shown before all have ended.
        self._waiting: dict[str, list[TextDelta]] | None = {} if (request.params.best_of or 1) > 1 else None

    @property
    def done(self) -> bool:
        return not self.open_ids

    def take_aborts(self) -> list[str]:
        """Engine requests to abort since the last call."""
        aborts, self._aborts = self._aborts, []
        return aborts

    def push(self, event: TokenEvent) -> list[TextDelta]:
        """The deltas that ``event`` releases, often none. Exactly one per choice is terminal.

        An internal error ends every choice of this request, and no other request.
        """
        if event.request_id not in self.open_ids:
            return []
        try:
            return self._push(event)
        except Exception as error:
            logger.exception("request %s failed", self.request_id)
            return self._end_all(error)

    def fail(self, error: ErrorInfo) -> list[TextDelta]:
        """End every choice that is open with ``error``."""
        ends = [TokenEvent(request_id=i, finish_reason="error", error=error) for i in sorted(self.open_ids)]
        return [delta for event in ends for delta in self.push(event)]

    def _push(self, event: TokenEvent) -> list[TextDelta]:
        engine_id = event.request_id
        choice = self._choices[engine_id]
        if event.generations:
            self.generations[event.generations] = None
        if event.error is not None and event.error.code == GrammarError.code:
            event = msgspec.structs.replace(event, error=self._of_constraint(event.error))
        delta = choice.push(event)
        if choice.finished:
            self.open_ids.discard(engine_id)
            if event.finish_reason is None:
                self._aborts.append(engine_id)
        if delta is None:
            return []
        return [delta] if self._waiting is None else self._gather(engine_id, delta)

    def _of_constraint(self, error: ErrorInfo) -> ErrorInfo:
        """The engine's error about a grammar, with the field that the grammar was made of."""
        constraint = self.request.constraint
        param = "tools" if constraint is None else constraint.param
        return msgspec.structs.replace(error, message=f"{param}: {error.message}", param=param)

    def _end_all(self, error: Exception) -> list[TextDelta]:
        """End every choice after ``error``; what they held back is lost, and the engine is to abort."""
        info = TruffulaError(f"The answer could not be built: {type(error).__name__}: {error}.").info()
        places = [one.choice for one in self.engine_requests if one.request_id in self.open_ids]
        if self._waiting is not None:
            places = list(range(self.request.params.n))
        self._aborts += sorted(self.open_ids)
        self.open_ids.clear()
        totals = ChoiceTotals(prompt_tokens=self.prompt_tokens)
        return [TextDelta(choice=place, finish_reason="error", error=info, totals=totals) for place in places]

    def _gather(self, engine_id: str, delta: TextDelta) -> list[TextDelta]:
        assert self._waiting is not None
        self._waiting.setdefault(engine_id, []).append(delta)
        if self.open_ids:
            return []
        ended = [merged(self._waiting[engine_id], 0) for engine_id in self._choices]
        # Failed choices come first: no other is known to be the best while one of them failed.
        ended.sort(key=lambda one: (one.finish_reason not in ("error", "abort"), rank(one)))
        return [msgspec.structs.replace(one, choice=i) for i, one in enumerate(ended[: self.request.params.n])]


class Service:
    """Opens requests: tokenises, checks against the model's limits, expands ``n`` and ``best_of``. Thread-safe.

    Args:
        info: Of the started engine. ``self.info`` adds what the text files say, as ``EngineInfo`` describes.
        texts: The model's text files, where they were read already. Without a tokenizer ids still serve, text raises
            ``NoTokenizer``.
        directory: Which adapters clients may name.
        templates: Name → Jinja source, to use in place of the tokenizer's.
        render: Renders chats to find what a template writes after an answer, in place of this process.
        tool_format, reasoning_format: How the model writes tool calls and reasoning, where its template does not tell.
    """

    def __init__(
        self,
        info: EngineInfo,
        *,
        texts: LoadedTexts | None = None,
        directory: AdapterDirectory | None = None,
        limits: ServiceLimits | None = None,
        templates: Mapping[str, str] | None = None,
        render: Render | None = None,
        tool_format: str | None = None,
        reasoning_format: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        texts = texts_of(info, texts)
        tokenizer = texts.tokenizer
        self.generation_config = texts.generation_config
        self.directory = directory or AdapterDirectory()
        self.limits = limits or ServiceLimits()
        self._clock = clock
        self._numbers = itertools.count()
        self._random = random.SystemRandom()
        self.replaced_templates = templates is not None
        known = texts.chat_templates(templates)
        self._formats = {"tool_format": tool_format, "reasoning_format": reasoning_format}
        self._engine_ends, self._configured = frozenset(info.eos_token_ids), tuple(info.end_tokens)
        response = None if tokenizer is None or self.replaced_templates else tokenizer.response_template
        answers = AnswerFormats(known, tokenizer, response_template=response, **self._formats)
        ends = EndTokens(
            texts.end_tokens, info.end_tokens, tokenizer=tokenizer, templates=known, vocab_size=info.vocab_size,
            render=render,
        )  # fmt: skip
        self.base = TextSet(tokenizer, known, answers, ends)
        self._named_ends = texts.end_tokens
        self.info = self._described(info, texts)
        self.text_sets = TextSets(self, texts.path, texts.digest, clock)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The base's."""
        return self.base.tokenizer

    def text_set(self, tokenizer: Tokenizer | None, found: Examined, source: TextSource) -> TextSet:
        """The text set of an adapter, whose ``tokenizer`` may be the base's."""
        templates = ChatTemplates(found.templates, found.special_tokens)
        named = self._named_ends if found.same_tokenizer or tokenizer is None else tokenizer.end_tokens
        ends = EndTokens(
            named, self._configured, tokenizer=tokenizer, templates=templates,
            vocab_size=self.info.vocab_size + self.info.more_ids, turn_ends=found.turn_ends,
        )  # fmt: skip
        for warning in found.warnings:
            logger.warning("the adapter in %s: %s", source.folder, warning)
        answers = AnswerFormats(templates, tokenizer, response_template=found.response_template, **self._formats)
        return TextSet(tokenizer, templates, answers, ends, source, "" if found.same_tokenizer else source.digest)

    def _described(self, info: EngineInfo, texts: LoadedTexts) -> EngineInfo:
        """``info`` with what the text files say. What they warn of is logged; a library may well serve ids alone, so
        that there is no tokenizer is logged by the server.
        """
        ends = self.base.ends
        warnings = [*texts.warnings, *ends.warnings]
        if self.tokenizer is not None and self.tokenizer.vocab_size > info.vocab_size:
            warnings.append(
                f"The tokenizer has {self.tokenizer.vocab_size} tokens, the model {info.vocab_size} ids: a prompt with "
                f"a token from {info.vocab_size} on is refused."
            )
        for warning in warnings:
            logger.warning("%s", warning)
        return msgspec.structs.replace(
            info,
            eos_token_ids=[token.id for token in ends.always],
            end_tokens=ends.all,
            warnings=[*info.warnings, *without_tokenizer(texts.no_tokenizer), *warnings],
            no_tokenizer=texts.no_tokenizer,
        )

    def has_chat_template(self, adapter: AdapterRef | None = None) -> bool:
        """Whether messages can be rendered without a template of the request. Raises as ``TextSets.find``."""
        texts = self.text_sets.now(adapter)
        return texts.tokenizer is not None and bool(texts.templates)

    def resolve_adapter(
        self, name: str | None, source: str | None = None, token: str | None = None
    ) -> AdapterRef | None:
        """The adapter ``name``; None is the base (None, "" and ``limits.base_names``). Raises ``AdapterNotFound``."""
        return self.directory.resolve(name, source, self.limits.base_names, token)

    def is_plain(self, request: GenerateRequest) -> bool:
        """Whether the prompt of ``request`` is made without a template, or by one that needs no limits."""
        if request.messages is None:
            return True
        try:
            return self.base.templates.is_plain(self.base.templates.choose(request))
        except TemplateError:
            return True  # rendering raises it again

    def prompt(self, request: GenerateRequest, texts: TextSet) -> Prompt:
        """Template, tokenize and truncate. Raises as ``make_prompt``."""
        return make_prompt(request, texts.tokenizer, texts.templates, self.info)

    def open(self, request: GenerateRequest, grammar: Grammar | None = None) -> RequestState:
        """The state of a new request; its ``engine_requests`` are to be submitted. ``grammar`` is that of its
        ``constraint``.

        Raises ``InvalidRequest``, ``PromptTooLong``, ``TemplateError``, ``NoTokenizer``.
        """
        texts = self.text_sets.now(request.adapter)
        self.check(request, texts)
        return self.begin(request, self.prompt(request, texts), texts, grammar)

    def check(self, request: GenerateRequest, texts: TextSet) -> None:
        """Raise ``InvalidRequest`` for parameters that no prompt makes valid."""
        params = request.params
        count = max(params.n, params.best_of or 1)
        if count > self.limits.max_choices:
            name = "best_of" if (params.best_of or 1) > params.n else "n"
            raise InvalidRequest(f"{name} is {count}; the limit is {self.limits.max_choices}.", param=name)
        if params.stop:
            need_tokenizer(texts.tokenizer, self.info)
        constraint = request.constraint
        if constraint is not None and texts.tokenizer is None:
            raise NoTokenizer(
                f"{constraint.param} constrains the answer's text, and this model has no tokenizer; leave it out.",
                param=constraint.param,
            )
        if constraint is not None:
            check_text(constraint.value, constraint.param)
        for stop in params.stop:
            check_text(stop, "stop")
        checked_ids(params.stop_token_ids, "stop_token_ids", ids_of(request, self.info))
        checked_ids(list(params.logit_bias), "logit_bias", ids_of(request, self.info))

    def begin(
        self, request: GenerateRequest, prompt: Prompt, texts: TextSet, grammar: Grammar | None = None
    ) -> RequestState:
        """As ``open``, of a request that was checked and whose ``prompt`` was made."""
        assert grammar is not None or request.constraint is None
        params = fitting(request, len(prompt.ids), self.info)
        count = max(params.n, params.best_of or 1)
        end_ids = texts.end_ids(request)
        engine_params = self._engine_params(params, end_ids)
        now = self._clock()
        request_id = request.request_id or f"{self._random.getrandbits(64):016x}"
        # A client's id need not be unique, an engine's must be.
        stem = f"{request_id}-{next(self._numbers)}"
        engine_requests = [
            EngineRequest(
                request_id=f"{stem}.{choice}",
                prompt_ids=prompt.ids,
                params=engine_params,
                choice=choice,
                adapter=request.adapter,
                grammar=grammar,
                salt=request.salt,
                tenant=request.tenant,
                weight=request.weight,
                arrival=now,
                queue_deadline=None if request.queue_timeout_s is None else now + request.queue_timeout_s,
                deadline=None if request.deadline_s is None else now + request.deadline_s,
            )
            for choice in range(count)
        ]
        echoed = prompt if prompt.pieces is not None else None
        choices = [
            ChoiceState(
                one, params, texts.tokenizer, end_ids, echoed, self._clock, texts.answers.parser(request, prompt.tail)
            )
            for one in engine_requests
        ]
        ignored = prompt.ignored + texts.answers.ignored(request)
        state = RequestState(request, request_id, engine_requests, choices, len(prompt.ids), ignored)
        self._check_scores([state], self.limits.max_prompt_scores)
        return state

    def check_scores_of_call(self, states: Sequence[RequestState]) -> None:
        """Raise ``InvalidRequest`` when the prompts of one call have too many scores together."""
        self._check_scores(states, self.limits.max_prompt_scores * CALL_SCORES)

    def _check_scores(self, states: Sequence[RequestState], limit: int) -> None:
        asked = sum(
            state.prompt_tokens * len(state.engine_requests) * (scores + 1)
            for state in states
            if (scores := state.request.params.prompt_logprobs) is not None
        )
        if asked > limit:
            raise InvalidRequest(
                f"prompt_logprobs asks for {asked} scores of prompt tokens and their alternatives, in all choices; the "
                f"limit is {limit}. Ask for fewer alternatives, or send fewer or shorter prompts.",
                param="prompt_logprobs",
                scores=asked,
                max_scores=limit,
            )

    def _engine_params(self, params: SamplingParams, end_ids: frozenset[int]) -> EngineParams:
        """The engine's part: a seed, the end tokens that it does not know, and logprobs to find the best choice."""
        seed = params.seed
        if seed is None:
            seed = 0 if params.greedy else self._random.getrandbits(63)
        logprobs = 0 if params.logprobs is None and (params.best_of or 1) > 1 else params.logprobs
        ends = params.stop_token_ids
        if not params.ignore_eos:
            ends += tuple(sorted(end_ids - self._engine_ends - set(ends)))
        return params.for_engine(seed=seed, logprobs=logprobs, stop_token_ids=ends)
