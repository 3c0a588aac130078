"""Client's JSON Schemas (draft 2020-12, and the older spellings that mean the same) to those that llguidance enforces.

llguidance ignores some keywords silently and treats some numbers inexactly. ``enforceable`` returns a schema whose
every keyword is enforced, and raises ``InvalidRequest`` with the keyword and its place for what cannot be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

from truffula.errors import InvalidRequest, did_you_mean, nearest
from truffula.text.one_of import disjoint_options

Schema = dict[str, Any] | bool
MAX_DEPTH = 60
"""Levels of subschemas; llguidance reads JSON of 127 levels, and each subschema takes up to two."""
MAX_REPEAT = 65_536
MAX_VALUES = 10_000
"""Of one enum."""
EXACT = 2**53
"""llguidance computes with float64: integers beyond are not all told from their neighbours."""
WHITESPACE: Mapping[str, Any] = MappingProxyType(
    {"whitespace_pattern": r"[ ]|\n(?:[ ]{0,40}|\t{0,10})", "json_allowed_escapes": 'nrbtf\\"'}
)
"""llguidance's options: between two JSON tokens one space, or a line break and its indentation. A character has one
spelling in a string, so that no key can be written twice.
"""
TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")
_ANNOTATIONS = frozenset(
    {
        *("$schema", "$id", "id", "$anchor", "$comment", "$vocabulary", "$defs", "definitions", "$dynamicAnchor"),
        *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"),
        *("contentMediaType", "contentEncoding", "contentSchema", "$recursiveAnchor"),
        *("discriminator", "externalDocs", "xml", "enumNames", "enumDescriptions", "markdownDescription"),
    }
)
"""Keywords that no value violates, and the definitions, which are read where ``$ref`` names them."""
_NO_EFFECT: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "uniqueItems": (False,),
        "nullable": (False,),
        "minContains": (0,),
        "propertyNames": (True, {}),
        "unevaluatedProperties": (True, {}),
        "unevaluatedItems": (True, {}),
        "dependentRequired": ({},),
        "dependentSchemas": ({},),
        "dependencies": ({},),
    }
)
"""Keywords that cannot be enforced, and the values with which they demand nothing."""
_REFUSED = frozenset(
    {*_NO_EFFECT, "not", "if", "then", "else", "contains", "maxContains", "$dynamicRef", "$recursiveRef"}
)
_ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "nullable": 'use "type": [..., "null"]',
        "if": "use anyOf",
        "then": "use anyOf",
        "else": "use anyOf",
        "$dynamicRef": "use $ref",
        "$recursiveRef": "use $ref",
    }
)
_FORMATS = frozenset({"duration", "email", "ipv4", "ipv6", "uuid", "uri"})
"""Those of llguidance."""
_SPACES = r"\t\n\x0b\x0c\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_ANY = r"[^\n\r\u2028\u2029]"
_LABEL = "(?:[A-Za-z0-9]{1,63}|[A-Za-z0-9](?:-?[A-Za-z0-9]){0,31})"
_DAYS = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][48]|[13579][26]|[2468]0)00)-02-29"
_DATE = rf"(?:(?:[0-9]{{3}}[1-9]|[0-9]{{2}}[1-9]0|[0-9][1-9]00|[1-9]000)-{_DAYS}|{_LEAP})"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_PATTERNS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "date": {"pattern": f"^{_DATE}$"},
        "time": {"pattern": f"^{_TIME}$"},
        "date-time": {"pattern": f"^{_DATE}[tT]{_TIME}$"},
        "hostname": {"pattern": rf"^{_LABEL}(?:\.{_LABEL})*$", "maxLength": 253},
    }
)
"""In place of llguidance's own, which accept 29 February in every year, the year 0, a second 60, and names of hosts
that are too long or are no A-labels.
"""
_INTEGERS = {
    f"{sign}int{bits}": (0 if sign else -(2 ** (bits - 1)), 2 ** (bits if sign else bits - 1) - 1)
    for sign in ("", "u")
    for bits in (8, 16, 32, 64)
}
_NUMBER_FORMATS: Mapping[str, tuple[int, int] | None] = MappingProxyType({**_INTEGERS, "float": None, "double": None})
"""OpenAPI's formats of numbers, and their bounds."""


