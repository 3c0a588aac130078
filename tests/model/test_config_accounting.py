"""A config.json is read whole: every key is honoured, knowingly inert, warned of, or refused by name."""

from __future__ import annotations

import contextlib
import json
from itertools import product
from typing import Any

import pytest

from truffula.errors import TruffulaError, UnsupportedModel
from truffula.model.architectures import ARCHITECTURES
from truffula.model.config_view import load_defaults
from truffula.model.parts.parallel import ParallelSpec
from truffula.model.read import read_config
from truffula.testing.tiny import tiny_config


def refusal(config: dict[str, Any]) -> UnsupportedModel:
    with pytest.raises(UnsupportedModel) as caught:
        read_config(config)
    return caught.value


def test_the_table_of_defaults_covers_every_architecture() -> None:
    # Of a text part that transformers has no causal language model of.
    assert set(load_defaults()) == set(ARCHITECTURES) | {"muse_glimmer_text"}


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_an_empty_config_is_the_class_default(model_type: str) -> None:
    # The class has no default for these.
    needed: dict[str, dict[str, Any]] = {
        "deepseek_v2": {"num_experts_per_tok": 6},
        "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2},
        "glm4_moe": {"head_dim": 128},
        "lfm2_moe": {"layer_types": ["conv"] * 31 + ["full_attention"]},
    }
    read = read_config({"model_type": model_type, **needed.get(model_type, {})})
    text = load_defaults()[model_type].fields.get("text_config") or {}
    defaults = load_defaults()[read.spec.model_type]
    fields = defaults.fields | text
    value = lambda key: fields[defaults.aliases.get(key, key)]
    assert read.warnings == read.spec.notes
    assert read.spec.vocab_size == value("vocab_size")
    # The layers of Nemotron-H are as many as their kinds.
    assert len(read.spec.layers) == (4 if model_type == "nemotron_h" else value("num_hidden_layers"))
    mixers = [layer.mixer for layer in read.spec.layers]
    parts = [each.part for mixer in mixers if isinstance(mixer, ParallelSpec) for each in mixer.parts]
    attention = next((part for part in parts or mixers if part and part.kv_widths), None)
    assert attention is None or attention.heads == value("num_attention_heads")


def test_defaults_that_are_not_what_one_would_guess() -> None:
    # A gemma2 config that leaves head_dim out means 256; a qwen2 one that leaves out kv heads means 32, not its heads.
    assert read_config({"model_type": "gemma2", "hidden_size": 64}).spec.layers[0].mixer.head_dim == 256
    assert refusal({"model_type": "qwen2", "num_attention_heads": 16}).param == "num_key_value_heads"


def test_unknown_model_types_are_refused_with_what_is_supported() -> None:
    error = refusal({"model_type": "mamba", "auto_map": {"AutoModel": "modeling.Mamba"}})
    assert error.param == "model_type"
    assert "'mamba'" in str(error) and "qwen2" in str(error) and "auto_map" in str(error)
    assert refusal({}).param == "model_type"


def test_remote_code_of_a_known_type_is_not_run_and_said_so() -> None:
    read = read_config(tiny_config() | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}})
    assert any("auto_map" in text for text in read.warnings)


@pytest.mark.parametrize("level", ["", "text_config"])
def test_an_unknown_quantisation_is_refused_by_its_method(level: str) -> None:
    quantised = {"quantization_config": {"quant_method": "quip"}}
    error = refusal(tiny_config() | ({level: quantised} if level else quantised))
    assert "quip" in str(error) and str(error.param).endswith("quantization_config.quant_method")


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("llama", "per_layer_config", {"0": {"num_attention_heads": 2}}),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "num_hidden_layers", 2**32 - 32),
        ("llama", "is_encoder_decoder", True),
        ("llama", "hidden_act", "quick_gelu"),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("qwen2", "layer_types", ["full_attention", "linear_attention", "full_attention"]),
        ("qwen2", "layer_types", ["sliding_attention"] * 3),
        ("qwen2", "layer_types", ["full_attention"] * 2),
        ("mistral", "architectures", ["MistralForSequenceClassification"]),
    ],
)
def test_what_would_change_the_answer_is_refused(model_type: str, key: str, value: Any) -> None:
    error = refusal(tiny_config(model_type, **{key: value}))
    assert error.param == key
    assert key in str(error)


