"""Metrics: bounded labels, counts from records, the engine's numbers when somebody scrapes."""

from prometheus_client.parser import text_string_to_metric_families

from truffula.metrics import BASE_LABEL, OTHER_LABEL, Metrics, RequestRecord
from truffula.types import EngineRestarts, EngineStats


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


def test_lorax_names_by_switch_and_json():
    metrics = Metrics(lambda: EngineStats(monotonic=0.0, waiting=4), lorax_names=True)
    metrics.request_ended(record(validation_s=0.001))
    metrics.request_ended(record(error_code="overloaded"))
    found = samples(metrics)
    assert found["lorax_request_count_total", ()] == 2
    assert found["lorax_request_success_total", ()] == 1
    assert found["lorax_request_failure_total", (("err", "overloaded"),)] == 1
    assert found["lorax_queue_length", ()] == 4
    assert not any(name.startswith("lorax_") for name, _ in samples(Metrics()))
    assert {"truffula_sequences_waiting"} <= {family["name"] for family in metrics.as_json()}


def test_loads_are_counted_by_adapter():
    stats = EngineStats(monotonic=1.0, adapter_loads=4, adapter_loads_by_name={"pirate": 3, "poet": 1})
    found = samples(Metrics(lambda: stats, max_adapters=1))
    name = "truffula_adapter_loads_total"
    loads = {labels: value for (sample, labels), value in found.items() if sample == name}
    assert sorted(loads.values()) == [1, 3] and (("adapter", OTHER_LABEL),) in loads
