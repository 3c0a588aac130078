"""The types of arguments whose notation does not show them: a tag's text is a string, or JSON, by the tool's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from truffula.text.output_reader import json_from

MAX_REFERENCES = 16
_NUMBER = re.compile(r"-?[0-9]")
_WORDS = MappingProxyType({"true": "true", "false": "false", "null": "null", "none": "null"})


def property_schema(parameters: Mapping[str, Any] | None, key: str) -> Any:
    """The schema of one argument; None where the tool's schema has none."""
    root = resolved(parameters, parameters or {})
    found = root.get("properties") if isinstance(root, Mapping) else None
    if isinstance(found, Mapping) and key in found:
        return found[key]
    return root.get("additionalProperties") if isinstance(root, Mapping) else None


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """``schema``, or what its ``$ref`` points to within ``root``."""
    for _ in range(MAX_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#"):
            break
        schema = root
        for part in reference[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, Mapping) else None
    return schema


def types_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> list[str]:
    """The JSON types that ``schema`` allows, in its order; empty: any."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or depth > MAX_REFERENCES:
        return []
    declared = schema.get("type")
    found = [declared] if isinstance(declared, str) else list(declared) if isinstance(declared, list) else []
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if not found and isinstance(values, list):
        found = [_type_of(value) for value in values]
    for keyword in ("anyOf", "oneOf", "allOf"):
        for choice in schema.get(keyword) or [] if not found else []:
            found += types_of(choice, root, depth + 1)
    if found and schema.get("nullable"):
        found.append("null")
    return list(dict.fromkeys(found))


def json_of(text: str, types: list[str]) -> str:
    """The JSON of an argument that was written as ``text``: of the first type that the text can be, else a string.

    Chat templates write JSON, or Python literals.
    """
    word = _WORDS.get(text.strip().lower())
    value: str | None = None
    if word == "null" and (not types or "null" in types):
        return word
    for kind in types or ["number", "boolean", "object", "array"]:
        if kind == "string":
            break
        if kind == "boolean" and word in ("true", "false"):
            return word
        value = json_from(text) if value is None else value
        shape = "number" if _NUMBER.match(value) else {"{": "object", "[": "array"}.get(value[:1])
        if kind == shape:
            return value
        if kind == "integer" and shape == "number" and float(value).is_integer():
            return value if value.lstrip("-").isdecimal() else str(int(float(value)))
    return json.dumps(text, ensure_ascii=False)


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "integer", float: "number", dict: "object", list: "array"}
    return names.get(type(value), "null")
