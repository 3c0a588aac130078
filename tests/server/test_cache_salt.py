"""Tenants in the prefix cache: who shares blocks and who never does."""

import pytest
from live_server import ok, serving

PROMPT = list(range(20, 84))  # four blocks of ids, the same for everybody
TEXT = "The Truffula trees were bright, and the Lorax spoke for them. " * 3


def cached(live, key, **extra):
    headers = {"authorization": f"Bearer {key}"}
    body = {"prompt": PROMPT, "max_tokens": 1, **extra}
    answer = ok(live.client.post("/v1/completions", json=body, headers=headers))
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture
def keyed(model_folder):
    with serving(model_folder, backend="auto", api_keys=("key-one", "key-two")) as found:
        yield found


def test_keys_never_share_blocks(keyed):
    assert cached(keyed, "key-one") == 0
    assert cached(keyed, "key-one") > 0
    assert cached(keyed, "key-two") == 0, "another key must not see what the first one sent"
    assert cached(keyed, "key-one", cache_salt="x") == 0
    assert cached(keyed, "key-two", cache_salt="x") == 0
    assert cached(keyed, "key-two", cache_salt="x") > 0


def test_keys_share_where_the_operator_says_so(model_folder):
    with serving(model_folder, backend="auto", api_keys=("key-one", "key-two"), salt_by_api_key=False) as live:
        assert cached(live, "key-one") == 0
        assert cached(live, "key-two") > 0
        assert cached(live, "key-two", cache_salt="x") == 0


def test_the_native_side_has_a_salt_too(live):
    """What the native side cached under a salt is a hit on ``/v1/`` under the same one only."""
    parameters = {"max_new_tokens": 1, "cache_salt": "native-tenant"}
    response = live.post("/generate", {"inputs": TEXT, "parameters": parameters})
    ok(response)
    assert "x-truffula-ignored" not in response.headers

    def hit(**extra):
        return live.completion(prompt=TEXT, max_tokens=1, **extra)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert hit(cache_salt="somebody-else") == 0
    assert hit() == 0
    assert hit(cache_salt="native-tenant") > 0
