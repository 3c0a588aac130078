"""lorax-client and text-generation as they are installed today, in a virtual environment of their own."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from live_server import MODEL, serving
from pages import ROOT, blocks

from clients import PACKAGES, write_tools_model
from environments import environment


@pytest.fixture(scope="module")
def python():
    return environment("lorax-client", PACKAGES["lorax-client"]) / "python"


@pytest.fixture(scope="module")
def live(tmp_path_factory, adapter_folders):
    model = write_tools_model(tmp_path_factory.mktemp("tools") / "model")
    adapters = {name: str(adapter_folders[name]) for name in ("pirate", "org/poet")}
    with serving(model, adapters=adapters, backend="auto") as found:
        yield found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_shipped_clients_work_unchanged(live, python):
    script = Path(__file__).with_name("lorax_clients_script.py")
    done = subprocess.run(
        [str(python), str(script), live.url], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["sync"] == report["async"]
    assert len(set(report["sync"].values())) == 3
    assert set(report["errors"]) == set(report["tgi_errors"]) == {"ValidationError"}
    refused = report["refused"]
    for name, word in (("embed", "Embeddings"), ("classify", "Classification"), ("classify_batch", "Classification")):
        assert refused[name][0] == "UnprocessableEntityError" and word in refused[name][1]
    assert refused["async embed"] == refused["embed"] and refused["async classify"] == refused["classify"]
    assert refused["merged"][0] == "ValidationError" and "equal ranks" in refused["merged"][1]
    for name in ("watermark", "adapter_source"):
        assert refused[name][0] == "ValidationError" and name.split()[0] in refused[name][1]
    assert refused["unknown adapter"][0] == "GenerationError" and "nobody" in refused["unknown adapter"][1]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["lorax-client", "inference-client"], ids=["0.36", "2.4"])
def test_inference_client_works_unchanged(live, name):
    script = Path(__file__).with_name("hub_client_script.py")
    command = [str(environment(name, PACKAGES[name]) / "python"), str(script), live.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert f"huggingface_hub=={report['version']}" in PACKAGES[name]
    assert report["model"] == MODEL
    assert report["async"] == report["text"] == live.native("Hello", max_new_tokens=6)["generated_text"]
    assert report["errors"] == ["ValidationError", "GenerationError"] * 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_snippet_of_the_readme_runs(live, python):
    (snippet,) = [block for block in blocks(ROOT / "README.md", "python") if block.info == "lorax-client"]
    code = snippet.code.replace("http://127.0.0.1:8000", live.url)
    (prompt,) = re.findall(r'^prompt = (".*?")', code, re.MULTILINE)
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    text = live.native(json.loads(prompt), adapter_id="pirate", max_new_tokens=32)["generated_text"]
    assert done.stdout == f"{text}\n{text}"