def test_a_known_field_nobody_reads_is_refused_unless_it_says_the_default() -> None:
    # attention_bias is not read for mistral: its class has no such field, so this is a key transformers ignores.
    assert read_config(tiny_config("mistral", attention_bias=True)).warnings != ()
    # Both spellings of one thing are known to the class of gemma3 but mean nothing to the text that is served.
    assert read_config(tiny_config("gemma3") | {"mm_tokens_per_image": 16}).warnings == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", 32.0),
        ("hidden_size", True),
        ("hidden_size", 0),
        ("hidden_size", None),
        ("num_hidden_layers", -1),
        ("num_attention_heads", [4]),
        ("num_key_value_heads", 3),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", "1e-6"),
        ("attention_bias", "yes"),
        ("attention_bias", 1),
        ("vocab_size", 0),
        ("rope_theta", -1.0),
        ("rope_theta", float("nan")),
        ("rope_scaling", "linear"),
        ("rope_parameters", []),
        ("head_dim", 7),
    ],
)
def test_wrong_values_are_refused_with_key_and_value(key: str, value: Any) -> None:
    error = refusal(tiny_config("llama", **{key: value}))
    assert error.param == key
    assert key in str(error)


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"type": "dynamic"}, "factor"),
        ({"type": "dynamic", "factor": 0.5}, "factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "longrope"),
        ({"type": "su"}, "su"),
        ({"type": "mrope", "mrope_section": [2, 1, 1]}, "mrope"),
        ({"rope_type": "made_up"}, "made_up"),
        ({"type": "linear"}, "factor"),
        ({"type": "linear", "factor": "2"}, "factor"),
        ({"type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({"type": "yarn", "factor": 2.0, "truncate": 1}, "truncate"),
        ({"type": "linear", "factor": 2.0, "finetuned": True}, "finetuned"),
        ({"full_attention": {"rope_type": "default"}}, "layer type"),
    ],
)
def test_rope_kinds_and_parameters_are_refused_by_name(rope: dict[str, Any], named: str) -> None:
    error = refusal(tiny_config("llama", rope_scaling=rope))
    assert named in str(error)
    assert str(error.param).startswith("rope_scaling")


def test_two_spellings_of_the_rope_that_differ_are_refused() -> None:
    config = tiny_config(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default"})
    assert "rope_parameters" in str(refusal(config))


def test_parameters_of_another_rope_kind_are_pointed_out() -> None:
    read = read_config(tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "factor": 8.0}))
    assert any("factor has no effect" in text for text in read.warnings)


def test_keys_nobody_knows_are_warned_of_once_and_by_name() -> None:
    read = read_config(tiny_config(unsloth_fixed=True, my_note="hello"))
    assert len(read.warnings) == 1
    assert "my_note, unsloth_fixed" in read.warnings[0]


def test_bookkeeping_and_sampling_defaults_are_silent() -> None:
    more = {"use_cache": False, "torch_dtype": "bfloat16", "transformers_version": "4.1", "temperature": 0.6,
            "initializer_range": 0.5, "attention_dropout": 0.1, "pretraining_tp": 4, "_name_or_path": "x",
            "is_decoder": True, "pad_token_id": 0, "id2label": {"0": "a"}}  # fmt: skip
    assert read_config(tiny_config(**more)).warnings == ()


def test_nested_configs_are_accounted_for_too() -> None:
    config = tiny_config("gemma3")
    config["text_config"]["mystery"] = 1
    assert any("text_config" in text and "mystery" in text for text in read_config(config).warnings)
    config["text_config"]["use_bidirectional_attention"] = True
    assert "text_config" in str(refusal(config))
    config["text_config"] = {"model_type": "llama"}
    assert refusal(config).param == "text_config.model_type"


def test_a_yarn_config_stretches_the_length() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = tiny_config("qwen2", max_position_embeddings=32768, rope_scaling=yarn)
    assert read_config(config).spec.max_positions == 131072


