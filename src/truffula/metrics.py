"""Prometheus metrics: one registry per server, never the global one, and a bounded number of series.

A client names adapters, so an adapter's name is a label only once it has answered, and only for ``max_adapters`` names:
the operator's own, then the first that come. Others count as ``__other__``, the base as ``__base_model__``. Times are
seconds.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from truffula.types import EngineRestarts, EngineStats

BASE_LABEL = "__base_model__"
OTHER_LABEL = "__other__"

_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0)
_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)

# name of the gauge or counter → (its help, the field of EngineStats); a name ending in _total is a counter
_ENGINE_SERIES: tuple[tuple[str, str, str], ...] = (
    ("truffula_sequences_running", "Sequences in the batch", "running"),
    ("truffula_sequences_waiting", "Sequences in the queue", "waiting"),
    ("truffula_sequences_waiting_for_adapter", "Sequences in the queue whose adapter loads", "waiting_for_adapter"),
    ("truffula_kv_blocks", "KV blocks of the pool", "num_blocks"),
    ("truffula_kv_blocks_used", "KV blocks held by sequences", "used_blocks"),
    ("truffula_kv_blocks_cached", "KV blocks kept for prefix hits", "cached_blocks"),
    ("truffula_kv_blocks_free", "KV blocks that are free", "free_blocks"),
    ("truffula_budget_bytes", "Bytes of the budget shared by KV and adapters", "budget_bytes"),
    ("truffula_budget_used_bytes", "Bytes of the budget in use", "budget_used_bytes"),
    ("truffula_adapters_resident", "Adapters in the backend's memory", "adapters_resident"),
    ("truffula_adapter_bytes", "Bytes of the resident adapters", "adapter_bytes"),
    ("truffula_engine_steps_total", "Steps of the engine", "steps"),
    ("truffula_preemptions_total", "Sequences that were preempted", "preemptions"),
    ("truffula_engine_prompt_tokens_total", "Prompt tokens the engine received", "prompt_tokens"),
    ("truffula_prefix_hit_tokens_total", "Prompt tokens served from the prefix cache", "prefix_hit_tokens"),
    ("truffula_engine_generated_tokens_total", "Tokens the engine generated", "generated_tokens"),
    ("truffula_adapter_load_failures_total", "Adapter loads that failed", "adapter_load_failures"),
    ("truffula_adapter_evictions_total", "Adapters evicted from the backend's memory", "adapter_evictions"),
)


@dataclass(slots=True)
class RequestRecord:
    """What one HTTP request was: filled while it is served, then logged on one line and counted.

    ``adapter`` stays None for the base model. ``generates`` marks the routes that produce tokens.
    """

    request_id: str
    method: str = ""
    path: str = ""
    route: str = ""
    generates: bool = False
    adapter: str | None = None
    status: int = 0
    finish: str | None = None
    error_code: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    max_tokens: int | None = None
    validation_s: float = 0.0
    queue_s: float | None = None
    load_s: float = 0.0
    ttft_s: float | None = None
    total_s: float = 0.0
    ignored: str = ""


class Observer:
    """The instruments of one adapter label, looked up once per request rather than once per token."""

    __slots__ = ("completion", "inter_token", "prompt", "queue", "total", "ttft")

    def __init__(self, metrics: Metrics, label: str) -> None:
        self.prompt = metrics._prompt.labels(label)
        self.completion = metrics._completion.labels(label)
        self.ttft = metrics._ttft.labels(label)
        self.inter_token = metrics._inter_token.labels(label)
        self.queue = metrics._queue.labels(label)
        self.total = metrics._total.labels(label)


class Metrics:
    """All series of one server. ``engine`` returns the newest stats, or None while there are none."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(
        self,
        engine: Callable[[], EngineStats | None] | None = None,
        *,
        restarts: Callable[[], EngineRestarts] = EngineRestarts,
        max_adapters: int = 100,
        lorax_names: bool = False,
        named: Iterable[str] = (),
    ) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._max_adapters = max_adapters
        self._labels = set(sorted(named)[:max_adapters])
        self._observers: dict[str, Observer] = {}
        self._lock = threading.Lock()
        own, by = self.registry, ("adapter",)
        self._requests = Counter(
            "truffula_requests", "Generating requests by outcome", ("adapter", "route", "outcome"), registry=own
        )
        self._http = Counter("truffula_http_responses", "HTTP responses", ("route", "method", "status"), registry=own)
        self._prompt = Counter("truffula_prompt_tokens", "Prompt tokens of ended requests", by, registry=own)
        self._completion = Counter("truffula_completion_tokens", "Completion tokens sent", by, registry=own)
        self._ttft = _histogram("truffula_time_to_first_token_seconds", "Arrival to first token", _SECONDS, own, by)
        self._inter_token = _histogram(
            "truffula_inter_token_seconds", "Between two deltas of a choice", _TOKEN_SECONDS, own, by
        )
        self._queue = _histogram("truffula_queue_seconds", "Arrival to admission", _SECONDS, own, by)
        self._total = _histogram("truffula_request_seconds", "Arrival to last byte", _SECONDS, own, by)
        self._loading = _histogram("truffula_adapter_wait_seconds", "Waits for an adapter's load", _SECONDS, own, by)
        self._lorax = _LoraxSeries(own) if lorax_names else None
        own.register(_EngineCollector(engine or (lambda: None), restarts, lorax_names, self.label))

    def label(self, adapter: str | None, *, answered: bool) -> str:
        """The label of an adapter's name: itself if it has one, or gets it now: it ``answered`` and there is room."""
        if adapter is None:
            return BASE_LABEL
        with self._lock:
            if adapter in self._labels:
                return adapter
            if not answered or len(self._labels) >= self._max_adapters:
                return OTHER_LABEL
            self._labels.add(adapter)
            return adapter

    def observer(self, adapter: str | None, *, answered: bool) -> Observer:
        label = self.label(adapter, answered=answered)
        found = self._observers.get(label)
        if found is None:
            found = self._observers.setdefault(label, Observer(self, label))
        return found

    def request_ended(self, record: RequestRecord) -> None:
        """Counts one HTTP request, and its tokens and times where it was a generating one."""
        method = record.method if record.method in _METHODS else "other"
        self._http.labels(record.route or "unknown", method, str(record.status)).inc()
        if not record.generates:
            return
        outcome = record.error_code or record.finish or "unknown"
        answered = record.completion_tokens > 0 or record.finish in ("stop", "length")
        label = self.label(record.adapter, answered=answered)
        self._requests.labels(label, record.route, outcome).inc()
        one = self.observer(record.adapter, answered=answered)
        one.total.observe(record.total_s)
        if record.prompt_tokens:
            one.prompt.inc(record.prompt_tokens)
        if record.completion_tokens:
            one.completion.inc(record.completion_tokens)
        if record.queue_s is not None:
            one.queue.observe(record.queue_s)
        if record.ttft_s is not None:
            one.ttft.observe(record.ttft_s)
        if record.load_s > 0:
            self._loading.labels(label).observe(record.load_s)
        if self._lorax is not None:
            self._lorax.request_ended(record)

    def text(self) -> bytes:
        """The exposition Prometheus scrapes."""
        return generate_latest(_WithoutBirthdays(self.registry))

    def as_json(self) -> list[dict[str, Any]]:
        """The same series as data, one entry a family."""
        return [
            {
                "name": family.name,
                "type": family.type,
                "help": family.documentation,
                "samples": [{"name": s.name, "labels": dict(s.labels), "value": s.value} for s in family.samples],
            }
            for family in _WithoutBirthdays(self.registry).collect()
        ]


