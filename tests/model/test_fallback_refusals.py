"""What the transformers fallback refuses, and with which words; what it warns of; when it computes serially."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fallback_types import small_config, write_small
from parity import parity_model

from truffula.errors import (
    CheckpointError,
    ConfigError,
    InsufficientMemory,
    MissingDependency,
    TyingError,
    UnsupportedModel,
)
from truffula.model.fallback.skeleton import make_skeleton
from truffula.model.fallback.trace import trace
from truffula.model.load import plan_model
from truffula.testing.files import write_safetensors
from truffula.weights.open import open_checkpoint
from truffula.weights.tying import Tie

HEAD, EMBED, SOME = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.dense_h_to_4h.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_small(tmp_path_factory.mktemp("persimmon"), small_config("persimmon", num_hidden_layers=2))


def changed(original: Path, folder: Path, *, drop: str = "", add: Any = (), **config: Any) -> Path:
    """A copy of the model with other tensors and other keys in its config; a key that is None is removed."""
    checkpoint = open_checkpoint(original)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors if name != drop} | dict(add)
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    keys = {**checkpoint.config, **config}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))
    return folder


def refused(folder: Path, error: type[Exception], *words: str, implementation: str = "auto") -> None:
    with pytest.raises(error) as found:
        plan_model(open_checkpoint(folder), implementation)
    for word in words:
        assert word in str(found.value), str(found.value)


def test_code_from_the_repository_is_named_and_not_run(original, tmp_path):
    (tmp_path / "modeling_novel.py").write_text("raise SystemExit('it ran')")
    auto_map = {"AutoConfig": "configuration_novel.NovelConfig", "AutoModelForCausalLM": "modeling_novel.Novel"}
    folder = changed(original, tmp_path, model_type="novel", auto_map=auto_map)
    refused(
        folder, UnsupportedModel, "'novel'", "transformers", "configuration_novel.py, modeling_novel.py", "never run"
    )


def test_a_known_type_with_remote_code_is_served_by_what_is_built_in(original, tmp_path):
    plan = plan_model(open_checkpoint(changed(original, tmp_path, auto_map={"AutoModel": "modeling_x.X"})))
    assert plan.implementation.kind == "fallback"
    assert any("auto_map" in text and "not run" in text for text in plan.warnings)


def test_a_type_that_transformers_lacks_is_refused_by_name(original, tmp_path):
    refused(changed(original, tmp_path, model_type="kimi_k3"), UnsupportedModel, "'kimi_k3'", "neither")


def test_other_models_than_causal_language_models_are_refused(original, tmp_path):
    for model_type, word in (("vit", "no causal language model"), ("t5", "no causal language model")):
        refused(changed(original, tmp_path, model_type=model_type), UnsupportedModel, repr(model_type), word)


def test_a_bidirectional_model_is_refused(tmp_path):
    folder = write_small(tmp_path, small_config("bert", is_decoder=True))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_decoder": False}))
    refused(folder, UnsupportedModel, "attends to later tokens", "is_decoder")


def test_native_only_refuses_it(original):
    refused(original, UnsupportedModel, "'persimmon'", "supported are", implementation="native")


def test_without_its_packages_the_refusal_says_what_to_install(original, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "torch" else found(name, *more)
    )
    refused(original, MissingDependency, "torch is not installed", "[torch,hf]")


@pytest.mark.parametrize("name", [SOME, "model.final_layernorm.bias", "model.layers.0.self_attn.q_layernorm.weight"])
def test_a_missing_tensor_is_named(original, tmp_path, name):
    refused(changed(original, tmp_path, drop=name), CheckpointError, "missing", name)


def test_a_tensor_that_belongs_nowhere_is_named(original, tmp_path):
    add = {"model.layers.2.mlp.dense_h_to_4h.weight": np.zeros((56, 32), np.float32)}
    refused(changed(original, tmp_path, add=add), CheckpointError, "belong to no part", *add)


def test_a_tensor_of_the_wrong_shape_is_named(original, tmp_path):
    refused(changed(original, tmp_path, add={SOME: np.zeros((55, 32), np.float32)}), CheckpointError, SOME, "[55, 32]")


def test_a_value_that_is_not_finite_is_named(original, tmp_path):
    values = np.zeros((56, 32), np.float32)
    values[3, 4] = np.nan
    with (
        pytest.raises(CheckpointError, match=r"dense_h_to_4h.*1 NaN"),
        parity_model(changed(original, tmp_path, add={SOME: values})),
    ):
        pass


def test_tying_is_decided_as_for_every_model(original, tmp_path):
    refused(changed(original, tmp_path, drop=HEAD), TyingError, HEAD, "tie_word_embeddings")
    tied = plan_model(open_checkpoint(changed(original, tmp_path, drop=HEAD, tie_word_embeddings=True)))
    assert tied.tying.tie is Tie.TIED and tied.saved_bytes > 0
    unset = plan_model(open_checkpoint(changed(original, tmp_path, drop=HEAD, tie_word_embeddings=None)))
    assert unset.tying.tie is Tie.TIED and any("assumes false" in text for text in unset.warnings)
    folder = changed(original, tmp_path, drop=EMBED, tie_word_embeddings=True)
    with parity_model(folder) as model:
        assert model.plan.tying.tie is Tie.REVERSED
        table = model.loaded.executable.model.get_input_embeddings().weight
        assert table is model.loaded.executable.model.get_output_embeddings().weight
        np.testing.assert_array_equal(table.detach().numpy(), open_checkpoint(original).read(HEAD))


def test_a_config_that_transformers_refuses(original, tmp_path):
    refused(changed(original, tmp_path, num_attention_heads=5), UnsupportedModel, "config.json", "PersimmonForCausalLM")


def test_a_key_that_the_class_does_not_know_is_a_warning(original, tmp_path):
    plan = plan_model(open_checkpoint(changed(original, tmp_path, novel_key=1)))
    assert any("novel_key" in text for text in plan.warnings)


def test_memory_is_counted_before_loading(original):
    with pytest.raises(InsufficientMemory, match="Weights"), parity_model(original, memory_bytes=200_000):
        pass


@pytest.mark.parametrize(("option", "value"), [("backend", "cpu"), ("quantize", "q8_0"), ("cpu_isa", "avx2")])
def test_options_of_native_kernels_are_refused(original, option, value):
    with pytest.raises(ConfigError, match=option), parity_model(original, **{option: value}):
        pass


def test_a_model_that_mixes_packed_sequences_is_served_serially(tmp_path):
    """camembert counts positions from the ids that are no padding, whatever positions it is given."""
    with parity_model(write_small(tmp_path, small_config("camembert"))) as model:
        assert model.plan.implementation.kind == "serial"
        assert "differ from each alone" in model.plan.implementation.reason
        assert not model.settings.limits.prefix_cache
        assert model.settings.info.implementation == "serial"


@pytest.mark.parametrize("layers", [10**5, 10**30])
def test_more_layers_than_any_model_has_are_refused_before_they_are_made(original, tmp_path, layers):
    refused(
        changed(original, tmp_path, num_hidden_layers=layers), UnsupportedModel, "num_hidden_layers is 1000", "4096"
    )


def test_the_window_of_a_mask_is_found_behind_any_position():
    config = small_config("vaultgemma", sliding_window=200_000, max_position_embeddings=400_000)
    assert {call.window for call in trace(make_skeleton(config.to_dict())).calls} == {None, 200_000}


def test_experts_that_are_not_numbered_from_zero_are_an_error(tmp_path):
    """transformers stacks them in their order: each row would use another expert than the one that it chose."""
    original = write_small(tmp_path / "a", small_config("flex_olmo", num_hidden_layers=1))
    name = "model.layers.0.mlp.experts.{}.down_proj.weight"
    value = open_checkpoint(original).read(name.format(1))
    folder = changed(original, tmp_path / "b", drop=name.format(1), add={name.format(4): value})
    refused(folder, CheckpointError, "experts.#.down_proj.weight", "number 1 is not among them")
    wrong = changed(original, tmp_path / "c", drop=name.format(1), add={name.format(1): value[:, :-1].copy()})
    with pytest.raises(CheckpointError, match="cannot be converted") as found:
        plan_model(open_checkpoint(wrong))
    assert "Traceback" not in str(found.value)
