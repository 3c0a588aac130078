"""TRL's AsyncGRPO trains an adapter on answers of a served model, and sends each version of it to the server."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from live_server import ok, serving, write_model
from pages import ROOT, blocks

from environments import environment

PACKAGES = ["trl==1.16.0", "transformers==5.24.0", "peft==0.21.2", "requests", "aiohttp"]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def python():
    return environment("trl", PACKAGES, torch=True) / "python"


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory, python):
    """A tiny model whose files say what transformers' Auto classes ask for, with a chat template that TRL knows."""
    folder = write_model(tmp_path_factory.mktemp("trained") / "llama", max_position_embeddings=512)
    (template,) = python.parents[1].glob("lib/*/site-packages/trl/chat_templates/qwen2_5.jinja")
    for name, more in (
        ("config.json", {"architectures": ["LlamaForCausalLM"]}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template.read_text()},
        ),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | more))
    return folder


def run(python, *argv, cwd):
    """What the script printed last, in a process that sees no GPU and no Hub."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [str(python), *map(str, argv)], cwd=cwd, env={**os.environ, **quiet},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_async_grpo_trains_an_adapter(trained_model, python, tmp_path):
    """Four steps, a version before each. All tokens of each answer were drawn from one version, as peft computes it."""
    with serving(trained_model, adapter_admin=True, backend="auto") as live:
        report = json.loads(
            run(python, HERE / "trl_script.py", live.url, trained_model, tmp_path / "out", cwd=tmp_path)
        )
        versions = [row["id"] for row in ok(live.client.get("/v1/models"))["data"] if row["parent"]]
        assert versions == ["trl-policy-v4", "trl-policy-v5"]  # TRL has unloaded those that it no longer needs
        assert ok(live.client.get("/is_paused")) == {"is_paused": False}
    steps = [row for row in report["log"] if "ratio" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[0]["ratio"] == pytest.approx(1, abs=1e-4)
    drawn_from = set()
    for distance in report["distances"]:
        version = min(distance, key=distance.get)
        others = [far for name, far in distance.items() if name != version]
        assert distance[version] < 1e-3 < min(others), distance
        drawn_from.add(version)
    assert len(drawn_from) >= 3, drawn_from


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_snippet_of_the_page_trains(trained_model, python, tmp_path):
    (snippet,) = blocks(ROOT / "docs" / "clients" / "trl.md", "python")
    with serving(trained_model, adapter_admin=True, backend="auto") as live:
        code = snippet.code.replace("http://127.0.0.1:8000", live.url).replace("org/model", str(trained_model))
        quick = "max_steps=1, max_completion_length=16, use_cpu=True, bf16=False, report_to=[], token_budget=2048"
        assert "max_steps=100" in code
        script = tmp_path / "page.py"
        script.write_text("import trl_on_cpu\n" + code.replace("max_steps=100", quick) + "    print('trained')\n")
        assert run(python, script, cwd=tmp_path) == "trained"
        assert "trl-policy-v2" in [row["id"] for row in ok(live.client.get("/v1/models"))["data"]]
