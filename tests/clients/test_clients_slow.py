"""The pages of docs/clients run, and so do scenarios with each client, in the client's own environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import CLIENTS
from live_server import Live, serving, write_adapters, write_model
from pages import ROOT, blocks

from environments import environment

TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<|role|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)
SERVER = "http://127.0.0.1:8000"
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose chat template has tools; transformers can read its tokenizer, too."""
    folder = write_model(tmp_path_factory.mktemp("clients") / "model", max_position_embeddings=4096)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    adapters = write_adapters(tmp_path_factory.mktemp("adapters"), model)
    named = {"pirate": str(adapters["pirate"])}
    with serving(model, adapters=named, served_model_name="smollm2", backend="auto") as live:
        yield live


def run(name: str, argv: list[str], folder: Path) -> str:
    """What the command printed, with the environment's programs first on the PATH."""
    home = environment(f"client-{name}", CLIENTS[name].packages, torch=CLIENTS[name].torch)
    variables = {**os.environ, **QUIET, "PATH": f"{home}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(argv, cwd=folder, env=variables, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CLIENTS)
def test_the_page_runs(served: Live, model: Path, name: str, tmp_path: Path) -> None:
    """Its blocks of Python share one process, as its blocks of commands share one shell."""
    for language, argv in (("python", ["python", "-c"]), ("sh", ["bash", "-ec"])):
        found = [b.code for b in blocks(ROOT / "docs" / "clients" / f"{name}.md", language) if b.info == name]
        if found:
            code = "\n".join(found).replace(SERVER, served.url).replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model))
            assert run(name, [*argv, code], tmp_path).strip()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CLIENTS)
def test_scenarios(served: Live, model: Path, name: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name(f"with_{name.replace('-', '_')}.py")
    run(name, ["python", str(script), served.url, str(model)], tmp_path)
