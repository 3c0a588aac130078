"""Fields by which clients of OpenAI, vLLM, SGLang, LoRAX and TGI constrain an answer, read into one ``Constraint``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from truffula.errors import InvalidRequest, did_you_mean, nearest
from truffula.items import Constraint
from truffula.json_text import json_value
from truffula.server.body import Body

Reader = Callable[[Any, str], Constraint | None]
_IGNORED_OPTIONS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "disable_fallback": (True, False),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
    }
)
"""vLLM's options beside a constraint, and their values that change nothing here."""


class OpenAIConstraints(Body):
    """The fields on OpenAI's routes: its own, and those of vLLM and SGLang."""

    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    regex: Any = None
    ebnf: Any = None
    json_schema: Any = None
    structural_tag: Any = None

    @property
    def constraint(self) -> Constraint | None:
        """What the fields ask for. Raises ``InvalidRequest``."""
        return constraint_of({name: getattr(self, name) for name in OPENAI_FIELDS})


class NativeConstraints(Body):
    """The fields in ``parameters`` of the native routes: LoRAX's and TGI's."""

    response_format: Any = None
    grammar: Any = None

    @property
    def constraint(self) -> Constraint | None:
        """What the fields ask for. Raises ``InvalidRequest``."""
        return constraint_of({name: getattr(self, name) for name in NATIVE_FIELDS})


def constraint_of(given: Mapping[str, Any]) -> Constraint | None:
    """The one constraint that fields of a body ask for, by their names; null is absent.

    Raises ``InvalidRequest`` for a wrong value, and for two constraints.
    """
    found = [
        constraint
        for name, value in given.items()
        if value is not None and (constraint := _READERS[name](value, name)) is not None
    ]
    if len(found) > 1:
        raise InvalidRequest(
            f"{found[0].param} and {found[1].param} both constrain the answer; give one of them.", param=found[1].param
        )
    return found[0] if found else None


def response_format(value: Any, param: str = "response_format") -> Constraint | None:
    """OpenAI's ``response_format``, Responses' ``text.format`` (the same without an inner object), and LoRAX's,
    huggingface_hub's and TGI's forms of it.
    """
    kind = _object(value, param).get("type")
    inner = value.get("json_schema") if isinstance(value.get("json_schema"), Mapping) else value
    schema = next((inner[key] for key in ("schema", "value") if inner.get(key) is not None), None)
    if kind == "text":
        return None
    if kind == "json_object" and schema is None:
        return Constraint(kind="json_object", param=param)
    if kind == "structural_tag":
        return Constraint(kind="structural_tag", value=_json(value), param=param)
    if kind == "regex":
        return _regex(value.get("value", value.get("pattern")), param)
    if kind in ("json_schema", "json_object", "json"):
        if kind == "json_schema" and inner is value and isinstance(schema, Mapping) and "schema" in schema:
            schema = schema["schema"]  # TGI: {"value": {"name", "schema"}}
        if schema is None:
            raise InvalidRequest(f"{param} has type {kind!r} and no schema.", param=param)
        return _schema(schema, param)
    raise InvalidRequest(
        f"{param} has the type {str(kind)[:40]!r}; it must be 'text', 'json_object', 'json_schema', 'regex' or "
        "'structural_tag'.",
        param=param,
    )


def structured_outputs(value: Any, param: str = "structured_outputs") -> Constraint | None:
    """vLLM's object with one of ``json``, ``regex``, ``choice``, ``grammar``, ``json_object``, ``structural_tag``."""
    readers: dict[str, Reader] = {
        "json": _schema,
        "regex": _regex,
        "choice": _choice,
        "grammar": _grammar,
        "json_object": _any_object,
        "structural_tag": _structural_tag,
    }
    found = []
    for name, given in _object(value, param).items():
        place = f"{param}.{name[:40]}"
        if given is None or given in _IGNORED_OPTIONS.get(name, ()):
            continue
        if name not in readers:
            raise InvalidRequest(
                f"{place} is not supported by this server; leave it out.{did_you_mean(nearest(name, readers))}",
                param=place,
            )
        if (constraint := readers[name](given, place)) is not None:
            found.append(constraint)
    if len(found) > 1:
        raise InvalidRequest(f"{param} has {len(found)} constraints; give one of them.", param=found[1].param)
    return found[0] if found else None


def tgi_grammar(value: Any, param: str = "grammar") -> Constraint | None:
    """TGI's ``{"type": "json" | "regex" | "json_schema" | "json_object", "value"}``."""
    if value == "":
        return None
    if (kind := _object(value, param).get("type")) not in ("json", "json_object", "json_schema", "regex"):
        raise InvalidRequest(
            f"{param} has the type {str(kind)[:40]!r}; it must be json, json_object, json_schema or regex.", param=param
        )
    return response_format(value, param)


def _schema(value: Any, param: str) -> Constraint:
    """A JSON Schema as a value, or as its JSON text."""
    if isinstance(value, str):
        try:
            value = json_value(value)
        except ValueError as error:
            raise InvalidRequest(f"{param} is a string that is not JSON: {error}.", param=param) from error
    if not isinstance(value, Mapping | bool):
        raise InvalidRequest(f"{param} is no JSON Schema, which is an object or a boolean.", param=param)
    return Constraint(kind="json_schema", value=_json(value), param=param)


def _regex(value: Any, param: str) -> Constraint | None:
    text = _string(value, param)
    return Constraint(kind="regex", value=text, param=param) if text else None


def _grammar(value: Any, param: str) -> Constraint | None:
    text = _string(value, param)
    return Constraint(kind="lark", value=text, param=param) if text else None


def _choice(value: Any, param: str) -> Constraint | None:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise InvalidRequest(f"{param} must be a list of strings.", param=param)
    return Constraint(kind="choice", value=_json(value), param=param)


def _any_object(value: Any, param: str) -> Constraint | None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{param} must be true or false.", param=param)
    return Constraint(kind="json_object", param=param) if value else None


def _structural_tag(value: Any, param: str) -> Constraint | None:
    """An object, or its JSON text."""
    return Constraint(kind="structural_tag", value=value if isinstance(value, str) else _json(value), param=param)


def _object(value: Any, param: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{param} must be a JSON object.", param=param)
    return value


def _string(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{param} must be a string.", param=param)
    return value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


_READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "response_format": response_format,
        "structured_outputs": structured_outputs,
        "guided_json": _schema,
        "guided_regex": _regex,
        "guided_choice": lambda value, param: None if value == [] else _choice(value, param),
        "guided_grammar": _grammar,
        "regex": _regex,
        "ebnf": _grammar,
        "json_schema": _schema,
        "structural_tag": _structural_tag,
        "grammar": tgi_grammar,
    }
)
OPENAI_FIELDS = tuple(OpenAIConstraints.model_fields)
NATIVE_FIELDS = tuple(NativeConstraints.model_fields)
