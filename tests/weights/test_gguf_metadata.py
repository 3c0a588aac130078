"""Metadata of a GGUF file that changes results is honoured as llama.cpp does or refused; other unread keys are named.

The oracle of rotation is transformers' rotary embedding; what a combination of keys means is llama.cpp's loader: type
"linear" where none is written, a factor of 0 is none, type "none" scales nothing, the newer key wins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import FAMILIES, LAYERS, VOCAB, metadata_of, write_tiny_gguf
from gguf_writer import write_gguf
from test_gguf_file import llama3_factors
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import LlamaConfig

from truffula import LLM, SamplingParams
from truffula.errors import CheckpointError, TruffulaError, UnsupportedModel
from truffula.model.load import plan_model
from truffula.weights.gguf.checkpoint import GgufCheckpoint
from truffula.weights.gguf.header import Metadata, read_header
from truffula.weights.gguf.tokenizer import generation_config, read_tokenizer
from truffula.weights.gguf.vocabulary import unread_keys
from truffula.weights.texts import read_texts

THETA, WIDTH, CONTEXT = 50000.0, 16, 512
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}
PLAIN: dict[str, Any] = {"rope_type": "default"}
# keys under the architecture's prefix → what transformers is to be asked for
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, PLAIN),
    "factor alone": ({"rope.scaling.factor": 4.0}, LINEAR),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LINEAR),
    "factor below one": ({"rope.scaling.factor": 0.5}, {"rope_type": "linear", "factor": 0.5}),
    "the older key": ({"rope.scale_linear": 4.0}, LINEAR),
    "the older key and linear": ({"rope.scaling.type": "linear", "rope.scale_linear": 4.0}, LINEAR),
    "both keys": ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, LINEAR),
    "both keys, the newer 0": ({"rope.scaling.factor": 0.0, "rope.scale_linear": 2.0}, PLAIN),
    "factor 0": ({"rope.scaling.factor": 0.0}, PLAIN),
    "factor 1": ({"rope.scaling.factor": 1.0}, PLAIN),
    "linear without factor": ({"rope.scaling.type": "linear"}, PLAIN),
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, PLAIN),
    "none and the older key": ({"rope.scaling.type": "none", "rope.scale_linear": 4.0}, PLAIN),
    "yarn": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, YARN),
    "yarn, original length 0": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 0},
        YARN,
    ),
    "yarn of a shorter length": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
        YARN | {"original_max_position_embeddings": 128},
    ),
    "yarn with its band": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
            "rope.scaling.yarn_ext_factor": 1.0,
            "rope.scaling.attn_factor": 1.0,
        },
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    ),
    "yarn without factor": ({"rope.scaling.type": "yarn"}, PLAIN),
    "another base": ({"rope.freq_base": 1e6, "rope.scaling.factor": 4.0}, LINEAR | {"rope_theta": 1e6}),
}


def checkpoint_of(tmp_path: Path, architecture: str, keys: dict[str, Any], **tensors: Any) -> GgufCheckpoint:
    """A tiny model with ``keys`` under its architecture's prefix (as they are where they name another)."""
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", architecture)
    changed = {key if key.startswith(("general.", "other.")) else f"{architecture}.{key}": v for key, v in keys.items()}
    pairs = {key: value for key, value in {**tiny.metadata, **changed}.items() if value is not None}
    return GgufCheckpoint(write_gguf(tmp_path / "x.gguf", pairs, {**tiny.stored, **tensors}))


def transformers_table(rope: dict[str, Any]) -> tuple[np.ndarray, float]:
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=1,
        head_dim=WIDTH,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_theta": THETA, **rope},
    )
    if rope["rope_type"] == "default":
        theta = rope.get("rope_theta", THETA)
        return theta ** (-np.arange(0, WIDTH, 2) / WIDTH), 1.0
    inv_freq, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    return inv_freq.numpy(), factor