def enforceable(schema: Any) -> Schema:
    """``schema`` in the keywords that llguidance enforces, its ``$ref``s under ``$defs``.

    Raises ``InvalidRequest`` without a param: the message names the keyword and its place as a JSON pointer.
    """
    reader = _Reader(schema)
    read = reader.schema(schema, "#")
    _check_possible(read, reader)
    _check_cycles(reader)
    for one in (read, *reader.definitions.values()):
        _ease_one_of(one, reader.definitions)
    if isinstance(read, dict) and reader.definitions:
        read["$defs"] = reader.definitions
    return read


def subschemas(schema: Schema, place: str) -> Iterator[tuple[Schema, str]]:
    """The direct subschemas of an enforceable schema, and their places."""
    if isinstance(schema, bool):
        return
    for key in ("properties", "patternProperties"):
        for name, one in schema.get(key, {}).items():
            yield one, f"{place}/{key}/{_escaped(name)}"
    for key in ("prefixItems", "allOf", "anyOf", "oneOf"):
        for index, one in enumerate(schema.get(key, ())):
            yield one, f"{place}/{key}/{index}"
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield schema[key], f"{place}/{key}"


class _Reader:
    """Reads one document. ``definitions`` are the schemas that ``$ref``s name, ``places`` where they were."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self.definitions: dict[str, Schema] = {}
        self.places: dict[str, str] = {}
        self._depth = 0

    def schema(self, value: Any, place: str) -> Schema:
        if isinstance(value, bool):
            return value
        if not isinstance(value, dict):
            raise _refused(place, f"is a JSON {_kind(value)}; a schema is an object or a boolean")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refused(place, f"lies below {MAX_DEPTH} levels of schemas; use fewer")
        read: dict[str, Any] = {}
        for key, given in value.items():
            if key in _ANNOTATIONS or key.startswith("x-"):
                if key in ("$id", "id") and place != "#" and isinstance(given, str) and not given.startswith("#"):
                    raise _cannot(key, place, "a schema with an identifier of its own inside another is not supported")
                continue
            self._keyword(key, given, f"{place}/{_escaped(key)}", value, read)
        _check_counts(read, place)
        self._depth -= 1
        return read

    def _keyword(self, key: str, given: Any, place: str, whole: Mapping[str, Any], read: dict[str, Any]) -> None:
        """Adds what keyword ``key`` of ``whole`` demands to ``read``."""
        if key in _REFUSED:
            if any(given == one and type(given) is type(one) for one in _NO_EFFECT.get(key, ())):
                return
            if (key == "if" and not {"then", "else"} & set(whole)) or (key in ("then", "else") and "if" not in whole):
                return
            if key in ("minContains", "maxContains") and "contains" not in whole:
                return
            raise _cannot(key, place, _ADVICE.get(key, "leave it out"))
        handle = _KEYWORDS.get(key)
        if handle is None:
            raise InvalidRequest(
                f"{key[:64]!r} at {place[:200]} is not a keyword of JSON Schema that this server knows."
                f"{did_you_mean(nearest(key, _KEYWORDS))} Names that begin with 'x-' are ignored."
            )
        handle(self, key, given, place, whole, read)

    def _list(self, key: str, given: Any, place: str, whole: Any, read: dict[str, Any]) -> None:
        if not isinstance(given, list) or (not given and key != "prefixItems"):
            raise _refused(place, "must be a list of schemas that is not empty")
        read[key] = [*read.get(key, ()), *(self.schema(one, f"{place}/{index}") for index, one in enumerate(given))]

    def _map(self, key: str, given: Any, place: str, whole: Any, read: dict[str, Any]) -> None:
        if not isinstance(given, dict):
            raise _refused(place, f"is a JSON {_kind(given)}; it must be an object of schemas")
        for name in given:
            if key == "patternProperties":
                _check_pattern(name, place)
            else:
                _check_string(name, place)
        read[key] = {
            _ecmascript(name) if key == "patternProperties" else name: self.schema(one, f"{place}/{_escaped(name)}")
            for name, one in given.items()
        }

    def _one(self, key: str, given: Any, place: str, whole: Any, read: dict[str, Any]) -> None:
        read[key] = self.schema(given, place)

    def _items(self, key: str, given: Any, place: str, whole: Mapping[str, Any], read: dict[str, Any]) -> None:
        """``items`` and, of older drafts, its list form with ``additionalItems``."""
        old = isinstance(whole.get("items"), list)
        if key == "items" and old:
            self._list("prefixItems", given or [True], place, whole, read)
        elif key == "items":
            self._one(key, given, place, whole, read)
        elif old:
            self._one("items", given, place, whole, read)

    def _ref(self, key: str, given: Any, place: str, whole: Any, read: dict[str, Any]) -> None:
        if not isinstance(given, str):
            raise _refused(place, f"is a JSON {_kind(given)}; it must be a string")
        document, _, fragment = given.partition("#")
        own = self._root.get("$id", self._root.get("id")) if isinstance(self._root, dict) else None
        if document and document != (own.rstrip("#") if isinstance(own, str) else None):
            raise _cannot("$ref", place, f"{given[:100]!r} is another document, and none is fetched; use '#/$defs/...'")
        target, at = self._resolve(unquote(fragment), given, place)
        name = next((name for name, known in self.places.items() if known == at), None)
        if name is None:
            stem = re.sub(r"\W", "_", at.removeprefix("#/$defs/").removeprefix("#/definitions/"))[:40]
            name = stem if stem not in self.places else f"{stem}_{len(self.places)}"
            self.places[name] = at
            self.definitions[name] = True  # until it is read: it may refer to itself
            depth, self._depth = self._depth, self._depth + 1
            self.definitions[name] = self.schema(target, at)
            self._depth = depth
        read["$ref"] = f"#/$defs/{name}"

    def _resolve(self, fragment: str, given: str, place: str) -> tuple[Any, str]:
        """What a ``$ref`` within the document names, and its place."""
        if fragment and not fragment.startswith("/"):
            found = [
                (one, at)
                for one, at in _walk(self._root, "#")
                if one.get("$anchor") == fragment or one.get("$id", one.get("id")) == f"#{fragment}"
            ]
            if len(found) == 1:
                return found[0]
            raise _cannot("$ref", place, f"{given[:100]!r} names no schema of this document")
        target = self._root
        for part in fragment.split("/")[1:]:
            if target is not self._root and isinstance(target, dict) and isinstance(target.get("$id"), str):
                raise _cannot("$ref", place, f"{given[:100]!r} leads into a schema with an identifier of its own")
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and name.isdecimal() and int(name) < len(target):
                target = target[int(name)]
            elif isinstance(target, dict) and name in target:
                target = target[name]
            else:
                raise _cannot("$ref", place, f"{given[:100]!r} names no schema of this document")
        return target, f"#{fragment}"

    def _type(self, key: str, given: Any, place: str, whole: Any, read: dict[str, Any]) -> None:
        listed = given if isinstance(given, list) else [given]
        for one in listed:
            if one not in TYPES:
                raise _refused(place, f"is {str(one)[:40]!r}; it must be one of {', '.join(TYPES)}")
        read[key] = given

    def _const(self, key: str, given: Any, place: str, whole: Any, read: dict[str, Any]) -> None:
        values = given if key == "enum" else [given]
        if not isinstance(values, list) or not values:
            raise _refused(place, "must be a list that is not empty")
        if len(values) > MAX_VALUES:
            raise _refused(place, f"has {len(values)} values; the limit is {MAX_VALUES}")
        for one in values:
            _check_value(one, place)
        read[key] = given

    def _number(self, key: str, given: Any, place: str, whole: Mapping[str, Any], read: dict[str, Any]) -> None:
        if isinstance(given, bool) and key.startswith("exclusiveM"):  # draft 4
            inclusive = "m" + key.removeprefix("exclusiveM")
            if given and inclusive in whole:
                self._number(key, whole[inclusive], place, whole, read)
            return
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise _refused(place, f"is a JSON {_kind(given)}; it must be a number")
        if key == "multipleOf":
            if given <= 0:
                raise _refused(place, f"is {given}; it must be above 0")
            _check_exact(given, place)
            read[key] = given
            return
        lower = key.lower().endswith("minimum")
        if isinstance(given, int) and (given < -EXACT if lower else given > EXACT):  # narrower, and exact
            key, given = key.replace("exclusiveM", "m"), -EXACT if lower else EXACT
        _check_exact(given, place)
        read[key] = (max if lower else min)(given, read.get(key, given))

    def _count(self, key: str, given: Any, place: str, whole: Any, read: dict[str, Any]) -> None:
        if isinstance(given, bool) or not isinstance(given, int | float) or given < 0 or given != int(given):
            raise _refused(place, f"is {str(given)[:40]}; it must be an integer of at least 0")
        read[key] = int(given)

    def _required(self, key: str, given: Any, place: str, whole: Any, read: dict[str, Any]) -> None:
        if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
            raise _refused(place, "must be a list of names")
        for one in given:
            _check_string(one, place)
        read[key] = list(dict.fromkeys(given))

    def _pattern(self, key: str, given: Any, place: str, whole: Any, read: dict[str, Any]) -> None:
        if not isinstance(given, str):
            raise _refused(place, f"is a JSON {_kind(given)}; it must be a regular expression")
        _check_pattern(given, place)
        read[key] = _ecmascript(given)

    def _format(self, key: str, given: Any, place: str, whole: Mapping[str, Any], read: dict[str, Any]) -> None:
        """Strings have llguidance's formats, numbers OpenAPI's."""
        types = whole.get("type")
        numeric = types in ("integer", "number") or (isinstance(types, list) and {"integer", "number"} & set(types))
        if isinstance(given, str) and numeric and given in _NUMBER_FORMATS:
            bounds = _NUMBER_FORMATS[given]
            if bounds is not None:
                low, high = max(bounds[0], -EXACT), min(bounds[1], EXACT)
                read.setdefault("allOf", []).append({"minimum": low, "maximum": high})
            return
        if isinstance(given, str) and given in _PATTERNS:
            read.setdefault("allOf", []).append(dict(_PATTERNS[given]))
            return
        if not isinstance(given, str) or given not in _FORMATS:
            known = ", ".join(sorted({*_FORMATS, *_PATTERNS}))
            raise _cannot(key, place, f"{str(given)[:40]!r} is none of {known}")
        read[key] = given


def _walk(value: Any, place: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Every object in ``value``, with its place."""
    if isinstance(value, dict):
        yield value, place
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        yield from _walk(inner, f"{place}/{_escaped(str(name))}")


