"""GGUF files of further families, with gguf-py's names and the metadata of llama.cpp's converter.

The model read from such a file equals the one with the same weights in safetensors, which the parity tests compare with
transformers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_models import FAMILIES as USUAL
from gguf_models import VOCABULARY, interleave
from gguf_writer import write_gguf
from kernel_backends import BEST

from truffula.errors import UnsupportedModel
from truffula.model.load import WeightReader, plan_model
from truffula.model.parts.attention import AttentionSpec
from truffula.model.read import read_config
from truffula.testing.files import Array
from truffula.testing.programs import Driver, capacity_for
from truffula.testing.tiny import tiny_config, tiny_tensors, write_tiny_checkpoint
from truffula.weights.gguf_names import FAMILIES
from truffula.weights.open import open_checkpoint

IDS = [7, 31, 12, 55, 40, 9, 23, 18, 50, 4, 36, 27]
VOCAB = 61
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
# Architecture, model type, overrides of its tiny config, keys of metadata beside the usual ones, and whether the
# converter interleaves the rows of q and k.
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], bool]] = [
    ("smollm3", "smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1], "tie_word_embeddings": False},
     {"rope.dimension_count": 8}, True),
    ("granite", "granite", {"tie_word_embeddings": True},
     {"attention.scale": 0.2, "embedding_scale": 3.0, "logit_scale": 2.5, "residual_scale": 0.3,
      "rope.dimension_count": 8}, True),
    ("granitemoe", "granitemoe",
     {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.3},
     {"attention.scale": 0.2, "embedding_scale": 3.0, "logit_scale": 2.5, "residual_scale": 0.3}, True),
    ("seed_oss", "seed_oss", {"attention_bias": True, "attention_out_bias": False}, {}, False),
    ("olmo2", "olmo2", {}, {}, False),
    ("olmo2", "olmo3", {"sliding_window": 7, "num_hidden_layers": 4}, {"attention.sliding_window": 7}, False),
    ("olmoe", "olmoe", {"norm_topk_prob": False}, {}, False),
    ("command-r", "cohere", {"use_qk_norm": True},
     {"attention.layer_norm_epsilon": 1e-4, "logit_scale": 0.4, "rope.scaling.type": "none"}, False),
    ("cohere2", "cohere2", {"head_dim": 8},
     {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.4, "rope.scaling.type": "none", "vocab_size": VOCAB,
      "attention.sliding_window": 7, "rope.dimension_count": 8}, False),
    ("glm4moe", "glm4_moe", {"use_qk_norm": True, "attention_bias": True, "n_shared_experts": 2,
                             "routed_scaling_factor": 1.8, "num_nextn_predict_layers": 0},
     {"rope.dimension_count": 4, "expert_feed_forward_length": 24, "expert_shared_count": 2, "nextn_predict_layers": 0,
      "leading_dense_block_count": 1, "expert_gating_func": 2, "expert_weights_scale": 1.8, "expert_weights_norm": True,
      "expert_group_count": 1, "expert_group_used_count": 1}, False),
    ("lfm2", "lfm2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
     {"attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 3, "vocab_size": VOCAB, "feed_forward_length": 40},
     False),
    ("gpt-oss", "gpt_oss", {"rope_parameters": {**YARN, "truncate": False}},
     {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}, False),
]  # fmt: skip


def metadata(architecture: str, config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """What the converter's base class writes of a config, and ``more``."""
    spec = read_config(config).spec
    mixer: Any = next(layer.mixer for layer in spec.layers if isinstance(layer.mixer, AttentionSpec))
    pairs = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": spec.hidden,
        "feed_forward_length": config["intermediate_size"],
        "block_count": len(spec.layers),
        "attention.head_count": mixer.heads,
        "attention.head_count_kv": mixer.kv_heads,
        "attention.key_length": mixer.head_dim,
        "attention.value_length": mixer.head_dim,
        "attention.layer_norm_rms_epsilon": spec.final_norm.eps if spec.final_norm else 0.0,
        "rope.freq_base": 10000.0,
    }
    router = getattr(spec.layers[-1].mlp, "router", None)
    if router is not None:
        pairs |= {"expert_count": router.experts, "expert_used_count": router.top_k}
    if architecture == "gpt-oss":
        pairs |= {"attention.sliding_window": mixer.window, "expert_feed_forward_length": config["intermediate_size"]}
    if "attention.layer_norm_epsilon" in more:
        del pairs["attention.layer_norm_rms_epsilon"]
    named = {f"{architecture}.{key}": value for key, value in {**pairs, **more}.items()}
    return {"general.architecture": architecture, **named, **VOCABULARY}


