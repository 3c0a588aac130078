"""The types that layers and processes exchange. The engine's types hold token ids only, the service's hold text.

All are frozen, and those that other processes get are msgspec-encodable, so both transports use the same objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec

from truffula.errors import ErrorInfo, InvalidRequest
from truffula.items import Constraint, Grammar, Item, Message, Part, Text, Tool, ToolChoice
from truffula.params import EngineParams, SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]
Progress = Callable[[str, int, int | None], None]
"""A callback (stage, done, total or None) for the progress of a start, in bytes while downloading and loading."""


MAX_ADAPTERS = 8
"""Adapters that may act together in one request, or be merged into one."""


class Credential(msgspec.Struct, frozen=True):
    """A client's own token for the source of an adapter. ``id`` is a salted digest of it, which identifies the right
    that it proves; ``token`` is sent to the source and nowhere else. Its repr shows neither.
    """

    id: str
    token: str

    def __repr__(self) -> str:
        return "Credential(...)"


AdapterKind = Literal["local", "hub", "s3", "gcs", "azure", "http", "composed", "merged"]


class AdapterRef(msgspec.Struct, frozen=True, kw_only=True):
    """The adapter of a request, after the check that the client may use it.

    ``name`` is the name in the request, for logs and metrics. ``kind`` and ``locator`` are its location (an absolute
    folder for ``local``, a repository id for ``hub``, the URL of a folder for the others). ``fingerprint`` identifies
    the state of the location without reading the files (sizes and mtimes, or the period in which it is checked once):
    when it changes, the pool loads or checks it again. Identity in the engine is the content hash found on loading (the
    generation), never the name. ``root``: what contains ``locator`` (a parent folder, or a pattern of URLs); neither a
    link nor a redirect may lead outside of it when the files are read. "" when the operator configured the adapter's
    folder itself. ``untrained``: its tensors may all be zero, as those of a trainer's first version are.
    ``wanted``: the generation that it must have, or the first digits of it; "" for the present one.
    ``credential``: the client's own, by which the source is read instead of the operator's.

    ``composed``: ``parts`` act together, each by its weight; the engine loads them one by one. ``merged``: a loading
    worker makes one adapter of ``parts`` by ``merge``. ``lora/compose.py`` makes both; ``locator`` describes them.
    """

    name: str
    kind: AdapterKind = "local"
    locator: str
    revision: str | None = None
    fingerprint: str = ""
    root: str = ""
    untrained: bool = False
    wanted: str = ""
    credential: Credential | None = None
    parts: tuple[WeightedAdapter, ...] = ()
    merge: MergeMethod | None = None

    @property
    def acting(self) -> tuple[WeightedAdapter, ...]:
        """The adapters that the engine loads for it, and their weights."""
        return self.parts if self.kind == "composed" else (WeightedAdapter(self),)

    @property
    def rights(self) -> tuple[str, ...]:
        """The ids of the clients' credentials by which it and its parts are read."""
        own = set() if self.credential is None else {self.credential.id}
        return tuple(sorted(own.union(*(part.ref.rights for part in self.parts))))

    @property
    def private(self) -> bool:
        """Whether a client's own right or request made it, so that other clients do not learn of it."""
        return self.kind == "merged" or bool(self.rights)

    @property
    def label(self) -> str:
        """Its name in metrics: of several adapters their names without weights, so that there are few."""
        return "+".join(sorted({part.ref.name for part in self.parts})) or self.name


class TextSource(msgspec.Struct, frozen=True):
    """The text files of an adapter's ``folder``, by their checksum; links may not lead out of ``root``, if given."""

    folder: str
    root: str
    digest: str


class WeightedAdapter(msgspec.Struct, frozen=True):
    """One of several adapters; its change of the base counts ``weight`` times."""

    ref: AdapterRef
    weight: float = 1.0


MergeStrategy = Literal["ties", "dare_linear", "dare_ties", "magnitude_prune"]
MergeSign = Literal["total", "frequency"]


class MergeMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How A and B of several adapters become those of one, by the definitions of peft's ``add_weighted_adapter``.

    ``density`` is the share of values that are kept; ``sign`` how ties elects the sign of a value.
    """

    strategy: MergeStrategy
    density: Annotated[float, msgspec.Meta(gt=0, le=1)]
    sign: MergeSign = "total"


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate, as token ids. ``n = 3`` is three of these with ``choice`` 0, 1, 2.

    ``params.seed`` is resolved. ``resume_ids`` are completion tokens that the client already has (after a crash):
    generation continues after them and they are not emitted again. With ``grammar`` no token is drawn that it forbids;
    ``EngineClient.set_vocabulary`` comes before the first such request. Times are of ``time.monotonic()``, which all
    processes of a machine share. ``salt`` separates tenants in the prefix cache.
    ``tenant`` is whose turn it takes, ``weight`` that tenant's share beside others'; with 0 it takes what others leave.
    """

    request_id: str
    prompt_ids: list[int]
    params: EngineParams
    choice: int = 0
    adapter: AdapterRef | None = None
    resume_ids: list[int] = []
    grammar: Grammar | None = None
    salt: str = ""
    tenant: str = ""
    weight: float = 1.0
    arrival: float = 0.0
    queue_deadline: float | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name in ("request_id", "salt", "tenant"):  # these cross to the engine's process as UTF-8
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError:
                raise InvalidRequest(
                    f"{name} contains a lone surrogate, which is half of a UTF-16 pair and not text.", param=name
                ) from None


MAX_VOCABULARIES = 16
"""Of adapters and the model together, that an engine keeps for grammars."""


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of a model as bytes, by id, for grammars (``Tokenizer.vocabulary``).

    An id without a token has b"". Of ``special_ids`` (control tokens) no text consists: a grammar has to name them.
    ``end_ids`` end a completion. ``key`` identifies that of an adapter; "" is the model's.
    """

    tokens: list[bytes]
    special_ids: list[int]
    end_ids: list[int]
    key: str = ""


class RequestTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. ``queue_s`` from arrival to admission (``load_s`` of it waiting for the adapter), ``ttft_s`` to the
    first token.
    """

    queue_s: float = 0.0
    load_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The output of one step for one sequence, the only output of the engine. Exactly one event per request has a
    ``finish_reason``.

    ``logprobs`` and ``top_logprobs`` have one entry per token when requested, else are empty; a top list holds
    ``(id, logprob)`` best first and does not repeat the chosen id unless it is among the k best. ``prompt_logprobs``
    comes once, with the first event: one entry per prompt token, the first None, else ``(logprob, top list)``.
    ``vector`` comes with the final event of a model whose output is a vector per sequence. ``generations`` of its
    adapters, joined by +, come with ``times``.
    On ``stop`` by a stop id or EOS the id is the last of ``token_ids`` and is ``stop_reason``. On ``error``, ``error``
    is the error.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[float] = []
    top_logprobs: list[list[tuple[int, float]]] = []
    prompt_logprobs: list[tuple[float, list[tuple[int, float]]] | None] | None = None
    vector: list[float] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: ErrorInfo | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    times: RequestTimes | None = None
    generations: str = ""


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request in text, made by every API dialect, the command line and ``LLM``.

    Exactly one of ``prompt`` (text, or token ids taken as they are) and ``messages`` (the model's chat template makes
    the text). ``tools``, ``documents`` and ``template_kwargs`` go to the template; ``chat_template``
    replaces the model's; ``reasoning_effort`` becomes the variable of that name, and those that switch reasoning on
    or off. With ``parse_output`` tool calls and reasoning in the answer become parts of their own; with ``parse_whole``
    they are known at its end only, and a call that is cut or malformed is text from its beginning.
    ``thinking_budget`` ends the reasoning after that many tokens. ``constraint`` is what the answer's text must match.
    With a ``suffix`` the completion is the text between ``prompt`` and it. With ``clip_max_tokens``,
    ``params.max_tokens`` may be more than the model's length leaves to the answer. ``add_special_tokens`` None adds
    what the tokenizer adds (BOS) to a text prompt and nothing to a rendered chat. ``truncate`` n keeps the last n
    prompt tokens. ``echo`` returns the prompt's text on the first delta of each choice, ``return_prompt_tokens`` its
    token pieces as well (``params.prompt_logprobs`` implies that).
    ``prepared`` is the prompt where a text worker has made it (``service/prompts.py``), with the texts of the base or
    of an adapter (``prepared_with``), in place of ``prompt`` and of what ``messages`` hold.
    ``queue_timeout_s`` and ``deadline_s`` count from acceptance. ``request_id`` is the client's
    word, for logs; it need not be unique. ``salt`` separates tenants in the prefix cache.
    ``tenant`` and ``weight``: as in ``EngineRequest``.
    """

    prompt: str | list[int] | None = None
    suffix: str = ""
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    documents: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}
    tool_choice: ToolChoice = ToolChoice()
    constraint: Constraint | None = None
    parse_output: bool = False
    parse_whole: bool = False
    thinking_budget: Annotated[int, msgspec.Meta(ge=0)] | None = None
    reasoning_effort: str | None = None
    clip_max_tokens: bool = False
    chat_template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    params: SamplingParams = SamplingParams()
    adapter: AdapterRef | None = None
    request_id: str = ""
    echo: bool = False
    return_prompt_tokens: bool = False
    truncate: int | None = None
    prepared: bytes | None = None
    prepared_with: TextSource | None = None
    salt: str = ""
    tenant: str = ""
    weight: float = 1.0
    queue_timeout_s: float | None = None
    deadline_s: float | None = None

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the model is told of. None with ``tool_choice`` none: a model that knows a tool calls it."""
        return [] if self.tool_choice.mode == "none" else self.tools or []


