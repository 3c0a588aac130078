"""``/health``, ``/ping``, ``/startup``, ``/info``, ``/metrics``: for machines that watch. They run nothing."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from truffula import __version__
from truffula.metrics import Metrics
from truffula.server.errors import Unhealthy
from truffula.server.replies import json_reply
from truffula.server.state import state_of


async def health(request: Request) -> Response:
    """200 with an empty body while the engine's heart beats and the server does not drain."""
    state = state_of(request)
    if not state.service.healthy():
        raise Unhealthy("unhealthy")
    return Response(status_code=200)


async def startup(request: Request) -> Response:
    """200 once one generation has been answered."""
    state = state_of(request)
    if not state.service.healthy():
        raise Unhealthy("unhealthy")
    if not state.succeeded:
        raise Unhealthy("No request has been answered yet.")
    return Response(status_code=200)


async def info(request: Request) -> Response:
    """What runs here, in the words of LoRAX and TGI. Never a secret."""
    state = state_of(request)
    engine, config, restarts = state.service.info, state.config, state.service.restarts()
    return json_reply(
        {
            "model_id": state.model_id,
            "model_sha": None,
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
            "max_batch_total_tokens": engine.num_blocks * engine.block_size,
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
            "engine_restarts": restarts.count,
            "engine_restart_reason": restarts.last_reason or None,
        }
    )


async def metrics(request: Request) -> Response:
    """Prometheus' text; JSON by ``?format=json`` or ``Accept: application/json``."""
    state = state_of(request)
    wanted = request.query_params.get("format")
    if wanted == "json" or (wanted is None and "application/json" in request.headers.get("accept", "")):
        return json_reply(state.metrics.as_json())
    return Response(state.metrics.text(), headers={"content-type": Metrics.content_type})
