"""How one streamed completion is asked for, and what its frames mean, in the words of each kind of server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from truffula.bench.measured import Stream


class Dialect(Protocol):
    """``read`` takes one frame that arrived at ``now`` into ``stream``."""

    @property
    def path(self) -> str: ...

    def body(self, prompt: list[int], max_tokens: int, adapter: str | None) -> dict[str, Any]: ...

    def read(self, frame: dict[str, Any], now: float, stream: Stream) -> None: ...


@dataclass(frozen=True)
class OpenAI:
    """``/v1/completions`` with token ids; an adapter is a model name, ``model`` the base's."""

    model: str = ""
    path: str = "/v1/completions"

    def body(self, prompt: list[int], max_tokens: int, adapter: str | None) -> dict[str, Any]:
        return {
            "model": adapter or self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def read(self, frame: dict[str, Any], now: float, stream: Stream) -> None:
        if "error" in frame:
            stream.failure = str(frame["error"])[:300]
        if frame.get("choices"):
            stream.tokens.append(now)
        if frame.get("usage"):
            usage = frame["usage"]
            stream.output_tokens = usage["completion_tokens"]
            stream.prompt_tokens = usage["prompt_tokens"]
            stream.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


@dataclass(frozen=True)
class LlamaServer:
    """llama-server's ``/completion``: ``adapters`` in the order of its ``--lora``, each request scales its own to 1."""

    adapters: tuple[str, ...] = ()
    path: str = "/completion"

    def body(self, prompt: list[int], max_tokens: int, adapter: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": prompt,
            "n_predict": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
        }
        if adapter is not None:
            body["lora"] = [{"id": self.adapters.index(adapter), "scale": 1.0}]
        return body

    def read(self, frame: dict[str, Any], now: float, stream: Stream) -> None:
        if "error" in frame:
            stream.failure = str(frame["error"])[:300]
        if not frame.get("stop") or frame.get("content"):
            stream.tokens.append(now)
        if frame.get("stop"):
            stream.output_tokens = frame["tokens_predicted"]
            stream.prompt_tokens = frame["tokens_evaluated"]
            stream.cached_tokens = max(0, frame.get("timings", {}).get("cache_n", 0))