@pytest.mark.parametrize(
    "model_type",
    sorted(
        set(ARCHITECTURES) - {"gemma3", "gemma4", "gemma4_unified", "kimi_k2", "llama4", "mistral3", "muse_glimmer"}
    ),
)
def test_what_transformers_writes_is_read_without_a_warning(model_type: str, tmp_path: Any) -> None:
    read = read_config(as_written(tiny_config(model_type), tmp_path))
    assert read.warnings == read.spec.notes
    assert read.spec == read_config(tiny_config(model_type)).spec


def as_written(config: dict[str, Any], folder: Any) -> dict[str, Any]:
    """``config`` as transformers saves it."""
    from transformers import AutoConfig

    settings = {key: value for key, value in config.items() if key != "model_type"}
    AutoConfig.for_model(config["model_type"], **settings).save_pretrained(folder)
    written: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return written


def test_sizes_by_layer_are_read_with_numbers_of_two_digits(tmp_path: Any) -> None:
    config = tiny_config("gemma4_text", num_hidden_layers=12, layer_types=["sliding_attention", "full_attention"] * 6)
    written = as_written(config, tmp_path)
    assert "01" in written["per_layer_config"]
    assert read_config(written).spec == read_config(config).spec
    twice = {**written, "per_layer_config": {**written["per_layer_config"], "1": {"head_dim": 16}}}
    assert refusal(twice).param == "per_layer_config"
    assert refusal({**written, "per_layer_config": {"one": {"head_dim": 16}}}).param == "per_layer_config"


def test_the_table_of_defaults_is_transformers_own() -> None:
    """Regenerate in memory and compare; the remedy is scripts/generate_config_defaults.py."""
    import importlib.util
    from pathlib import Path

    script = Path(__file__).resolve().parents[2] / "scripts" / "generate_config_defaults.py"
    spec = importlib.util.spec_from_file_location("generate_config_defaults", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TABLE.read_text() == module.render(module.table())


ROPE = {"rope_type": "yarn", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE_KEYS = [
    *ROPE,
    "type",
    "rope_theta",
    "factors",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
]
ROPE_KEYS += ["beta_slow", "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor", "full_attention"]
FAST = {
    "apertus",
    "gemma3_text",
    "glm4_moe",
    "hunyuan_v1_dense",
    "lfm2",
    "llama",
    "llama4_text",
    "mistral3",
    "qwen2_moe",
}
READ_ALONE = sorted(set(ARCHITECTURES) - {"gemma3", "llama4"})
WRONG: list[Any] = [[], {}, "x", "", -1, 0, 1, True, None, 1.5, 1e308, 10**30, 10**400, [1], [None], {"a": 1}]


def spread(model_types: list[str], fast: set[str]) -> list[Any]:
    """The others, 50 s in all, in the slow suite."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in model_types]


@pytest.mark.parametrize("model_type", spread(READ_ALONE, FAST))
def test_a_wrong_value_of_any_key_is_an_error_of_ours(model_type: str) -> None:
    """Whatever JSON a file holds, it is read or refused: no other exception, and no array of its size."""
    config = tiny_config(model_type=model_type)
    for key in (*load_defaults()[model_type].known, "architectures", "quantization_config", "text_config"):
        for value in WRONG:
            with contextlib.suppress(TruffulaError):
                read_config({**config, key: value})


@pytest.mark.parametrize("model_type", spread(READ_ALONE, {"llama", "gemma3_text"}))
def test_a_wrong_value_of_a_rope_is_an_error_of_ours(model_type: str) -> None:
    config = tiny_config(model_type=model_type)
    for kind, key, where in product(("linear", "llama3", "yarn", "factors"), ROPE_KEYS, ("scaling", "parameters")):
        for value in WRONG:
            rope: dict[str, Any] = {**ROPE, "rope_type": kind, key: value}
            if where == "parameters" and model_type.startswith("gemma3"):
                rope = {"full_attention": rope, "sliding_attention": rope}
            with contextlib.suppress(TruffulaError):
                read_config({**config, "rope_scaling": None, "rope_parameters": None, f"rope_{where}": rope})


def test_a_head_that_is_named_without_a_list_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="LlamaForSequenceClassification"):
        read_config(tiny_config(architectures="LlamaForSequenceClassification"))
