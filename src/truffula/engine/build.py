"""Builds an ``Engine`` from an ``EngineConfig``: finds the files, plans the model and the memory, then loads."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from truffula.config import EngineConfig
from truffula.engine.budget import MemoryBudget
from truffula.engine.engine import Engine
from truffula.engine.kv_layout import KvLayout
from truffula.engine.limits import EngineLimits
from truffula.engine.memory import MemoryDivision, memory_limit, plan_memory
from truffula.errors import ConfigError, UnsupportedModel
from truffula.kernels.backend import Backend, Executable, MemoryPlan
from truffula.kernels.cpu.formats import INT8_KINDS
from truffula.kernels.host import usable_cpus
from truffula.kernels.inputs import Capacity
from truffula.kernels.select import DtypeChoice, Precision, choose_dtype, fallback_warning, select_backend
from truffula.lora.base import base_source
from truffula.lora.generations import OWNER
from truffula.lora.loading import LoadingWorker
from truffula.lora.pool import AdapterPool
from truffula.lora.worker import LoadLimits, Setup
from truffula.model.load import ModelPlan, WeightReader, plan_model
from truffula.model.plan import PackingFails
from truffula.option import format_size
from truffula.types import MAX_ADAPTERS, EngineInfo, Progress
from truffula.weights.checkpoint import Checkpoint
from truffula.weights.open import open_checkpoint
from truffula.weights.packages import package_cache
from truffula.weights.sources import resolve_source
from truffula.weights.watch import FileWatch, require_same_files, stamp, stamps_of, with_samples

logger = logging.getLogger(__name__)

SCORING_BYTES = 16 * 2**20
"""Logits of a step that prompt logprobs may use, besides one row per sequence."""


@dataclass(frozen=True)
class EngineSettings:
    """What the start decides from model and machine; ``EngineConfig`` is what was configured."""

    info: EngineInfo
    limits: EngineLimits
    capacity: Capacity


def find_settings(config: EngineConfig, path: Path, plan: ModelPlan, backend: Backend) -> EngineSettings:
    """Decides what depends on model and machine. Reads no tensor.

    Raises:
        ConfigError: ``max_model_len`` is above the model's, or the dtype is not served.
        InsufficientMemory: Computed here, before anything is loaded.
    """
    if config.max_model_len is not None and config.max_model_len > plan.max_model_len:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}; the model has {plan.max_model_len} positions.",
            param="max_model_len", max_model_len=plan.max_model_len,
        )  # fmt: skip
    if not plan.interface.kv_groups:
        raise UnsupportedModel(
            "config.json: a model in which no layer has attention is not served.", param="layer_types"
        )
    dtype = choose_dtype(backend, config.dtype, plan.stored_dtype)
    rows = config.max_running + max(16, SCORING_BYTES // (8 * plan.interface.vocab_size))
    capacity = Capacity(
        max_tokens=config.step_tokens,
        max_seqs=min(config.max_running, config.step_tokens),
        max_logit_rows=min(rows, config.step_tokens),
        max_segments=min(config.max_running, config.step_tokens) * MAX_ADAPTERS,
        num_blocks=1,
        block_size=config.block_size,
        max_blocks_per_seq=math.ceil((config.max_model_len or plan.max_model_len) / config.block_size),
    )
    planned = backend.plan(plan.program, dtype.dtype, capacity, plan.stored_types)
    layout = KvLayout(
        config.block_size, planned.depth * config.step_tokens,
        tuple(group.window for group in plan.interface.kv_groups), planned.kv_block_bytes,
        state_rows=planned.depth + 1 if plan.interface.states else 0, state_bytes=planned.state_bytes,
    )  # fmt: skip
    memory = plan_memory(
        planned,
        memory_limit(config.memory_bytes, backend),
        layout,
        model_len=plan.max_model_len,
        asked_len=config.max_model_len,
        max_running=config.max_running,
    )
    capacity = dataclasses.replace(
        capacity,
        num_blocks=memory.num_blocks,
        num_states=memory.num_states,
        max_blocks_per_seq=math.ceil(memory.max_model_len / config.block_size),
    )
    limits = EngineLimits(
        max_model_len=memory.max_model_len,
        step_tokens=config.step_tokens,
        step_logit_rows=capacity.max_logit_rows,
        max_running=config.max_running,
        max_waiting=config.max_running + config.max_waiting,  # the service rejects requests earlier
        block_size=config.block_size,
        num_blocks=memory.num_blocks,
        prefix_cache=config.prefix_cache and plan.implementation.kind != "serial",
        vocab_size=plan.interface.vocab_size,
        more_ids=plan.interface.more_ids,
        eos_token_ids=plan.eos_token_ids,
        prefetch_adapters=config.prefetch_adapters,
        rope_regime=plan.interface.rope_regime,
        kv_windows=layout.windows,
        kv_block_bytes=() if planned.kv_at_load else layout.block_bytes,  # at load all are paid for already
        num_states=memory.num_states,
        state_bytes=0 if planned.kv_at_load else layout.state_bytes,
    )
    info = _describe(config, path, plan, backend, dtype, planned, memory)
    return EngineSettings(info, limits, capacity)


def _describe(
    config: EngineConfig,
    path: Path,
    plan: ModelPlan,
    backend: Backend,
    dtype: DtypeChoice,
    planned: MemoryPlan,
    memory: MemoryDivision,
) -> EngineInfo:
    """The info of an engine that is not loaded yet: ``files`` and ``start_s`` are added then."""
    slow = fallback_warning(config.backend, backend) if plan.transformers is None else plan.implementation.reason + "."
    return EngineInfo(
        model=config.model,
        model_type=plan.size.model_type,
        implementation=plan.implementation.kind,
        implementation_reason=plan.implementation.reason,
        backend=backend.name,
        device=backend.device,
        dtype=dtype.dtype,
        vocab_size=plan.interface.vocab_size - plan.interface.more_ids,
        more_ids=plan.interface.more_ids,
        max_model_len=memory.max_model_len,
        block_size=config.block_size,
        num_blocks=memory.num_blocks,
        kv_tokens=memory.kv_tokens,
        step_tokens=config.step_tokens,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        eos_token_ids=list(plan.eos_token_ids),
        end_tokens=list(plan.end_tokens),
        bos_token_id=plan.bos_token_id,
        path=str(path),
        revision=config.revision,
        isa=backend.isa,
        threads=config.threads or usable_cpus(),
        dtype_reason=dtype.reason,
        quantize=config.quantize,
        exact=config.exact,
        int8_note=int8_note(config, planned.weight_formats),
        tying=plan.tying.tie.value,
        tying_reason=plan.tying.reason,
        weight_formats=dict(planned.weight_formats),
        weight_bytes=planned.weight_bytes,
        stored_bytes=plan.stored_bytes,
        saved_by_tying_bytes=plan.saved_bytes,
        fixed_bytes=memory.fixed_bytes,
        memory_limit_bytes=memory.limit_bytes,
        memory_reason=memory.reason,
        budget_bytes=memory.pool_bytes,
        unused_tensors=len(plan.unused),
        warnings=[*([slow] if slow else []), *plan.warnings, *memory.warnings],
    )


def build_engine(
    config: EngineConfig,
    progress: Progress | None = None,
    first: EngineInfo | None = None,
    on_model_path: Callable[[Path], None] | None = None,
) -> tuple[Engine, EngineInfo]:
    """Build an engine in this thread, which must then be the one that steps it (thread counts are per thread).

    ``first`` is the info of the engine that this one replaces: it serves the same files, unchanged, with the same
    settings. ``on_model_path`` is called with the path of the files once they are open. A file that replaces one of
    them later, by a rename, is not loaded: a reader of the path compares what it read with the ``files`` of the info.

    Raises:
        CheckpointChanged: The files are not those of ``first``, or were written to while they were read.
        TruffulaError: Why this model cannot be served. Everything that was opened is closed.
    """
    if first is not None:
        config = repeated(config, first)
    report = progress or (lambda stage, done, total: None)
    began = time.monotonic()
    if first is not None:
        path = Path(first.path)
    else:
        path = resolve_source(
            config.model, cache_dir=config.cache_dir, offline=config.offline, revision=config.revision, progress=report
        )
    report("reading the model files", 0, None)
    with closing(_open(path, first)) as checkpoint:  # what the executable keeps mapped stays mapped
        files = stamps_of(checkpoint)
        if first is not None:
            require_same_files(first.files, files, restarting=True)
        if on_model_path is not None:
            on_model_path(path)
        loaded = load_model(config, path, checkpoint, report)
        plan, settings, executable = loaded.plan, loaded.settings, loaded.executable
        try:
            loaded.pull.finish()
            require_same_files(files, stamps_of(checkpoint))
            executable.prepare()
            engine = _assemble(config, settings, plan, executable, checkpoint)
        except BaseException:
            executable.close()
            raise
    info = replace(settings.info, start_s=time.monotonic() - began, files=with_samples(files))
    _log(info)
    return engine, info


@dataclass(frozen=True)
class LoadedModel:
    """A model and the plan it was loaded by. ``pull.finish`` is still to be called."""

    plan: ModelPlan
    settings: EngineSettings
    pull: WeightReader
    executable: Executable


def load_model(
    config: EngineConfig, path: Path, checkpoint: Checkpoint, report: Progress, serial: str = ""
) -> LoadedModel:
    """Plan and load the model; ``serial`` as in ``plan_model``."""
    plan = plan_model(checkpoint, config.implementation, serial=serial, more_ids=config.adapter_tokens)
    backend = choose_backend(config, plan)
    settings = find_settings(config, path, plan, backend)
    pull = WeightReader(
        checkpoint,
        plan,
        progress=lambda _, done, total: report("loading weights", done, total),
        block_kinds=backend.block_kinds,
    )
    try:
        executable = backend.load(plan.program, settings.info.dtype, pull, settings.capacity)
    except PackingFails as error:
        return load_model(config, path, checkpoint, report, serial=str(error))
    return LoadedModel(plan, settings, pull, executable)


def choose_backend(config: EngineConfig, plan: ModelPlan) -> Backend:
    """The backend that computes the planned model."""
    name = config.backend
    if plan.transformers is not None:
        if name == "cpu":
            raise ConfigError(
                f"backend is 'cpu', but {plan.implementation.reason}, which needs torch; leave backend at auto.",
                param="backend",
            )
        name = "reference"
    backend = select_backend(
        name, config.device, threads=config.threads or usable_cpus(), cpu_isa=config.cpu_isa,
        precision=Precision(config.quantize, config.exact),
    )  # fmt: skip
    if plan.transformers is None:
        return backend
    from truffula.model.fallback.backend import TransformersBackend

    return TransformersBackend(plan.transformers, backend)


def repeated(config: EngineConfig, first: EngineInfo) -> EngineConfig:
    """``config`` with what the first start decided, so that a restarted engine gives the same answers."""
    return dataclasses.replace(
        config,
        backend=first.backend,
        device=first.device,
        dtype=first.dtype,
        threads=first.threads,
        max_model_len=first.max_model_len,
        memory_bytes=first.memory_limit_bytes,
    )


def _open(path: Path, first: EngineInfo | None) -> Checkpoint:
    """The checkpoint at ``path``. One that an earlier engine served and that can no longer be opened has changed."""
    if first is not None:
        now = [stamp(Path(item.path)) for item in first.files]
        require_same_files(first.files, now, restarting=True)
    return open_checkpoint(path)


def _assemble(
    config: EngineConfig, settings: EngineSettings, plan: ModelPlan, executable: Executable, checkpoint: Checkpoint
) -> Engine:
    """The engine of a loaded model, with its budget, loading worker, adapter pool and watch over the mapped files."""
    budget = MemoryBudget(settings.info.budget_bytes)
    if config.adapter_memory_bytes is not None:
        budget.set_limit(OWNER, config.adapter_memory_bytes)
    with ExitStack() as undo:
        watch = FileWatch(checkpoint.files)
        undo.callback(watch.close)
        setup = Setup(
            sites=plan.interface.sites,
            model=config.model,
            layout=executable.layout,
            base=base_source(plan, checkpoint, dtype=settings.info.dtype, quantize=config.quantize),
            limits=LoadLimits(
                image_bytes=budget.limit_of(OWNER),
                file_bytes=config.max_adapter_file_bytes,
                memory_bytes=config.adapter_worker_memory_bytes,
                cpu_s=config.adapter_load_timeout_s,
                wall_s=config.adapter_load_timeout_s,
                download_s=config.adapter_download_timeout_s,
            ),
            offline=config.offline,
            cache_dir=None if config.cache_dir is None else str(config.cache_dir),
            adapter_cache=_adapter_cache(config),
            adapter_cache_bytes=config.adapter_cache_bytes,
        )
        loader = LoadingWorker(setup)
        undo.callback(loader.close)
        adapters = AdapterPool(executable, loader, budget, time.monotonic, failure_ttl_s=config.adapter_failure_ttl_s)
        engine = Engine(executable, settings.limits, adapters, budget, watch=watch)
        undo.pop_all()
    return engine


def _adapter_cache(config: EngineConfig) -> str:
    """The folder of the disk cache of adapters; "" for a user without a home folder, where nothing is kept."""
    if config.adapter_cache_dir is not None:
        return str(config.adapter_cache_dir)
    try:
        return str(package_cache(config.cache_dir) / "adapters")
    except ConfigError:
        return ""


def int8_note(config: EngineConfig, weight_formats: Mapping[str, int]) -> str:
    """One line for the start log: which products are computed in int8, and the flag that changes it; empty for none."""
    formats = ", ".join(sorted(name.upper() for name in weight_formats if name.upper() in INT8_KINDS))
    if not formats:
        return ""
    if config.quantize != "none":
        return f"int8: weights are rounded to {formats}, activations to int8 (--quantize {config.quantize})"
    return f"int8: activations are rounded to int8 for the file's {formats} weights; --exact computes on its values"


def _log(info: EngineInfo) -> None:
    logger.info(
        "%s loaded in %.1f s, %s for KV cache and adapters", info.model, info.start_s,
        format_size(info.budget_bytes),
    )  # fmt: skip
    for warning in info.warnings:
        logger.warning("%s", warning)
