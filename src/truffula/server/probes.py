"""Routes that tell about the server and generate nothing: health, version, ``/info``, ``/metrics``."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from truffula import __version__
from truffula.errors import InvalidRequest
from truffula.metrics import Metrics
from truffula.server.errors import Unhealthy
from truffula.server.replies import json_reply
from truffula.server.state import state_of
from truffula.server.vllm_metrics import max_loras


async def health(request: Request) -> Response:
    """200 with an empty body while the engine answers and the server takes requests, else 503."""
    _require_healthy(request)
    return Response(status_code=200)


def _require_healthy(request: Request) -> None:
    if not state_of(request).service.healthy():
        raise Unhealthy("unhealthy")


async def openai_health(request: Request) -> Response:
    """As `/health`, with a JSON body like llama.cpp's."""
    _require_healthy(request)
    return json_reply({"status": "ok"})


async def version(request: Request) -> Response:
    """The version of truffula."""
    return json_reply({"version": __version__})


async def openai_root(request: Request) -> Response:
    """The name and version of the server, and where its models and documentation are."""
    return json_reply({"name": "truffula", "version": __version__, "models": "/v1/models", "docs": "/docs"})


async def startup(request: Request) -> Response:
    """200 once a request has been answered, else 503."""
    _require_healthy(request)
    if not state_of(request).succeeded:
        raise Unhealthy("No request has been answered yet.")
    return Response(status_code=200)


async def info(request: Request) -> Response:
    """The model, its limits and the server's version, in the fields of LoRAX and TGI."""
    state = state_of(request)
    engine, config, restarts = state.service.info, state.config, state.service.restarts()
    return json_reply(
        {
            "model_id": state.model_id,
            "model_sha": engine.revision,
            "model_dtype": engine.dtype,
            "model_device_type": engine.device,
            "model_pipeline_tag": "text-generation",
            "model_type": engine.model_type,
            "max_concurrent_requests": engine.max_running,
            "max_best_of": config.max_best_of,
            "max_stop_sequences": config.max_stop_sequences,
            "max_input_length": engine.max_model_len - 1,
            "max_input_tokens": engine.max_model_len - 1,
            "max_total_tokens": engine.max_model_len,
            "waiting_served_ratio": 0.0,
            "max_batch_total_tokens": engine.kv_tokens,
            "max_batch_prefill_tokens": engine.step_tokens,
            "max_waiting_tokens": 0,
            "validation_workers": 1,
            "max_client_batch_size": 1,
            "eager_prefill": True,
            "router": "truffula",
            "version": __version__,
            "sha": None,
            "docker_label": None,
            "request_logger_url": None,
            "backend": engine.backend,
            "end_tokens": [{"id": token.id, "text": token.text, "source": token.source} for token in engine.end_tokens],
            "engine_restarts": restarts.count,
            "engine_restart_reason": restarts.last_reason or None,
        }
    )


async def load(request: Request) -> Response:
    """How many requests are running or waiting, in the fields of vLLM and SGLang."""
    active = state_of(request).service.active
    return json_reply({"server_load": active, "load": active})


async def sglang_info(request: Request) -> Response:
    """The model and its limits, in the fields of SGLang."""
    state = state_of(request)
    info = state.service.info
    return json_reply(
        {
            "model_path": info.model,
            "tokenizer_path": info.model,
            "served_model_name": state.model_id,
            "is_generation": True,
            "dtype": info.dtype,
            "context_length": info.max_model_len,
            "max_running_requests": info.max_running,
            "max_total_num_tokens": info.kv_tokens,
            "tp_size": 1,
            "dp_size": 1,
            "version": __version__,
        }
    )


async def server_info(request: Request) -> Response:
    """The configuration that is in effect, as vLLM's clients read it: an object with ``config_format=json``, else a
    text.
    """
    wanted = request.query_params.get("config_format", "text")
    if wanted not in ("text", "json"):
        raise InvalidRequest(f"config_format: should be text or json, got {wanted[:40]!r}.", param="config_format")
    state = state_of(request)
    info, stats = state.service.info, state.service.known_stats()
    config = {
        "model_config": {
            "model": info.model,
            "served_model_name": state.model_id,
            "dtype": f"torch.{info.dtype}",
            "max_model_len": info.max_model_len,
        },
        # An adapter may have any rank; 512 is the highest that vLLM's clients know.
        "lora_config": {"max_lora_rank": 512, "max_loras": max_loras(stats, info)},
        "parallel_config": {"data_parallel_size": 1, "tensor_parallel_size": 1, "pipeline_parallel_size": 1},
        "cache_config": {"block_size": info.block_size, "num_gpu_blocks": info.num_blocks},
        "scheduler_config": {"max_num_seqs": info.max_running, "max_num_batched_tokens": info.step_tokens},
    }
    shown = config if wanted == "json" else ", ".join(f"{name}={value}" for name, value in config.items())
    return json_reply({"vllm_config": shown, "vllm_env": {}, "system_env": {"truffula_version": __version__}})


async def metrics(request: Request) -> Response:
    """Metrics as Prometheus reads them; as JSON with ``?format=json`` or ``Accept: application/json``."""
    state = state_of(request)
    wanted = request.query_params.get("format")
    if wanted == "json" or (wanted is None and "application/json" in request.headers.get("accept", "")):
        return json_reply(state.metrics.as_json())
    return Response(state.metrics.text(), headers={"content-type": Metrics.content_type})