def stacked(tensors: dict[str, Array], model_type: str) -> dict[str, Array]:
    """``tensors`` with the matrices of all experts together, gate and up apart, as the converter makes them."""
    made: dict[str, Array] = {}
    for name, array in tensors.items():
        if model_type == "gpt_oss" and ".experts." in name:
            name = re.sub(r"_proj_bias$", "_proj.bias", name)
            name, turned = (name, array) if name.endswith("bias") else (f"{name}.weight", array.swapaxes(1, 2))
            if "gate_up_proj" in name:
                made[name.replace("gate_up", "gate")], made[name.replace("gate_up", "up")] = (
                    turned[:, 0::2], turned[:, 1::2]
                )  # fmt: skip
            else:
                made[name] = turned
        elif name.endswith("input_linear.weight"):
            half = array.shape[1] // 2
            root = name.replace("input_linear", "experts.{}_proj")
            made[root.format("gate")], made[root.format("up")] = array[:, :half], array[:, half:]
        elif name.endswith("output_linear.weight"):
            made[name.replace("output_linear", "experts.down_proj")] = array
        elif match := re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name):
            whole = match[1].removesuffix(".") + match[3]
            made[whole] = np.stack([*made.get(whole, []), array])
        else:
            made[name] = array
    return made


def write_pair(
    folder: Path, case: tuple[str, str, dict[str, Any], dict[str, Any], bool], extra: dict[str, Array] | None = None
) -> tuple[Path, Path]:
    """The same model in safetensors and in GGUF, there with the tensors ``extra``."""
    architecture, model_type, overrides, more, permuted = case
    usual = {"vocab_size": VOCAB, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    if model_type == "olmo3":
        usual["rope_parameters"] = dict.fromkeys(("full_attention", "sliding_attention"), usual["rope_parameters"])
    config = tiny_config(model_type, **{**usual, **overrides})
    plain = write_tiny_checkpoint(folder / "plain", config, seed=3)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    mixer: Any = read_config(config).spec.layers[0].mixer
    stored = dict(extra or {})
    for name, array in stacked(tiny_tensors(config, seed=3), model_type).items():
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        name = re.sub(
            r"block_sparse_moe\.experts\.(\w+)_proj", r"mlp.experts.\1_proj", name
        )  # as the converter maps it
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        if ".shortconv.conv." in found:
            array = array[:, 0]
        if permuted and (match := re.search(r"\.attn_([qk])\.", found)):
            array = interleave(array, mixer.heads if match[1] == "q" else mixer.kv_heads)
        stored[f"{found}.weight" if found.endswith("attn_sinks") else found] = np.ascontiguousarray(array)
    return plain, write_gguf(folder / "model.gguf", metadata(architecture, config, more), stored)


def logits(path: Path, block_kinds: frozenset[str] = frozenset()) -> Array:
    checkpoint = open_checkpoint(path)
    plan = plan_model(checkpoint)
    pull, capacity = WeightReader(checkpoint, plan, block_kinds=block_kinds), capacity_for(len(IDS))
    executable = list(BEST.values())[-1].load(plan.program, "float32", pull, capacity)
    pull.finish()
    made = Driver(executable, capacity).feed(IDS)
    executable.close()
    return made


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}: {case[1]}" for case in CASES])
def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path: Path, case: Any) -> None:
    plain, file = write_pair(tmp_path, case)
    checkpoint = open_checkpoint(file)
    assert not checkpoint.warnings
    assert plan_model(checkpoint).spec == plan_model(open_checkpoint(plain)).spec
    np.testing.assert_array_equal(logits(file), logits(plain))


def test_every_family_that_is_read_has_a_tiny_model() -> None:
    assert {*USUAL, *(case[0] for case in CASES)} == set(FAMILIES)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    case = next(case for case in CASES if case[0] == "glm4moe")
    more = {**case[3], "block_count": 4, "nextn_predict_layers": 1}
    extra = {f"blk.3.{name}.weight": np.ones(32, np.float32) for name in ("attn_norm", "nextn.enorm", "nextn.hnorm")}
    plain, file = write_pair(tmp_path, (*case[:3], more, case[4]), extra)
    plan = plan_model(open_checkpoint(file))
    assert len(plan.spec.layers) == 3 and len(plan.unused) == 3
    np.testing.assert_array_equal(logits(file), logits(plain))


def test_a_scaled_olmo3_is_refused(tmp_path: Path) -> None:
    case = next(case for case in CASES if case[1] == "olmo3")
    more = {**case[3], "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}
    _, file = write_pair(tmp_path, (*case[:3], more, case[4]))
    with pytest.raises(UnsupportedModel, match=r"olmo2\.rope\.scaling\.type is 'yarn'"):
        open_checkpoint(file)
