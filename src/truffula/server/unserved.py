"""Routes of other servers that this one does not have: what to use instead, in the form of that API's errors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

from truffula.errors import TruffulaError, nearest
from truffula.server.errors import NoClassification, NoEmbeddings, UnknownPath

_CHAT = "use POST /v1/chat/completions"
_COMPLETION = "use POST /v1/completions"
_NOT_SERVED = "this server generates text only"
_EMBEDDINGS = "Embeddings are not served: this server generates text only."
_CLASSIFICATION = "Classification is not served: this server generates text only."
# Path → the API it belongs to, and what to use. A path also stands for those below it.
_ADVICE: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "/v1/responses": ("OpenAI's Responses API", _CHAT),
        "/v1/conversations": ("OpenAI's Conversations API", _CHAT),
        "/v1/assistants": ("OpenAI's Assistants API", _CHAT),
        "/v1/threads": ("OpenAI's Assistants API", _CHAT),
        "/v1/realtime": ("OpenAI's Realtime API", _CHAT),
        "/v1/audio": ("OpenAI's Audio API", _NOT_SERVED),
        "/v1/images": ("OpenAI's Images API", _NOT_SERVED),
        "/v1/videos": ("OpenAI's Videos API", _NOT_SERVED),
        "/v1/moderations": ("OpenAI's Moderations API", _NOT_SERVED),
        "/v1/files": ("OpenAI's Files API", "send each request on its own"),
        "/v1/batches": ("OpenAI's Batch API", "send each request on its own"),
        "/v1/fine_tuning": ("OpenAI's Fine-tuning API", "train an adapter with peft and serve it with --adapter"),
        "/v1/messages": ("Anthropic's Messages API", _CHAT),
        "/v1/complete": ("Anthropic's Text Completions API", _COMPLETION),
        "/v1/rerank": ("Reranking", _NOT_SERVED),
        "/v1/score": ("Scoring", _NOT_SERVED),
        "/v2": ("KServe's inference protocol", "use the routes under /v1/"),
        "/rerank": ("Reranking", _NOT_SERVED),
        "/score": ("Scoring", _NOT_SERVED),
        "/pooling": ("Pooling", _NOT_SERVED),
        "/api/chat": ("Ollama's API", _CHAT),
        "/api/generate": ("Ollama's API", _COMPLETION),
        "/api/tags": ("Ollama's API", "use GET /v1/models"),
        "/api/show": ("Ollama's API", "use GET /v1/models"),
        "/api/ps": ("Ollama's API", "use GET /v1/models"),
        "/api/version": ("Ollama's API", "use GET /version"),
        "/api": ("Ollama's API", "GET /docs lists the routes of this server"),
        "/completion": ("llama.cpp's own API", _COMPLETION),
        "/infill": ("llama.cpp's own API", "completion between a prefix and a suffix is not supported"),
        "/apply-template": ("llama.cpp's own API", "use POST /chat_tokenize"),
        "/props": ("llama.cpp's own API", "use GET /info"),
        "/slots": ("llama.cpp's own API", "use GET /metrics"),
        "/lora-adapters": ("llama.cpp's own API", "name the adapter in each request; GET /v1/models lists them"),
        "/get_model_info": ("SGLang's own API", "use GET /info"),
        "/model_info": ("SGLang's own API", "use GET /info"),
        "/get_server_info": ("SGLang's own API", "use GET /info"),
        "/health_generate": ("SGLang's own API", "use GET /health"),
        "/encode": ("SGLang's own API", _NOT_SERVED),
        "/load_lora_adapter": ("SGLang's administration", "use POST /v1/load_lora_adapter"),
        "/unload_lora_adapter": ("SGLang's administration", "use POST /v1/unload_lora_adapter"),
        "/v1/load_lora_adapter": ("Loading of adapters", "start the server with --adapter-admin"),
        "/v1/unload_lora_adapter": ("Unloading of adapters", "start the server with --adapter-admin"),
    }
)
_EMBEDDING_PATHS = ("/v1/embeddings", "/embeddings", "/embed", "/embed_all", "/embed_sparse", "/embedding")
_CLASSIFY_PATHS = ("/classify", "/classify_batch", "/v1/classify", "/predict")


def refusal(path: str, served: Collection[str]) -> TruffulaError:
    """The error for a ``path`` that no route of ``served`` (paths) has."""
    if path in _EMBEDDING_PATHS:
        return NoEmbeddings(_EMBEDDINGS)
    if path in _CLASSIFY_PATHS:
        return NoClassification(_CLASSIFICATION)
    head = path
    while head and head not in _ADVICE:
        head = head.rpartition("/")[0]
    if head:
        what, advice = _ADVICE[head]
        return UnknownPath(f"{what} is not served here ({path[:200]}); {advice}.")
    near = _nearest(path, served)
    hint = f"did you mean {near}?" if near else "GET /docs lists the routes."
    return UnknownPath(f"There is no route {path[:200]}; {hint}")


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