class TopToken(msgspec.Struct, frozen=True, gc=False):
    """One of the most likely tokens at a position. ``text`` is its own, U+FFFD where it is part of a character; ``raw``
    are its own bytes, None when the tokenizer does not provide them.
    """

    id: int
    text: str
    logprob: float
    raw: bytes | None = None


class TokenPiece(msgspec.Struct, frozen=True, gc=False):
    """One token as text.

    ``text`` is the part of the text that this token added: a character split over tokens belongs to the last of them,
    the others have "". ``shown`` False: the text is not part of the delta's ``text`` (a special token under
    ``skip_special_tokens``, the EOS or stop id that ended it, a token inside a stop string); ``text`` is then the
    token's own. ``special``: whether the vocabulary marks it as special. The joined ``text`` of the shown pieces is the
    text. ``logprob`` None: not requested (or the first prompt token). ``top`` holds the k most likely, best first.
    ``raw`` are the bytes that this token added to the text, of a split character its own part. None: logprobs were not
    requested, or the tokenizer does not provide them.
    """

    id: int
    text: str
    logprob: float | None = None
    special: bool = False
    shown: bool = True
    top: list[TopToken] = []
    raw: bytes | None = None


@dataclass(frozen=True)
class PromptPart:
    """The prompt of a request whose client asked for it.

    ``make_tokens`` makes ``tokens``; it takes long where each has many alternatives. ``entries`` counts tokens and
    alternatives.
    """

    text: str
    entries: int
    make_tokens: Callable[[], list[TokenPiece]] = field(repr=False, compare=False)

    @cached_property
    def tokens(self) -> list[TokenPiece]:
        """Joined, their texts are ``text``; tokens that the tokenizer added (BOS) have text "" and are special."""
        return self.make_tokens()


