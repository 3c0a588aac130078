"""Latent attention's families beyond plain parity: sparse indexers, layers that are not needed, configs of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_backends import on_the_best
from transformers import AutoModelForCausalLM

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.kernels.backend import Backend
from truffula.model.load import WeightReader, plan_model
from truffula.model.read import read_config
from truffula.testing.programs import Driver, capacity_for
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint

TOPK = 24


def indexers(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of an indexer in every layer."""
    rng, made = np.random.default_rng(2), {}
    width, heads = config["index_head_dim"], config["index_n_heads"]
    shapes = {
        "wq_b.weight": (heads * width, config["q_lora_rank"]),
        "wk.weight": (width, config["hidden_size"]),
        "k_norm.weight": (width,),
        "k_norm.bias": (width,),
        "weights_proj.weight": (heads, config["hidden_size"]),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, shape in shapes.items():
            made[f"model.layers.{layer}.self_attn.indexer.{name}"] = rng.standard_normal(shape).astype(np.float32)
    return made


@on_the_best
@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_sparse_attention_is_exact_up_to_index_topk(tmp_path: Path, model_type: str, backend: Backend) -> None:
    config = tiny_config(model_type, index_topk=TOPK, num_hidden_layers=2)
    folder = write_tiny_checkpoint(tmp_path / "model", config, extra=indexers(config))
    checkpoint = open_checkpoint(folder)
    plan = plan_model(checkpoint)
    assert plan.max_model_len == TOPK
    assert any(f"index_topk = {TOPK}" in text for text in plan.warnings)
    assert len(plan.unused) == 10 and all(".indexer." in name for name in plan.unused)
    capacity = capacity_for(TOPK, block_size=4)
    executable = backend.load(plan.program, "float32", WeightReader(checkpoint, plan), capacity)
    ids = np.random.default_rng(1).integers(3, 101, TOPK).tolist()
    mine = Driver(executable, capacity).feed(ids, chunk=7)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([[*ids, 5]])).logits[0, :TOPK].numpy()
    np.testing.assert_allclose(mine, theirs, atol=1e-4)
    executable.close()


@pytest.mark.parametrize(("model_type", "key"), [("deepseek_v3", "num_nextn_predict_layers"), ("glm4_moe_lite", None)])
def test_layers_that_predict_further_tokens_are_not_needed(tmp_path: Path, model_type: str, key: str | None) -> None:
    extra = {
        f"model.layers.3.{name}": np.zeros(4, np.float32) for name in ("eh_proj.weight", "self_attn.q_a_proj.weight")
    }
    config = tiny_config(model_type, **({key: 1} if key else {}))
    plan = plan_model(open_checkpoint(write_tiny_checkpoint(tmp_path / "one", config, extra=extra)))
    assert plan.unused == tuple(extra)
    assert plan.warnings == ()
    beyond = extra | {"model.layers.4.eh_proj.weight": np.zeros(4, np.float32)}
    with pytest.raises(CheckpointError, match=r"layers\.4"):
        plan_model(open_checkpoint(write_tiny_checkpoint(tmp_path / "two", config, extra=beyond)))


def test_kimi_as_its_repositories_write_it() -> None:
    """Another name of the text type and of the class, keys of the repository's own code, an image encoder."""
    text = tiny_config("deepseek_v3", num_nextn_predict_layers=0)
    text |= {"model_type": "kimi_k2", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    text |= {
        "ep_size": 1,
        "seq_aux": True,
        "aux_loss_alpha": 0.001,
        "auto_map": {"AutoConfig": "configuration_deepseek.X"},
    }
    read = read_config(text)
    assert (read.spec.model_type, read.spec.names.unused) == ("kimi_k2", ())
    nested = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": text}
    nested |= {"vision_config": {"model_type": "kimi_k25"}, "media_placeholder_token_id": 7, "ignore_index": -100}
    read = read_config(nested)
    assert read.spec.model_type == "kimi_k2"
    assert read.spec.names.body == "model.language_model."
    assert read.warnings == ()


def test_glm_5_2_as_its_repository_writes_it() -> None:
    """An older name of the layers, and a head_dim that transformers overwrites."""
    from transformers import AutoConfig

    config = tiny_config("glm_moe_dsa")
    layers = ["deepseek_sparse_attention"] * config["num_hidden_layers"]
    written = config | {"layer_types": layers, "head_dim": config["qk_nope_head_dim"]}
    assert read_config(written).spec == read_config(config).spec
    theirs = AutoConfig.for_model(**written)
    assert theirs.head_dim == config["qk_rope_head_dim"] and set(theirs.layer_types) == {"indexed_attention"}


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("deepseek_v2", "scoring_func", "sigmoid"),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "topk_method", "greedy"),
        ("deepseek_v3", "moe_layer_freq", 2),
        ("deepseek_v3", "head_dim", 8),
        ("deepseek_v3", "num_key_value_heads", 2),
        ("deepseek_v3", "qk_head_dim", 15),
        ("deepseek_v32", "layer_types", ["full_attention"] * 3),
        ("deepseek_v32", "rope_interleave", False),
        ("glm4_moe_lite", "mlp_layer_types", ["dense", "dense", "linear"]),
    ],
)
def test_what_is_not_computed_is_refused_by_name(model_type: str, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        read_config(tiny_config(model_type, **{key: value}))
    assert caught.value.param == key


def test_one_row_per_token_and_layer_is_cached() -> None:
    """Of 512 + 64 numbers at DeepSeek's widths, however many heads there are."""
    read = read_config({"model_type": "deepseek_v3", "first_k_dense_replace": 61})
    assert {layer.mixer.kv_widths for layer in read.spec.layers} == {(576,)}
