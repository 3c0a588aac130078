"""GGUF files of families with experts and with latent attention, as llama.cpp's converter writes them.

The converter itself was compared with transformers on each of these configs; here its names, keys and changes are
repeated, and the model read from a file equals the one with the same weights in safetensors.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_expert_cases import CASES
from gguf_models import TinyGguf
from gguf_pairs import Case, config_of, logits, metadata, stored_of, write_pair
from gguf_writer import GgufBlocks, write_gguf
from test_gguf_parts import write_parts

from truffula import LLM, SamplingParams
from truffula.errors import TruffulaError, UnsupportedModel
from truffula.kernels.cpu import CpuBackend
from truffula.kernels.inputs import Capacity
from truffula.model.load import plan_model
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.tiny import tiny_tensors
from truffula.weights.open import open_checkpoint


def keys_of(case: Case) -> dict[str, Any]:
    return metadata(case, config_of(case))


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_model_it_was_made_from(tmp_path: Path, name: str) -> None:
    plain, file = write_pair(tmp_path, CASES[name])
    checkpoint = open_checkpoint(file)
    assert not checkpoint.warnings
    found, wanted = plan_model(checkpoint), plan_model(open_checkpoint(plain))
    assert replace(found.spec, model_type=wanted.spec.model_type) == wanted.spec
    assert found.program.sites == wanted.program.sites  # what adapters address
    np.testing.assert_array_equal(logits(file), logits(plain))


def test_older_files_have_the_whole_of_kv_b(tmp_path: Path) -> None:
    case = CASES["DeepSeek V2 Lite"]
    plain, _ = write_pair(tmp_path, case)
    tensors = {name: array for name, array in stored_of(case).items() if not re.search(r"attn_[kv]_b\.", name)}
    config, whole = config_of(case), "model.layers.{}.self_attn.kv_b_proj.weight"
    tiny = tiny_tensors(config, seed=3)
    tensors |= {f"blk.{layer}.attn_kv_b.weight": tiny[whole.format(layer)] for layer in range(3)}
    older = {"attention.key_length": 16, "attention.value_length": 12, "attention.head_count_kv": 4}
    older |= {"attention.key_length_mla": None, "attention.value_length_mla": None}
    file = write_gguf(tmp_path / "old.gguf", keys_of(replace(case, metadata={**case.metadata, **older})), tensors)
    np.testing.assert_array_equal(logits(file), logits(plain))


@pytest.mark.parametrize(
    ("name", "experts", "groups"),
    [
        ("DeepSeek V3", 256, (8, 4)),
        ("DeepSeek V2", 160, (8, 3)),
        ("DeepSeek V3", 384, (1, 1)),
        ("DeepSeek V2", 64, (1, 1)),
    ],
)
def test_older_files_have_no_groups_of_experts(
    tmp_path: Path, name: str, experts: int, groups: tuple[int, int]
) -> None:
    keys = {"expert_count": experts, "expert_group_count": None, "expert_group_used_count": None}
    case = replace(CASES[name], metadata={**CASES[name].metadata, **keys})
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", keys_of(case), stored_of(case))).config
    assert (config["n_group"], config["topk_group"]) == groups


@pytest.mark.parametrize("name", ["DeepSeek V3", "GLM-5", "K-EXAONE", "Command (MoE)"])
def test_predictors_and_indexers_are_left_out(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    plain, _ = write_pair(tmp_path, case)
    ones = {f"blk.3.{one}.weight": np.ones(32, np.float32) for one in ("attn_norm", "nextn.enorm", "nextn.hnorm")}
    if case.architecture == "glm-dsa":
        ones |= {f"blk.0.indexer.{one}.weight": np.ones((8, 8), np.float32) for one in ("attn_k", "attn_q_b", "proj")}
        ones |= {f"blk.0.indexer.k_norm.{kind}": np.ones(8, np.float32) for kind in ("weight", "bias")}
    more = {**case.metadata, "block_count": 4, "nextn_predict_layers": 1}
    file = write_gguf(tmp_path / "mtp.gguf", keys_of(replace(case, metadata=more)), {**stored_of(case), **ones})
    plan = plan_model(open_checkpoint(file))
    assert len(plan.spec.layers) == 3 and len(plan.unused) == len(ones)
    np.testing.assert_array_equal(logits(file), logits(plain))


# The same models, wide enough for blocks of 32.
WIDE = {
    "DeepSeek V3": {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32,
                    "kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32},
    "MiniMax M2": {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "rotary_dim": 8},
    "Llama 4": {"hidden_size": 64, "intermediate_size": 32, "intermediate_size_mlp": 96, "head_dim": 16},
    "Granite 3 (shared)": {"hidden_size": 64, "intermediate_size": 32, "shared_intermediate_size": 32},
}  # fmt: skip
WIDER = {
    "DeepSeek V3": {"expert_feed_forward_length": 32},
    "MiniMax M2": {"rope.dimension_count": 8, "expert_feed_forward_length": 32},
    "Llama 4": {"rope.dimension_count": 16, "expert_feed_forward_length": 32, "feed_forward_length": 96},
    "Granite 3 (shared)": {"rope.dimension_count": 16, "expert_shared_feed_forward_length": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Q8_0", "MXFP4"])
@pytest.mark.parametrize("name", WIDE)
def test_quantised_files(tmp_path: Path, name: str, kind: str) -> None:
    """The values of the blocks, in safetensors, give the same logits; products of blocks nearly the same."""
    case = CASES[name]
    case = replace(case, config={**case.config, **WIDE[name]}, metadata={**case.metadata, **WIDER[name]})
    number = gguf.GGMLQuantizationType[kind]
    blocks: dict[str, Any] = {}
    values = {}
    for key, array in stored_of(case).items():
        if array.ndim < 2 or array.shape[-1] % 32 or "ffn_gate_inp." in key:
            blocks[key] = values[key] = array
            continue
        data = gguf.quants.quantize(array, number)
        blocks[key] = GgufBlocks(int(number), array.shape, data.tobytes())
        values[key] = gguf.quants.dequantize(data, number)
    exact = write_gguf(tmp_path / "values.gguf", keys_of(case), values)
    file = write_gguf(tmp_path / "blocks.gguf", keys_of(case), blocks)
    wanted = logits(exact)
    np.testing.assert_array_equal(logits(file), wanted)
    packed = logits(file, CpuBackend(1).block_kinds)
    # Of a row for which another expert is chosen, products differ more.
    assert np.median(np.abs(packed - wanted).max(axis=1)) < 0.1 * np.abs(wanted).max()
    plan = plan_model(open_checkpoint(file))
    capacity = Capacity(max_tokens=16, max_seqs=1, max_logit_rows=1, max_segments=1, num_blocks=3, block_size=16,
                        max_blocks_per_seq=2)  # fmt: skip
    formats = CpuBackend(1).plan(plan.program, "bfloat16", capacity, plan.stored_types).weight_formats
    assert ("q8_0" in formats) == (kind == "Q8_0")
    kv_b = [key for key in plan.stored_types if "kv_b_proj" in key]
    assert all(plan.stored_types[key] == "F32" for key in kv_b)  # read as values, and counted so


def test_halves_stay_halves(tmp_path: Path) -> None:
    case = CASES["DeepSeek V3"]
    tensors = {key: array.astype(np.float16) if array.ndim > 1 else array for key, array in stored_of(case).items()}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "half.gguf", keys_of(case), tensors))
    info = checkpoint.info("model.layers.0.self_attn.kv_b_proj.weight")
    assert (info.values, checkpoint.read(info.name).dtype) == ("F16", np.float16)


@pytest.mark.slow
def test_adapters_have_the_names_of_transformers(tmp_path: Path) -> None:
    plain, file = write_pair(tmp_path, CASES["DeepSeek V3"])
    targets = ["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = write_tiny_adapter(tmp_path / "a", plain, rank=3, targets=targets)
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=3)
    answers = []
    for path in (plain, file):
        with LLM(
            str(path), dtype="float32", max_model_len=64, memory_bytes=200 << 20, adapters={"a": str(adapter)}
        ) as m:
            answers.append([m.generate([[5, 9, 30]], sampling, adapters=name)[0] for name in ("a", None)])
    (tuned, base), (tuned_file, base_file) = answers
    assert tuned.logprobs == tuned_file.logprobs and base.logprobs == base_file.logprobs
    assert tuned.logprobs != base.logprobs


def test_split_files_have_experts_and_halves_of_kv_b_in_any_part(tmp_path: Path) -> None:
    case = CASES["DeepSeek V3"]
    plain, file = write_pair(tmp_path, case)
    tiny = TinyGguf(file, {}, stored_of(case), keys_of(case))
    parts = write_parts(tiny, "m", 7)
    assert len(
        {part.file for part in open_checkpoint(parts[0]).info("model.layers.1.self_attn.kv_b_proj.weight").parts}
    )
    np.testing.assert_array_equal(logits(parts[0]), logits(plain))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("DeepSeek V3", {"expert_gating_func": 3}, "expert_gating_func is 3; it must be 1 or 2"),
    ("DeepSeek V3", {"attention.key_length_mla": 6}, "key_length_mla is 6, of which 6 columns are rotated"),
    ("DeepSeek V3", {"attention.key_length": 25}, "key_length is 25; expected 24"),
    ("DeepSeek V3", {"attention.kv_lora_rank": 2**31}, "key_length is 24; expected"),
    ("DeepSeek V3", {"attention.q_lora_rank": None}, "q_lora_rank is missing"),
    ("DeepSeek V3", {"rope.scaling.type": "linear"}, "rope.scaling.type is linear; it must be yarn"),
    ("DeepSeek V3", {"expert_count": 2**31 - 1}, "expert"),
    ("DeepSeek V3", {"nextn_predict_layers": 3}, "nextn_predict_layers is 3, of 3 layers"),
    ("DeepSeek V3", {"leading_dense_block_count": -1}, "positive integer"),
    ("DeepSeek V3", {"expert_weights_scale": float("nan")}, "finite"),
    ("DeepSeek V3", {"attention.sinks": 1}, r"deepseek2\.attention\.sinks"),
    ("Mistral Large 3", {"attention.temperature_length": 8}, "temperature_length is 8; it must be 6"),
    ("GLM-5", {"attention.indexer.top_k": 0}, "top_k is 0"),
    ("MiniMax M2", {"expert_weights_scale": 2.0}, "expert_weights_scale"),
    ("MiniMax M2", {"expert_gating_func": None}, "expert_gating_func is 0; it must be 2"),
    ("Llama 4", {"attention.sliding_window": 0}, "sliding_window is 0; it must be 8192"),
    ("Llama 4", {"expert_used_count": 2}, "one is supported"),
    ("ERNIE 4.5", {"expert_count": 2**31 - 1}, "experts"),
    ("ERNIE 4.5", {"expert_group_count": 2}, "expert_group_count is 2"),
    ("Hunyuan A13B", {"expert_shared_feed_forward_length": 48}, "expert_shared_feed_forward_length is 48"),
    ("Hunyuan A13B", {"expert_shared_count": 2}, "expert_shared_count is 2"),
    ("Hunyuan A13B", {"expert_count": 2**31 - 1}, "router"),
    ("dots.llm1", {"attention.sliding_window": 6}, "sliding_window"),
    ("Trinity", {"expert_weights_norm": False}, "expert_weights_norm is False"),
    ("Trinity", {"attention.sliding_window_pattern": [True]}, "1 entries for 5 layers"),
    ("Trinity", {"attention.sliding_window_pattern": ["no"] * 5}, "true and false"),
    ("DeepSeek V3", {"expert_weights_norm": "no"}, "expert_weights_norm is 'no'; it must be true or false"),
    ("K-EXAONE", {"attention.sliding_window_pattern": [True] * 4}, "4 entries for 3 layers"),
    ("Command (MoE)", {"expert_weights_scale": 2.0}, "expert_weights_scale is 2.0"),
    ("Laguna XS", {"attention.head_count": [4, 6]}, "3 positive integers"),
    ("Laguna XS", {"attention.head_count": [4, 6, 2**31 - 1]}, "num_attention_heads_per_layer|shape"),
    ("Laguna XS", {"attention.head_count_kv": [2, 2, 1]}, "head_count_kv is 2; it must be 1"),
    ("DBRX", {"attention.layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    ("DBRX", {"attention.clamp_kqv": [1.0]}, "finite"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changed", "words"), REFUSED)
def test_what_is_refused(tmp_path: Path, name: str, changed: dict[str, Any], words: str) -> None:
    case = CASES[name]
    file = write_gguf(
        tmp_path / "m.gguf", keys_of(replace(case, metadata={**case.metadata, **changed})), stored_of(case)
    )
    with pytest.raises(TruffulaError, match=words):
        plan_model(open_checkpoint(file))


def test_halves_of_kv_b_that_do_not_fit(tmp_path: Path) -> None:
    case = CASES["DeepSeek V3"]
    tensors = stored_of(case)
    for changed in ({"blk.0.attn_k_b.weight": tensors["blk.0.attn_k_b.weight"][:3]}, {"blk.0.attn_v_b.weight": None}):
        kept = {key: array for key, array in {**tensors, **changed}.items() if array is not None}
        with pytest.raises(TruffulaError, match=r"kv_b_proj\.weight cannot be made of blk\.0\.attn_k_b\.weight"):
            open_checkpoint(write_gguf(tmp_path / "m.gguf", keys_of(case), kept))


def test_longrope_of_phimoe_is_refused(tmp_path: Path) -> None:
    case = CASES["Phi-3.5-MoE"]
    tables = {f"rope_factors_{name}.weight": np.full(4, 2, np.float32) for name in ("long", "short")}
    more = {**case.metadata, "rope.scaling.original_context_length": 128}
    file = write_gguf(tmp_path / "m.gguf", keys_of(replace(case, metadata=more)), {**stored_of(case), **tables})
    with pytest.raises(UnsupportedModel, match="no keys for short_mscale"):
        open_checkpoint(file)
