"""Each command as a user runs it: its output, its status. At least one of each kind in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from command import here, truffula
from live_server import write_model
from terminal import terminal

from truffula.kernels.cpu import available, instruction_sets
from truffula.kernels.installation import installation
from truffula.testing.adapters import write_adapter, write_tiny_adapter
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    return write_tiny_adapter(model.parent / "leaf", model, rank=3)


def test_an_unknown_flag_is_named() -> None:
    done = truffula("serve", "model", "--max-runing", "3")
    assert done.returncode == 2
    assert "--max-runing" in done.stderr


def test_a_wrong_value_names_flag_value_and_what_is_expected() -> None:
    done = here("generate", "model", "hello", "--step-tokens", "many")
    assert done.returncode == 1
    assert "--step-tokens" in done.stderr and "many" in done.stderr and "an integer" in done.stderr


def test_an_unknown_model_says_what_was_tried() -> None:
    done = truffula("generate", "./no-such-folder", "hello", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "model_not_found" in done.stderr and "no-such-folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_said_before_anything_loads(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = truffula("serve", str(model), "--port", port)
    assert done.returncode == 1
    assert f"Port {port}" in done.stderr and "--port" in done.stderr


def test_too_little_memory_is_computed_before_loading(model: Path) -> None:
    done = here("generate", str(model), "hello", "--memory", "100KiB")
    assert done.returncode == 1
    assert "insufficient_memory" in done.stderr and "100 KiB" in done.stderr


def test_config_shows_values_and_their_origin() -> None:
    shown = json.loads(here("config", "--show", "--json", TRUFFULA_MAX_RUNNING="7").stdout)
    rows = {row["name"]: row for row in shown}
    assert (rows["max_running"]["value"], rows["max_running"]["source"]) == ("7", "TRUFFULA_MAX_RUNNING")
    assert rows["step_tokens"]["origin"] == "default"


def test_an_unknown_variable_is_refused_with_the_nearest() -> None:
    done = here("config", "--show", TRUFFULA_MAX_RUNING="7")
    assert done.returncode == 1
    assert "TRUFFULA_MAX_RUNNING" in done.stderr


def test_doctor_finds_the_backends_and_what_they_would_use() -> None:
    rows = {row["what"]: row for row in json.loads(truffula("doctor", "--json", TRUFFULA_THREADS="2").stdout)}
    assert rows["backend reference"]["state"] == "ok"
    if available():
        assert rows["instruction sets"]["value"] == ", ".join(instruction_sets())
        assert rows["would use"]["value"] == f"{instruction_sets()[0]}, 2 threads"
        assert rows["backend auto"]["value"].startswith("cpu ")
    else:
        assert rows["native kernels"]["state"] == "missing"
        assert "C++20 compiler" in rows["native kernels"]["advice"] and rows["backend auto"]["state"] == "note"


@pytest.mark.skipif(not available(), reason="truffula was installed without its native kernels")
def test_an_instruction_set_that_is_not_there_is_refused_naming_what_is(model: Path) -> None:
    for given in ({}, {"TRUFFULA_CPU_ISA": "nonsense"}):
        flags = () if given else ("--cpu-isa", "nonsense")
        done = here("generate", str(model), "hello", *flags, **given)
        assert done.returncode == 1
        assert "cpu_isa" in done.stderr and "nonsense" in done.stderr
        assert all(name in done.stderr for name in instruction_sets())


def test_inspect_a_model_tells_tying_and_every_key(model: Path) -> None:
    found = json.loads(here("inspect", str(model), "--json").stdout)
    written = json.loads((model / "config.json").read_text())
    assert {row["key"] for row in found["config"]} == set(written)
    assert found["tying"] in ("tied", "separate") and found["tying_reason"]
    assert found["weights_bytes"] == sum(kind["bytes"] for kind in found["stored"].values())
    parts = [value for key, value in found.items() if key.startswith("weights_of_")]
    assert sum(parts) == found["weights_bytes"] == 4 * found["parameters"]


def test_inspect_a_config_alone_tells_what_it_tells_of_the_model(tmp_path: Path) -> None:
    """The file, or a folder without weights; but not a folder whose weights cannot be read."""
    config = tiny_config("qwen3_5_moe") | {"dtype": "float32"}
    whole = write_tiny_checkpoint(tmp_path / "model", config)
    (tmp_path / "alone").mkdir()
    file = tmp_path / "alone" / "config.json"
    file.write_text((whole / "config.json").read_text())
    expected = json.loads(here("inspect", str(whole), "--json").stdout)
    for source in (file, file.parent):
        found = json.loads(here("inspect", str(source), "--json").stdout)
        differing = {key for key in expected if found[key] != expected[key]}
        assert differing == {"path", "format", "warnings"} and "stands alone" in found["warnings"][0]
    assert found["layer_kinds"] == "3 × gated delta rule, 4 × 3 of 6 experts and a shared one, 1 × full attention"
    assert (found["positions"], found["chat_template"]) == ("rope default, base 10000; 4 columns", "no tokenizer")
    # Layers of linear attention: 4 heads of 6 x 10 in float32, and 3 rows of 2 x 12 + 40 columns of the convolution.
    assert found["state_bytes"] == 3 * (4 * 6 * 10 * 4 + 3 * 64 * 2)
    assert "mlp.experts.*.gate_proj" in found["adapter_modules"]
    (file.parent / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights" in here("inspect", str(file.parent)).stderr


def test_inspect_tells_what_kv_costs_per_token_and_per_sequence(tmp_path: Path, model: Path) -> None:
    """A layer's K and V in bfloat16: 2 x 2 heads x 12 numbers. One layer of seven keeps all tokens, six keep 7."""
    folder = write_tiny_checkpoint(tmp_path / "gemma", tiny_config("gemma3_text"))
    found = json.loads(here("inspect", str(folder), "--json").stdout)
    assert (found["kv_per_token_bytes"], found["kv_windows_bytes"]) == (96, 6 * 7 * 96)
    assert "kv_windows_bytes" not in json.loads(here("inspect", str(model), "--json").stdout)