_Handler = Callable[[_Reader, str, Any, str, Mapping[str, Any], dict[str, Any]], None]
_KEYWORDS: Mapping[str, _Handler] = MappingProxyType(
    {
        **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), _Reader._list),
        **dict.fromkeys(("properties", "patternProperties"), _Reader._map),
        **dict.fromkeys(("items", "additionalItems"), _Reader._items),
        **dict.fromkeys(("enum", "const"), _Reader._const),
        **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), _Reader._number),
        **dict.fromkeys(
            ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _Reader._count
        ),
        "additionalProperties": _Reader._one,
        "$ref": _Reader._ref,
        "type": _Reader._type,
        "required": _Reader._required,
        "pattern": _Reader._pattern,
        "format": _Reader._format,
    }
)


def _check_counts(read: Mapping[str, Any], place: str) -> None:
    """Raise for a number of properties that repeated names would reach: only named ones are known to differ."""
    if read.get("minProperties", 0) - len(read.get("required", ())) > 1:
        raise _cannot(
            "minProperties", place, "more properties than one beside the required ones; name them in required"
        )


def _check_value(value: Any, place: str) -> None:
    """Raise for a constant that llguidance would write as another value."""
    if isinstance(value, str):
        _check_string(value, place)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _check_exact(value, place)
    elif isinstance(value, list):
        for one in value:
            _check_value(one, place)
    elif isinstance(value, dict):
        for name, one in value.items():
            _check_string(name, place)
            _check_value(one, place)


