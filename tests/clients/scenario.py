"""What the scenarios of all clients share. They run in the clients' own environments, which have pydantic."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, Field

URL = sys.argv[1]
BASE, ADAPTER = "smollm2", "pirate"
QUESTION = "What is the ocean?"
TALK = [{"role": "user", "content": QUESTION}]


class Trip(BaseModel, extra="forbid"):
    """A trip to a city."""

    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=99)
    by_train: bool


TOOL = {
    "type": "function",
    "function": {"name": "Trip", "description": "A trip to a city.", "parameters": Trip.model_json_schema()},
}


def differ(answer: Callable[[str], str]) -> str:
    """The answer of the adapter, which is none of the base's. Both are the same when they are asked again."""
    found = {name: answer(name) for name in (BASE, ADAPTER)}
    assert found[ADAPTER] and found[ADAPTER] != found[BASE], found
    assert found == {name: answer(name) for name in (BASE, ADAPTER)}
    return found[ADAPTER]


def raises(kind: type[Exception], call: Callable[[], object], *words: str) -> None:
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError(f"no {kind.__name__}")
