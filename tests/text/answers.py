"""Published chat templates, what they make of an assistant's message, and what the parser makes of that."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from truffula.items import Part, Reasoning, Text, Tool, ToolCallPart
from truffula.text.output_parser import make_parser
from truffula.text.sandbox import template_environment
from truffula.text.tool_formats import OutputFormat, detect_format

FOLDER = Path(__file__).with_name("templates")
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "opts": {"type": "object"},
        "items": {"type": "array"},
        "maybe": {"type": ["string", "null"]},
        "kind": {"$ref": "#/$defs/kind"},
    },
    "$defs": {"kind": {"enum": ["a", "b"]}},
}
SIMPLE = {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}}
TOOLS = [Tool(name="get_weather", description="Weather.", parameters=PARAMETERS), Tool(name="ping", description="No.")]


@dataclass(frozen=True)
class Model:
    """A template, the formats that it has, and what it can write.

    ``thinks`` is the key of the reasoning in a message; "": it writes none. ``text``: whether it writes text beside
    calls; ``several``: whether it writes several calls. ``arguments``: as what it expects them.
    """

    name: str
    tools: str | None
    reasoning: str | None
    end: str
    thinks: str = ""
    text: bool = True
    several: bool = True
    arguments: str = "object"


MODELS = [
    Model("qwen2_5", "hermes", None, "<|im_end|>\n"),
    Model("qwen3", "hermes", "think", "<|im_end|>\n", "reasoning_content"),
    Model("hermes_3", "hermes", None, "<|im_end|>\n", text=False),
    Model("granite_4", "hermes", None, "<|end_of_text|>\n"),
    Model("qwen3_coder", "qwen3_coder", None, "<|im_end|>\n"),
    Model("qwen3_5", "qwen3_coder", "think", "<|im_end|>\n", "reasoning_content"),
    Model("nemotron_3", "qwen3_coder", "think", "\n<|im_end|>\n", "reasoning_content"),
    Model("seed_oss", "seed_oss", "seed_oss", "<seed:eos>", "reasoning_content"),
    Model("minimax_m2", "minimax_m2", "think", "[e~[\n", "reasoning_content"),
    Model("glm_4_6", "glm4_5", "think", "", "reasoning_content"),
    Model("glm_4_7", "glm4_7", "think", "", "reasoning_content"),
    Model("llama_3_1", "llama_json", None, "<|eot_id|>", text=False, several=False),
    Model("llama_3_2_pythonic", "llama_pythonic", None, "<|eot_id|>", text=False, arguments="python"),
    Model("lfm2", "lfm2", None, "<|im_end|>\n"),
    Model("mistral_nemo", "mistral_json", None, "</s>", text=False),
    Model("mistral_small_3_2", "mistral", None, "</s>", text=False),
    Model("ministral_3", "mistral", "mistral", "</s>"),
    Model("deepseek_v3", "deepseek_v3", "think", "<｜end▁of▁sentence｜>", arguments="text"),
    Model("deepseek_v3_1", "deepseek_v3_1", "think", "<｜end▁of▁sentence｜>"),
    Model("deepseek_v3_2", "deepseek_v3_2", "think", "<｜end▁of▁sentence｜>", "reasoning_content"),
    Model("deepseek_v4", "deepseek_v4", "think", "<｜end▁of▁sentence｜>", "reasoning_content"),
    Model("kimi_k2", "kimi_k2", None, "<|im_end|>"),
    Model("nemotron_nano", "nemotron_nano", "think", "<SPECIAL_12>\n\n", text=False),
    Model("gpt_oss", "harmony", "harmony", "", "thinking", text=False, several=False),
    Model("gemma_4", "gemma4", "gemma4", "<|tool_response>", "reasoning"),
]


@cache
def template(name: str) -> tuple[str, jinja2.Template]:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return source, template_environment().from_string(source)


def format_of(model: Model) -> OutputFormat:
    return detect_format(template(model.name)[0])


Call = tuple[str, dict[str, Any]]


def rendered(model: Model, text: str, reasoning: str, calls: Sequence[Call]) -> tuple[str, str]:
    """The prompt, and the assistant's part of the conversation, without the token that ends it."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if model.thinks and reasoning:
        message[model.thinks] = reasoning
    made = {
        "object": lambda given: given,
        "text": lambda given: json.dumps(given, ensure_ascii=False),
        "python": lambda given: {key: repr(value) for key, value in given.items()},
    }[model.arguments]
    if calls:
        message["tool_calls"] = [
            {"id": f"call{i:05}", "type": "function", "function": {"name": name, "arguments": made(arguments)}}
            for i, (name, arguments) in enumerate(calls)
        ]
    render = template(model.name)[1].render
    tools = [Tool(name="ping", description="No.", parameters=SIMPLE).for_template()]
    kwargs = {"tools": tools, "bos_token": "<s>", "eos_token": "</s>", "enable_thinking": True}
    chat = [{"role": "user", "content": "hi"}]
    prompt = render(messages=chat, add_generation_prompt=True, **kwargs)
    full = render(messages=[*chat, message], add_generation_prompt=False, **kwargs)
    same = next((i for i, pair in enumerate(zip(prompt, full, strict=False)) if pair[0] != pair[1]), len(prompt))
    while same < len(prompt) and full[same - 1] not in ">\n":
        same -= 1  # the prompt and the answer differ within a marker
    return full[:same], full[same:].removesuffix(model.end)


@dataclass
class Answer:
    """The folded parts of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    @property
    def parsed(self) -> list[Call]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def fold(parts: Iterable[Part]) -> Answer:
    answer = Answer()
    for part in parts:
        if isinstance(part, Text):
            assert part.text
            answer.text += part.text
        elif isinstance(part, Reasoning):
            assert part.text
            answer.reasoning += part.text
        else:
            assert isinstance(part, ToolCallPart)
            if part.id:
                assert part.index == len(answer.calls) and part.name
                answer.calls.append([part.name, ""])
                answer.ids.append(part.id)
            assert part.index == len(answer.calls) - 1
            answer.calls[-1][1] += part.arguments
    return answer


def parse(
    fmt: OutputFormat,
    pieces: Iterable[str],
    prompt: str = "",
    tools: Sequence[Tool] = TOOLS,
    special: Sequence[str] = (),
    whole: bool = False,
) -> Answer:
    parser = make_parser(fmt, tools, prompt_tail=prompt, special_tokens=special, whole=whole)
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return fold([*parts, *parser.finish()])