class _WithoutBirthdays(Collector):
    """A registry without the library's ``_created`` samples, which double the series and which nobody asked for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _EngineCollector(Collector):
    """Series read at each scrape from the engine's last heartbeat, so that nothing is counted twice."""

    def __init__(
        self,
        stats: Callable[[], EngineStats | None],
        restarts: Callable[[], EngineRestarts],
        lorax_names: bool,
        label: Callable[..., str],
    ) -> None:
        self._stats = stats
        self._restarts = restarts
        self._lorax_names = lorax_names
        self._label = label

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily(
            "truffula_engine_up",
            "1 when the engine is up",
            0 if stats is None else 1,
        )
        yield CounterMetricFamily(
            "truffula_engine_restarts_total", "Starts of an engine after one that died", self._restarts().count
        )
        if stats is None:
            return
        for name, text, field in _ENGINE_SERIES:
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(name, text, getattr(stats, field))
        yield self._loads(stats)
        if self._lorax_names:
            yield GaugeMetricFamily("lorax_batch_current_size", "Sequences in the batch", stats.running)
            yield GaugeMetricFamily("lorax_queue_length", "Sequences in the queue", stats.waiting)
            yield CounterMetricFamily("lorax_batch_inference_count", "Steps of the engine", stats.steps)

    def _loads(self, stats: EngineStats) -> Metric:
        """Loads per adapter, under the same bounded labels as requests: what loaded has shown that it exists."""
        counts: collections.Counter[str] = collections.Counter()
        for name, loads in stats.adapter_loads_by_name.items():
            counts[self._label(name, answered=True)] += loads
        family = CounterMetricFamily("truffula_adapter_loads_total", "Adapters loaded", labels=["adapter"])
        for label, loads in counts.items():
            family.add_metric([label], loads)
        return family


