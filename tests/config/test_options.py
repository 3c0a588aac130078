"""Where a value comes from, what it must be, and what is said when it is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truffula.config import OPTIONS, EngineConfig, ServerConfig, options_of
from truffula.errors import ConfigError
from truffula.kernels.select import BACKENDS
from truffula.option import parse_size
from truffula.settings import load_config, load_settings, require_paths


def origins(cli: dict, env: dict) -> dict:
    return {s.option.name: (s.value, s.origin, s.source) for s in load_config(cli, env).settings}


def test_an_option_wins_over_the_environment_and_that_over_the_default():
    assert origins({"model": "m"}, {})["port"][1] == "default"
    assert origins({"model": "m"}, {"TRUFFULA_PORT": "9"})["port"] == (9, "environment", "TRUFFULA_PORT")
    assert origins({"model": "m", "port": 10}, {"TRUFFULA_PORT": "9"})["port"] == (10, "option", "--port")
    assert origins({"model": "m", "port": None}, {"TRUFFULA_PORT": "9"})["port"][0] == 9, "None is an option not given"
    assert origins({"model": "m"}, {"TRUFFULA_PORT": ""})["port"][1] == "default", "an empty variable is not set"


def test_what_is_shown_is_what_is_used():
    resolved = load_config({"model": "m", "memory": "4GiB"}, {"TRUFFULA_MAX_RUNNING": "7", "TRUFFULA_HOST": "::1"})
    for setting in resolved.settings:
        config = resolved.engine if setting.option.group == "engine" else resolved.server
        assert getattr(config, setting.option.field) == setting.value
    assert (resolved.engine.memory_bytes, resolved.engine.max_running, resolved.server.host) == (4 * 2**30, 7, "::1")


def test_every_option_has_one_name_one_variable_and_help():
    rows = [*options_of(EngineConfig), *options_of(ServerConfig)]
    assert len({r.name for r in rows}) == len({r.env for r in rows}) == len({r.flag for r in rows}) == len(rows)
    for row in rows:
        assert row.help and re.fullmatch(r"TRUFFULA_[A-Z_]+", row.env) and re.fullmatch(r"--[a-z-]+", row.flag)


@pytest.mark.parametrize(
    ("name", "near"), [("TRUFFULA_MAX_RUNING", "TRUFFULA_MAX_RUNNING"), ("TRUFFULA_PROT", "TRUFFULA_PORT")]
)
def test_an_unknown_variable_is_refused_with_the_nearest_known(name: str, near: str):
    with pytest.raises(ConfigError) as caught:
        load_config({"model": "m"}, {name: "1"})
    assert str(caught.value) == f"Unknown environment variable {name}. Did you mean {near}?"
    assert caught.value.param == name


def test_an_unknown_option_is_refused_with_the_nearest_known():
    with pytest.raises(ConfigError, match=r"max_runing.*Did you mean max_running\?"):
        load_config({"model": "m", "max_runing": 3}, {})


def test_variables_of_others_are_left_alone():
    load_config({"model": "m"}, {"TRUFFULACTION": "x", "PATH": "y", "OMP_NUM_THREADS": "2"})


@pytest.mark.parametrize(
    ("env", "value"),
    [
        ("TRUFFULA_PORT", "eighty"), ("TRUFFULA_PORT", "70000"), ("TRUFFULA_PORT", "-1"), ("TRUFFULA_PORT", "80.5"),
        ("TRUFFULA_MEMORY", "4 potatoes"), ("TRUFFULA_MEMORY", "-1GiB"), ("TRUFFULA_MEMORY", "0"),
        ("TRUFFULA_PREFIX_CACHE", "maybe"), ("TRUFFULA_DTYPE", "float8"), ("TRUFFULA_QUEUE_TIMEOUT", "nan"),
        ("TRUFFULA_QUEUE_TIMEOUT", "inf"), ("TRUFFULA_ADAPTERS", "pirate"), ("TRUFFULA_ADAPTERS", "a=x,a=y"),
        ("TRUFFULA_ADAPTERS", "=x"), ("TRUFFULA_STEP_TOKENS", "0"), ("TRUFFULA_LOG_FORMAT", "xml"),
    ],
)  # fmt: skip
def test_a_malformed_value_is_refused_by_variable_value_and_expectation(env: str, value: str):
    with pytest.raises(ConfigError) as caught:
        load_config({"model": "m"}, {env: value})
    option = next(o for o in OPTIONS.values() if o.env == env)
    assert env in str(caught.value) and value in str(caught.value) and option.expected in str(caught.value)


def test_secrets_are_neither_shown_nor_in_messages_nor_in_repr():
    resolved = load_config({"model": "m"}, {"TRUFFULA_API_KEYS": "hush-1,hush-2"})
    assert resolved.server.api_keys == ("hush-1", "hush-2")
    assert "hush" not in repr(resolved.server) and not any("hush" in s.shown for s in resolved.settings)
    with pytest.raises(ConfigError) as caught:
        ServerConfig(api_keys=("hush", ""))
    assert "hush" not in str(caught.value)


def test_a_model_must_be_named_but_settings_show_without_one():
    with pytest.raises(ConfigError, match="TRUFFULA_MODEL"):
        load_config({}, {})
    assert "model" not in {s.option.name for s in load_settings({}, {})}


def test_variables_of_the_hub_are_honoured_below_ours():
    found = origins({"model": "m"}, {"HF_HUB_OFFLINE": "1", "HF_HOME": "/cache/hf"})
    assert found["offline"] == (True, "environment", "HF_HUB_OFFLINE")
    assert found["cache_dir"] == (Path("/cache/hf/hub"), "environment", "HF_HOME")
    both = {"HF_HUB_OFFLINE": "1", "TRUFFULA_OFFLINE": "0", "HF_HOME": "/a", "HF_HUB_CACHE": "/b"}
    found = origins({"model": "m"}, both)
    assert found["offline"][0] is False and found["cache_dir"][0] == Path("/b")


def test_none_switches_a_limit_off_where_there_may_be_none():
    assert load_config({"model": "m", "queue_timeout": "none"}, {}).server.queue_timeout_s is None
    with pytest.raises(ConfigError):
        load_config({"model": "m", "max_body": "none"}, {})


def test_adapters_come_as_pairs_or_as_a_mapping():
    for given_as in (["a=x/y", "b=z"], {"a": "x/y", "b": "z"}, "a=x/y,b=z"):
        assert dict(load_config({"model": "m", "adapters": given_as}, {}).server.adapters) == {"a": "x/y", "b": "z"}


def test_a_folder_alone_is_an_adapter_named_after_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "pirate").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path / "pirate"), f"{tmp_path}/pirate/", "pirate", "./pirate", "org/pirate"):
        assert dict(load_config({"model": "m", "adapters": [source]}, {}).server.adapters) == {"pirate": source}
    monkeypatch.chdir(tmp_path / "pirate")
    assert dict(load_config({"model": "m", "adapters": ["."]}, {}).server.adapters) == {"pirate": "."}
    with pytest.raises(ConfigError, match="NAME=FOLDER"):
        load_config({"model": "m", "adapters": ["a/pirate", "b/pirate"]}, {})


def test_lists_are_separated_by_commas_wherever_they_come_from():
    for cli, env in (
        ({"allow_hub": ["a/*,b/*"]}, {}),
        ({"allow_hub": ["a/*", "b/*"]}, {}),
        ({}, {"TRUFFULA_ALLOW_HUB": "a/*, b/*"}),
    ):
        assert load_config({"model": "m", **cli}, env).server.allow_hub == ("a/*", "b/*")
    found = load_config({"model": "m", "allow_local": ["/a,/b", Path("/c,d")]}, {}).server.allow_local
    assert found == (Path("/a"), Path("/b"), Path("/c,d")), "a path that is one already is not split"
    assert load_config({"model": "m", "cors_origins": [""]}, {}).server.cors_origins == ()


def test_the_choices_of_the_backend_are_those_that_can_be_selected():
    assert OPTIONS["backend"].choices == BACKENDS


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("backend", "gpu", "one of auto, cpu, reference"),
        ("dtype", "float8", "one of auto, float32, bfloat16, float16"),
    ],
)
def test_choices_are_checked_with_the_options(name: str, value: str, said: str):
    for cli, env in (({name: value}, {}), ({}, {f"TRUFFULA_{name.upper()}": value})):
        with pytest.raises(ConfigError) as caught:
            load_config({"model": "m", **cli}, env)
        assert repr(value) in str(caught.value) and said in str(caught.value)


def test_an_option_of_the_engines_process_is_refused_with_an_inline_engine():
    inline = {"model": "m", "transport": "inline"}
    assert load_config(inline, {}).server.transport == "inline"
    with pytest.raises(ConfigError, match="--max-restarts has no effect with --transport inline") as caught:
        load_config({**inline, "max_restarts": 3}, {})
    assert caught.value.param == "max_restarts"
    with pytest.raises(ConfigError, match="TRUFFULA_HANG_TIMEOUT has no effect"):
        load_config(inline, {"TRUFFULA_HANG_TIMEOUT": "9"})


def test_paths_that_must_exist_are_checked_as_what_they_must_be(tmp_path: Path):
    (tmp_path / "file").touch()
    right = {"chat_template": tmp_path / "file", "adapter_dir": tmp_path, "allow_local": [tmp_path]}
    require_paths(load_settings(right, {}))
    wrong = {"chat_template": tmp_path, "adapter_dir": tmp_path / "file", "allow_local": [tmp_path, tmp_path / "none"]}
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=f"{OPTIONS[name].flag} is '{tmp_path}.* that exists"):
            require_paths(load_settings({name: value}, {}))


@pytest.mark.parametrize("wrong", [{"max_running": 0}, {"memory_bytes": "4GiB"}, {"dtype": "int3"}, {"offline": "yes"}])
def test_an_object_that_exists_is_valid(wrong: dict):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineConfig(model="m", **wrong)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**40), st.sampled_from(["KiB", "MiB", "GiB", "kB", "MB", "GB", "", "B"]), st.booleans())
def test_sizes_are_exact(number: int, unit: str, spaced: bool):
    scale = {"K": 1, "M": 2, "G": 3}.get(unit[:1].upper(), 0)
    base = 1024 if unit.endswith("iB") else 1000
    assert parse_size(f"{number}{' ' if spaced else ''}{unit}") == number * base**scale


SERVICE = {
    "TRUFFULA_SERVICE_HOST": "10.0.0.9",
    "TRUFFULA_SERVICE_PORT": "8000",
    "TRUFFULA_SERVICE_PORT_HTTP": "8000",
    "TRUFFULA_PORT": "tcp://10.0.0.9:8000",
    "TRUFFULA_PORT_8000_TCP": "tcp://10.0.0.9:8000",
    "TRUFFULA_PORT_8000_TCP_PROTO": "tcp",
    "TRUFFULA_PORT_8000_TCP_PORT": "8000",
    "TRUFFULA_PORT_8000_TCP_ADDR": "10.0.0.9",
    "TRUFFULA_CANARY_SERVICE_HOST": "10.0.0.8",
    "TRUFFULA_CANARY_PORT": "tcp://10.0.0.8:8000",
}


def test_variables_that_kubernetes_makes_of_a_service_are_no_options(caplog: pytest.LogCaptureFixture):
    """https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables"""
    assert origins({"model": "m"}, SERVICE)["port"][1] == "default"
    assert "enableServiceLinks" in caplog.text and "TRUFFULA_PORT," in caplog.text
    assert origins({"model": "m"}, SERVICE | {"TRUFFULA_HOST": "::1"})["host"][0] == "::1"


@pytest.mark.parametrize("name", ["TRUFFULA_SERVICE", "TRUFFULA_PORT_TCP", "TRUFFULA_CANARY_PORT"])
def test_what_only_looks_like_a_service_is_still_refused(name: str):
    with pytest.raises(ConfigError, match=name):
        load_config({"model": "m"}, {name: "8000"})


@pytest.mark.parametrize("empty", ["", " ", "key,", ",key", "key, ,other", "a,,b"])
def test_an_empty_api_key_is_an_error_that_names_where_it_was_given(empty):
    """It comes of an unset variable (``--api-key "$KEY"``), and the server would ask for no key at all."""
    with pytest.raises(ConfigError, match=r"^TRUFFULA_API_KEYS is empty") as caught:
        load_config({"model": "m"}, {"TRUFFULA_API_KEYS": empty})
    assert caught.value.param == "api_keys"
    for sent in (empty, [empty] if "," not in empty else empty.split(",")):
        with pytest.raises(ConfigError, match=r"^--api-key is empty"):
            load_config({"model": "m", "api_keys": sent}, {})


def test_no_api_key_is_none():
    assert load_config({"model": "m", "api_keys": None}, {}).server.api_keys == ()
    assert load_config({"model": "m", "api_keys": []}, {}).server.api_keys == ()
