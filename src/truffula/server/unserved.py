"""Routes of other servers that this one does not have: what to use instead, in the form of that API's errors."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from truffula.errors import TruffulaError, nearest
from truffula.server.errors import NoClassification, NoEmbeddings, UnknownPath

_EMBEDDING_PATHS = ("/v1/embeddings", "/embeddings", "/embed", "/embed_all", "/embed_sparse", "/embedding")
_CLASSIFY_PATHS = ("/classify", "/classify_batch", "/v1/classify", "/predict")


def unserved(path: str, served: Collection[str]) -> TruffulaError:
    """The error for a ``path`` that no route of ``served`` (paths) has."""
    if path in _EMBEDDING_PATHS:
        return NoEmbeddings("Embeddings are not served: this server generates text only.")
    if path in _CLASSIFY_PATHS:
        return NoClassification("Classification is not served: this server generates text only.")
    head, advices = path, _advices()
    while head and head not in advices:
        head = head.rpartition("/")[0]
    if head:
        what, advice = advices[head]
        return UnknownPath(f"{what} is not served here ({path[:200]}); {advice}.")
    near = _nearest(path, served)
    hint = f"did you mean {near}?" if near else "GET /docs lists the routes."
    return UnknownPath(f"There is no route {path[:200]}; {hint}")


@cache
def _advices() -> Mapping[str, tuple[str, str]]:
    return tomllib.loads(Path(__file__).with_name("unserved.toml").read_text(encoding="utf-8"))


def _nearest(path: str, served: Collection[str]) -> str | None:
    """The route that was probably meant: with or without /v1, without a slash too many, or spelled nearly so."""
    plain = re.sub(r"/+", "/", path[:200]).rstrip("/").lower()
    bare = plain
    while bare.startswith("/v1/"):
        bare = bare.removeprefix("/v1")
    for guess in (plain, f"/v1{bare}", bare):
        if guess in served:
            return guess
    return nearest(plain, (one for one in served if len(one) > 1), cutoff=0.75)
