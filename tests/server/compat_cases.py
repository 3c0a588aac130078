"""Every field of every route's body, each with an example value and what it must do: ``docs/compatibility.md`` and
``test_compatibility.py`` are made from this table.

A case is sent with ``value``, and must be accepted and answered in another way than without it; ``same_as`` and
``check`` say more. Names of fields are those of the OpenAI routes where others have a name of their own for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
DECISIONS, NATIVE = "/v1/decisions", "/generate"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
TALK = [{"role": "user", "content": "Hello"}]
BODIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        CHAT: {"messages": TALK, "max_tokens": 12, "temperature": 0},
        COMPLETION: {"prompt": "Hello", "max_tokens": 12, "temperature": 0},
        RESPONSES: {"input": "Hello", "max_output_tokens": 12, "temperature": 0},
        DECISIONS: {"input": "Blue.", "questions": [{"type": "predicate", "instructions": "A colour."}]},
        MESSAGES: {"messages": TALK, "max_tokens": 12, "temperature": 0},
        COUNT: {"messages": TALK},
        NATIVE: {"inputs": "Hello", "parameters": {"max_new_tokens": 12}},
        "/tokenize": {"inputs": "Hello"},
        "/chat_tokenize": {"messages": TALK},
        "/detokenize": {"tokens": [2, 40, 41]},
    }
)
"""A request without fields that a case has not; the greedy answer is the same each time."""


TEMPLATE = (
    "{% for m in messages %}<|role|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{{ tools }}{{ documents }}{{ reasoning_effort }}{{ mood }}"
    "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)
"""A chat template that writes whatever it is given."""


NEW = frozenset({"id", "created", "created_at", "completed_at", "item_id", "request_id", "model", "obfuscation"})


def plain(value: Any) -> Any:
    """An answer without what differs each time, and without the name of the model."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items() if name not in NEW}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Seen:
    """The answer to a case; ``base`` is the one without its field, ``ask`` sends the case with more fields."""

    json: Any
    headers: Mapping[str, str]
    base: Seen | None
    ask: Callable[..., Seen]

    @property
    def texts(self) -> list[str]:
        """The texts of the answer's choices."""
        reply = self.json
        if "choices" in reply:
            return [one["text"] if "text" in one else one["message"]["content"] for one in reply["choices"]]
        if "output" in reply:
            return ["".join(part["text"] for item in reply["output"] for part in item["content"])]
        if "content" in reply:
            return ["".join(block["text"] for block in reply["content"])]
        return [reply["generated_text"]]

    @property
    def answer(self) -> Any:
        """The texts of a whole answer, or all of an answer that has none."""
        texts = isinstance(self.json, dict) and {"choices", "output", "content", "generated_text"} & {*self.json}
        return self.texts if texts else plain(self.json)

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def count(self) -> int:
        """How many tokens the answer has."""
        usage = self.json.get("usage") or self.json["details"]
        return next(usage[name] for name in ("completion_tokens", "output_tokens", "generated_tokens") if name in usage)


def is_text(text: str) -> Callable[[Seen], bool]:
    return lambda seen: seen.text == text


def repeats(seen: Seen) -> bool:
    """Whether the seed repeats the answer, and another gives another."""
    return seen.ask().texts == seen.texts != seen.ask(seed=8).texts


def is_cut(seen: Seen) -> bool:
    """Whether the text ends before the stop string, or with it on LoRAX's side."""
    assert seen.base is not None
    before, stop, _ = seen.base.text.partition(stop_of(seen.base))
    return seen.text in (before, before + stop)


def stop_of(base: Seen) -> str:
    return base.text[3:5]


@dataclass(frozen=True)
class Case:
    """``fields`` are names with one meaning, ``routes`` the routes where they have it (default: all that have them).

    ``given`` are further fields of both requests. With ``same_as``, the answer is the one to these fields instead.
    ``test`` names a test that exists already. What is ``ignored`` has no effect and is listed, what is ``neutral``
    changes no answer and is not listed. What is ``refused`` is so although clients of this very route send it.
    """

    fields: str
    value: Any = None
    routes: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    same_as: Mapping[str, Any] | None = None
    check: Callable[[Seen], bool] | None = None
    test: str = ""
    ignored: bool = False
    neutral: bool = False
    refused: bool = False
    note: str = ""


