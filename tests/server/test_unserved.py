"""Routes of other servers: refused in the form of their own API, with what to use here; routes that tools expect."""

import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError
from live_server import MODEL, assert_canonical_error, ok, serving

from truffula import __version__


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/embed", 422, "Embeddings are not served"),
        ("/v1/embeddings", 400, "Embeddings are not served"),
        ("/classify", 422, "Classification is not served"),
        ("/classify_batch", 422, "Classification is not served"),
        ("/v1/conversations", 404, "use POST /v1/responses"),
        ("/v1/conversations/conv_1", 404, "use POST /v1/responses"),
        ("/v1/audio/transcriptions", 404, "Audio API is not served here"),
        ("/v1/images/generations", 404, "Images API"),
        ("/v1/files", 404, "Files API"),
        ("/v1/batches", 404, "Batch API"),
        ("/v1/fine_tuning/jobs", 404, "--adapter"),
        ("/v1/moderations", 404, "Moderations API"),
        ("/v1/rerank", 404, "Reranking"),
        ("/v1/load_lora_adapter", 404, "--adapter-admin"),
        ("/v1/unload_lora_adapter", 404, "--adapter-admin"),
        ("/rerank", 404, "Reranking"),
        ("/score", 404, "Scoring"),
        ("/completion", 404, "use POST /v1/completions"),
        ("/lora-adapters", 404, "GET /v1/models"),
        ("/v2/models/llama/infer", 404, "KServe"),
        ("/load_lora_adapter", 404, "--adapter-admin"),
        # A base URL with or without /v1, slashes, spelling.
        ("/chat/completions", 404, "did you mean /v1/chat/completions?"),
        ("/v1/v1/chat/completions", 404, "did you mean /v1/chat/completions?"),
        ("/v1/generate", 404, "did you mean /generate?"),
        ("/generate/", 404, "did you mean /generate?"),
        ("//v1//completions", 404, "did you mean /v1/completions?"),
        ("/v1/chat/completion", 404, "did you mean /v1/chat/completions?"),
        ("/V1/Chat/Completions", 404, "did you mean /v1/chat/completions?"),
        ("/nowhere", 404, "GET /docs lists the routes"),
    ],
)
def test_what_is_not_served_says_what_to_use(live, path, status, words):
    for method in ("POST", "GET"):
        response = live.client.request(method, live.url + path, json={} if method == "POST" else None)
        assert response.status_code == status
        error = response.json()["error"]
        assert words in (error if isinstance(error, str) else error["message"])


def test_native_embeddings_and_classification_have_the_contracts_error_types(live):
    assert assert_canonical_error(live.post("/embed", {"inputs": "a"}), 422)["error_type"] == "embedding_failure"
    for path in ("/classify", "/classify_batch"):
        assert assert_canonical_error(live.post(path, {"inputs": "a"}), 422)["error_type"] == "classification_failure"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/api/chat", "use POST /v1/chat/completions"),
        ("/api/generate", "use POST /v1/completions"),
        ("/api/tags", "use GET /v1/models"),
        ("/api/pull", "GET /docs"),
    ],
)
def test_ollamas_clients_get_a_string(live, path, words):
    response = live.post(path, {"model": MODEL})
    assert response.status_code == 404
    assert set(response.json()) == {"error"}
    assert words in response.json()["error"]


def test_anthropics_clients_get_their_form(live, model_folder):
    response = live.post("/v1/messages/batches", {"requests": []})
    assert (response.status_code, response.json()["type"]) == (404, "error")
    assert response.json()["error"]["type"] == "not_found_error"
    assert "send each request on its own" in response.json()["error"]["message"]
    with serving(model_folder, api_keys=("k",)) as guarded:
        response = guarded.post("/v1/messages/count_tokens", {})
        assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")


def test_real_clients_show_the_words(live):
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="-", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="Embeddings are not served"):
        client.embeddings.create(model=MODEL, input="a")
    with pytest.raises(openai.NotFoundError, match="use POST /v1/responses"):
        client.conversations.create()
    with pytest.raises(openai.NotFoundError, match="GET /v1/models lists them"):
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="n_predict has no effect"):
        client.completions.create(model=MODEL, prompt="a", extra_body={"n_predict": 1})
    without_v1 = openai.OpenAI(base_url=live.url, api_key="-", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="did you mean /v1/chat/completions"):
        without_v1.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a"}])
    with pytest.raises(GenerationError, match="no model or adapter 'gone'"):
        InferenceClient(live.url).text_generation("a", adapter_id="gone")


def test_what_tools_ask_first(live):
    assert ok(live.client.get("/version")) == {"version": __version__}
    assert ok(live.client.get("/v1/health")) == {"status": "ok"}
    assert live.client.get("/ping").content == b""
    assert ok(live.client.get("/v1"))["models"] == "/v1/models"
    assert ok(live.client.get("/openapi.json")) == ok(live.client.get("/api-doc/openapi.json"))


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("GET", "/generate", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("POST", "/v1/models/a/b", "GET, HEAD"),
        ("DELETE", "/", "GET, HEAD, POST"),
        ("PUT", "/docs", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_the_right_one(live, method, path, allowed):
    response = live.client.request(method, path)
    assert_canonical_error(response, 405, f"{method} is not allowed on {path}; use {allowed}.")
    assert response.headers["allow"] == allowed
