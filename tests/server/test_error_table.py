"""The table that turns codes into HTTP: complete, and of one shape a side."""

import pytest

import truffula.errors as errors
import truffula.lora.worker  # noqa: F401  (the engine's process has its errors, too)
from truffula.errors import ErrorInfo, TruffulaError
from truffula.server.errors import TABLE, dialect_of, error_body, error_headers, from_validation, render, status_of


def every_error(root=TruffulaError):
    yield root
    for child in root.__subclasses__():
        yield from every_error(child)


@pytest.mark.parametrize("cls", sorted(set(every_error()), key=lambda c: c.code), ids=lambda c: c.code)
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/messages", "/api/chat"])
def test_every_code_has_a_row_and_renders(cls, path):
    assert cls.code in TABLE, f"{cls.__name__} has no row in server/errors.py"
    response = render(
        errors.TruffulaError.from_info(ErrorInfo(code=cls.code, message="What happened.", param="field")),
        dialect_of(path),
    )
    assert 400 <= response.status_code < 600
    assert response.headers["content-type"] == "application/json"
    assert b"What happened." in response.body


@pytest.mark.parametrize("code", sorted({cls.code for cls in every_error()}))
def test_every_code_comes_back_as_an_error_with_all_that_was_sent(code):
    """Also where a class of that code has another constructor, as the loading worker's own has."""
    info = ErrorInfo(code=code, message="Why.", param="field", data={"limit": 3})
    back = TruffulaError.from_info(info)
    assert back.info() == info and "code" in vars(type(back)) | vars(back)


@pytest.mark.parametrize(
    ("cls", "native", "openai"),
    [
        (errors.InvalidRequest, (422, "validation"), (400, "invalid_request_error", "invalid_request")),
        (errors.PromptTooLong, (422, "validation"), (400, "invalid_request_error", "context_length_exceeded")),
        (errors.AdapterNotFound, (424, "generation"), (404, "invalid_request_error", "model_not_found")),
        (errors.AdapterError, (424, "generation"), (400, "invalid_request_error", "adapter_invalid")),
        (errors.Overloaded, (429, "overloaded"), (429, "rate_limit_error", "overloaded")),
        (errors.QueueTimeout, (503, "overloaded"), (503, "server_error", "queue_timeout")),
        (errors.DeadlineExceeded, (504, "generation"), (504, "server_error", "deadline_exceeded")),
        (errors.EngineDied, (503, "incomplete_generation"), (503, "server_error", "engine_died")),
        (errors.GrammarError, (424, "generation"), (400, "invalid_request_error", "grammar_failed")),
        (errors.GenerationError, (424, "generation"), (500, "server_error", "generation_failed")),
        (errors.TemplateError, (422, "template_error"), (400, "invalid_request_error", "template_error")),
        (errors.NoTokenizer, (404, "no fast tokenizer"), (404, "invalid_request_error", "no_tokenizer")),
    ],
)
def test_the_contract_of_statuses(cls, native, openai):
    error = cls("It went wrong.")
    body = error_body(error, "openai")["error"]
    assert (status_of(error, "native"), error_body(error, "native")["error_type"]) == native
    assert (status_of(error, "openai"), body["type"], body["code"]) == openai


def test_native_messages_begin_as_callers_match_them():
    for code, words in {
        "invalid_request": "Input validation error: ",
        "generation_failed": "Request failed during generation: ",
        "overloaded": "Model is overloaded",
        "engine_died": "Incomplete generation",
    }.items():
        assert error_body(TruffulaError.from_info(ErrorInfo(code=code, message="Why.")), "native")["error"].startswith(
            words
        )


def test_only_what_may_be_retried_says_when():
    assert error_headers(errors.Overloaded("Full.", retry_after_s=7), "native") == {"retry-after": "7"}
    assert error_headers(errors.QueueTimeout("Late."), "openai") == {"retry-after": "1"}
    assert error_headers(errors.InvalidRequest("Wrong."), "openai") == {}


def test_a_lone_surrogate_in_a_message_still_reaches_the_client():
    assert rb"bad \\ud800" in render(errors.InvalidRequest("bad \ud800"), "openai").body


def test_an_unknown_code_of_a_newer_engine_is_a_fault_of_ours():
    assert status_of(TruffulaError.from_info(ErrorInfo(code="novel", message="?")), "openai") == 500


@pytest.mark.parametrize(
    ("path", "side"),
    [
        *(("/v1/models", "openai"), ("/v1", "openai"), ("/v1x", "native"), ("/generate", "native"), ("/", "native")),
        *(("/chat/completions", "openai"), ("/v1/messages", "anthropic"), ("/v1/messages/count_tokens", "anthropic")),
        *(("/v1/messagesx", "openai"), ("/api/chat", "ollama"), ("/api-doc/openapi.json", "native")),
    ],
)
def test_side_by_path(path, side):
    assert dialect_of(path) == side


def test_validation_errors_name_the_field_and_not_the_input():
    from pydantic import ValidationError

    from truffula.server.openai_bodies import ChatBody, CompletionBody

    cases = [
        (CompletionBody, {"prompt": "a", "temperature": True}, "temperature"),
        (CompletionBody, {"prompt": "a", "stop": ["a", 3]}, "stop"),
        (CompletionBody, {"prompt": [[1, True]]}, "prompt"),
        (CompletionBody, {}, "prompt"),
        (ChatBody, {"messages": "x" * 10_000}, "messages"),
        (ChatBody, {"messages": [5]}, "messages[0]"),
    ]
    for model, value, param in cases:
        with pytest.raises(ValidationError) as caught:
            model.model_validate(value)
        error = from_validation(caught.value)
        assert error.param is not None
        assert error.param.startswith(param)
        assert len(error.message) < 400
