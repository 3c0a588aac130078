"""What is installed for the clients of docs/clients, by the names of their pages, and the model that they ask."""

from __future__ import annotations

import json
from pathlib import Path

from live_server import write_model

PACKAGES = {
    "openai": ("openai==3.57.0",),
    "langchain": ("langchain-openai==1.7.4",),
    "llamaindex": ("llama-index-llms-openai-like==0.8.1",),
    "litellm": ("litellm==1.110.2",),
    "lorax-client": ("lorax-client==0.6.3", "text-generation==0.7.0", "huggingface_hub==0.36.2"),
    "inference-client": ("huggingface_hub==2.4.0", "aiohttp"),
    "lm-eval": ("lm-eval[api]==0.4.13",),
}
TEMPLATE = (
    "{% if tools %}Tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}\n"
    'Answer with <tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>{% endif %}'
    "{% for m in messages %}<|role|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)


def write_tools_model(folder: Path) -> Path:
    """A tiny model whose chat template has tools, in Hermes' form."""
    model = write_model(folder, max_position_embeddings=4096)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return model
