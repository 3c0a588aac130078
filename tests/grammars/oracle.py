"""Whether a value meets a schema, by ``jsonschema``, which shares nothing with llguidance."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import uuid
from fractions import Fraction
from typing import Any

from jsonschema import (
    Draft4Validator,
    Draft7Validator,
    Draft202012Validator,
    FormatChecker,
    ValidationError,
    validators,
)

FORMATS = FormatChecker(formats=())
DURATION = re.compile(r"P(?!$)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)")


def is_label(text: str) -> bool:
    return re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)", text) is not None


def checked(name: str, check: Any) -> None:
    """``check`` raises ``ValueError``, or returns whether a string has the format."""
    FORMATS.checks(name, raises=ValueError)(lambda value: not isinstance(value, str) or check(value) is not False)


def date_time(value: str) -> bool:
    cut = re.sub(r"(\.\d{1,6})\d*", r"\1", value.upper())  # datetime has microseconds
    return datetime.datetime.fromisoformat(cut).tzinfo is not None


checked("date", lambda value: bool(datetime.date.fromisoformat(value)) and len(value) == 10)
checked("date-time", date_time)
checked("time", lambda value: date_time(f"2000-01-01T{value}"))
checked("ipv4", lambda value: bool(ipaddress.IPv4Address(value).packed))
checked("ipv6", lambda value: bool(ipaddress.IPv6Address(value).packed))
checked("uuid", lambda value: str(uuid.UUID(value)) == value.lower())
checked("email", lambda value: value.count("@") == 1 and not re.search(r"\s|^@|@$|\.\.", value))
checked("hostname", lambda value: len(value) < 254 and all(map(is_label, value.split("."))))
checked("uri", lambda value: bool(re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]*", value)))
checked("duration", lambda value: bool(DURATION.fullmatch(value)))


def multiple_of(validator: Any, divisor: Any, value: Any, schema: Any) -> Any:
    """As decimals: 0.07 is a multiple of 0.01."""
    if validator.is_type(value, "number") and Fraction(str(value)) % Fraction(str(divisor)):
        yield ValidationError(f"{value} is no multiple of {divisor}")


def is_valid(schema: Any, text: str) -> bool:
    """Whether the JSON ``text`` meets ``schema``."""
    value = json.loads(text)
    base: Any = Draft202012Validator
    if isinstance(schema, dict):
        if isinstance(schema.get("exclusiveMinimum"), bool):
            base = Draft4Validator
        elif isinstance(schema.get("items"), list):
            base = Draft7Validator
    extended = validators.extend(base, {"multipleOf": multiple_of})
    return bool(extended(schema, format_checker=FORMATS).is_valid(value))
