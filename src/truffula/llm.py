"""``LLM``: a base model and its adapters in this process, without a server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from truffula.config import ENGINE_PROCESS, EngineConfig, options_of
from truffula.engine.client import TRANSPORTS, Transport, connect
from truffula.errors import AdapterNotFound, ConfigError, InvalidRequest, TruffulaError
from truffula.items import Constraint, Tool, ToolChoice
from truffula.lora.compose import compose, merge
from truffula.lora.registry import split_content
from truffula.lora.sources import AdapterDirectory
from truffula.params import SamplingParams
from truffula.service.core import Service
from truffula.service.inputs import (
    Messages,
    Prompt,
    as_list,
    constraint_of,
    ids_of,
    is_ids,
    prompt_fields,
    spread,
    with_items,
)
from truffula.service.outputs import ChoiceOutput, RequestOutput, request_output
from truffula.service.progress import ProgressBar
from truffula.service.sync import SyncService
from truffula.types import (
    AdapterCommand,
    AdapterRef,
    AdapterState,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    MergeMethod,
    MergeSign,
    MergeStrategy,
    TextDelta,
    WeightedAdapter,
)

Adapter = str | Path | AdapterRef | Mapping[str, float] | None

__all__ = ["LLM", "Adapters", "ChoiceOutput", "RequestOutput"]


class Adapters:
    """``llm.adapters``: load, unload and list adapters. Adapters are also loaded when first used."""

    def __init__(self, service: SyncService, directory: AdapterDirectory, default: Adapter, base: str) -> None:
        self._service = service
        self._directory = directory
        self._default = default
        self._bases = (base, service.core.info.model)

    def load(self, name: str, source: str | Path | None = None) -> AdapterState:
        """Load the adapter ``name`` and wait until it is ready. ``source``: a folder, a Hub id or a URL, unless
        ``name`` is known.

        Raises ``AdapterNotFound``, ``AdapterError`` (broken, unsupported, of another base), ``AdapterLoadError``,
        ``InsufficientMemory``.
        """
        ref = self.resolve(name) if source is None else self._directory.locate(name, source)
        states = self._service.adapters(AdapterCommand(action="load", ref=ref))
        if source is not None and ref is not None:
            self._directory.add(ref)
        return next((state for state in states if state.name == name), states[0])

    def unload(self, name: str) -> None:
        """Remove the name, and free the memory when running requests have ended. Raises ``AdapterNotFound``."""
        ref = self.resolve(name)
        self._service.adapters(AdapterCommand(action="unload", ref=ref))
        self._directory.remove(name)

    def names(self) -> list[str]:
        """The known names, loaded or not, sorted."""
        return self._directory.names()

    def resolve(self, adapter: Adapter) -> AdapterRef | None:
        """The reference of a known name, a folder or a Hub id; without restrictions, unlike in a server. Of a mapping
        of these to weights, the weighted sum; of None the default adapter, if there is one. None is the base.

        Raises ``AdapterNotFound``, and ``InvalidRequest`` for a weight out of range.
        """
        adapter = self._default if adapter is None else adapter
        if isinstance(adapter, Mapping):
            return compose(self._weighted(adapter))
        if adapter is None or isinstance(adapter, AdapterRef):
            return adapter
        is_base = self._default is not None and str(adapter) in self._bases
        return None if is_base else _resolve(self._directory, adapter)

    def merge(
        self, weights: Mapping[str, float], strategy: MergeStrategy, *, density: float, sign: MergeSign = "total"
    ) -> AdapterRef:
        """The adapter that ``weights`` (by name, folder or Hub id) merge to by one of peft's strategies; it is made
        when it is first used. A weighted sum needs no ``merge``: give the mapping as the adapter.

        ``density`` (above 0, up to 1): the share of values that are kept. ``sign``: how ``ties`` elects a sign.

        Raises ``AdapterNotFound`` and ``InvalidRequest``.
        """
        try:
            method = msgspec.convert({"strategy": strategy, "density": density, "sign": sign}, MergeMethod)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"The merge is invalid: {error}.", param="strategy") from error
        return merge(self._weighted(weights), method)

    def _weighted(self, weights: Mapping[str, float]) -> list[WeightedAdapter]:
        parts = []
        for name, weight in weights.items():
            ref = self.resolve(name)
            if ref is None or not isinstance(weight, int | float) or isinstance(weight, bool):
                raise InvalidRequest(f"adapters has {name!r}: {weight!r}; give a name and a number.", param="adapters")
            parts.append(WeightedAdapter(ref, float(weight)))
        return parts

    def list(self) -> list[AdapterState]:
        """The adapters of the engine: loading, ready, resident, failed or retired."""
        return self._service.adapters(AdapterCommand(action="list"))


def _resolve(directory: AdapterDirectory, adapter: str | Path) -> AdapterRef:
    """``adapter`` by a known name, or where it is. Raises ``AdapterNotFound``."""
    name, names = str(adapter), directory.names()
    try:
        known = directory.resolve(name) if split_content(name)[0] in names else None
        return directory.locate(name, adapter) if known is None else known
    except ConfigError as error:
        raise AdapterNotFound(
            f"There is no adapter {name!r} (configured: {', '.join(names) or 'none'}). {error.message}",
            param="adapters",
            adapter=name,
        ) from error


class LLM:
    """A base model and its adapters. The constructor returns when the model is loaded.

    Args:
        model: A folder, a ``.gguf`` file, an alias, or a Hub id.
        adapters: Name → folder, Hub id or URL. They are loaded when first used.
        default_adapter: What acts where a call names no adapter; then the base is named by ``model``.
        device, dtype: Compute device and dtype; ``auto`` selects the faster of float32 and bfloat16.
        transport: Where the engine runs: in the calling thread (``inline``), or in a process of its own (``process``).
        chat_template: Jinja source that replaces the model's template.
        progress: Called with (stage, done, total or None) while the model loads.
        options: Fields of ``truffula.config.EngineConfig`` (``max_model_len``, ``memory_bytes``, ``max_running``, …).

    Raises ``ConfigError`` for an option that is unknown or has no effect with ``transport``, and ``TruffulaError`` when
    the model cannot be loaded. A context manager; ``close`` frees the memory. Several threads may call its methods.
    """

    def __init__(
        self,
        model: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        default_adapter: Adapter = None,
        device: str = "cpu",
        dtype: str = "auto",
        transport: Transport = "inline",
        chat_template: str | None = None,
        progress: Callable[[str, int, int | None], None] | None = None,
        **options: Any,
    ) -> None:
        if transport not in TRANSPORTS:
            raise ConfigError(
                f"transport is {transport!r}; it must be one of {', '.join(TRANSPORTS)}.", param="transport"
            )
        known = {field.name for field in fields(EngineConfig)} - {"model", "device", "dtype"}
        for name in options:
            if name not in known:
                raise ConfigError(f"LLM has no option {name!r}; available: {', '.join(sorted(known))}.", param=name)
        if transport == "inline":
            _refuse_process_options(options)
        config = EngineConfig(model=str(model), device=device, dtype=dtype, **options)
        directory = AdapterDirectory()
        for name, source in (adapters or {}).items():
            directory.add(directory.locate(name, source))  # report an error before the model is loaded
        if default_adapter is not None and not isinstance(default_adapter, AdapterRef):
            for one in default_adapter if isinstance(default_adapter, Mapping) else (default_adapter,):
                _resolve(directory, one)
        client = connect(config, transport, progress)
        try:
            templates = None if chat_template is None else {"default": chat_template}
            self._service = SyncService(client, Service(client.info, templates=templates))
            if adapters or default_adapter is not None:
                self._service.adapters(AdapterCommand(action="prepare"))
        except BaseException:
            client.close()
            raise
        self.adapters = Adapters(self._service, directory, default_adapter, config.model)

    @property
    def info(self) -> EngineInfo:
        """Facts about the loaded model."""
        return self._service.core.info

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can be used with the base without ``chat_template``."""
        return self.can_chat(None)

    def can_chat(self, adapter: Adapter) -> bool:
        """Whether ``chat`` can be used with ``adapter`` without ``chat_template``. Raises as ``Adapters.resolve``."""
        return self._service.core.has_chat_template(self.adapters.resolve(adapter))

    def stats(self) -> EngineStats:
        return self._service.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapters: Adapter | Sequence[Adapter] = None,
        constraint: Constraint | Mapping[str, Any] | None = None,
        errors: Literal["raise", "return"] = "raise",
        progress: bool | Callable[[int, int], None] = True,
    ) -> list[Any]:
        """Complete ``prompts`` in one batch. Their number is not limited: the engine's queue is refilled as it drains.

        Args:
            prompts: One text, one list of token ids, or a list of these.
            params: One for all, or one per prompt.
            adapters: A name, a folder or Hub id, None for the default adapter or the base, or several with weights
            (``{"pirate": 0.7, "formal": -0.3}``); or a list of these, one per prompt.
            constraint: What every completion must match: a JSON Schema, or a ``Constraint``.
            errors: ``return`` returns a request's ``TruffulaError`` in its place; ``raise`` raises the first error and
            aborts the others. Every prompt is checked before the first one is computed.
            progress: Called with (prompts done, prompts). True: a bar on stderr, if that is a terminal and the batch
            takes longer than a second. False: none.

        Returns: One ``RequestOutput`` per prompt, in order; a list also for a single prompt.
        """
        listed = [prompts] if isinstance(prompts, str) or is_ids(prompts) else as_list(prompts, "prompts")
        prepared = [prompt if isinstance(prompt, str) else ids_of(prompt, i) for i, prompt in enumerate(listed)]
        shared = {"constraint": constraint_of(constraint)}
        return self._run([{"prompt": prompt, **shared} for prompt in prepared], params, adapters, errors, progress)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapters: Adapter | Sequence[Adapter] = None,
        constraint: Constraint | Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any] | Tool] | None = None,
        tool_choice: str | Mapping[str, Any] | ToolChoice | None = None,
        reasoning_effort: str | None = None,
        thinking_budget: int | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        errors: Literal["raise", "return"] = "raise",
        progress: bool | Callable[[int, int], None] = True,
    ) -> list[Any]:
        """Answer one conversation or several: ``messages`` is one list of ``{"role", "content"}``, or a list of such
        lists.

        Args:
            tools: Functions that the model may call, as OpenAI's API describes them.
            tool_choice: ``auto``, ``none``, ``required``, or the name of the function to call.
            reasoning_effort, thinking_budget: How much the model reasons, and the most tokens of it.
            continue_final_message: Continue the last message instead of answering it.

        The other arguments are as in ``generate``. Tool calls and reasoning are no part of the output's ``text``.
        """
        listed = as_list(messages, "messages")
        talks = listed if listed and all(isinstance(item, list | tuple) for item in listed) else [listed]
        shared: dict[str, Any] = {
            "constraint": constraint_of(constraint),
            "tools": tools,
            "tool_choice": tool_choice,
            "parse_output": True,
            "parse_whole": True,
            "reasoning_effort": reasoning_effort,
            "thinking_budget": thinking_budget,
            "template_kwargs": template_kwargs or {},
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
        }
        return self._run([{"messages": talk, **shared} for talk in talks], params, adapters, errors, progress)

    def stream(
        self,
        prompt: Prompt | Messages,
        params: SamplingParams | None = None,
        *,
        adapter: Adapter = None,
        **request: Any,
    ) -> Iterator[TextDelta]:
        """The deltas of the completion of one prompt (or chat). Closing the iterator aborts the request.

        ``request``: further fields of ``truffula.types.GenerateRequest``.
        """
        requests = self._requests([{**prompt_fields(prompt), **request}], params, adapter)
        return (delta for _, delta in self._stream(requests))

    def stream_each(
        self,
        prompts: Sequence[Prompt | Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapters: Adapter | Sequence[Adapter] = None,
    ) -> Iterator[tuple[int, TextDelta]]:
        """The deltas of several completions in one batch, as (index of the prompt, delta)."""
        given = [prompt_fields(prompt) for prompt in as_list(prompts, "prompts")]
        return self._stream(self._requests(given, params, adapters))

    def close(self) -> None:
        """Free the model. Idempotent."""
        self._service.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _stream(self, requests: list[GenerateRequest]) -> Iterator[tuple[int, TextDelta]]:
        for position, found in self._service.stream(requests):
            assert not isinstance(found, TruffulaError)  # errors are raised, as return_errors is not set
            for delta in found:
                yield position, delta

    def _run(
        self,
        given: list[dict[str, Any]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapters: Adapter | Sequence[Adapter],
        errors: str,
        progress: bool | Callable[[int, int], None],
    ) -> list[Any]:
        if errors not in ("raise", "return"):
            raise InvalidRequest(f"errors is {errors!r}; it must be 'raise' or 'return'.", param="errors")
        requests = self._requests(given, params, adapters)
        outputs: list[Any] = [None] * len(requests)
        with contextlib.closing(ProgressBar()) as bar:
            report = bar if progress is True else None
            answers = self._service.completions(requests, progress=report, return_errors=errors == "return")
            for done, (index, answer) in enumerate(answers, 1):
                outputs[index] = (
                    answer if isinstance(answer, TruffulaError) else request_output(requests[index], answer)
                )
                if callable(progress):
                    progress(done, len(requests))
        return outputs

    def _requests(
        self,
        given: list[dict[str, Any]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapters: Adapter | Sequence[Adapter],
    ) -> list[GenerateRequest]:
        count = len(given)
        every_params = spread(params if params is not None else SamplingParams(), SamplingParams, count, "params")
        every_adapter = spread(adapters, str | Path | AdapterRef | Mapping | None, count, "adapters")
        refs = [self.adapters.resolve(adapter) for adapter in every_adapter]
        try:
            return [
                msgspec.convert(
                    {**with_items(one), "params": p, "adapter": ref, "return_prompt_tokens": True}, GenerateRequest
                )
                for one, p, ref in zip(given, every_params, refs, strict=True)
            ]
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"The request is invalid: {error}.") from error


def _refuse_process_options(names: Iterable[str]) -> None:
    """Raise ``ConfigError`` if one of ``names`` only concerns an engine in a process of its own."""
    for option in options_of(EngineConfig):
        if option.field in names and option.topic == ENGINE_PROCESS:
            raise ConfigError(
                f"{option.field} has no effect on an engine in this process; leave it out, or use transport='process'.",
                param=option.field,
            )