def _check_string(text: str, place: str) -> None:
    if found := re.search(r"[\x00-\x07\x0b\x0e-\x1f]", text):
        raise _refused(place, f"has the control character U+{ord(found[0]):04X}, which answers cannot contain")


def _check_exact(number: float, place: str) -> None:
    if abs(number) > EXACT or (isinstance(number, float) and float(f"{number:.15g}") != number):
        raise _refused(
            place, f"is {number!r:.40}; numbers beyond 2^53 and those of more than 15 digits are not enforced exactly"
        )


def _check_pattern(pattern: str, place: str) -> None:
    if problem := regex_problem(pattern):
        raise _cannot("pattern", place, f"{pattern[:100]!r} {problem}")


def _ecmascript(pattern: str) -> str:
    r"""``pattern`` in Rust's syntax, with ECMAScript's meaning of ``\s``, ``\S`` and ``.``."""
    parts, in_class = [], False
    for token in re.findall(r"\\.|.", pattern, re.DOTALL):
        if token == "." and not in_class:
            token = _ANY
        elif token in ("\\s", "\\S"):
            token = f"[{'^' if token == chr(92) + 'S' else ''}{_SPACES}]"
        elif token in "[]":
            in_class = token == "["
        parts.append(token)
    return "".join(parts)


def regex_problem(pattern: str) -> str | None:
    """What is wrong with a regular expression that llguidance accepts."""
    trailing = len(pattern) - len(pattern.rstrip("\\"))
    if trailing % 2:
        return "ends with a backslash that escapes nothing"
    counts = [int(count[:9]) for pair in re.findall(r"\{(\d+)(?:,(\d*))?\}", pattern) for count in pair if count]
    if max(counts, default=0) > MAX_REPEAT:
        return f"repeats something more than {MAX_REPEAT} times"
    return None