@pytest.mark.parametrize("case", ROPES)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_rotation_is_what_transformers_computes(tmp_path: Path, architecture: str, case: str) -> None:
    keys, rope = ROPES[case]
    plan = plan_model(checkpoint_of(tmp_path, architecture, keys))
    tables = [plan.spec.ropes[layer.mixer.rope] for layer in plan.spec.layers]
    full = [table for table, layer in zip(tables, plan.spec.layers, strict=True) if layer.mixer.window is None]
    wanted, factor = transformers_table(rope)
    assert full or architecture == "gemma2"
    for table in full or tables:
        np.testing.assert_allclose(np.float32(table.inv_freq), wanted, rtol=3e-6)
        assert table.factor == pytest.approx(factor)
    if architecture == "gemma3":  # its sliding layers keep the plain table of their own base
        np.testing.assert_allclose(np.float32(tables[0].inv_freq), 1e4 ** (-np.arange(0, 16, 2) / 16), rtol=3e-6)
    assert not [text for text in plan.warnings if "rope" in text]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_scaling_without_a_type_changes_the_answer(tmp_path: Path, architecture: str) -> None:
    """End to end: the same scores as with the type written, other ones than without scaling."""

    def answer(**keys: Any) -> Any:
        tiny = write_tiny_gguf(tmp_path / "x.gguf", architecture, hidden=64, **keys)
        with LLM(str(tiny.path), dtype="float32", max_model_len=64, memory_bytes=200 << 20) as llm:
            params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=5)
            return llm.generate([list(range(3, 50))], params)[0].logprobs

    written = answer(rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert answer(rope__scaling__factor=8.0) == written
    assert answer() != written


@pytest.mark.parametrize("kind", [{}, {"rope.scaling.type": "linear"}, {"rope.scaling.type": "none"}])
def test_a_table_of_factors_beside_a_scaling_that_asks_for_nothing(tmp_path: Path, kind: dict[str, Any]) -> None:
    table = llama3_factors(THETA, WIDTH, 8.0, 1, 4, 8192)
    checkpoint = checkpoint_of(tmp_path, "llama", {**kind, "rope.scaling.factor": 1.0}, **{"rope_freqs.weight": table})
    assert checkpoint.config["rope_parameters"]["rope_type"] == "factors"


@pytest.mark.parametrize("keys", [{"rope.scaling.factor": 4.0}, {"rope.scaling.type": "yarn"}])
def test_a_table_of_factors_beside_a_scaling_is_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    table = llama3_factors(THETA, WIDTH, 8.0, 1, 4, 8192)
    with pytest.raises(UnsupportedModel, match="both rope_freqs"):
        checkpoint_of(tmp_path, "llama", keys, **{"rope_freqs.weight": table})


@pytest.mark.parametrize("kind", ["linear", "none", None])
def test_parameters_of_yarn_without_yarn_are_named(tmp_path: Path, kind: str | None) -> None:
    keys = {"rope.scaling.type": kind, "rope.scaling.factor": 2.0, "rope.scaling.yarn_beta_fast": 16.0}
    (warning,) = checkpoint_of(tmp_path, "qwen2", keys).warnings
    assert "qwen2.rope.scaling.yarn_beta_fast" in warning
    assert f"type is {kind or 'linear'}" in warning


# Keys llama.cpp knows, at a value that changes the result: refused for every architecture that doesn't read them.
CHANGES: dict[str, Any] = {
    "rope.scaling.type": "longrope",
    "rope.scaling.attn_factor": 2.0,
    "rope.scaling.yarn_attn_factor": 2.0,
    "rope.scaling.yarn_ext_factor": 0.5,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.scaling.alpha": 1000.0,
    "rope.scaling.factor": -1.0,
    "rope.dimension_count": 8,
    "rope.dimension_count_swa": 8,
    "rope.dimension_sections": [4, 4, 0, 0],
    "attention.scale": 0.5,
    "attention.output_scale": 0.5,
    "attention.value_scale": 0.5,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.temperature_length": 8192,
    "attention.temperature_scale": 0.1,
    "attention.causal": False,
    "attention.shared_kv_layers": 4,
    "attention.key_length_swa": 8,
    "attention.value_length": 8,
    "attention.head_count_kv": [2] * (LAYERS - 1) + [1],
    "logit_scale": 0.5,
    "embedding_scale": 2.0,
    "residual_scale": 0.5,
    "router_logit_softcapping": 30.0,
    "swiglu_clamp_exp": 7.0,
    "hidden_activation": "relu",
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 16,
    "expert_shared_feed_forward_length": 16,
    "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
    "expert_group_count": 2,
    "pooling_type": 3,
    "nextn_predict_layers": 1,
    "leading_dense_block_count": 1,
    "use_parallel_residual": True,
    "embedding_length_out": 12,
    "full_attention_interval": 4,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "attention.sliding_window": 64,
    "attention.sliding_window_pattern": 3,
    "rope.freq_base_swa": 777.0,
}
READ = {
    "llama": {"attention.sliding_window"},
    "qwen2moe": {"expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length"},
    "qwen3moe": {"expert_used_count", "expert_feed_forward_length"},
    "gemma2": {
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
    },
    "gemma3": {
        "final_logit_softcapping",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "rope.freq_base_swa",
    },
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_key_that_changes_results_is_read_or_refused_by_name(tmp_path: Path, architecture: str) -> None:
    before = checkpoint_of(tmp_path, architecture, {}).config
    for key, value in CHANGES.items():
        if key in READ.get(architecture, ()):
            checkpoint = checkpoint_of(tmp_path, architecture, {key: value})
            assert checkpoint.config != before, key
            assert checkpoint.warnings == (), key
            continue
        with pytest.raises(TruffulaError, match=key.rsplit(".", 1)[-1]) as caught:
            checkpoint_of(tmp_path, architecture, {key: value})
        assert isinstance(caught.value, UnsupportedModel | CheckpointError), key
        assert caught.value.param == f"{architecture}.{key}", key


HARMLESS: dict[str, Any] = {
    "rope.scaling.finetuned": True,
    "tensor_data_layout": "reference",
    "vocab_size": VOCAB,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "leading_dense_block_count": 0,
    "pooling_type": 0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "use_parallel_residual": False,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "general.file_type": 7,
    "general.quantization_version": 2,
    "general.size_label": "1B",
    "general.tags": ["text-generation"],
    "general.base_model.0.name": "x",
    "general.sampling.temp": 0.7,
}


def experts_of(architecture: str) -> bool:
    return architecture.endswith("moe")


@pytest.mark.parametrize("architecture", [*filter(experts_of, FAMILIES)])
@pytest.mark.parametrize("key", ["expert_count", "expert_used_count"])
@pytest.mark.parametrize("value", [0, None])
def test_a_file_with_experts_says_how_many(tmp_path: Path, architecture: str, key: str, value: int | None) -> None:
    with pytest.raises(CheckpointError, match=f"{architecture}.{key} is") as caught:
        checkpoint_of(tmp_path, architecture, {key: value})
    assert caught.value.param == f"{architecture}.{key}"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_harmless_keys_are_not_spoken_of(tmp_path: Path, architecture: str) -> None:
    before = checkpoint_of(tmp_path, architecture, {})
    more = {} if architecture.startswith("gemma") else {"attention.sliding_window": 0}
    # A count of 0 says that a file is dense: one with experts must state how many.
    keys = {key: value for key, value in HARMLESS.items() if not (experts_of(architecture) and "expert" in key)}
    checkpoint = checkpoint_of(tmp_path, architecture, keys | more)
    assert checkpoint.config == before.config
    assert checkpoint.warnings == before.warnings == ()


def test_unknown_keys_are_named_together_wherever_the_operator_looks(tmp_path: Path) -> None:
    keys = {"shape_of_things": 3, "other.list": [1, 2, 3], "other.text": "t" * 99, "general.sampling.mirostat": 2}
    checkpoint = checkpoint_of(tmp_path, "qwen2", keys)
    (warning,) = checkpoint.warnings
    words = ("qwen2.shape_of_things (3)", "other.list (a list of 3)", "other.text (ttt", "general.sampling.mirostat")
    assert all(text in warning for text in words)
    assert plan_model(checkpoint).warnings[0] == warning
    with LLM(str(checkpoint.path), dtype="float32", max_model_len=32, memory_bytes=200 << 20) as llm:
        assert warning in llm.info.warnings


def test_an_unknown_tokenizer_key_is_named(tmp_path: Path) -> None:
    pairs = metadata_of("llama") | {"tokenizer.ggml.suppress_tokens": [1], "tokenizer.ggml.fim_pre_token_id": 1}
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    (warning,) = [text for text in read_texts(write_gguf(tmp_path / "x.gguf", pairs, tiny.stored)).warnings
                  if "suppress" in text]  # fmt: skip
    assert "tokenizer.ggml.suppress_tokens" in warning
    assert "fim_pre" not in warning


def test_a_tokenizer_key_is_read_or_reported() -> None:
    common = {
        "general.architecture": "llama",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab"],
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0, 0.0, -1.0, -2.0, -3.0],
        "tokenizer.ggml.merges": ["a b"],
        **{f"tokenizer.ggml.{name}_token_id": 1 for name in ("bos", "eos", "eot", "eom", "unknown", "padding")},
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.chat_template": "x",
        "tokenizer.chat_template.tool_use": "y",
    }
    read: set[str] = set()
    for model in ("gpt2", "llama"):
        metadata = Metadata({**common, "tokenizer.ggml.model": model})
        read_tokenizer(metadata)
        generation_config(metadata)
        read |= set(metadata) - set(metadata.unread())
    assert {key for key in (*common, "tokenizer.ggml.model") if key.startswith("tokenizer.")} <= read
    assert unread_keys(dict.fromkeys(read)) == []
    assert unread_keys({"tokenizer.ggml.new_key": 1, "tokenizer.ggml.pre": "x"}) == ["tokenizer.ggml.new_key"]


def test_reading_is_recorded_and_looking_is_not(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", {"a": 1, "b": ["x", "y"], "c": [1, 2], "d": True}, {})
    metadata = read_header(path, memoryview(path.read_bytes())).metadata
    assert "a" in metadata and list(metadata) == ["a", "b", "c", "d"] and metadata.get("e", 5) == 5
    assert (metadata.peek("b"), metadata.peek("c"), metadata.peek("d")) == ("a list of 2", "a list of 2", True)
    assert metadata.unread() == ["a", "b", "c", "d"]
    assert (metadata["b"], metadata.get("a")) == (["x", "y"], 1)
    assert metadata.unread() == ["c", "d"]


def test_default_sampling_parameters_are_those_of_generation_config(tmp_path: Path) -> None:
    keys = {"temp": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "penalty_repeat": 1.1}
    checkpoint = checkpoint_of(tmp_path, "llama", {f"general.sampling.{key}": value for key, value in keys.items()})
    wanted = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.1}
    assert checkpoint.generation_config == wanted | {"eos_token_id": [2]}
    assert read_texts(checkpoint.path).generation_config == checkpoint.generation_config


@pytest.mark.parametrize(
    ("kind", "words"),
    [("adapter", "PEFT"), ("imatrix", "statistics"), ("mmproj", "image encoder"), (7, "not a language")],
)
def test_a_file_that_is_no_model_is_refused_by_what_it_is(tmp_path: Path, kind: Any, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words) as caught:
        checkpoint_of(tmp_path, "llama", {"general.type": kind})
    assert caught.value.param == "general.type"


@pytest.mark.parametrize(
    ("architecture", "key"),
    [("gemma3", "rope.freq_base"), ("gemma3", "attention.sliding_window"), ("llama", "context_length")],
)
def test_a_key_without_a_default_must_be_there(tmp_path: Path, architecture: str, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{architecture}.{key} is missing"):
        checkpoint_of(tmp_path, architecture, {key: None})


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_which_layers_slide(tmp_path: Path, architecture: str) -> None:
    def full(pattern: Any) -> list[int]:
        key = {"attention.sliding_window_pattern": pattern}
        kinds = checkpoint_of(tmp_path, architecture, key).config["layer_types"]
        return [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]

    assert full(None) == ([1, 3, 5] if architecture == "gemma2" else [5])
    assert full(3) == [2, 5]
    assert full(1) == list(range(LAYERS))
    assert full(0) == []
    assert full([False] * 2 + [True] * (LAYERS - 2)) == [0, 1]
    with pytest.raises(CheckpointError, match="sliding_window_pattern has 2 entries"):
        full([True, False])


def test_a_second_base_for_gemma2_must_be_the_first(tmp_path: Path) -> None:
    before = checkpoint_of(tmp_path, "gemma2", {}).config
    assert checkpoint_of(tmp_path, "gemma2", {"rope.freq_base_swa": THETA}).config == before
