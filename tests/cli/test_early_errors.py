"""What is wrong with the options is said before anything is loaded; Ctrl-C is quiet at any time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command import here

# A model that is not there: a test that gets as far as looking for it has failed.
MODEL = "/no/such/model"
# Runs the entry point with Ctrl-C arriving when a module is first looked for.
INTERRUPTED = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["truffula", "serve", {model!r}, "--port", "0"]
from truffula.cli import main
main()
"""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--chat-template", "chatml"], "--chat-template is 'chatml'; it must be a file that exists."),
        (["--adapter-dir", "/no/folder"], "--adapter-dir is '/no/folder'; it must be a folder that exists."),
        (["--allow-local", "/no/folder"], "--allow-local is '/no/folder'; it must be a folder that exists."),
        (["--adapter", "a=/no/folder"], "'/no/folder' is neither an existing folder nor a Hub id"),
        (["--adapter", "pirate"], "--adapter is 'pirate'; it must be NAME=FOLDER"),
        (["--api-key", ""], "--api-key is empty. Set a key, or leave it out"),
        (["--api-key", "one", "--api-key", " "], "--api-key is empty. Set a key, or leave it out"),
        (["--adapter-dir", "~nosuchuser/x"], "--adapter-dir is '~nosuchuser/x'; it must be a folder that exists."),
        (["--config", "~nosuchuser/x.toml"], "~nosuchuser/x.toml"),
        (["--backend", "gpu"], "--backend is 'gpu'; it must be one of auto, cpu, reference, triton."),
        (["--tool-format", "hermez"], "--tool-format is 'hermez'; it must be one of auto, none, harmony, "),
        (["--reasoning-format", "deep"], "--reasoning-format is 'deep'; it must be one of auto, none, harmony, "),
        (["--port", "70000"], "--port is '70000'; it must be an integer"),
    ],
)
def test_a_wrong_option_is_refused_in_one_style_before_the_model_is_looked_for(flags: list[str], said: str) -> None:
    done = here("serve", MODEL, "--port", "0", *flags)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr and done.stderr.startswith("error (config_invalid)") and done.stderr.count("\n") == 1


def test_options_of_the_server_do_not_stop_other_commands() -> None:
    done = here("generate", MODEL, "hi", TRUFFULA_ADAPTER_DIR="/no/folder", HF_HUB_OFFLINE="1")
    assert MODEL in done.stderr and "ADAPTER_DIR" not in done.stderr


def test_a_path_of_the_environment_is_named_by_its_variable() -> None:
    done = here("serve", MODEL, TRUFFULA_ADAPTER_DIR="/no/folder")
    assert "TRUFFULA_ADAPTER_DIR is '/no/folder'; it must be a folder that exists." in done.stderr


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{% for m in messages %}{{ m", "is not valid Jinja, line 1"),
        (b"\xff\xfe", "cannot be read"),
        (b"{{ 1 }}" + b" " * 400_001, "the limit is 400000"),
    ],
)
def test_a_broken_chat_template_is_refused_before_the_model_is_looked_for(
    data: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / "chat.jinja").write_bytes(data)
    done = here("serve", MODEL, "--port", "0", "--chat-template", str(tmp_path / "chat.jinja"))
    assert done.returncode == 1
    assert said in done.stderr and "chat.jinja" in done.stderr and MODEL not in done.stderr


def test_a_whole_chat_template_passes(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    done = here("serve", MODEL, "--port", "0", "--chat-template", str(tmp_path / "chat.jinja"), HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "chat.jinja" not in done.stderr and MODEL in done.stderr


@pytest.mark.parametrize(
    "module", ["typer", "truffula.cli.app", "truffula.config", "truffula.server.launch", "msgspec"]
)
def test_ctrl_c_while_importing_ends_quietly(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.format(module=module, model=MODEL)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_model_can_come_from_the_environment_alone() -> None:
    done = here("serve", "--port", "0", TRUFFULA_MODEL=MODEL, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and MODEL in done.stderr and "No model" not in done.stderr
    done = here("chat", TRUFFULA_MODEL=MODEL, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and MODEL in done.stderr and "No model" not in done.stderr


def test_without_a_model_the_variables_of_other_servers_are_named() -> None:
    assert "or set TRUFFULA_MODEL." in here("serve").stderr
    for name, owner in (("MODEL_ID", "LoRAX and TGI"), ("LLAMA_ARG_MODEL", "llama.cpp")):
        assert (
            f"{name} is set, but it is a variable of {owner}; truffula reads TRUFFULA_MODEL."
            in here("serve", **{name: "x"}).stderr
        )
