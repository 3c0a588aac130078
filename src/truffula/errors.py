"""All errors that truffula raises deliberately.

    TruffulaError
    ├── ConfigError              an option is invalid                  config_invalid
    ├── InvalidRequest           a field of a request is invalid       invalid_request
    │   ├── PromptTooLong        ... the prompt does not fit           prompt_too_long
    │   └── TemplateError        ... the chat template failed          template_error
    ├── ModelNotFound            no such base model                    model_not_found
    ├── UnsupportedModel         a config needs an unsupported feature model_unsupported
    ├── CheckpointError          files of a model are invalid          checkpoint_invalid
    │   ├── TyingError           embedding or head is missing          checkpoint_tying
    │   └── CheckpointChanged    ... changed while served              checkpoint_changed
    ├── AdapterNotFound          no such adapter                       adapter_not_found
    ├── AdapterError             an adapter is invalid or unsupported  adapter_invalid
    ├── AdapterLoadError         loading it failed (may be retried)    adapter_load_failed
    ├── InsufficientMemory       not enough memory                     insufficient_memory
    ├── Overloaded               the queue is full                     overloaded
    ├── QueueTimeout             waited too long in the queue          queue_timeout
    ├── DeadlineExceeded         a request took too long               deadline_exceeded
    ├── GenerationError          a step failed, or non-finite logits   generation_failed
    ├── GrammarError             a constraint cannot be followed       grammar_failed
    ├── EngineDied               the engine ended during the request   engine_died
    ├── ShuttingDown             the server drains                     shutting_down
    ├── NoTokenizer              the model has no tokenizer            no_tokenizer
    ├── MissingDependency        an extra is not installed             missing_dependency
    ├── ProcessFailed            a child process failed                process_failed
    ├── KernelError              shapes or dtypes; an internal error   kernel_error
    ├── DeviceLost               the device stopped computing          device_lost
    └── WireError                a peer of another version, bad frame  wire_error

``code`` is stable, for comparisons in programs; ``param`` names the invalid field, ``data`` holds values and limits.
HTTP statuses are known only in ``server/errors.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A ``TruffulaError`` as plain data, for other processes and for events."""

    code: str
    message: str
    param: str | None = None
    data: dict[str, Any] = {}


class TruffulaError(Exception):
    """Base class. ``str(error)`` says what is wrong, with value and limit, and what to do."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, **data: Any) -> None:
        self.message = _characters(message)
        super().__init__(self.message)
        self.param = None if param is None else _characters(param)
        self.data = data

    def info(self) -> ErrorInfo:
        """This error as plain data."""
        return ErrorInfo(code=self.code, message=self.message, param=self.param, data=self.data)

    @staticmethod
    def from_info(info: ErrorInfo | None) -> TruffulaError:
        """The exception that ``info`` describes; an unknown code gives a plain ``TruffulaError`` with that code.

        None is the error of a request that the engine ended without an error.
        """
        if info is None:
            return GenerationError("The engine ended the request without a reason.")
        cls = _classes(TruffulaError).get(info.code)
        if cls is None:
            error = TruffulaError(info.message, param=info.param, **info.data)
            error.code = info.code  # type: ignore[misc]  # a newer peer's code must survive the trip
            return error
        return cls(info.message, param=info.param, **info.data)

    def __reduce__(self) -> Any:
        return (TruffulaError.from_info, (self.info(),))


def _characters(text: str) -> str:
    """``text`` with lone surrogates written out, as names of files and clients' values may have: neither JSON nor
    msgpack can hold them.
    """
    return text.encode("utf-8", "backslashreplace").decode()


class ConfigError(TruffulaError):
    code = "config_invalid"


class InvalidRequest(TruffulaError):
    code = "invalid_request"


class PromptTooLong(InvalidRequest):
    code = "prompt_too_long"


class TemplateError(InvalidRequest):
    code = "template_error"


class ModelNotFound(TruffulaError):
    code = "model_not_found"


class UnsupportedModel(TruffulaError):
    code = "model_unsupported"


class CheckpointError(TruffulaError):
    code = "checkpoint_invalid"


class TyingError(CheckpointError):
    code = "checkpoint_tying"


class CheckpointChanged(CheckpointError):
    code = "checkpoint_changed"


class AdapterNotFound(TruffulaError):
    code = "adapter_not_found"


class AdapterError(TruffulaError):
    code = "adapter_invalid"


class AdapterLoadError(TruffulaError):
    code = "adapter_load_failed"


class AdapterExists(InvalidRequest):
    """An adapter is registered under this name already."""

    code = "adapter_exists"


class GenerationMismatch(TruffulaError):
    """An adapter's generation is not the expected one; ``present`` is what it is."""

    code = "generation_mismatch"


class InsufficientMemory(TruffulaError):
    code = "insufficient_memory"


class Overloaded(TruffulaError):
    code = "overloaded"


class QueueTimeout(TruffulaError):
    code = "queue_timeout"


class DeadlineExceeded(TruffulaError):
    code = "deadline_exceeded"


class GenerationError(TruffulaError):
    code = "generation_failed"


class GrammarError(TruffulaError):
    code = "grammar_failed"


class EngineDied(TruffulaError):
    code = "engine_died"


class ShuttingDown(TruffulaError):
    code = "shutting_down"


class NoTokenizer(TruffulaError):
    code = "no_tokenizer"


class MissingDependency(TruffulaError):
    code = "missing_dependency"


class ProcessFailed(TruffulaError):
    code = "process_failed"


class KernelError(TruffulaError):
    code = "kernel_error"


class DeviceLost(TruffulaError):
    code = "device_lost"


class WireError(TruffulaError):
    code = "wire_error"


def _classes(root: type[TruffulaError]) -> dict[str, type[TruffulaError]]:
    """Code → class. One without a code of its own travels as the class that has it: its constructor may be another."""
    found = {root.code: root} if "code" in vars(root) else {}
    for child in root.__subclasses__():
        found.update(_classes(child))
    return found


def internal_error(error: BaseException) -> TruffulaError:
    """A ``TruffulaError`` with the type and the message of another exception, such as a library's."""
    return TruffulaError(f"{type(error).__name__}: {str(error)[:1000]}")


def unknown_adapter(name: str, reason: str, param: str = "adapter") -> AdapterNotFound:
    """The error for a client that names no adapter it may use: the same one whether the adapter is absent or forbidden.

    ``reason`` is for the log alone: it may contain paths and names that the client must not know.
    """
    shown = name if len(name) <= 80 else name[:77] + "..."
    text = f"There is no model or adapter {shown!r}; GET /v1/models lists them."
    return AdapterNotFound(text, param=param, adapter=shown, reason=reason)


def is_rust_panic(error: BaseException) -> bool:
    """Whether ``error`` is a panic of a Rust library, which pyo3 raises as a ``BaseException`` of a private type."""
    return type(error).__name__ == "PanicException"


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The most similar of the ``known`` words, or None. ``cutoff``: the minimum similarity, 0 to 1."""
    import difflib  # needed for errors only

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(meant: object | None) -> str:
    """`` Did you mean X?``, to append to a sentence; "" for None."""
    return "" if meant is None else f" Did you mean {meant}?"


def some(names: Sequence[str], most: int = 10) -> str:
    """``names`` in a sentence: the first ``most``, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