def test_inspect_names_end_tokens_and_what_is_wrong_with_the_tokenizer(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "text")
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": 500}))
    found = json.loads(here("inspect", str(folder), "--json").stdout)
    assert found["end_tokens"] == [{"id": 1, "text": "<|end|>", "source": "tokenizer_config.json eos_token"}]
    assert found["answers"] == "tool calls none, reasoning none"
    assert any("added_tokens.json gives the token '<tool>' the id 500" in text for text in found["warnings"])
    shown = here("inspect", str(folder))
    assert "end tokens" in shown.stdout
    assert "<|end|> (1, tokenizer_config.json eos_token)" in " ".join(shown.stdout.split())

    silent = write_model(tmp_path / "silent", with_tokenizer=False)
    (silent / "tokenizer.model").write_bytes(b"")
    shown = here("inspect", str(silent))
    assert "1 (config.json eos_token_id)" in " ".join(shown.stdout.split())
    assert "tokenizer.model is not read" in " ".join(shown.stderr.split())


def test_inspect_says_what_rounding_would_lose(model: Path, adapter: Path) -> None:
    found = json.loads(here("inspect", str(model), "--quantize", "q8_0", "--json").stdout)
    kinds = found["rounding"]["kinds"]
    assert kinds["all"]["tensors"] == sum(kind["tensors"] for name, kind in kinds.items() if name != "all")
    assert 0 < kinds["all"]["error"] <= kinds["all"]["worst_error"] < 0.05
    refused = here("inspect", str(adapter), "--quantize", "q8_0")
    assert refused.returncode == 1 and "adapters are never rounded" in refused.stderr
    unknown = here("inspect", str(model), "--quantize", "q3")
    assert unknown.returncode == 1 and "--quantize" in unknown.stderr and "q8_0" in unknown.stderr


