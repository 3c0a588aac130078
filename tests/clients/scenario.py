"""What the scenarios of all clients share. They run in the clients' own environments."""

from __future__ import annotations

import sys
from collections.abc import Callable

URL = sys.argv[1]
BASE, ADAPTER = "smollm2", "pirate"
QUESTION = "What is the ocean?"
TALK = [{"role": "user", "content": QUESTION}]


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