class _LoraxSeries:
    """LoRAX's names, for dashboards that exist. Counted beside ours, without an adapter label as LoRAX has none."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._count = Counter("lorax_request_count", "Requests", registry=registry)
        self._success = Counter("lorax_request_success", "Requests answered", registry=registry)
        self._failure = Counter("lorax_request_failure", "Requests failed", ("err",), registry=registry)
        self._seconds = {
            field: _histogram(f"lorax_request_{name}", f"Seconds: {name}", _SECONDS, registry)
            for field, name in (
                ("total_s", "duration"),
                ("validation_s", "validation_duration"),
                ("queue_s", "queue_duration"),
            )
        }
        self._inference = _histogram("lorax_request_inference_duration", "Seconds in the engine", _SECONDS, registry)
        self._per_token = _histogram(
            "lorax_request_mean_time_per_token_duration", "Seconds per token", _TOKEN_SECONDS, registry
        )
        self._counts = {
            field: _histogram(f"lorax_request_{name}", f"Tokens: {name}", _TOKENS, registry)
            for field, name in (
                ("completion_tokens", "generated_tokens"),
                ("prompt_tokens", "input_length"),
                ("max_tokens", "max_new_tokens"),
            )
        }

    def request_ended(self, record: RequestRecord) -> None:
        self._count.inc()
        if record.error_code is not None:
            self._failure.labels(_LORAX_ERR.get(record.error_code, "generation")).inc()
            return
        self._success.inc()
        for instruments in (self._seconds, self._counts):
            for field, histogram in instruments.items():
                value = getattr(record, field)
                if value is not None:
                    histogram.observe(value)
        inference = max(0.0, record.total_s - (record.queue_s or 0.0))
        self._inference.observe(inference)
        if record.completion_tokens:
            self._per_token.observe(inference / record.completion_tokens)


_LORAX_ERR = MappingProxyType(
    {
        "invalid_request": "validation",
        "prompt_too_long": "validation",
        "malformed_json": "bad_request",
        "body_too_large": "bad_request",
        "unsupported_media_type": "bad_request",
        "overloaded": "overloaded",
        "queue_timeout": "overloaded",
        "engine_died": "incomplete",
        "aborted": "incomplete",
        "template_error": "template",
        "adapter_not_found": "download_adapter",
        "adapter_invalid": "load_adapter",
        "adapter_load_failed": "load_adapter",
    }
)


def _histogram(
    name: str,
    text: str,
    buckets: tuple[float, ...],
    registry: CollectorRegistry,
    labels: tuple[str, ...] = (),
) -> Histogram:
    return Histogram(name, text, labels, buckets=buckets, registry=registry)
