"""``--vllm-metrics``: the series that routers read, parsed as they parse them."""

import msgspec
import pytest
from live_server import MODEL, ok, serving
from prometheus_client.parser import text_string_to_metric_families

from truffula.metrics import Metrics
from truffula.server.vllm_metrics import VllmMetrics, kv_usage, max_loras
from truffula.types import EngineInfo, EngineStats

INFO = EngineInfo(
    model="m", model_type="llama", backend="cpu", device="cpu", dtype="float32", vocab_size=9, max_model_len=64,
    block_size=16, num_blocks=40, kv_tokens=640, step_tokens=64, max_running=8, eos_token_ids=[],
)  # fmt: skip
STATS = EngineStats(
    monotonic=0.0, running=3, waiting=4, used_blocks=10, num_blocks=40, kv_used_bytes=400, prompt_tokens=90,
    prefix_hit_tokens=30, adapters_resident=2, adapter_bytes=200, adapter_limit_bytes=1000, budget_bytes=1000,
    resident_names=["poet", "pirate"], loading_names=["late", "pirate", "a,b"],
)  # fmt: skip
NAMES = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc",
    "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_queries_total",
    "vllm:gpu_prefix_cache_hits_total", "vllm:cache_config_info", "vllm:lora_requests_info",
}  # fmt: skip


def samples(text):
    """Series by name; each name has one sample, so that a scraper that takes any takes the right one."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                assert sample.name not in found
                found[sample.name] = sample
    return found


def adapters(sample, label):
    """As the Gateway API's picker reads the label."""
    return {name.strip() for name in sample.labels[label].split(",") if name.strip()}


def scrape(stats):
    """A function that scrapes what ``stats`` holds then."""
    metrics = Metrics()
    metrics.registry.register(VllmMetrics(lambda: stats[0], INFO, "tiny/llama"))
    return lambda: samples(metrics.text().decode())


def test_every_series_has_the_engines_numbers():
    found = scrape([STATS])()
    assert found.keys() == NAMES
    values = {name: sample.value for name, sample in found.items()}
    assert (values["vllm:num_requests_running"], values["vllm:num_requests_waiting"]) == (3, 4)
    assert values["vllm:kv_cache_usage_perc"] == values["vllm:gpu_cache_usage_perc"] == 0.5  # of what adapters leave
    assert (values["vllm:prefix_cache_queries_total"], values["vllm:prefix_cache_hits_total"]) == (90, 30)
    assert found["vllm:num_requests_running"].labels == {"model_name": "tiny/llama", "engine": "0"}
    config = found["vllm:cache_config_info"]
    assert (config.labels, config.value) == ({"block_size": "16", "num_gpu_blocks": "40"}, 1)
    lora = found["vllm:lora_requests_info"]
    assert set(lora.labels) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert adapters(lora, "running_lora_adapters") == {"poet", "pirate"}
    assert adapters(lora, "waiting_lora_adapters") == {"late"}
    assert lora.labels["max_lora"] == "6"


def test_the_adapters_sample_is_dated_by_its_last_change():
    stats = [STATS]
    read = scrape(stats)
    first = read()["vllm:lora_requests_info"].value
    stats[0] = msgspec.structs.replace(STATS, running=7, resident_names=["pirate", "poet"])
    assert read()["vllm:lora_requests_info"].value == first
    stats[0] = msgspec.structs.replace(STATS, resident_names=["poet"])
    assert read()["vllm:lora_requests_info"].value > first
    stats[0] = None
    assert read() == {}


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 6),
        ({"kv_used_bytes": 900}, 2),  # no room left: only what is resident
        ({"adapter_limit_bytes": 300}, 3),
        ({"adapters_resident": 0, "adapter_bytes": 0}, 8),
    ],
)
def test_room_for_adapters_is_counted_in_bytes(changes, most):
    assert max_loras(msgspec.structs.replace(STATS, **changes), INFO) == most
    assert max_loras(None, INFO) == 8


def test_the_used_part_of_the_cache_is_between_0_and_1():
    assert kv_usage(EngineStats(monotonic=0.0)) == 0.0
    assert kv_usage(EngineStats(monotonic=0.0, kv_used_bytes=5, budget_bytes=4)) == 1.0


def test_a_server_shows_its_adapters(model_folder, adapter_folders, live):
    assert samples(live.client.get("/metrics").text) == {}
    named = {name: str(adapter_folders[name]) for name in ("pirate", "org/poet")}
    with serving(model_folder, adapters=named, vllm_metrics=True) as server:
        before = samples(server.client.get("/metrics").text)["vllm:lora_requests_info"]
        assert before.labels["max_lora"] == str(server.service.info.max_running)
        for name in named:
            ok(server.post("/v1/completions", {"model": name, "prompt": "Hello", "max_tokens": 2}))
        found = samples(server.client.get("/metrics").text)
        assert found.keys() == NAMES
        lora = found["vllm:lora_requests_info"]
        assert adapters(lora, "running_lora_adapters") == set(named)
        assert adapters(lora, "waiting_lora_adapters") == set()
        assert int(lora.labels["max_lora"]) > 2
        assert found["vllm:num_requests_running"].labels["model_name"] == MODEL
        assert found["vllm:prefix_cache_queries_total"].value > 0
        assert "vllm:lora_requests_info" in server.client.get("/metrics?format=json").text
