"""A script may end without closing its engine, while it steps: no abort, no complaint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kernel_backends import needs_native

from truffula.testing.tiny import tiny_llama_config, write_tiny_checkpoint

SCRIPT = """
import sys, tempfile, threading, time
early = tempfile.TemporaryDirectory()  # has something done at exit, from before there was an engine
from truffula import LLM, SamplingParams
from truffula.errors import ShuttingDown

model = sys.argv[1]
llm = LLM(model, backend="cpu", dtype="float32", memory_bytes=1 << 28, max_model_len=4096)
begun = threading.Event()

def generate():
    prompts = [[i % 90 for i in range(4000)]] * 4
    begun.set()
    try:
        llm.generate(prompts, SamplingParams(max_tokens=90, ignore_eos=True))
    except ShuttingDown:
        pass

threading.Thread(target=generate, daemon=True).start()
begun.wait()
while not llm.stats().steps:
    time.sleep(0.001)
print("the end")
"""


@needs_native
def test_a_script_ends_while_its_engine_steps(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "max_position_embeddings": 4096}
    model = write_tiny_checkpoint(tmp_path / "model", tiny_llama_config(**shape))
    command = [sys.executable, "-c", SCRIPT, str(model)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "the end\n", "")