def test_inspect_an_adapter_against_its_base_and_a_wrong_one(model: Path, adapter: Path, tmp_path: Path) -> None:
    found = json.loads(here("inspect", str(adapter), "--base", str(model), "--json").stdout)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert set(config) <= {row["field"] for row in found["fields"]}
    assert (found["rank"], found["error"]) == (3, None)
    other = write_model(tmp_path / "other", hidden_size=64)
    refused = here("inspect", str(adapter), "--base", str(other))
    assert refused.returncode == 1
    assert "adapter_invalid" in refused.stderr and "lora_" in refused.stderr


def test_inspect_an_adapter_says_what_happens_with_each_field(model: Path, adapter: Path) -> None:
    shown = here("inspect", str(adapter), "--base", str(model)).stdout
    assert "what happens" in shown and "served" in shown and "checked" in shown
    assert re.search(rf"rank 3, \d+ modules, [\d.]+ (KiB|B); compared with {re.escape(str(model))}", shown)
    assert "No effect when serving:" in shown and "inference_mode" in shown


def test_inspect_a_refused_adapter_leaves_out_what_it_does_not_know(model: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", {"peft_type": "LORA", "r": 4}, {})
    done = here("inspect", str(tmp_path / "a"), "--base", str(model))
    assert done.returncode == 1
    assert "lora_alpha: missing" in done.stderr and "nothing" not in done.stdout + done.stderr
    assert "rank 0" not in done.stdout and "0 modules" not in done.stdout and "No effect" not in done.stdout


def test_names_that_look_like_markup_are_shown_as_they_are(model: Path, tmp_path: Path) -> None:
    """rich would take [red] for a colour, [/x] for a mistake in its markup and :smile: for a picture."""
    folder = write_tiny_adapter(tmp_path / "[red] :smile:", model, **{"[/x]": ":smile:"})
    done = here("inspect", str(folder))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "[/x]" in done.stdout + done.stderr and "[red] :smile:" in done.stdout
    shown = here("inspect", str(write_model(tmp_path / "[red] :smile: [/x]"))).stdout
    assert "[red] :smile: [/x]" in shown.splitlines()[0]


def test_names_do_not_control_the_terminal(model: Path, tmp_path: Path) -> None:
    folder = write_tiny_adapter(tmp_path / "leaf", model, **{"\x1b]0;title\x07": 1})
    with terminal("inspect", str(folder)) as screen:
        screen.wait_for("␛]0;title")  # in the table
        screen.wait_for("␛]0;title")  # in the error
        assert screen.wait_for_end() == 1
    assert "\x1b]" not in screen.raw


@pytest.mark.parametrize("names", [("adapter_config.json",), ("adapter_model.bin",), ("adapters.safetensors",)])
def test_inspect_says_what_an_incomplete_adapter_lacks(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    done = here("inspect", str(tmp_path))
    assert done.returncode == 1
    assert "adapter_invalid" in done.stderr and names[0] in done.stderr and "config.json, so" not in done.stderr


def test_inspect_a_trainers_output_says_which_folder_to_give(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "checkpoint-7")
    done = here("inspect", str(tmp_path))
    assert done.returncode == 1 and "checkpoint-7" in done.stderr


def test_generate_side_by_side_from_standard_input(model: Path, adapter: Path) -> None:
    args = (
        "generate",
        str(model),
        "-a",
        "base",
        "-a",
        f"leaf={adapter}",
        "--raw",
        "--max-tokens",
        "6",
        "--dtype",
        "float32",
    )
    done = truffula(*args, stdin="Hello trees\n")
    assert done.returncode == 0, done.stderr
    assert "--- base" in done.stdout and "--- leaf" in done.stdout
    assert "\x1b[" not in done.stdout, "no colour where there is no terminal"


def test_generate_refuses_a_broken_adapter(model: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "leaf").mkdir()
    (tmp_path / "leaf" / "adapter_config.json").write_text('{"peft_type": "OFT", "r": 2}')
    (tmp_path / "leaf" / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    done = here("generate", str(model), "hello", "--raw", "-a", str(tmp_path / "leaf"))
    assert done.returncode == 1
    assert "OFT" in done.stderr and "Traceback" not in done.stderr


def test_bench_step_on_a_toy_shape() -> None:
    done = here("bench", "step", "--tiny", "--rows", "1,3", "--steps", "2", "--prefill", "20", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    seen = [(line["what"], line["rows"], line["adapters"]) for line in report["lines"]]
    assert seen == [("decode", r, a) for r in (1, 3) for a in ("none", "shared", "distinct")] + [
        ("prefill", 20, "none")
    ]
    assert all(line["ms"] >= line["best_ms"] > 0 for line in report["lines"])
    refused = here("bench", "step", "--tiny", "--adapters", "some")
    assert refused.returncode != 0 and "none, shared, distinct" in refused.stderr


@pytest.mark.skipif(not available(), reason="truffula was installed without its native kernels")
def test_bench_step_computes_with_the_instruction_set_asked_for() -> None:
    """By option or by the environment, as a server does; the option wins, and one that is not there is refused."""
    toy = ("bench", "step", "--tiny", "--rows", "1", "--adapters", "none", "--steps", "1", "--prefill", "0", "--json")
    assert json.loads(here(*toy, TRUFFULA_CPU_ISA="portable").stdout)["isa"] == "portable"
    assert json.loads(here(*toy, "--cpu-isa", "portable", TRUFFULA_CPU_ISA="none-such").stdout)["isa"] == "portable"
    refused = here(*toy, TRUFFULA_CPU_ISA="none-such")
    assert refused.returncode != 0 and "none-such" in refused.stderr and "portable" in refused.stderr


@pytest.mark.parametrize(("missing", "adapter"), [("torch", False), ("transformers", False), ("peft", True)])
def test_verify_says_what_to_install_before_it_fetches(
    missing: str, adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else found(name, *rest)
    )
    done = here("verify", "org/no-such-model", *(("--adapter", "leaf") if adapter else ()), HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "(missing_dependency)" in done.stderr
    assert f"not installed here: {missing}." in done.stderr and "CPU build" in done.stderr
    assert installation().pip_install("train") in done.stderr


def test_verify_of_a_gguf_model_says_that_it_needs_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    done = here("verify", str(tmp_path / "m.gguf"))
    assert done.returncode == 1 and "(missing_dependency)" in done.stderr and "not installed here: gguf." in done.stderr
    assert installation().pip_install("train") in done.stderr


def test_verify_looks_at_the_adapter_before_it_computes(tmp_path: Path) -> None:
    done = here("verify", "org/no-such-model", "--adapter", str(tmp_path / "nope"), HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "(adapter_not_found)" in done.stderr
    assert "nope" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_verify_and_bench_on_a_tiny_model(model: Path, adapter: Path) -> None:
    checked = json.loads(truffula("verify", str(model), "--adapter", str(adapter), "--json").stdout)
    assert checked["ok"] is True
    common = (str(model), "--max-model-len", "256", "--json")
    small = ("--clients", "2", "--repeats", "1", "--prompt-tokens", "9", "--max-tokens", "5", "--rank", "2")
    done = truffula("bench", "serve", *common, *small)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["http"]["output_tokens"] == 10
    opened = ("--rate", "50", "--requests", "6", "--adapters", "zipf", "--adapter-count", "3")
    done = truffula("bench", "serve", *common, *small[2:], *opened)
    assert done.returncode == 0, done.stderr
    arrived = json.loads(done.stdout)["http"]
    assert (arrived["requests"], arrived["output_tokens"], arrived["failures"]) == (6, 30, 0)
    assert arrived["prefix_hit_rate"] == 0.0 and 1 <= arrived["adapters"]["used"] <= 3
