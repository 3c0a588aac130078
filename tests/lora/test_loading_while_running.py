"""No request waits for another's adapter: an engine as it is served, with loads that block or use all CPU."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from invariants import check_engine

from truffula.config import EngineConfig
from truffula.engine.build import build_engine
from truffula.engine.engine import Engine
from truffula.lora.sources import AdapterDirectory
from truffula.params import EngineParams
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.tiny import tiny_llama_config, write_tiny_checkpoint
from truffula.types import EngineRequest, TokenEvent

PATIENCE_S = 120.0
SLOW = {"(" + "(.*l)*(.*p)*(.*r)*" * 40 + f")*z{n}": 3 for n in range(15)}  # more computing time than patterns may take


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    model = write_tiny_checkpoint(tmp_path / "model", tiny_llama_config(), seed=1)
    made, _ = build_engine(EngineConfig(model=str(model), dtype="float32", memory_bytes=64 << 20))
    yield made
    made.close()


def workers(engine: Engine) -> list[int]:
    """Of this engine's own loader: other engines of this process may have some too."""
    pids: list[int] = engine._adapters.loads.loader.pids()
    return pids


def request(name: str, directory: AdapterDirectory, adapter: str | None, tokens: int) -> EngineRequest:
    params = EngineParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return EngineRequest(request_id=name, prompt_ids=[5, 6, 7], params=params, adapter=directory.resolve(adapter))


def emitted(events: list[TokenEvent], name: str) -> int:
    return sum(len(event.token_ids) for event in events if event.request_id == name)


def test_running_sequences_emit_in_every_step_while_loads_block_and_burn(engine: Engine, tmp_path: Path) -> None:
    for name in ("burning", "blocked", "good"):
        write_tiny_adapter(tmp_path / "served" / name, tmp_path / "model", seed=len(name))
    path = tmp_path / "served" / "burning" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": SLOW}))
    directory = AdapterDirectory(adapter_dir=tmp_path / "served")
    engine.add(request("base", directory, None, 120))
    engine.step()
    engine.add(request("burning", directory, "burning", 4))
    engine.step()
    (first,) = workers(engine)
    engine.add(request("blocked", directory, "blocked", 4))
    engine.step()
    (second,) = [pid for pid in workers(engine) if pid != first]
    os.kill(second, signal.SIGSTOP)
    engine.add(request("good", directory, "good", 4))
    final: dict[str, TokenEvent] = {}

    def step() -> list[TokenEvent]:
        events = engine.step()
        final.update({event.request_id: event for event in events if event.finish_reason is not None})
        return events

    for _ in range(50):
        assert emitted(step(), "base") == 1
        check_engine(engine)
    end = time.monotonic() + PATIENCE_S
    while {"burning", "good"} - set(final):  # the blocked one holds up nobody's load either
        if not step():
            time.sleep(0.005)
        assert time.monotonic() < end and "blocked" not in final
    os.kill(second, signal.SIGCONT)
    while not engine.idle():
        step()
        assert time.monotonic() < end
    assert {first, second} <= set(workers(engine)), "a hostile adapter ends no worker"
    assert {name: event.finish_reason for name, event in final.items()} == {
        "base": "length", "burning": "error", "blocked": "length", "good": "length"
    }  # fmt: skip
    error = final["burning"].error
    assert error is not None and error.code == "adapter_invalid" and "seconds to match" in error.message
    check_engine(engine)


def test_a_killed_worker_delays_its_load_and_ends_no_request(engine: Engine, tmp_path: Path) -> None:
    write_tiny_adapter(tmp_path / "served" / "a", tmp_path / "model")
    directory = AdapterDirectory(adapter_dir=tmp_path / "served")
    engine.add(request("base", directory, None, 60))
    engine.add(request("late", directory, "a", 4))
    events = engine.step()
    (worker,) = workers(engine)
    os.kill(worker, signal.SIGKILL)
    end = time.monotonic() + PATIENCE_S
    while not engine.idle():
        events += engine.step()
        assert time.monotonic() < end
    assert (emitted(events, "base"), emitted(events, "late")) == (60, 4)
    check_engine(engine)


def test_an_adapter_whose_values_overflow_the_model_is_an_error_of_that_adapter(engine: Engine, tmp_path: Path) -> None:
    """Every value is finite, so that it loads; what the model computes with it is not."""
    write_tiny_adapter(tmp_path / "served" / "huge", tmp_path / "model")
    path = tmp_path / "served" / "huge" / "adapter_model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:start] + b"\x7f" * (len(content) - start))
    directory = AdapterDirectory(adapter_dir=tmp_path / "served")
    engine.add(request("huge", directory, "huge", 4))
    engine.add(request("base", directory, None, 8))
    events: list[TokenEvent] = []
    end = time.monotonic() + PATIENCE_S
    while not engine.idle():
        events += engine.step()
        assert time.monotonic() < end
    (error,) = [event.error for event in events if event.error is not None]
    assert error.code == "adapter_invalid" and "'huge'" in error.message
    assert emitted(events, "base") == 8
