"""``json_value``: reading JSON that a client or a model wrote."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def json_value(text: str, decode: Callable[[str], Any] = json.loads) -> Any:
    """The value of a JSON text, as ``decode`` reads it. What Python's limits forbid is a ``ValueError`` as any other,
    with words for a client.
    """
    try:
        return decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        if str(error).startswith("Exceeds the limit"):
            raise ValueError(f"a number has more than {sys.get_int_max_str_digits()} digits") from None
        raise