NATIVE_SIDE = (NATIVE, "/tokenize")
HOT = {"temperature": 2, "seed": 7}
ENDS = {"logit_bias": {"1": 100}}  # <|end|>
BRACKETS = {"logit_bias": {"10": 100}}  # each token is "("
SCHEMA = {"type": "json_schema", "name": "five", "schema": {"const": 5}}
TOOLS = "test_openai_tools.py::"
KEPT = "test_responses_client.py::"
CALLED = "test_responses_tools.py::"
ANTHROPIC = "test_messages_tools.py::"
ADAPTERS, RELOAD = ("/v1/adapters",), ("/v1/adapters/{name:path}/reload",)
ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter")
TOOLS_GIVEN = [{"type": "function", "function": {"name": "f"}}]
BY_TEMPLATE = "Where the model's chat template does not use it, it is listed as ignored."

CASES: tuple[Case, ...] = (
    # How many tokens, and where they end
    Case("max_tokens max_completion_tokens", 3, (CHAT, COMPLETION), check=lambda seen: seen.count == 3),
    Case("max_output_tokens", 3, check=lambda seen: seen.count == 3),
    Case("parameters.max_new_tokens", 3, (NATIVE,), {"details": True}, check=lambda seen: seen.count == 3),
    Case("min_tokens", 5, (CHAT, COMPLETION, RESPONSES), ENDS, check=lambda seen: seen.count >= 5),
    Case("parameters.min_tokens", 5, (NATIVE,), {"details": True, **ENDS}, check=lambda seen: seen.count >= 5),
    Case("stop parameters.stop", lambda base: [stop_of(base)], check=is_cut),
    Case("stop_token_ids parameters.stop_token_ids", [10], given=BRACKETS, check=lambda seen: seen.text in ("", "(")),
    Case("ignore_eos ignore_eos_token", True, given=ENDS),
    Case("parameters.ignore_eos_token", True, given={"details": True, **ENDS}),
    Case("include_stop_str_in_output no_stop_trim", True, given={"stop": "((", **BRACKETS}, check=is_text("((")),
    # Sampling
    Case("temperature parameters.temperature", 2.0, given={"seed": 7}),
    Case("top_p parameters.top_p", 0.000001, given=HOT, same_as={"temperature": 0}),
    Case("min_p parameters.min_p", 1.0, given=HOT, same_as={"temperature": 0}),
    Case("top_k parameters.top_k", 1, given=HOT, same_as={"temperature": 0}),
    Case("typical_p parameters.typical_p", 0.05, given=HOT),
    Case("seed parameters.seed", 7, given={"temperature": 2}, check=repeats),
    Case("parameters.do_sample", True, given={"seed": 7}),
    Case("logit_bias parameters.logit_bias", {"10": 100}, check=lambda seen: set(seen.text) == {"("}),
    Case(
        "frequency_penalty presence_penalty parameters.frequency_penalty parameters.presence_penalty",
        2.0,
        given={"logit_bias": {str(i): 50 for i in range(10, 16)}},
    ),
    Case("repetition_penalty parameters.repetition_penalty", 1.9),
    Case("n", 3, check=lambda seen: len(seen.texts) == 3),
    Case("best_of", test="test_openai_completions.py::test_best_of_returns_the_most_likely"),
    Case("parameters.best_of", 2, (NATIVE,), {"details": True, **HOT, "seed": None}),
    # What is reported
    Case("stream", test="test_lorax_native.py::test_a_stream_is_an_event_a_token", routes=(NATIVE,)),
    Case("stream", True, check=lambda seen: seen.headers["content-type"] == "text/event-stream"),
    Case("stream_options.include_usage", True, given={"stream": True}),
    Case("stream_options.continuous_usage_stats", True, given={"stream": True, "stream_options.include_usage": True}),
    Case("stream_options.include_obfuscation", True, given={"stream": True}, ignored=True),
    Case("logprobs", 2, (COMPLETION,)),
    Case("logprobs", True, (CHAT,)),
    Case("top_logprobs", 2, (CHAT,), {"logprobs": True}),
    Case("top_logprobs", 2, (RESPONSES,)),
    Case("prompt_logprobs", 1),
    Case("echo", True, check=lambda seen: seen.base is not None and seen.text == "Hello" + seen.base.text),
    Case("return_token_ids", True),
    Case("return_tokens_as_token_ids", True, (COMPLETION,), {"logprobs": 1}),
    Case("return_tokens_as_token_ids", True, (CHAT,), {"logprobs": True}),
    Case("skip_special_tokens", False, given={"logit_bias": {"2": 100}}),
    Case("request_id rid", "mine", check=lambda seen: seen.headers["x-request-id"] == "mine"),
    Case("parameters.return_full_text parameters.details", True, (NATIVE,)),
    Case("parameters.decoder_input_details", True, (NATIVE,), {"details": True}),
    Case("parameters.return_k_alternatives parameters.top_n_tokens", 2, (NATIVE,), {"details": True}),
    # The prompt
    Case("prompt", "Another", (COMPLETION,)),
    Case("messages", [{"role": "user", "content": "Another"}], (CHAT, "/chat_tokenize")),
    Case("input", "Another", (RESPONSES, DECISIONS)),
    Case("inputs", "Another", (NATIVE, "/tokenize")),
    Case("instructions", "Be kind."),
    Case("suffix", test=f"{TOOLS}test_a_suffix_is_part_of_the_prompt"),
    Case("truncate_prompt_tokens parameters.truncate", 2, (CHAT, COMPLETION, RESPONSES, NATIVE)),
    Case("add_special_tokens", False, (COMPLETION, "/tokenize")),
    Case("add_special_tokens", True, (CHAT, "/chat_tokenize")),
    Case("add_generation_prompt", False, (CHAT, "/chat_tokenize")),
    Case("continue_final_message", True, (CHAT, "/chat_tokenize")),
    Case("add_generation_prompt", False, ("/tokenize",), {"inputs": None, "messages": TALK}),
    Case("continue_final_message", True, ("/tokenize",), {"inputs": None, "messages": TALK}),
    Case("tools documents", TOOLS_GIVEN, ("/tokenize",), {"inputs": None, "messages": TALK}, note=BY_TEMPLATE),
    Case(
        "chat_template_kwargs", {"mood": "calm"}, ("/tokenize",), {"inputs": None, "messages": TALK}, note=BY_TEMPLATE
    ),
    Case("reasoning_effort", "low", ("/tokenize",), {"inputs": None, "messages": TALK}, note=BY_TEMPLATE),
    Case("chat_template_kwargs", {"mood": "calm"}, note=BY_TEMPLATE),
    Case("documents", [{"text": "Rain."}], note=BY_TEMPLATE),
    Case("parameters.apply_chat_template", True, (NATIVE,)),
    Case("cache_salt parameters.cache_salt", test="test_cache_salt.py::test_keys_never_share_blocks"),
    # Models and adapters
    Case("model", "pirate", (CHAT, COMPLETION, RESPONSES, MESSAGES, DECISIONS, NATIVE)),
    Case("lora_path adapter_id", "pirate", (CHAT, COMPLETION, RESPONSES, DECISIONS), same_as={"model": "pirate"}),
    Case("parameters.adapter_id parameters.model", "pirate", (NATIVE,), same_as={"model": "pirate"}),
    Case("merged_adapters", {"ids": ["pirate"]}, (CHAT, COMPLETION, RESPONSES), same_as={"model": "pirate"}),
    Case(
        "parameters.merged_adapters",
        {"ids": ["pirate", "pirate"], "weights": [0.5, 0.5]},
        (NATIVE,),
        same_as={"model": "pirate"},
    ),
    Case(
        "adapter_source parameters.adapter_source",
        test="test_unknown_names.py::test_the_operator_is_told_the_name_and_the_reason_once",
    ),
    Case("api_token parameters.api_token", "hf_x", (CHAT, COMPLETION, RESPONSES, NATIVE), ignored=True),
    # What the answer must match
    Case("guided_regex regex", "abc", check=is_text("abc")),
    Case("guided_choice", ["abc"], check=is_text("abc")),
    Case("guided_grammar ebnf", 'root ::= "abc"', check=is_text("abc")),
    Case("guided_json json_schema", {"const": 5}, check=is_text("5")),
    Case("structured_outputs", {"choice": ["abc"]}, check=is_text("abc")),
    Case("structural_tag", {"format": {"type": "const_string", "value": "abc"}}, check=is_text("abc")),
    Case("response_format", {"type": "json_schema", "json_schema": SCHEMA}, check=is_text("5")),
    Case("text.format", SCHEMA, check=is_text("5")),
    Case("parameters.response_format", {"type": "json_object", "schema": {"const": 5}}, (NATIVE,), check=is_text("5")),
    Case("parameters.grammar", {"type": "regex", "value": "abc"}, (NATIVE,), check=is_text("abc")),
    # Tools and reasoning
    Case("tools", test=f"{TOOLS}test_a_text_and_two_calls", routes=(CHAT,)),
    Case("tool_choice", test=f"{TOOLS}test_a_demanded_call_is_made", routes=(CHAT,)),
    Case("parallel_tool_calls", test=f"{TOOLS}test_at_most_one_call", routes=(CHAT,)),
    Case("reasoning_effort reasoning.effort", "low", note=BY_TEMPLATE),
    Case("include_reasoning separate_reasoning", test=f"{TOOLS}test_reasoning_is_apart_from_the_answer"),
    Case("thinking_token_budget", test=f"{TOOLS}test_a_budget_ends_the_reasoning", routes=(CHAT,)),
    Case("tools", TOOLS_GIVEN, ("/chat_tokenize",), note=BY_TEMPLATE),
    # Responses
    Case(
        "tools parallel_tool_calls tool_choice",
        test=f"{CALLED}test_a_demanded_function_is_called_and_its_result_continues",
        routes=(RESPONSES,),
    ),
    Case("thinking_token_budget", test=f"{CALLED}test_reasoning_is_an_item_before_the_message", routes=(RESPONSES,)),
    Case("include", ["message.output_text.logprobs"]),
    Case("truncation", "disabled", neutral=True),
    Case("store", test=f"{KEPT}test_what_is_not_to_be_stored_is_not"),
    Case("previous_response_id", test=f"{KEPT}test_items_that_are_fed_back_continue_as_the_stored_response"),
    Case("background", test=f"{KEPT}test_a_background_response_is_polled"),
    Case("metadata", {"a": "b"}, check=lambda seen: seen.json["metadata"] == {"a": "b"}),
    Case("text.verbosity", "low", ignored=True),
    Case("reasoning.summary reasoning.generate_summary reasoning.context reasoning.mode", "auto", ignored=True),
    # Messages
    Case("system", "Be kind."),
    Case("temperature", 1.0, (MESSAGES,)),
    Case("top_p", 0.000001, (MESSAGES,), {"temperature": 1}, same_as={"temperature": 0}),
    Case("top_k", 1, (MESSAGES,), {"temperature": 1}, same_as={"temperature": 0}),
    Case("messages", [{"role": "user", "content": "Another"}], (MESSAGES, COUNT)),
    Case("max_tokens", 3, (MESSAGES,), check=lambda seen: seen.count == 3),
    Case("stop_sequences", lambda base: [stop_of(base)], check=is_cut),
    Case("tools", [{"name": "f", "input_schema": {"type": "object"}}], (MESSAGES, COUNT), note=BY_TEMPLATE),
    Case("tool_choice.type tool_choice.name", test=f"{ANTHROPIC}test_a_call_that_must_be_made"),
    Case("tool_choice.disable_parallel_tool_use", test=f"{ANTHROPIC}test_a_choice_of_one_call"),
    Case("thinking.type thinking.budget_tokens thinking.display", test=f"{ANTHROPIC}test_thinking"),
    Case("output_config.effort", "low", note=BY_TEMPLATE),
    Case("output_config.format", {"type": "json_schema", "schema": {"const": 5}}, (MESSAGES,), check=is_text("5")),
    Case("output_format", {"type": "json_schema", "schema": {"const": 5}}, (MESSAGES,), check=is_text("5")),
    Case("output_config.format output_format", {"type": "json_schema", "schema": {"const": 5}}, (COUNT,), neutral=True),
    Case("cache_control", {"type": "ephemeral"}, neutral=True, note="Prompts are cached without it."),
    Case(
        "context_management.edits",
        [{"type": "clear_thinking_20251015", "keep": "all"}],
        neutral=True,
        note="Only edits that keep all of the conversation; others are refused.",
    ),
    Case("thread", {"id": "t"}, refused=True, note="No conversation is stored; send it whole."),
    # Decisions
    Case("questions", [{"type": "predicate", "instructions": "A shape."}]),
    # Tokens
    Case("tokens", [40, 41, 42]),
    Case("prompt messages return_token_strs", test="test_probes.py::test_tokenize_as_vllm", routes=("/tokenize",)),
    Case(
        "model",
        "pirate",
        (COUNT, "/tokenize", "/chat_tokenize", "/detokenize"),
        neutral=True,
        note="It must be served. All have the same tokens.",
    ),
    Case("parameters", {"top_k": 3}, ("/tokenize",), ignored=True, note="How to generate changes no token."),
    Case("skip_special_tokens", True, ("/detokenize",)),
    # Administration
    Case(
        "lora_name lora_path load_inplace", test="test_server_auth.py::test_adapters_by_an_administrator", routes=ADMIN
    ),
    Case("pinned", test="test_vllm_routes.py::test_sglangs_forms", routes=ADMIN),
    Case("expected_generation", test="test_adapter_lifecycle.py::test_reload_is_compare_and_set"),
    Case("adapters load replace", test="test_adapter_lifecycle.py::test_registering_one_and_many", routes=ADAPTERS),
    Case("source", test="test_adapter_lifecycle.py::test_reload_is_compare_and_set", routes=RELOAD),
    Case(
        "target targets shadow shadow_percent",
        test="test_adapter_lifecycle.py::test_a_shadow_gets_a_copy_and_changes_nothing",
    ),
)
