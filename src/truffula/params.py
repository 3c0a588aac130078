"""``SamplingParams``: how a completion is sampled, when it ends, and what is reported of it."""

from __future__ import annotations

import functools
import numbers
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from truffula.errors import InvalidRequest

MAX_SEED = 2**64 - 1
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Fraction = Annotated[float, Meta(gt=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]


@functools.cache
def _record(params: type[EngineParams]) -> type[msgspec.Struct]:
    """A struct with the fields of ``params``. msgspec validates it at a conversion, as it does not in a constructor."""
    return msgspec.defstruct("Record", list(_types(params).items()))


@functools.cache
def _types(params: type[EngineParams]) -> dict[str, Any]:
    """The type of each field; msgspec evaluates the annotations anew at each call."""
    return {field.name: field.type for field in msgspec.structs.fields(params)}


def _validate(params: EngineParams) -> None:
    """Raise ``InvalidRequest`` for the first invalid field, and replace a list by a tuple, an int by a float."""
    given = msgspec.structs.asdict(params)
    try:
        checked = msgspec.structs.asdict(msgspec.convert(given, _record(type(params))))
    except msgspec.ValidationError:
        checked = {name: _checked(name, _plain(given[name]), kind) for name, kind in _types(type(params)).items()}
        given = {}
    for name, value in checked.items():
        if type(value) is not type(given.get(name)):
            msgspec.structs.force_setattr(params, name, value)


def _checked(name: str, value: Any, expected: Any) -> Any:
    """``value`` as ``expected``. Raises ``InvalidRequest``, of a collection for its first invalid entry."""
    try:
        return msgspec.convert(value, expected)
    except msgspec.ValidationError as error:
        if isinstance(value, dict | list) and len(value) > 1:
            entries = list(value.items() if isinstance(value, dict) else value)
            middle = len(entries) // 2
            for half in (entries[:middle], entries[middle:]):
                _checked(name, type(value)(half), expected)
        reason = str(error).partition(" - at ")[0]
        if get_origin(expected) is Literal:
            reason = f"expected one of {', '.join(get_args(expected))}"
        raise InvalidRequest(f"{name} is {value!r}; {reason[0].lower() + reason[1:]}.", param=name) from None


def _plain(value: Any) -> Any:
    """``value`` with numpy's numbers as Python's, which alone msgspec accepts."""
    if type(value) in (int, float, bool, str):
        return value
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


class EngineParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parameters of the engine, which does not handle text: how tokens are sampled and when a sequence ends.

    The fields are documented with ``SamplingParams``.
    """

    max_tokens: Count | None = 16
    min_tokens: Count = 0
    temperature: Annotated[float, Meta(ge=0.0, le=1e6)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    top_p: Fraction = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    typical_p: Fraction = 1.0
    repetition_penalty: Annotated[float, Meta(ge=1e-6, le=1e6)] = 1.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: dict[Count, Annotated[float, Meta(ge=-100.0, le=100.0)]] = {}
    seed: Annotated[int, Meta(ge=0)] | None = None
    stop_token_ids: tuple[Count, ...] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=1024)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=1024)] | None = None
    logprobs_of: Literal["raw", "warped"] = "raw"

    def __post_init__(self) -> None:
        _validate(self)
        if self.seed is not None and self.seed > MAX_SEED:
            raise InvalidRequest(f"seed is {self.seed}; it must be at most {MAX_SEED}.", param="seed")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, above max_tokens = {self.max_tokens}.", param="min_tokens"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class SamplingParams(EngineParams, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parameters of a completion and of its output. Invalid values raise ``InvalidRequest`` naming the field.

    ``temperature`` 0 is greedy. ``top_k`` 0 is off. ``max_tokens`` None is up to the model's length. ``logprobs`` k
    gives, per generated token, the k most likely ids and the chosen one; 0 only the chosen one. ``logprobs_of`` selects
    the distribution: ``raw`` (the model's) or ``warped`` (after penalties, bias, temperature and truncation, as LoRAX
    reports). With ``seed`` None, the service draws a seed per request. Order of operations on the logits: repetition,
    frequency and presence, bias, temperature, top-k, top-p, min-p, typical-p. Only the service uses ``stop``,
    ``include_stop``, ``skip_special_tokens``, ``n`` and ``best_of``.
    """

    stop: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    n: Annotated[int, Meta(ge=1)] = 1
    best_of: Annotated[int, Meta(ge=1)] | None = None

    def __post_init__(self) -> None:
        given: object = self.stop
        if isinstance(given, str):  # callers may give one string
            msgspec.structs.force_setattr(self, "stop", (given,))
        EngineParams.__post_init__(self)
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequest(f"best_of is {self.best_of}, below n = {self.n}.", param="best_of", n=self.n)

    def for_engine(self, *, seed: int, logprobs: int | None, stop_token_ids: tuple[int, ...]) -> EngineParams:
        """The engine's part of these parameters, with the values that the service determines."""
        kept = {name: getattr(self, name) for name in EngineParams.__struct_fields__}
        return EngineParams(**kept | {"seed": seed, "logprobs": logprobs, "stop_token_ids": stop_token_ids})