class ChoiceTotals(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of one finished choice. ``completion_tokens`` includes EOS and the tokens of a stop string; ``seed``
    None: not used, because sampling was greedy. ``reasoning_tokens`` of the completion were parsed as reasoning.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    seed: int | None = None
    mean_logprob: float | None = None
    times: RequestTimes | None = None


def text_of(parts: Iterable[Item | Part]) -> str:
    """The joined text of those that are text."""
    return "".join([part.text for part in parts if type(part) is Text])


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A part of one choice that is final: no partial character, and no text that may become a stop string.

    Without ``GenerateRequest.parse_output`` the only part is the joined text of the shown ``tokens``. Exactly one delta
    per choice has a ``finish_reason``, the last one, with ``totals``; unless nothing was generated it also has the last
    token (so a stream with one event per token can have its summary on that event). ``eos``: an end-of-sequence id
    ended it (it is the last token then, not shown unless asked for); ``stop_reason`` is the stop string or stop id that
    did. ``prompt`` is on a choice's first delta when requested. ``error`` is set for finish_reason ``error``, and may
    be for ``abort``.
    """

    choice: int = 0
    parts: list[Part] = []
    tokens: list[TokenPiece] = []
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    eos: bool = False
    error: ErrorInfo | None = None
    prompt: PromptPart | None = None
    totals: ChoiceTotals | None = None

    @property
    def text(self) -> str:
        return text_of(self.parts)


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """All deltas of one choice, merged. ``items`` are in the order of their beginnings."""

    index: int
    items: list[Item]
    tokens: list[TokenPiece]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    eos: bool = False
    error: ErrorInfo | None = None
    totals: ChoiceTotals = ChoiceTotals()

    @property
    def text(self) -> str:
        return text_of(self.items)

    @property
    def token_ids(self) -> list[int]:
        return [piece.id for piece in self.tokens]


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A complete response: ``choices`` by index. The prompt counts once, completion tokens for every choice."""

    choices: list[CompletionChoice]
    prompt: PromptPart | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class AdapterCommand(msgspec.Struct, frozen=True, kw_only=True):
    """``load`` waits until the adapter is ready, or raises; ``unload`` waits for running requests; ``unpin`` ends what
    a ``load`` that was ``pinned`` began; ``list`` returns the states; ``prepare`` starts what the first load would wait
    for.
    """

    action: Literal["load", "unload", "unpin", "list", "prepare"]
    ref: AdapterRef | None = None
    pinned: bool = False


EngineAction = Literal["pause", "drain", "resume", "reset_prefix_cache"]
"""``pause``: no step is planned any more; running and waiting requests stay as they are. ``drain``: no request is
admitted any more; what runs goes to its end. ``resume`` ends both. ``reset_prefix_cache``: no later request finds what
was computed before.
"""


class AdapterState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one adapter in the pool. ``parts`` are the kinds of its parts, ``sites`` counts where they act;
    ``used_at`` is the monotonic time of its last use, ``private`` as of ``AdapterRef``.
    """

    name: str
    generation: str | None = None
    status: Literal["loading", "ready", "uploading", "resident", "failed", "retired"] = "ready"
    nbytes: int = 0
    rank: int = 0
    commit: str = ""  # of the Hub, as of its last load
    leases: int = 0
    pinned: bool = False
    parts: list[str] = []
    sites: int = 0
    used_at: float | None = None
    private: bool = False
    error: ErrorInfo | None = None


class FileStamp(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a file when the model was loaded from it. ``sample`` is a digest of parts of its content, where they
    were read (``weights/watch.py``).
    """

    path: str
    size: int
    mtime_ns: int
    inode: int
    sample: str = ""


class EndToken(msgspec.Struct, frozen=True):
    """A token that ends a completion. ``source``: the file and key that name it; ``text``: "" without a tokenizer."""

    id: int
    source: str
    text: str = ""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a started engine, which do not change, also not after a restart.

    The engine names the end tokens of the model's configuration. A service adds those of the tokenizer and of the chat
    template (``eos_token_ids`` are those of every request); ``no_tokenizer`` is the reason when there is no tokenizer.
    ``more_ids`` behind the ``vocab_size`` ids of the model are those of adapters that add tokens.
    ``path`` is the location of the model's files, ``files`` their state when they were loaded ("" and empty for an
    engine without files). ``revision`` is of the Hub. ``implementation`` is ``native``,
    ``fallback`` or ``serial``. ``*_reason`` and ``int8_note`` explain a choice in one line for
    the operator. Byte counts: ``weight_bytes`` as loaded, ``stored_bytes`` in the files, ``fixed_bytes`` of memory that
    does not vary, ``memory_limit_bytes`` in all, ``budget_bytes`` for KV cache and adapters.
    """

    model: str
    model_type: str
    implementation: str = "native"
    implementation_reason: str = ""
    backend: str
    device: str
    dtype: str
    vocab_size: int
    more_ids: int = 0
    max_model_len: int
    block_size: int
    num_blocks: int
    kv_tokens: int
    step_tokens: int
    max_running: int
    max_waiting: int = 1024
    eos_token_ids: list[int]
    end_tokens: list[EndToken] = []
    bos_token_id: int | None = None
    no_tokenizer: str = ""
    path: str = ""
    files: list[FileStamp] = []
    revision: str | None = None
    isa: str = ""
    threads: int = 1
    dtype_reason: str = ""
    quantize: str = "none"
    exact: bool = False
    int8_note: str = ""
    tying: str = ""
    tying_reason: str = ""
    weight_formats: dict[str, int] = {}
    weight_bytes: int = 0
    stored_bytes: int = 0
    saved_by_tying_bytes: int = 0
    fixed_bytes: int = 0
    memory_limit_bytes: int = 0
    memory_reason: str = ""
    budget_bytes: int = 0
    unused_tensors: int = 0
    start_s: float = 0.0
    warnings: list[str] = []


class EngineRestarts(msgspec.Struct, frozen=True, kw_only=True):
    """The number of restarts of the engine's process, and the reason of the last one (empty: none)."""

    count: int = 0
    last_reason: str = ""


MAX_STATS_NAMES = 256


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A heartbeat: the state of the engine at ``monotonic``, the time of the machine's monotonic clock.

    ``resident_names`` are those by which resident adapters were named, the last used first; ``loading_names`` those of
    adapters that load or that waiting requests need. Of both at most ``MAX_STATS_NAMES``.
    """

    monotonic: float
    paused: bool = False
    steps: int = 0
    running: int = 0
    waiting: int = 0
    waiting_for_adapter: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    used_blocks: int = 0
    num_blocks: int = 0
    kv_used_bytes: int = 0
    kv_cached_bytes: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    adapter_loads: int = 0
    adapter_loads_by_name: dict[str, int] = {}
    adapter_load_failures: int = 0
    adapter_evictions: int = 0
    adapters_resident: int = 0
    resident_names: list[str] = []
    loading_names: list[str] = []
    adapter_bytes: int = 0
    adapter_limit_bytes: int = 0
    budget_bytes: int = 0
    budget_used_bytes: int = 0
