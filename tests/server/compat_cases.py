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
TALK = [{"role": "user", "content": "Hello"}]
BODIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        CHAT: {"messages": TALK, "max_tokens": 12, "temperature": 0},
        COMPLETION: {"prompt": "Hello", "max_tokens": 12, "temperature": 0},
        RESPONSES: {"input": "Hello", "max_output_tokens": 12, "temperature": 0},
        DECISIONS: {"input": "Blue.", "questions": [{"type": "predicate", "instructions": "A colour."}]},
        NATIVE: {"inputs": "Hello", "parameters": {"max_new_tokens": 12}},
        "/tokenize": {"inputs": "Hello"},
        "/chat_tokenize": {"messages": TALK},
        "/detokenize": {"tokens": [2, 40, 41]},
    }
)
"""A request without fields that a case has not; the greedy answer is the same each time."""


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
        reply = self.json[0] if isinstance(self.json, list) else self.json
        if "choices" in reply:
            return [one["text"] if "text" in one else one["message"]["content"] for one in reply["choices"]]
        if "output" in reply:
            return ["".join(part["text"] for item in reply["output"] for part in item["content"])]
        if "content" in reply:
            return ["".join(block["text"] for block in reply["content"])]
        return [reply["generated_text"]]

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def count(self) -> int:
        """How many tokens the answer has."""
        usage = self.json.get("usage") or self.json["details"]
        return next(
            usage[name] for name in ("completion_tokens", "output_tokens", "generated_tokens") if name in usage
        )


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
    ``test`` names a test that exists already, ``ignored`` fields are accepted without effect.
    """

    fields: str
    value: Any = None
    routes: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    same_as: Mapping[str, Any] | None = None
    check: Callable[[Seen], bool] | None = None
    test: str = ""
    ignored: bool = False
    note: str = ""


NATIVE_SIDE = (NATIVE, "/tokenize")
HOT = {"temperature": 2, "seed": 7}
ENDS = {"logit_bias": {"1": 100}}  # <|end|>
BRACKETS = {"logit_bias": {"10": 100}}  # each token is "("
SCHEMA = {"type": "json_schema", "name": "five", "schema": {"const": 5}}
TOOLS = "test_openai_tools.py::"
KEPT = "test_responses_client.py::"
CALLED = "test_responses_tools.py::"
TOOLS_GIVEN = [{"type": "function", "function": {"name": "f"}}]
UNUSED = "Listed as ignored where the model's chat template does not use it."

CASES: tuple[Case, ...] = (
    # How many tokens, and where they end
    Case("max_tokens max_completion_tokens", 3, (CHAT, COMPLETION), check=lambda seen: seen.count == 3),
    Case("max_output_tokens", 3, check=lambda seen: seen.count == 3),
    Case("parameters.max_new_tokens", 3, (NATIVE,), {"details": True}, check=lambda seen: seen.count == 3),
    Case("min_tokens", 5, (CHAT, COMPLETION, RESPONSES), ENDS, check=lambda seen: seen.count >= 5),
    Case("parameters.min_tokens", 5, (NATIVE,), {"details": True, **ENDS}, check=lambda seen: seen.count >= 5),
    Case("stop parameters.stop", lambda base: [stop_of(base)], check=is_cut),
    Case("stop_token_ids parameters.stop_token_ids", [10], given=BRACKETS, check=lambda seen: seen.text in ("", "(")),
    Case("ignore_eos ignore_eos_token parameters.ignore_eos_token", True, given={**ENDS, "details": True}),
    Case("include_stop_str_in_output no_stop_trim", True, given={"stop": "((", **BRACKETS}, check=is_text("((")),
    # Sampling
    Case("temperature parameters.temperature", 2.0, given={"seed": 7}),
    Case("top_p parameters.top_p min_p parameters.min_p", 0.000001, given=HOT),
    Case("top_k parameters.top_k", 1, given=HOT, same_as={"temperature": 0}),
    Case("typical_p parameters.typical_p", 0.05, given=HOT),
    Case("seed parameters.seed", 7, given={"temperature": 2}, check=repeats),
    Case("parameters.do_sample", True, given={"seed": 7}),
    Case("logit_bias parameters.logit_bias", {"10": 100}, check=lambda seen: set(seen.text) == {"("}),
    Case(
        "frequency_penalty presence_penalty parameters.frequency_penalty parameters.presence_penalty",
        2.0,
        given={"logit_bias": {"10": 1.5}},
    ),
    Case("repetition_penalty parameters.repetition_penalty", 1.9),
    Case("n", 3, check=lambda seen: len(seen.texts) == 3),
    Case("best_of", test="test_openai_completions.py::test_best_of_returns_the_most_likely"),
    Case("parameters.best_of", 2, (NATIVE,), {"details": True, **HOT, "seed": None}),
    # What is reported
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
    Case("add_special_tokens", True, (CHAT,)),
    Case("add_generation_prompt", False, (CHAT,)),
    Case("continue_final_message", True, (CHAT,)),
    Case("chat_template_kwargs", test="test_text_workers.py::test_what_a_template_leaves_out"),
    Case("documents", test="test_foreign_fields.py::test_documents"),
    Case("parameters.apply_chat_template", True, (NATIVE,)),
    Case("cache_salt parameters.cache_salt", test="test_cache_salt.py::test_keys_never_share_blocks"),
    # Models and adapters
    Case("model", "pirate", (CHAT, COMPLETION, RESPONSES, DECISIONS, NATIVE)),
    Case("lora_path adapter_id", "pirate", same_as={"model": "pirate"}),
    Case("parameters.adapter_id parameters.model", "pirate", (NATIVE,), same_as={"model": "pirate"}),
    Case("adapter_source parameters.adapter_source", test="test_naming_adapters.py::test_where_it_has_no_effect"),
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
    Case("reasoning_effort", test=f"{TOOLS}test_an_effort_switches_reasoning_on_and_off"),
    Case("include_reasoning separate_reasoning", test=f"{TOOLS}test_reasoning_is_apart_from_the_answer"),
    Case("thinking_token_budget", test=f"{TOOLS}test_a_budget_ends_the_reasoning", routes=(CHAT,)),
    Case("tools", TOOLS_GIVEN, ("/tokenize", "/chat_tokenize"), ignored=True, note=UNUSED),
    Case("chat_template_kwargs", {"enable_thinking": True}, ("/tokenize", "/chat_tokenize"), ignored=True, note=UNUSED),
    # Responses
    Case("tools parallel_tool_calls tool_choice", test=f"{CALLED}test_a_demanded_function_is_called_and_its_result_continues", routes=(RESPONSES,)),
    Case("thinking_token_budget", test=f"{CALLED}test_reasoning_is_an_item_before_the_message", routes=(RESPONSES,)),
    Case("reasoning.effort", test=""),
    Case("include", ["message.output_text.logprobs"]),
    Case("truncation", "disabled", note="Only disabled: an input that is too long is an error."),
    Case("store", test=f"{KEPT}test_what_is_not_to_be_stored_is_not"),
    Case("previous_response_id", test=f"{KEPT}test_items_that_are_fed_back_continue_as_the_stored_response"),
    Case("background", test=f"{KEPT}test_a_background_response_is_polled"),
    Case("metadata", {"a": "b"}, check=lambda seen: seen.json["metadata"] == {"a": "b"}),
    Case("text.verbosity", "low", ignored=True),
    Case("reasoning.summary reasoning.generate_summary reasoning.context reasoning.mode", "auto", ignored=True),
    # Decisions
    Case("questions", [{"type": "predicate", "instructions": "A shape."}]),
    # Tokens
    Case("tokens", [40, 41, 42]),
    Case("skip_special_tokens", True, ("/detokenize",)),
)
