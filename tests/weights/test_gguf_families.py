"""GGUF files of further families, with gguf-py's names and the metadata of llama.cpp's converter.

The model read from such a file equals the one with the same weights in safetensors, which the parity tests compare with
transformers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_dense_cases
import gguf_hybrid_cases
import numpy as np
import pytest
from gguf_expert_cases import CASES as EXPERTS
from gguf_hybrid_cases import FALCON, ssm
from gguf_models import FAMILIES as USUAL
from gguf_pairs import VOCAB, Case, Tensors, interleaved, logits, stacked, write_pair

from truffula.errors import UnsupportedModel
from truffula.model.load import plan_model
from truffula.weights.gguf.names import FAMILIES
from truffula.weights.open import open_checkpoint

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
SCALES = {"attention.scale": 0.2, "embedding_scale": 3.0, "logit_scale": 2.5, "residual_scale": 0.3}


def apart(tensors: Tensors, _: Any) -> Tensors:
    """gpt-oss: gate and up, whose columns alternate, apart and turned; the sinks as a weight."""
    made: Tensors = {}
    for name, array in tensors.items():
        if ".experts." not in name:
            made[name] = array
            continue
        bias = name.endswith("_bias")
        name, turned = (
            (name.replace("_proj_bias", "_proj.bias"), array) if bias else (f"{name}.weight", array.swapaxes(1, 2))
        )
        if "gate_up_proj" in name:
            made[name.replace("gate_up", "gate")], made[name.replace("gate_up", "up")] = (
                turned[:, 0::2],
                turned[:, 1::2],
            )
        else:
            made[name] = turned
    return made


def corrected(tensors: Tensors, _: Any) -> Tensors:
    return {
        name.replace("e_score_correction_bias", "e_score_correction.bias"): array for name, array in tensors.items()
    }


GLM4_MOE = Case(
    "glm4moe", "glm4_moe",
    {"use_qk_norm": True, "attention_bias": True, "n_shared_experts": 2, "routed_scaling_factor": 1.8,
     "num_nextn_predict_layers": 0},
    {"rope.dimension_count": 4, "expert_feed_forward_length": 24, "expert_shared_count": 2, "nextn_predict_layers": 0,
     "leading_dense_block_count": 1, "expert_gating_func": 2, "expert_weights_scale": 1.8, "expert_weights_norm": True,
     "expert_group_count": 1, "expert_group_used_count": 1},
    (stacked, corrected),
)  # fmt: skip
OLMO3 = Case("olmo2", "olmo3", {"sliding_window": 7, "num_hidden_layers": 4}, {"attention.sliding_window": 7})
# With the keys of a Granite 4 model whose layers all have attention.
GRANITE = Case(
    "granite", "granite", {"tie_word_embeddings": True},
    {**SCALES, **ssm(4, 1, 12), "rope.dimension_count": 8, "rope.scaling.finetuned": True, "expert_count": 0,
     "attention.head_count_kv": [2] * 3, "expert_shared_feed_forward_length": 56}, (interleaved,),
)  # fmt: skip
CASES = [
    Case("smollm3", "smollm3",
         {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1], "tie_word_embeddings": False},
         {"rope.dimension_count": 8}, (interleaved,)),
    GRANITE,
    Case("granitemoe", "granitemoe",
         {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.3},
         SCALES, (stacked, interleaved)),
    Case("seed_oss", "seed_oss", {"attention_bias": True, "attention_out_bias": False}),
    Case("olmo2", "olmo2"),
    OLMO3,
    Case("olmoe", "olmoe", {"norm_topk_prob": False}, convert=(stacked,)),
    Case("command-r", "cohere", {"use_qk_norm": True},
         {"attention.layer_norm_epsilon": 1e-4, "logit_scale": 0.4, "rope.scaling.type": "none"}),
    Case("cohere2", "cohere2", {"head_dim": 8},
         {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.4, "rope.scaling.type": "none", "vocab_size": VOCAB,
          "attention.sliding_window": 7, "rope.dimension_count": 8}),
    GLM4_MOE,
    Case("gpt-oss", "gpt_oss", {"rope_parameters": {**YARN, "truncate": False}},
         {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
          "attention.sliding_window": 6, "expert_feed_forward_length": 24}, (apart,)),
    *gguf_dense_cases.CASES,
    *gguf_hybrid_cases.CASES,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path: Path, case: Case) -> None:
    plain, file = write_pair(tmp_path, case)
    checkpoint = open_checkpoint(file)
    assert not checkpoint.warnings
    plan = plan_model(checkpoint)
    assert not plan.warnings
    assert plan.spec == plan_model(open_checkpoint(plain)).spec
    np.testing.assert_allclose(logits(file), logits(plain), rtol=0, atol=case.rounded)


def test_every_family_that_is_read_has_a_tiny_model() -> None:
    cases = [*CASES, *EXPERTS.values(), FALCON]
    assert {*USUAL, *(case.architecture for case in cases)} == set(FAMILIES)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    case = replace(GLM4_MOE, metadata={**GLM4_MOE.metadata, "block_count": 4, "nextn_predict_layers": 1})
    extra = {f"blk.3.{name}.weight": np.ones(32, np.float32) for name in ("attn_norm", "nextn.enorm", "nextn.hnorm")}
    plain, file = write_pair(tmp_path, case, extra)
    plan = plan_model(open_checkpoint(file))
    assert len(plan.spec.layers) == 3 and len(plan.unused) == 3
    np.testing.assert_array_equal(logits(file), logits(plain))


@pytest.mark.parametrize(
    ("case", "changed", "words"),
    [
        (GRANITE, {"rope.scaling.finetuned": False}, r"granite\.rope\.scaling\.finetuned is False; it must be True"),
        (GRANITE, {"expert_shared_feed_forward_length": 40}, r"shared_feed_forward_length is 40; it must be 56"),
    ],
)
def test_a_granite_model_of_another_kind_is_refused(
    tmp_path: Path, case: Case, changed: dict[str, Any], words: str
) -> None:
    _, file = write_pair(tmp_path, replace(case, metadata={**case.metadata, **changed}))
    with pytest.raises(UnsupportedModel, match=words):
        open_checkpoint(file)


def test_olmo2_without_a_window(tmp_path: Path) -> None:
    _, file = write_pair(tmp_path, Case("olmo2", "olmo2", metadata={"attention.sliding_window": 0}))
    assert open_checkpoint(file).config["model_type"] == "olmo2"


def test_a_scaled_olmo3_is_refused(tmp_path: Path) -> None:
    more = {**OLMO3.metadata, "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}
    _, file = write_pair(tmp_path, replace(OLMO3, metadata=more))
    with pytest.raises(UnsupportedModel, match=r"olmo2\.rope\.scaling\.type is 'yarn'"):
        open_checkpoint(file)


def test_multipliers_are_in_the_weights_of_falcon_h1(tmp_path: Path) -> None:
    plain, file = write_pair(tmp_path, FALCON)
    np.testing.assert_allclose(logits(file), logits(plain), rtol=0, atol=1e-4)
