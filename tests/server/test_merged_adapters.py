"""Several adapters in one request: what the fields mean, by their answers, and what is refused by name."""

import pytest
from live_server import MODEL, assert_canonical_error, ok

CHAT = [{"role": "user", "content": "Hello"}]
BODIES = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 8, "temperature": 0},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 8, "temperature": 0},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 16, "temperature": 0},
    "/v1/messages": {"messages": CHAT, "max_tokens": 8, "temperature": 0},
}


def native(live, **parameters):
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 8, "details": True, **parameters}}
    found = ok(live.post("/generate", body))
    return [token["id"] for token in found["details"]["tokens"]]


def mixed(live, **fields):
    return native(live, merged_adapters=fields)


@pytest.fixture(scope="module")
def alone(live):
    return {name: native(live, adapter_id=name) for name in ("pirate", "org/poet")} | {"base": native(live)}


def test_a_linear_merge_of_one_adapter_is_that_adapter(live, alone):
    pirate = alone["pirate"]
    assert mixed(live, ids=["pirate"]) == pirate
    assert mixed(live, ids=["pirate"], weights=[1.0], merge_strategy=None, density=None) == pirate
    assert mixed(live, ids=["pirate", "pirate"], weights=[0.5, 0.5], merge_strategy="linear", density=0.0) == pirate
    assert mixed(live, ids=["pirate", "org/poet"], weights=[1, 0], merge_strategy="Linear") == pirate
    assert mixed(live, ids=["org/poet", "pirate"], weights=[0, 0]) == alone["base"]


def test_a_linear_merge_does_not_depend_on_order_and_weights_count(live, alone):
    both = mixed(live, ids=["pirate", "org/poet"], weights=[0.7, -0.4])
    assert both == mixed(live, ids=["org/poet", "pirate"], weights=[-0.4, 0.7])
    answers = [both, mixed(live, ids=["pirate", "org/poet"]), mixed(live, ids=["pirate"], weights=[3.0])]
    assert len({tuple(tokens) for tokens in (*answers, *alone.values())}) == 6, "each mix answers as itself"


@pytest.mark.parametrize("strategy", ["ties", "DARE_LINEAR", "dare_ties", "magnitude_prune"])
def test_other_strategies_repeat_and_are_listed_with_their_parts(live, alone, strategy):
    fields = {"ids": ["pirate", "pirate"], "weights": [1.0, 0.5], "merge_strategy": strategy, "density": 0.6}
    first = mixed(live, **fields)
    assert first == mixed(live, **fields)
    assert first != alone["base"]
    assert mixed(live, ids=["pirate"], merge_strategy=strategy, density=1.0) == alone["pirate"]


def test_adapters_of_unequal_rank_merge_by_linear_only(live):
    body = {"inputs": "a", "parameters": {"merged_adapters": {
        "ids": ["pirate", "org/poet"], "merge_strategy": "ties", "density": 0.5,
    }}}  # fmt: skip
    error = assert_canonical_error(live.post("/generate", body), 422, "equal ranks")
    assert "pirate 4, org/poet 2" in error["error"] or "org/poet 2, pirate 4" in error["error"]


@pytest.mark.parametrize("path", sorted(BODIES))
def test_every_route_has_the_field_and_lists_of_names_with_scales(live, path):
    def answer(**fields):
        found = ok(live.post(path, {"model": MODEL, **BODIES[path], **fields}))
        if "choices" in found:
            return found["choices"]
        return [part["text"] for item in found.get("output", [found]) for part in item["content"]]

    wanted = answer(merged_adapters={"ids": ["pirate", "org/poet"], "weights": [0.7, -0.3]})
    assert wanted == answer(lora=[{"name": "org/poet", "scale": -0.3}, {"id": "pirate", "weight": 0.7}])
    assert wanted != answer()
    assert answer(lora=[{"name": "pirate"}]) == answer(lora_adapters=[{"id": "pirate", "scale": 1.0}])


BAD = [
    ({"ids": []}, "ids"),
    ({"ids": ["pirate"], "weights": [1, 2]}, "2 weights for 1 ids"),
    ({"ids": ["pirate"], "weights": ["1"]}, "weights[0]"),
    ({"ids": ["pirate"], "weights": [5000]}, "weights[0]"),
    ({"ids": ["pirate"] * 9}, "ids"),
    ({"ids": ["__base_model__", "pirate"]}, "names the base model"),
    ({"ids": [MODEL]}, "names the base model"),
    ({"ids": ["pirate"], "merge_strategy": "slerp"}, "merge_strategy"),
    ({"ids": ["pirate"], "merge_strategy": "ties"}, "density"),
    ({"ids": ["pirate"], "merge_strategy": "dare_linear", "density": 0}, "density"),
    ({"ids": ["pirate"], "merge_strategy": "ties", "density": 1.5}, "density"),
    ({"ids": ["pirate"], "merge_strategy": "ties", "density": 0.5, "majority_sign_method": "vote"}, "majority_sign"),
    ({"ids": ["pirate"], "wieghts": [1]}, "wieghts"),
    ({"weights": [1]}, "ids"),
    (["pirate"], "merged_adapters"),
]


@pytest.mark.parametrize(("value", "words"), BAD, ids=str)
def test_bad_values_are_refused_by_name(live, value, words):
    body = {"inputs": "a", "parameters": {"merged_adapters": value}}
    error = assert_canonical_error(live.post("/generate", body), 422, words)
    assert "parameters.merged_adapters" in error["error"] and error["error_type"] == "validation"
    error = assert_canonical_error(live.post("/v1/completions", {"prompt": "a", "merged_adapters": value}), 400, words)
    assert error["param"].startswith("merged_adapters")


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"adapter_id": "pirate", "merged_adapters": {"ids": ["org/poet"]}}, 400, "adapter_id"),
        ({"model": "pirate", "merged_adapters": {"ids": ["pirate", "org/poet"]}}, 400, "model names one adapter"),
        ({"merged_adapters": {"ids": ["pirate", "robin"]}}, 404, "robin"),
        ({"lora": [{"name": "pirate", "scale": "1"}]}, 400, "lora[0].scale"),
        ({"lora": [{"name": "pirate", "scale": 1, "weight": 1}]}, 400, "lora[0]"),
        ({"lora": [{"name": "pirate"}, {"id": 0}]}, 400, "lora"),
        ({"lora": ["pirate", "org/poet"]}, 400, "merged_adapters"),
    ],
    ids=str,
)
def test_contradictions_and_unknown_names(live, fields, status, words):
    assert_canonical_error(live.post("/v1/completions", {"prompt": "a", "max_tokens": 1, **fields}), status, words)


def test_the_answer_says_which_adapters_and_metrics_count_them_without_weights(live):
    body = {"prompt": "a", "max_tokens": 1, "merged_adapters": {"ids": ["pirate", "org/poet"], "weights": [0.25, 1]}}
    response = live.post("/v1/completions", body)
    ok(response)
    assert response.headers["x-adapter-id"] in ("pirate=0.25+org/poet=1", "org/poet=1+pirate=0.25")
    assert 'adapter="org/poet+pirate"' in live.client.get("/metrics").text
