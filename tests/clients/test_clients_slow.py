"""The pages of docs/clients run, and so do scenarios with each client, in the client's own environment."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Live, serving, write_adapters
from pages import ROOT, blocks

from clients import PACKAGES, write_tools_model
from environments import environment

HERE = Path(__file__).parent
SCENARIOS = {path.stem.removeprefix("with_").replace("_", "-"): path for path in sorted(HERE.glob("with_*.py"))}
# What these would fetch from elsewhere. huggingface_hub's own client asks no server at all when it is offline.
OFFLINE = {"lm-eval": {"HF_HUB_OFFLINE": "1"}, "litellm": {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The pages' server: the model smollm2 with the adapter pirate, both tiny."""
    model = write_tools_model(tmp_path_factory.mktemp("clients") / "model")
    adapters = write_adapters(tmp_path_factory.mktemp("adapters"), model)
    named = {"pirate": str(adapters["pirate"])}
    with serving(model, adapters=named, served_model_name="smollm2", backend="auto") as live:
        yield live


def run(name: str, argv: list[str], folder: Path) -> str:
    """What the command printed, with the programs of the client's environment first on the PATH."""
    home = environment(name, PACKAGES[name])
    variables = {
        **os.environ,
        **OFFLINE.get(name, {}),
        "HF_HOME": str(folder),
        "PATH": f"{home}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(argv, cwd=folder, env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("name", PACKAGES)
def test_the_page_runs(served: Live, name: str, tmp_path: Path) -> None:
    """Its blocks of Python share one process, its blocks of commands one shell."""
    ran = 0
    for language, argv in (("python", ["python", "-c"]), ("sh", ["bash", "-ec"])):
        found = [b.code for b in blocks(ROOT / "docs" / "clients" / f"{name}.md", language) if b.info == name]
        if found:
            code = "\n".join(found).replace("http://127.0.0.1:8000", served.url)
            assert run(name, [*argv, code], tmp_path).strip()
            ran += 1
    assert ran


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios(served: Live, name: str, tmp_path: Path) -> None:
    """Those of lorax-client and InferenceClient are in tests/server/test_lorax_clients_slow.py."""
    run(name, ["python", str(SCENARIOS[name]), served.url], tmp_path)
