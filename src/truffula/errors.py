"""Every error truffula raises on purpose.

    TruffulaError
    ├── ConfigError              an option of ours is wrong            config_invalid
    ├── InvalidRequest           a request's field is wrong            invalid_request
    │   ├── PromptTooLong        ... it does not fit                   prompt_too_long
    │   └── TemplateError        ... its chat template failed          template_error
    ├── ModelNotFound            no such base model                    model_not_found
    ├── UnsupportedModel         a config asks what we don't do        model_unsupported
    ├── CheckpointError          files of a model are broken           checkpoint_invalid
    │   ├── TyingError           neither table, or a missing head      checkpoint_tying
    │   └── CheckpointChanged    ... changed while they were served    checkpoint_changed
    ├── AdapterNotFound          no such adapter                       adapter_not_found
    ├── AdapterError             an adapter is broken or unsupported   adapter_invalid
    ├── AdapterLoadError         its loading failed (may be retried)   adapter_load_failed
    ├── InsufficientMemory       the numbers don't fit                 insufficient_memory
    ├── Overloaded               no free place in the queue            overloaded
    ├── QueueTimeout             waited too long for a place           queue_timeout
    ├── DeadlineExceeded         its time ended while it ran           deadline_exceeded
    ├── GenerationError          a step failed, or non-finite logits   generation_failed
    ├── EngineDied               the engine ended under the request    engine_died
    ├── ShuttingDown             the server drains                     shutting_down
    ├── NoTokenizer              text was asked of a model without one no_tokenizer
    ├── MissingDependency        an extra is not installed             missing_dependency
    ├── ProcessFailed            a program we started has failed       process_failed
    ├── KernelError              shapes or dtypes; our own mistake     kernel_error
    ├── DeviceLost               the device computes nothing any more  device_lost
    └── WireError                peer of another version, bad frame    wire_error

``code`` is stable and is what programs compare; ``param`` names the offending field, ``data`` carries
the numbers that matter. No layer below ``server/`` knows an HTTP status: the table is in ``server/errors.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A ``TruffulaError`` as plain data: what crosses a process boundary or rides on a ``TokenEvent``."""

    code: str
    message: str
    param: str | None = None
    data: dict[str, Any] = {}


class TruffulaError(Exception):
    """Base of all. ``str(error)`` says what happened, the value, the limit and the way out."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, **data: Any) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.data = data

    def info(self) -> ErrorInfo:
        """This error as data, for the wire."""
        return ErrorInfo(code=self.code, message=self.message, param=self.param, data=self.data)

    def __reduce__(self) -> Any:
        return (from_info, (self.info(),))


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
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_classes(child))
    return found


def from_info(info: ErrorInfo) -> TruffulaError:
    """The exception that ``info`` describes; an unknown code gives a plain ``TruffulaError`` with that code."""
    cls = _classes(TruffulaError).get(info.code)
    if cls is None:
        error = TruffulaError(info.message, param=info.param, **info.data)
        error.code = info.code  # type: ignore[misc]  # a newer peer's code must survive the trip
        return error
    return cls(info.message, param=info.param, **info.data)


def internal_error(error: BaseException) -> TruffulaError:
    """An exception that is no ``TruffulaError``, such as a library's, as one with its type and words."""
    return TruffulaError(f"{type(error).__name__}: {str(error)[:1000]}")


def is_rust_panic(error: BaseException) -> bool:
    """Whether a Rust library panicked: pyo3 raises that as a ``BaseException`` of a type that cannot be imported."""
    return type(error).__name__ == "PanicException"


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The most similar of the ``known`` words; None where none is. ``cutoff``: the least similarity, 0 to 1."""
    import difflib  # needed for errors only

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(meant: object | None) -> str:
    """`` Did you mean X?``, to follow the sentence that says what is unknown; "" for None."""
    return "" if meant is None else f" Did you mean {meant}?"
