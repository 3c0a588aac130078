"""``oneOf`` as ``anyOf`` where no value meets two of its options: llguidance does not look into ``$ref``s for that."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

MOST_OPTIONS = 100
Definitions = Mapping[str, Any]


def disjoint_options(options: list[Any], definitions: Definitions) -> bool:
    """Whether no value meets two of ``options``, schemas that are enforceable otherwise."""
    if len(options) > MOST_OPTIONS:
        return False
    return all(_disjoint(one, other, definitions) for one, other in combinations(options, 2))


def _disjoint(one: Any, other: Any, definitions: Definitions) -> bool:
    one, other = _resolved(one, definitions), _resolved(other, definitions)
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one is False or other is False
    left, right = _types(one), _types(other)
    if left is not None and right is not None and not left & right:
        return True
    if _differ(one, other):
        return True
    if left != {"object"} or right != {"object"}:
        return False
    return any(
        _differ(
            _resolved(one.get("properties", {}).get(name, {}), definitions),
            _resolved(other.get("properties", {}).get(name, {}), definitions),
        )
        for name in set(one.get("required", ())) & set(other.get("required", ()))
    )


def _resolved(schema: Any, definitions: Definitions) -> Any:
    """``schema``, or the one that its ``$ref`` names: what meets ``schema`` meets that one too."""
    for _ in range(10):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        schema = definitions[schema["$ref"].removeprefix("#/$defs/")]
    return schema


def _types(schema: Mapping[str, Any]) -> set[str] | None:
    types = schema.get("type")
    if types is None:
        return None
    listed = {types} if isinstance(types, str) else set(types)
    return {"number" if one == "integer" else one for one in listed}


def _differ(one: Any, other: Any) -> bool:
    """Whether both name their values, and share none."""
    left, right = _literals(one), _literals(other)
    return left is not None and right is not None and not any(value in right for value in left)


def _literals(schema: Any) -> list[Any] | None:
    if not isinstance(schema, dict):
        return None
    values: list[Any] | None = [schema["const"]] if "const" in schema else schema.get("enum")
    return values
