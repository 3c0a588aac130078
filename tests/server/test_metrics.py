"""Metrics: bounded labels, counts from records, the engine's numbers when somebody scrapes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from truffula.metrics import BASE_LABEL, OTHER_LABEL, TOKEN_SECONDS, Metrics, RequestRecord
from truffula.server.router_metrics import RouterMetrics
from truffula.types import EngineInfo, EngineRestarts, EngineStats

REQUIRED = {
    **dict.fromkeys(("model", "model_type", "backend", "device", "dtype"), ""),
    **dict.fromkeys(("vocab_size", "max_model_len", "num_blocks", "kv_tokens", "step_tokens", "max_running"), 1),
    "eos_token_ids": [],
}


def samples(metrics):
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for s in family.samples:
            found[(s.name, tuple(sorted(s.labels.items())))] = s.value
    return found


def record(**fields):
    known = {
        "request_id": "r",
        "method": "POST",
        "route": "/generate",
        "generates": True,
        "status": 200,
        "finish": "stop",
    }
    return RequestRecord(
        **known | {"prompt_tokens": 3, "completion_tokens": 5, "ttft_s": 0.1, "queue_s": 0.01} | fields
    )


def test_requests_are_counted_by_adapter_and_outcome():
    metrics = Metrics()
    metrics.request_ended(record(adapter="pirate"))
    metrics.request_ended(record())
    metrics.request_ended(record(status=422, error_code="invalid_request", finish=None))
    found = samples(metrics)
    name = "truffula_requests_total"
    assert found[name, (("adapter", "pirate"), ("outcome", "stop"), ("route", "/generate"))] == 1
    assert found[name, (("adapter", BASE_LABEL), ("outcome", "invalid_request"), ("route", "/generate"))] == 1
    assert found["truffula_completion_tokens_total", (("adapter", BASE_LABEL),)] == 10
    assert found["truffula_time_to_first_token_seconds_count", (("adapter", "pirate"),)] == 1


def test_labels_are_bounded():
    metrics = Metrics(max_adapters=2)
    for i in range(50):
        metrics.request_ended(record(adapter=f"a{i}", method=f"M{i}"))
    labels = {dict(labels).get("adapter") for (name, labels) in samples(metrics) if name == "truffula_requests_total"}
    assert labels == {"a0", "a1", OTHER_LABEL}
    methods = {dict(labels)["method"] for (name, labels) in samples(metrics) if name == "truffula_http_responses_total"}
    assert methods == {"other"}


def test_a_name_is_a_label_once_it_answers():
    metrics = Metrics(max_adapters=2, named=("ours",))
    for i in range(5):
        metrics.request_ended(record(adapter=f"invented{i}", status=404, error_code="adapter_not_found", finish=None,
                                     completion_tokens=0))  # fmt: skip
    for name in ("first", "second", "ours"):
        metrics.request_ended(record(adapter=name))
    labels = {dict(labels).get("adapter") for (name, labels) in samples(metrics) if name == "truffula_requests_total"}
    assert labels == {"ours", "first", OTHER_LABEL}


def test_the_engines_numbers_are_read_when_scraped():
    stats = EngineStats(monotonic=0.0, running=3, prefix_hit_tokens=7)
    found = samples(Metrics(lambda: stats))
    assert found["truffula_engine_up", ()] == 1
    assert found["truffula_sequences_running", ()] == 3
    assert found["truffula_prefix_hit_tokens_total", ()] == 7
    assert samples(Metrics(lambda: None))["truffula_engine_up", ()] == 0


def test_restarts_are_counted_while_there_is_no_engine():
    restarts = EngineRestarts(count=2, last_reason="out of memory")
    assert samples(Metrics(lambda: None, restarts=lambda: restarts))["truffula_engine_restarts_total", ()] == 2
    assert samples(Metrics())["truffula_engine_restarts_total", ()] == 0


def test_metrics_as_json():
    assert {"truffula_sequences_waiting"} <= {
        family["name"] for family in Metrics(lambda: EngineStats(monotonic=0.0)).as_json()
    }


@pytest.mark.parametrize(("prefix", "queue"), [("lorax", "lorax_queue_length"), ("tgi", "tgi_queue_size")])
def test_the_names_of_lorax_and_tgi(prefix, queue):
    """As their routers export them: counters without ``_total``, the seconds of histograms with buckets."""
    stats = EngineStats(monotonic=0.0, waiting=4, running=2, steps=9, used_blocks=3)
    metrics = Metrics(lambda: stats)
    assert not any(name.startswith(("lorax_", "tgi_")) for name, _ in samples(metrics))
    info = EngineInfo(**REQUIRED | {"block_size": 16})
    metrics.on_request.append(RouterMetrics(metrics.registry, lambda: stats, info).request_ended)
    metrics.request_ended(record(validation_s=0.001, max_tokens=20))
    metrics.request_ended(record(error_code="overloaded"))
    metrics.request_ended(record(generates=False))
    found = samples(metrics)
    assert found[f"{prefix}_request_count", ()] == 2
    assert found[f"{prefix}_request_success", ()] == 1
    assert found[f"{prefix}_request_failure", (("err", "overloaded"),)] == 1
    assert found[f"{prefix}_batch_inference_count", (("method", "decode"),)] == 9
    assert found[f"{prefix}_batch_current_size", ()] == 2
    assert found[f"{prefix}_batch_current_max_tokens", ()] == 48
    assert found[queue, ()] == 4
    for name, value in (("generated_tokens", 5), ("input_length", 3), ("max_new_tokens", 20)):
        assert found[f"{prefix}_request_{name}_sum", ()] == value
    for name in ("duration", "validation_duration", "queue_duration", "inference_duration"):
        assert found[f"{prefix}_request_{name}_count", ()] == 1
    assert found[f"{prefix}_request_mean_time_per_token_duration_count", ()] == 1


def test_loads_are_counted_by_adapter():
    stats = EngineStats(monotonic=1.0, adapter_loads=4, adapter_loads_by_name={"pirate": 3, "poet": 1})
    found = samples(Metrics(lambda: stats, max_adapters=1))
    name = "truffula_adapter_loads_total"
    loads = {labels: value for (sample, labels), value in found.items() if sample == name}
    assert sorted(loads.values()) == [1, 3] and (("adapter", OTHER_LABEL),) in loads


@given(st.lists(st.floats(0, 10) | st.sampled_from(TOKEN_SECONDS)))
def test_times_between_deltas_are_written_as_prometheus_clients_histogram_does(times):
    metrics, registry = Metrics(), CollectorRegistry()
    name, text = "truffula_inter_token_seconds", "Time between two deltas of a choice"
    expected = Histogram(name, text, ["adapter"], buckets=TOKEN_SECONDS, registry=registry).labels(BASE_LABEL)
    observer = metrics.observer(None, answered=True)
    for seconds in times:
        observer.inter_token.observe(seconds)
        expected.observe(seconds)
    assert generate_latest(registry) in metrics.text()
