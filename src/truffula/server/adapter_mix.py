"""Several adapters in one request: LoRAX's ``merged_adapters``, and lists of names with scales (``lora`` of llama.cpp).

{"ids": ["a", "b"], "weights": [0.7, 0.3], "merge_strategy": "ties", "density": 0.2}
[{"name": "a", "scale": 0.7}, {"name": "b", "scale": -0.3}]
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from truffula.errors import InvalidRequest
from truffula.lora.compose import MAX_WEIGHT, compose, merge
from truffula.server.errors import from_validation
from truffula.types import MAX_ADAPTERS, AdapterRef, MergeMethod, WeightedAdapter

BASE_ADAPTER = "__base_model__"
"""LoRAX's name of the base as an adapter. It cannot be merged."""

LEAST = 0.1
"""The least weight and density of keys that may not use the base: below, the answers are nearly the base's."""
_M = TypeVar("_M", bound=BaseModel)
_Name = Annotated[str, Field(min_length=1)]
_Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
_Lowered = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
_Strategy = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


@dataclass(frozen=True)
class AdapterMix:
    """Names of adapters with their weights. ``method`` None: what they change is added up."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    method: MergeMethod | None = None

    async def resolve(self, place: str, find: Callable[[str], Awaitable[AdapterRef | None]]) -> AdapterRef | None:
        """The one adapter that the engine is given; None is the base. ``find`` returns the adapter of a name.

        Raises ``InvalidRequest`` naming ``place`` for the base, and as ``find``.
        """
        parts = []
        for name, weight in zip(self.names, self.weights, strict=True):
            ref = None if name == BASE_ADAPTER else await find(name)
            if ref is None:
                raise InvalidRequest(f"{place} names the base model, not an adapter; leave it out.", param=place)
            parts.append(WeightedAdapter(ref, weight))
        return compose(parts, place) if self.method is None else merge(parts, self.method, place)


class _Merged(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    ids: Annotated[list[_Name], Field(min_length=1, max_length=MAX_ADAPTERS)]
    weights: list[_Weight] | None = None
    merge_strategy: Annotated[_Strategy, _Lowered] | None = None
    density: Annotated[float, Field(ge=0, le=1)] | None = None
    majority_sign_method: Annotated[Literal["total", "frequency"], _Lowered] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.ids):
            raise ValueError(f"{len(self.weights)} weights for {len(self.ids)} ids")
        if self.merge_strategy not in (None, "linear") and not self.density:
            raise ValueError(f"{self.merge_strategy} needs a density above 0: the share of values that are kept")
        return self


class _Scaled(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    name: _Name | None = None
    id: _Name | None = None
    scale: _Weight | None = None
    weight: _Weight | None = None

    @model_validator(mode="after")
    def _once(self) -> Self:
        if (self.name is None) == (self.id is None):
            raise ValueError("name (or id) must be an adapter's name")
        if self.scale is not None and self.weight is not None:
            raise ValueError("scale and weight mean the same")
        return self

    @property
    def factor(self) -> float:
        given = self.weight if self.scale is None else self.scale
        return 1.0 if given is None else given


def require_effect(adapter: AdapterRef, named: tuple[str, str | AdapterMix]) -> None:
    """Raise ``InvalidRequest`` where weights or a density leave little of ``adapter``, for a key without the base."""
    place, mix = named
    given = [] if isinstance(mix, str) else [*mix.weights, 1.0 if mix.method is None else mix.method.density]
    if any(one < LEAST for one in given) or any(abs(part.weight) < LEAST for part in adapter.acting):
        raise InvalidRequest(
            f"{place} has a weight or a density below {LEAST:g}; this API key may not use the base model, and such "
            "answers are nearly the base's.",
            param=place,
        )


def merged_adapters(place: str, value: Any) -> AdapterMix:
    """The value of LoRAX's field at ``place``. Raises ``InvalidRequest``."""
    given = _checked(_Merged, place, value)
    weights = tuple(given.weights or [1.0] * len(given.ids))
    method = None
    if given.merge_strategy is not None and given.merge_strategy != "linear":
        sign = given.majority_sign_method or "total"
        method = MergeMethod(strategy=given.merge_strategy, density=given.density or 0.0, sign=sign)
    return AdapterMix(tuple(given.ids), weights, method)


def scaled_adapters(place: str, values: Iterable[Any]) -> AdapterMix:
    """A list of objects with names and scales, the value of the field at ``place``. Raises ``InvalidRequest``."""
    given = [_checked(_Scaled, f"{place}[{index}]", value) for index, value in enumerate(values)]
    return AdapterMix(tuple(one.name or one.id or "" for one in given), tuple(one.factor for one in given))


def _checked(model: type[_M], place: str, value: Any) -> _M:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = from_validation(error)
        inside = found.param is not None and error.errors()[0]["loc"]  # not the object itself
        where = f"{place}.{found.param}" if inside else place
        text = found.message.removeprefix(f"{found.param}").removeprefix(":").strip()
        raise InvalidRequest(f"{where}: {text}", param=where) from error