def _ease_one_of(schema: Schema, definitions: Mapping[str, Schema]) -> None:
    """Write ``oneOf`` as ``anyOf``, in ``schema`` and inside it, where that is the same."""
    for one, _ in subschemas(schema, ""):
        _ease_one_of(one, definitions)
    if isinstance(schema, bool) or "oneOf" not in schema or "anyOf" in schema:
        return
    if disjoint_options(schema["oneOf"], definitions):
        listed = [("anyOf" if key == "oneOf" else key, value) for key, value in schema.items()]  # in the same order
        schema.clear()
        schema.update(listed)


def _check_cycles(reader: _Reader) -> None:
    """Raise for a schema that refers to itself for the same value: no validator comes to an end with it."""
    left = {name: set(_same_value(one)) for name, one in reader.definitions.items()}
    while ends := [name for name, names in left.items() if not names & left.keys()]:
        for name in ends:
            del left[name]
    for name in left:
        raise _cannot("$ref", reader.places[name], "it refers to itself for the same value")


def _same_value(schema: Schema) -> Iterator[str]:
    """The definitions to which ``schema`` refers for the value itself, not for a part of it."""
    if isinstance(schema, bool):
        return
    if "$ref" in schema:
        yield schema["$ref"].removeprefix("#/$defs/")
    for key in ("allOf", "anyOf", "oneOf"):
        for one in schema.get(key, ()):
            yield from _same_value(one)


def _check_possible(schema: Schema, reader: _Reader) -> None:
    """Raise for schemas that refer to themselves without an end: no finite value meets them."""
    possible: set[str] = set()
    while new := {
        name for name, one in reader.definitions.items() if name not in possible and _is_possible(one, possible)
    }:
        possible |= new
    for name, place in reader.places.items():
        if name not in possible:
            raise InvalidRequest(f"No value meets the schema at {place}: it requires itself, or something impossible.")
    if not _is_possible(schema, possible):
        raise InvalidRequest("No value meets the schema: it requires itself, or something impossible.")


def _is_possible(schema: Schema, possible: set[str]) -> bool:
    """Whether a finite value may meet ``schema``, when the definitions ``possible`` have some."""
    if isinstance(schema, bool):
        return schema
    if (ref := schema.get("$ref")) and ref.removeprefix("#/$defs/") not in possible:
        return False
    if not all(_is_possible(one, possible) for one in schema.get("allOf", ())):
        return False
    for key in ("anyOf", "oneOf"):
        if key in schema and not any(_is_possible(one, possible) for one in schema[key]):
            return False
    types = schema.get("type", TYPES)
    return any(_is_possible_as(kind, schema, possible) for kind in ([types] if isinstance(types, str) else types))


def _is_possible_as(kind: str, schema: Mapping[str, Any], possible: set[str]) -> bool:
    """As ``_is_possible``, of a value of type ``kind``."""
    if kind == "object":
        properties = schema.get("properties", {})
        other = schema.get("additionalProperties", True) if "patternProperties" not in schema else True
        return all(_is_possible(properties.get(name, other), possible) for name in schema.get("required", ()))
    if kind == "array":
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        least = schema.get("minItems", 0)
        needed = first[:least] + ([rest] if least > len(first) else [])
        return all(_is_possible(one, possible) for one in needed)
    return True


def _escaped(name: str) -> str:
    return name[:64].replace("~", "~0").replace("/", "~1")


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _refused(place: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"The schema cannot be used: {place[:200]} {problem}.")


def _cannot(keyword: str, place: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"The schema cannot be enforced: {keyword} at {place[:200]}: {problem}.")
