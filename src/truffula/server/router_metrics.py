"""Metrics under the names of LoRAX's and TGI's routers (``--lorax-metrics``), for existing dashboards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.registry import Collector

from truffula.metrics import SECONDS, TOKEN_SECONDS, TOKENS, RequestRecord
from truffula.types import EngineInfo, EngineStats

# prefix of the names → the end of the queue's
_PREFIXES = {"lorax": "queue_length", "tgi": "queue_size"}
# (field of RequestRecord, end of the name, help, buckets)
_HISTOGRAMS = (
    ("total_s", "duration", "Seconds from arrival to the last byte", SECONDS),
    ("validation_s", "validation_duration", "Seconds of validation", SECONDS),
    ("queue_s", "queue_duration", "Seconds in the queue", SECONDS),
    ("completion_tokens", "generated_tokens", "Generated tokens", TOKENS),
    ("prompt_tokens", "input_length", "Prompt tokens", TOKENS),
    ("max_tokens", "max_new_tokens", "Tokens asked for", TOKENS),
)
_ERRORS = MappingProxyType(
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


class RouterMetrics(Collector):
    """Both routers' series, without an adapter label, as theirs. ``stats`` is read at each scrape.

    Their counters have no ``_total`` at the end, which Prometheus' client adds to every counter: they are exported
    without a type.
    """

    def __init__(self, registry: CollectorRegistry, stats: Callable[[], EngineStats | None], info: EngineInfo) -> None:
        self._stats = stats
        self._block_size = info.block_size
        self._count = self._success = 0
        self._failures: dict[str, int] = {}
        self._of_record = [
            (field, Histogram(f"{prefix}_request_{name}", text, buckets=buckets, registry=registry))
            for prefix in _PREFIXES
            for field, name, text, buckets in _HISTOGRAMS
        ]
        self._inference = [
            Histogram(
                f"{prefix}_request_inference_duration", "Seconds in the engine", buckets=SECONDS, registry=registry
            )
            for prefix in _PREFIXES
        ]
        self._per_token = [
            Histogram(
                f"{prefix}_request_mean_time_per_token_duration",
                "Seconds per token",
                buckets=TOKEN_SECONDS,
                registry=registry,
            )
            for prefix in _PREFIXES
        ]
        registry.register(self)

    def request_ended(self, record: RequestRecord) -> None:
        """Count one generating request."""
        self._count += 1
        if record.error_code is not None:
            error = _ERRORS.get(record.error_code, "generation")
            self._failures[error] = self._failures.get(error, 0) + 1
            return
        self._success += 1
        for field, histogram in self._of_record:
            value = getattr(record, field)
            if value is not None:
                histogram.observe(value)
        inference = max(0.0, record.total_s - (record.queue_s or 0.0))
        for histogram in self._inference:
            histogram.observe(inference)
        for histogram in self._per_token if record.completion_tokens else ():
            histogram.observe(inference / record.completion_tokens)

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for prefix, queue in _PREFIXES.items():
            yield UnknownMetricFamily(f"{prefix}_request_count", "Requests", self._count)
            yield UnknownMetricFamily(f"{prefix}_request_success", "Requests answered", self._success)
            failures = UnknownMetricFamily(f"{prefix}_request_failure", "Requests failed", labels=["err"])
            for error, count in self._failures.items():
                failures.add_metric([error], count)
            yield failures
            if stats is None:
                continue
            steps = UnknownMetricFamily(f"{prefix}_batch_inference_count", "Engine steps", labels=["method"])
            steps.add_metric(["decode"], stats.steps)
            yield steps
            yield GaugeMetricFamily(f"{prefix}_batch_current_size", "Sequences in the batch", stats.running)
            held = stats.used_blocks * self._block_size
            yield GaugeMetricFamily(f"{prefix}_batch_current_max_tokens", "Tokens of the batch's KV blocks", held)
            yield GaugeMetricFamily(f"{prefix}_{queue}", "Sequences in the queue", stats.waiting)
