"""Options from a file: the same from each format, between the environment and the defaults, and nothing ignored."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from command import here

from truffula.config import OPTIONS
from truffula.errors import ConfigError
from truffula.settings import load_config, load_settings

TOML = """\
# what the container serves
model = "base"
port = 9001
memory = "2GiB"
prefix-cache = false
log_level = "warning"
queue_timeout = "none"
cors-origin = ["https://a.example", "https://b.example"]

[adapters]
pirate = "org/pirate"
"org/poet" = "./poet"
"""
YAML = """\
model: base
port: 9001
memory: 2GiB
prefix-cache: false
log_level: warning
queue_timeout: null
cors-origin:
  - https://a.example
  - https://b.example
adapters:
  pirate: org/pirate
  org/poet: ./poet
"""


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def given(path: Path | None, cli: dict[str, object] | None = None, env: dict[str, str] | None = None) -> dict:
    return {s.option.name: s for s in load_settings({**(cli or {}), "config": path}, env or {})}


def test_each_format_says_the_same(tmp_path: Path) -> None:
    table = tomllib.loads(TOML)
    files = {
        "a.toml": TOML,
        "a.yaml": YAML,
        "a.yml": YAML,
        "a.json": json.dumps(table),
        "b.json": json.dumps(table, indent=1),
    }
    for name, text in files.items():
        resolved = load_config({"config": write(tmp_path, name, text)}, {})
        assert (resolved.engine.model, resolved.server.port, resolved.engine.memory_bytes) == ("base", 9001, 2 * 2**30)
        assert (resolved.engine.prefix_cache, resolved.server.log_level) == (False, "warning")
        assert resolved.server.queue_timeout_s is None
        assert resolved.server.cors_origins == ("https://a.example", "https://b.example")
        assert dict(resolved.server.adapters) == {"pirate": "org/pirate", "org/poet": "./poet"}


def test_a_flag_wins_over_a_variable_that_over_the_file_and_that_over_other_tools_variables(tmp_path: Path) -> None:
    file = write(tmp_path, "a.toml", 'port = 1\nmax_n = 1\nmax_best_of = 1\ncache_dir = "/file"\n')
    env = {"TRUFFULA_PORT": "2", "TRUFFULA_MAX_N": "2", "HF_HUB_CACHE": "/hub"}
    found = {name: (s.value, s.origin, s.source) for name, s in given(file, {"port": 3}, env).items()}
    assert found["port"] == (3, "option", "--port")
    assert found["max_n"] == (2, "environment", "TRUFFULA_MAX_N")
    assert found["max_best_of"] == (1, "file", f"{file}, line 3")
    assert found["cache_dir"] == (Path("/file"), "file", f"{file}, line 4")
    assert found["max_prompts"][1:] == ("default", "")


def test_the_variable_names_the_file_and_the_flag_wins(tmp_path: Path) -> None:
    one, two = write(tmp_path, "1.toml", "port = 1"), write(tmp_path, "2.toml", "port = 2")
    assert given(None, env={"TRUFFULA_CONFIG": str(one)})["port"].value == 1
    assert given(two, env={"TRUFFULA_CONFIG": str(one)})["port"].value == 2
    assert given(None, env={"TRUFFULA_CONFIG": ""})["port"].value == 8000


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "max_n = 1\n\nmax-runing = 7\n", "a.toml, line 3: unknown option 'max-runing'."),
        ("a.toml", "max-runing = 7\n", "Did you mean max-running?"), ("a.toml", "max_runing = 7\n", " max_running?"),
        ("a.yaml", "model: m\nmax_runing: 7\n", "a.yaml, line 2: unknown option 'max_runing'."),
        ("a.json", '{\n "model": "m",\n "max_runing": 7\n}', "a.json, line 3: unknown option 'max_runing'."),
        ("a.toml", "[server]\nport = 1\n", "a.toml, line 1: unknown option 'server'."),
        ("a.toml", 'port = "eighty"\n', "port (a.toml, line 1) is 'eighty'; it must be an integer"),
        ("a.yaml", "port: 1.5\n", "port (a.yaml, line 1) is 1.5; it must be an integer"),
        ("a.yaml", "max_n: null\n", "max_n (a.yaml, line 1) is None; it must be an integer"),
        ("a.yaml", "api_keys: ['']\n", "api_keys (a.yaml, line 1) is empty. Set a key, or leave it out"),
        ("a.json", '{"allow_hub": {"a": "b"}}', "allow_hub (a.json, line 1) is {'a': 'b'}; it must be text"),
        ("a.toml", "port = 1\nport = 2\n", "a.toml is malformed"),
        ("a.json", '{"port": 1, "port": 2}', "a.json names port twice."),
        ("a.yaml", "port: 1\nport: 2\n", "a.yaml names port twice."),
        ("a.yaml", "adapters:\n  a: x\n  a: y\n", "a.yaml names a twice."),
        ("a.toml", "max-n = 1\nmax_n = 2\n", "line 2: max_n is set twice, under two of its names."),
        ("a.toml", "[adapters]\na = 'x'\n[adapter]\nb = 'y'\n", "adapter is set twice"),
        ("a.yaml", "allow_local:\n  a: b\n", "allow_local (a.yaml, line 1) is {'a': 'b'}; it must be a folder"),
        ("a.yaml", "model: [", "a.yaml is malformed"), ("a.yaml", "? [a]\n: 1\n", "a.yaml is malformed"),
        ("a.yaml", "port: 2024-13-45\n", "a.yaml is malformed: month must be in 1..12."),
        ("a.json", "[" * 100_000, "a.json is malformed"),
        ("a.json", "{", "a.json is malformed"),
        ("a.json", "[]", "a.json must contain one table of options"),
        ("a.yaml", "1: 2", "a.yaml must contain one table of options"),
        ("a.ini", "port=1", "a.ini is not a configuration file: its name must end in .toml, .yaml or .json."),
    ],
)  # fmt: skip
def test_what_a_file_says_wrong_is_named_with_its_place(
    name: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, name, text)
    with pytest.raises(ConfigError) as caught:
        load_settings({"config": Path(name)}, {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    for path, said in ((tmp_path / "none.toml", "No such file"), (tmp_path / "bytes.toml", "utf-8")):
        with pytest.raises(ConfigError, match=said):
            load_settings({"config": path}, {})


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    for name in ("a.toml", "a.yaml"):
        assert {s.origin for s in given(write(tmp_path, name, "")).values()} == {"default"}


def test_every_option_can_be_written_by_its_short_name_field_and_flag(tmp_path: Path) -> None:
    for option in OPTIONS.values():
        for word in {option.name, option.field, option.flag[2:], option.name.replace("_", "-")}:
            with pytest.raises(ConfigError, match="twice"):
                given(write(tmp_path, "a.json", json.dumps({option.name: "x"})[:-1] + f', "{word}": "x"' + "}"))


def test_config_show_names_file_and_line(tmp_path: Path) -> None:
    file = write(tmp_path, "a.toml", "\nmax-running = 7\n")
    for words, env in ((["--config", str(file)], {}), ([], {"TRUFFULA_CONFIG": str(file)})):
        rows = {row["name"]: row for row in json.loads(here("config", "--show", "--json", *words, **env).stdout)}
        assert rows["max_running"] == {
            "name": "max_running",
            "value": "7",
            "origin": "file",
            "source": f"{file}, line 2",
        }
    shown = here("config", "--show", "--config", str(file)).stdout
    assert f"TRUFFULA_MAX_RUNNING    7       {file}, line 2" in shown
    assert "85% of free memory" in shown, "what no value means"


def test_commands_take_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "a.toml", 'model = "/no/such/model"\nport = 0\n')
    done = here("serve", "--config", str(file), HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "/no/such/model" in done.stderr
    done = here("generate", "/another/model", "hi", "--config", str(file), HF_HUB_OFFLINE="1")
    assert "/another/model" in done.stderr, "the argument wins, and options of the server are no error"
