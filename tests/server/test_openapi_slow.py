"""Random requests made from the OpenAPI document, by schemathesis in an environment of its own: each is answered, or
refused in the dialect's own shape.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import serving

HOME = Path(__file__).resolve().parents[2] / ".venvs" / "schemathesis"
PACKAGES = ["schemathesis==4.32.5"]
EXAMPLES = 25
"""Valid and invalid ones, of each route."""


@pytest.fixture(scope="module")
def python():
    """The environment's interpreter; made once and kept."""
    interpreter = HOME / "bin" / "python"
    made = HOME / "made.txt"
    if not made.is_file() or made.read_text() != "\n".join(PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(HOME)], check=True)
        subprocess.run([str(interpreter), "-m", "pip", "install", "-q", *PACKAGES], check=True, timeout=280)
        made.write_text("\n".join(PACKAGES))
    return interpreter


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_request_is_answered_or_refused_in_the_dialects_shape(python, model_folder, adapter_folders):
    pirate = {"pirate": str(adapter_folders["pirate"])}
    options = {"adapters": pirate, "adapter_admin": True, "max_model_len": 64, "backend": "auto"}
    with serving(model_folder, **options) as live:
        live.completion(prompt="a", max_tokens=1)  # before that, /startup is 503
        done = subprocess.run(
            [str(python), str(Path(__file__).with_name("schemathesis_script.py")), live.url, str(EXAMPLES)],
            capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["wrong"] == []
        posted = {name for name in found["statuses"] if name.startswith("POST /v1/")}
        assert {"POST /v1/chat/completions 200", "POST /v1/completions 400"} <= posted
        assert live.client.get("/health").status_code == 200
