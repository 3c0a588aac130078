"""The clients of docs/clients that tests install: a page's name, what is installed for it, and whether that is torch."""

from __future__ import annotations

from typing import NamedTuple


class Client(NamedTuple):
    packages: tuple[str, ...]
    torch: bool = False


CLIENTS = {
    "openai": Client(("openai==3.57.0",)),
    "langchain": Client(("langchain-openai==1.7.4",)),
    "llamaindex": Client(("llama-index-llms-openai-like==0.8.1",)),
    "litellm": Client(("litellm==1.110.2",)),
    "lorax-client": Client(("lorax-client==0.6.3",)),
    "inference-client": Client(("huggingface_hub==2.4.0", "pydantic==2.13.0")),
    "lm-eval": Client(("lm-eval[api]==0.4.13",), torch=True),
}
