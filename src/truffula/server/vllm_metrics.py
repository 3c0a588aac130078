"""Metrics under vLLM's names (``--vllm-metrics``), by which routers choose a replica: llm-d and the Gateway API
inference extension read the queue, the KV cache and the adapters, vLLM's production stack the first two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from truffula.types import EngineInfo, EngineStats


def max_loras(stats: EngineStats | None, info: EngineInfo) -> int:
    """How many adapters there is memory for: the resident ones, and as many of their average size as still fit. No
    other limit exists. Before one is resident, as many as may run in one step.
    """
    if stats is None or not stats.adapters_resident or not stats.adapter_bytes:
        return info.max_running
    room = min(stats.adapter_limit_bytes, stats.budget_bytes - stats.kv_used_bytes) - stats.adapter_bytes
    return stats.adapters_resident + max(0, room) * stats.adapters_resident // stats.adapter_bytes


def kv_usage(stats: EngineStats) -> float:
    """The part of the KV cache that running requests use, 0 to 1: of its blocks or of the bytes that adapters leave."""
    of_blocks = stats.used_blocks / max(1, stats.num_blocks)
    of_bytes = stats.kv_used_bytes / max(1, stats.budget_bytes - stats.adapter_bytes)
    return min(1.0, max(of_blocks, of_bytes))


class VllmMetrics(Collector):
    """vLLM's series of ``stats``, which is read at each scrape; none while there is no engine.

    ``lora_requests_info`` is one sample, whose labels list adapters and whose value is the time of their last change:
    routers take the newest.
    """

    def __init__(self, stats: Callable[[], EngineStats | None], info: EngineInfo, model: str) -> None:
        self._stats = stats
        self._info = info
        self._labels = {"model_name": model, "engine": "0"}
        self._adapters: tuple[str, ...] = ()
        self._changed = time.time()

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        usage = kv_usage(stats)
        yield self._gauge("num_requests_running", "Sequences in the batch", stats.running)
        yield self._gauge("num_requests_waiting", "Sequences in the queue", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Used part of the KV cache, 0 to 1", usage)
        yield self._gauge("gpu_cache_usage_perc", "Former name of vllm:kv_cache_usage_perc", usage)
        for prefix, text in (("", ""), ("gpu_", " (former name)")):
            yield self._counter(f"{prefix}prefix_cache_queries", f"Prompt tokens looked up{text}", stats.prompt_tokens)
            yield self._counter(f"{prefix}prefix_cache_hits", f"Prompt tokens found{text}", stats.prefix_hit_tokens)
        blocks = {"block_size": str(self._info.block_size), "num_gpu_blocks": str(self._info.num_blocks)}
        yield _info("cache_config_info", "Blocks of the KV cache", blocks, 1)
        adapters = {
            "max_lora": str(max_loras(stats, self._info)),
            "running_lora_adapters": _joined(stats.resident_names),
            "waiting_lora_adapters": _joined([n for n in stats.loading_names if n not in stats.resident_names]),
        }
        if self._adapters != tuple(adapters.values()):
            self._adapters, self._changed = tuple(adapters.values()), time.time()
        yield _info("lora_requests_info", "Adapters in memory, and those that load", adapters, self._changed)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family


def _info(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _joined(names: Sequence[str]) -> str:
    """As routers read it back: separated by commas. A name with a comma would be read as two others."""
    return ", ".join(sorted(name for name in names if "," not in name))
