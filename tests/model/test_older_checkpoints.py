"""Files of families before Llama as the hub has them: bare prefixes, masks, old names of types, keys and heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.model.load import ModelPlan, WeightReader, plan_model
from truffula.model.read import read_config
from truffula.testing.tiny import tiny_config, tiny_tensors, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint
from truffula.weights.tying import Tie


def plan(folder: Path) -> ModelPlan:
    return plan_model(open_checkpoint(folder))


def test_gpt2_without_prefix_and_with_its_masks(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    tensors = tiny_tensors(config)
    bare = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    masks = {f"h.{layer}.attn.bias": np.ones((1, 1, 8, 8), np.float32) for layer in range(3)}
    folder = write_tiny_checkpoint(tmp_path, config, drop=tensors, extra=bare | masks)
    found = plan(folder)
    assert sorted(found.unused) == sorted(masks)
    assert found.tying.tie is Tie.TIED


@pytest.mark.parametrize("head", ["embed_out", "lm_head"])
def test_gpt_neox_has_its_head_under_either_name(tmp_path: Path, head: str) -> None:
    config = tiny_config("gpt_neox")
    weight = tiny_tensors(config)["embed_out.weight"]
    folder = write_tiny_checkpoint(tmp_path, config, drop=["embed_out.weight"], extra={f"{head}.weight": weight})
    found = plan(folder)
    assert found.tables["head"] == f"{head}.weight" and found.tying.tie is Tie.SEPARATE


def test_a_tied_head_keeps_its_bias_which_must_be_there(tmp_path: Path) -> None:
    config = tiny_config("phi", tie_word_embeddings=True)
    assert plan(write_tiny_checkpoint(tmp_path / "whole", config)).tying.tie is Tie.TIED
    folder = write_tiny_checkpoint(tmp_path / "without", config, drop=["lm_head.bias"])
    with pytest.raises(CheckpointError, match=r"lm_head\.bias"):
        plan(folder)


def test_rows_of_a_fused_module_are_sorted_and_conv1d_is_transposed(tmp_path: Path) -> None:
    neox = write_tiny_checkpoint(tmp_path / "neox", tiny_config("gpt_neox"))
    stored = open_checkpoint(neox).read("gpt_neox.layers.0.attention.query_key_value.weight")
    by_head = stored.reshape(4, 3, 8, 32)  # 4 heads, q k v, 8 columns
    np.testing.assert_array_equal(
        read(neox, "query_key_value.weight"), np.concatenate(by_head.swapaxes(0, 1)).reshape(96, 32)
    )
    gpt2 = write_tiny_checkpoint(tmp_path / "gpt2", tiny_config("gpt2"))
    stored = open_checkpoint(gpt2).read("transformer.h.0.mlp.c_fc.weight")
    np.testing.assert_array_equal(read(gpt2, "mlp.c_fc.weight"), stored.T)


def read(folder: Path, name: str) -> np.ndarray:
    """The first weight whose name ends so, as a backend gets it."""
    checkpoint = open_checkpoint(folder)
    found = plan_model(checkpoint)
    decl = next(decl for decl in found.program.weights if decl.name.endswith(name))
    return np.concatenate(list(WeightReader(checkpoint, found)(decl)))


def test_old_names_of_types_and_keys_mean_the_same() -> None:
    sizes = {"hidden_size": 32, "vocab_size": 101, "n_layer": 2, "n_head": 4}
    new = {"hidden_size": 32, "vocab_size": 101, "num_hidden_layers": 2, "num_attention_heads": 4}
    old_7b = read_config({"model_type": "RefinedWebModel", **sizes, "multi_query": True, "parallel_attn": True})
    assert old_7b.spec == read_config({"model_type": "falcon", **new}).spec
    old_40b = read_config({"model_type": "RefinedWeb", **sizes, "n_head_kv": 2})
    grouped = {"new_decoder_architecture": True, "num_kv_heads": 2}
    assert old_40b.spec == read_config({"model_type": "falcon", **new, **grouped}).spec
    gpt2 = read_config({"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}).spec
    names = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 64}
    assert gpt2 == read_config({"model_type": "gpt2", **names}).spec
    with pytest.raises(UnsupportedModel, match="same meaning"):
        read_config({"model_type": "gpt2", "n_embd": 32, "hidden_size": 64})


@pytest.mark.parametrize(
    ("config", "param"),
    [
        ({"model_type": "mpt", "attn_config": {"alibi": False}}, "attn_config.alibi"),
        ({"model_type": "mpt", "attn_config": {"qk_ln": True}}, "attn_config.qk_ln"),
        ({"model_type": "mpt", "attn_config": {"window": 3}}, "attn_config.window"),
        ({"model_type": "mpt", "logit_scale": 0.5}, "logit_scale"),
        ({"model_type": "falcon", "multi_query": False, "num_kv_heads": 2, "num_attention_heads": 71}, "num_kv_heads"),
        ({"model_type": "falcon", "num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ({"model_type": "falcon", "new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], 3]]}, "attention_types"),
        ({"model_type": "gpt_neox", "rotary_pct": 0.5, "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ({"model_type": "gptj", "rotary_dim": 7}, "rotary_dim"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "rope_scaling.short_factor",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(config: dict[str, object], param: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        read_config(config)
    assert caught.value.param == param
