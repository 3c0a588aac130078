"""Bytes that KV has used and adapters use now are used once: the process's memory follows the budget's count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from truffula.testing.tiny import tiny_llama_config, write_tiny_checkpoint

MEASURE = """
import sys
import psutil
from truffula.config import EngineConfig
from truffula.engine.build import build_engine
from truffula.params import EngineParams
from truffula.types import EngineRequest

def rss():
    return psutil.Process().memory_info().rss

def run(name, count):
    for n in range(count):
        prompt = [3 + (n * 7 + i) % 90 for i in range(tokens)]
        params = EngineParams(max_tokens=20, temperature=0, ignore_eos=True)  # all of them run together
        engine.add(EngineRequest(request_id=f"{name}{n}", prompt_ids=prompt, params=params))
    tokens_of = {}
    while not engine.idle():
        for event in engine.step():
            assert event.error is None, event
            tokens_of.setdefault(event.request_id, []).extend(event.token_ids)
    return tokens_of

backend, prefix_cache, tokens, count = sys.argv[2], sys.argv[3] == "cached", 256, 32
engine, info = build_engine(EngineConfig(
    model=sys.argv[1], backend=backend, dtype="float32", threads=1, memory_bytes=200 * 2**20, max_running=count,
    step_tokens=512, block_size=16, prefix_cache=prefix_cache, offline=True,
))
run("warm", 1)
first = run("a", count)
budget = engine._budget
held, counted = rss(), budget.used("kv")
assert counted >= info.budget_bytes // 2, "KV used too little for this to be a test"
assert budget.reserve("adapters", info.budget_bytes - counted // 4)
print(counted, held - rss(), counted - budget.used("kv"))
budget.release("adapters", budget.used("adapters"))
assert run("a", count) == first, "what is computed in memory that was returned is the same"
"""


@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("prefix", ["cached", pytest.param("free", marks=pytest.mark.slow)])
def test_kv_memory_is_returned_when_adapters_need_its_bytes(backend: str, prefix: str, tmp_path: Path):
    config = tiny_llama_config(
        hidden_size=64, head_dim=128, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=4,
        max_position_embeddings=512,
    )  # fmt: skip
    write_tiny_checkpoint(tmp_path / "tiny", config, seed=1, dtype="float32")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "tiny"), backend, prefix]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted, returned, uncounted = map(int, done.stdout.split())
    assert returned > 0.9 * uncounted > 0.6 * counted, f"{returned} bytes were returned, {uncounted} are counted less"
