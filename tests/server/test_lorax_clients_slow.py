"""lorax-client and text-generation as they are installed today, in a virtual environment of their own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import blocks

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".venvs" / "lorax-client"
PACKAGES = ["lorax-client==0.6.3", "text-generation==0.7.0", "huggingface_hub<1"]


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
