"""TRL's AsyncGRPO trains an adapter on answers of a served model, and sends each version of it to the server."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from live_server import ok, serving, write_model

from environments import environment

PACKAGES = ["trl==1.16.0", "transformers==5.24.0", "peft==0.21.2", "requests", "aiohttp"]


@pytest.fixture(scope="module")
def python():
    return environment("trl", PACKAGES, torch=True) / "python"


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory):
    """A tiny model whose files say what transformers' Auto classes ask for."""
    folder = write_model(tmp_path_factory.mktemp("trained") / "llama", max_position_embeddings=512)
    for name, more in (
        ("config.json", {"architectures": ["LlamaForCausalLM"]}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | more))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_async_grpo_trains_an_adapter(trained_model, python, tmp_path):
    """Four steps, a version before each. All tokens of each answer were drawn from one version, as peft computes it."""
    script = Path(__file__).with_name("trl_script.py")
    with serving(trained_model, adapter_admin=True, backend="auto") as live:
        done = subprocess.run(
            [str(python), str(script), live.url, str(trained_model), str(tmp_path / "out")],
            capture_output=True, text=True, timeout=280, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        versions = [row["id"] for row in ok(live.client.get("/v1/models"))["data"] if row["parent"]]
        assert versions == ["trl-policy-v4", "trl-policy-v5"]  # TRL has unloaded those that it no longer needs
        assert ok(live.client.get("/is_paused")) == {"is_paused": False}
    report = json.loads(done.stdout.splitlines()[-1])
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
