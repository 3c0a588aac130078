"""GGUF files of families with experts and with latent attention, as llama.cpp's converter writes them.

The converter itself was compared with transformers on each of these configs; here its names, keys and changes are
repeated, and the model read from a file equals the one with the same weights in safetensors.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
from gguf_models import VOCABULARY, TinyGguf, interleave
from gguf_pairs import VOCAB, logits, stacked
from gguf_writer import GgufBlocks, write_gguf
from test_gguf_parts import write_parts

from truffula import LLM, SamplingParams
from truffula.errors import TruffulaError, UnsupportedModel
from truffula.kernels.cpu import CpuBackend
from truffula.kernels.inputs import Capacity
from truffula.model.load import plan_model
from truffula.model.read import read_config
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.files import Array
from truffula.testing.tiny import tiny_config, tiny_tensors, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint

SLIDING, FULL = "sliding_attention", "full_attention"
THETA: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 6}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 6}
WINDOWS = {"attention.sliding_window": 6, "attention.sliding_window_pattern": [True, False, True]}
# Of tiny latent attention: rank 18, 6 rotated columns of 16, values 12 wide.
LATENT = {
    "attention.head_count_kv": 1, "attention.key_length": 24, "attention.value_length": 18,
    "attention.q_lora_rank": 20, "attention.kv_lora_rank": 18, "attention.key_length_mla": 16,
    "attention.value_length_mla": 12, "rope.dimension_count": 6,
}  # fmt: skip
ROUTED = {
    "expert_group_count": 1, "expert_group_used_count": 1, "leading_dense_block_count": 1,
    "expert_feed_forward_length": 24, "expert_shared_count": 2, "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
}  # fmt: skip
SIGMOID = {"expert_gating_func": 2}
INDEXER = {"attention.indexer.head_count": 2, "attention.indexer.key_length": 8, "attention.indexer.top_k": 64}
ALONE = {"num_nextn_predict_layers": 0}


class Case(NamedTuple):
    """``config`` overrides that of the tiny model, ``more`` are keys beside the usual ones; None drops one."""

    architecture: str
    model_type: str
    config: dict[str, Any]
    more: dict[str, Any]


CASES: dict[str, Case] = {
    "DeepSeek V3": Case(
        "deepseek2", "deepseek_v3",
        {**ALONE, "n_group": 2, "topk_group": 1, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {**LATENT, **ROUTED, **SIGMOID, **YARN_KEYS, "expert_group_count": 2, "rope.scaling.yarn_log_multiplier": 0.1},
    ),
    "DeepSeek V2": Case(
        "deepseek2", "deepseek_v2",
        {**ALONE, "n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy",
         "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
        {**LATENT, **ROUTED, **YARN_KEYS, "expert_gating_func": 1, "expert_group_count": 3,
         "expert_group_used_count": 2, "expert_weights_scale": 1.0, "expert_weights_norm": None,
         "rope.scaling.yarn_log_multiplier": 0.0707},
    ),
    "DeepSeek V2 Lite": Case(
        "deepseek2", "deepseek_v2", {**ALONE, "q_lora_rank": None, "routed_scaling_factor": 1.0},
        {**LATENT, **ROUTED, "attention.q_lora_rank": None, "expert_weights_scale": None, "expert_weights_norm": None},
    ),
    "GLM-4.7-Flash": Case(
        "deepseek2", "glm4_moe_lite", {**ALONE}, {**LATENT, **ROUTED, "expert_weights_scale": 1.8}
    ),
    "Youtu": Case(
        "deepseek2", "youtu", {},
        {**LATENT, "expert_feed_forward_length": 56, "expert_shared_count": 0, "leading_dense_block_count": 3},
    ),
    "Mistral Large 3": Case(
        "deepseek2", "mistral4", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3, "mscale": 1.0,
                                                      "mscale_all_dim": 1.0}},
        {**LATENT, **ROUTED, **YARN_KEYS, "leading_dense_block_count": 0, "expert_weights_scale": 1.0,
         "expert_gating_func": 1, "attention.temperature_scale": 0.3, "attention.temperature_length": 6,
         "rope.scaling.yarn_log_multiplier": 0.1},
    ),
    "Mistral 4": Case(
        "mistral4", "mistral4", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
        {**LATENT, **ROUTED, **YARN_KEYS, "leading_dense_block_count": 0, "expert_weights_scale": 1.0},
    ),
    "DeepSeek V3.2": Case("deepseek32", "deepseek_v32", {**ALONE}, {**LATENT, **ROUTED, **SIGMOID, **INDEXER}),
    "GLM-5": Case(
        "glm-dsa", "glm_moe_dsa", {**ALONE},
        {**LATENT, **ROUTED, **SIGMOID, **INDEXER, "attention.indexer.types": [True, False, True]},
    ),
    "MiniMax M2": Case(
        "minimax-m2", "minimax_m2", {}, {**SIGMOID, "rope.dimension_count": 6, "expert_feed_forward_length": 24}
    ),
    "Llama 4": Case(
        "llama4", "llama4_text",
        {"attention_chunk_size": 8192, "floor_scale": 8192, "no_rope_layer_interval": 4, "num_hidden_layers": 5,
         "interleave_moe_layer_step": 2},
        {"feed_forward_length": 40, "expert_feed_forward_length": 24, "interleave_moe_layer_step": 2, "expert_count": 5,
         "expert_used_count": 1, "rope.dimension_count": 8},
    ),
    "ERNIE 4.5": Case(
        "ernie4_5-moe", "ernie4_5_moe", {},
        {"leading_dense_block_count": 1, "interleave_moe_layer_step": 1, "expert_feed_forward_length": 24,
         "expert_shared_count": 2, "expert_shared_feed_forward_length": 28},
    ),
    "Hunyuan A13B": Case(
        "hunyuan-moe", "hunyuan_v1_moe", {},
        {"expert_feed_forward_length": 24, "expert_shared_feed_forward_length": 24, "expert_shared_count": 1},
    ),
    "dots.llm1": Case(
        "dots1", "dots1", {}, {**ROUTED, **SIGMOID, "expert_group_count": 4, "expert_group_used_count": 2,
                               "expert_weights_scale": 1.0, "expert_weights_norm": False},
    ),
    "Phi-3.5-MoE": Case(
        "phimoe", "phimoe", {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.01},
        {"attention.sliding_window": 0, "rope.dimension_count": 8},
    ),
    "Trinity": Case(
        "afmoe", "afmoe", {"num_hidden_layers": 5, "global_attn_every_n_layers": 4},
        {**ROUTED, **SIGMOID, "attention.sliding_window": 6, "expert_weights_scale": 1.7, "rope.dimension_count": 8},
    ),
    "K-EXAONE": Case(
        "exaone-moe", "exaone_moe", {**ALONE, "layer_types": [SLIDING, FULL, SLIDING]},
        {**ROUTED, **SIGMOID, **WINDOWS, "expert_shared_count": 1, "expert_shared_feed_forward_length": 24,
         "nextn_predict_layers": 0, "rope.scaling.type": "none"},
    ),
    "Command (MoE)": Case(
        "cohere2moe", "cohere2_moe",
        {**ALONE, "layer_types": [FULL, FULL, SLIDING], "num_shared_experts": 2, "first_k_dense_replace": 1,
         "prefix_dense_intermediate_size": 40},
        {**WINDOWS, "attention.sliding_window_pattern": [False, False, True], "attention.layer_norm_rms_epsilon": None,
         "attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.4, "feed_forward_length": 40,
         "expert_feed_forward_length": 56, "leading_dense_block_count": 1, "expert_weights_norm": True,
         "expert_shared_count": 2, "expert_shared_feed_forward_length": 112, "expert_gating_func": 1,
         "rope.scaling.type": "none", "rope.dimension_count": 8},
    ),
    "Command (MoE), RMS norms": Case(
        "cohere2moe", "cohere2_moe",
        {**ALONE, "layer_types": [SLIDING, FULL, SLIDING], "rms_norm_eps": 1e-6, "expert_selection_fn": "sigmoid",
         "norm_topk_prob": False},
        {**WINDOWS, "feed_forward_length": None, "attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.4,
         "expert_feed_forward_length": 56,
         "leading_dense_block_count": 0, "expert_weights_norm": False, "rope.scaling.type": "none"},
    ),
    "Laguna XS": Case(
        "laguna", "laguna",
        {"mlp_layer_types": ["dense", "sparse", "sparse"], "gating": True, "moe_routed_scaling_factor": 1.5,
         "rope_parameters": {FULL: {**YARN, "partial_rotary_factor": 0.6}, SLIDING: {**THETA, "rope_theta": 2e3}}},
        {**ROUTED, **SIGMOID, **YARN_KEYS, "attention.head_count": [4, 6, 2], "attention.sliding_window": 7,
         "rope.freq_base_swa": 2e3, "expert_feed_forward_length": 9, "expert_shared_feed_forward_length": 11,
         "expert_weights_scale": 1.5, "expert_shared_count": None, "rope.dimension_count": 6,
         "rope.dimension_count_swa": 10},
    ),
    "Laguna M": Case(
        "laguna", "laguna",
        {"mlp_layer_types": ["dense", "sparse", "sparse"], "gating": "per-element", "layer_types": [FULL] * 3,
         "num_attention_heads_per_layer": [4, 4, 4], "sliding_window": 512, "moe_routed_scaling_factor": 1.5,
         "rope_parameters": {FULL: {**THETA, "partial_rotary_factor": 1.0}}},
        {**ROUTED, "attention.head_count": [4, 4, 4], "expert_feed_forward_length": 9, "expert_weights_scale": 1.5,
         "expert_shared_feed_forward_length": 11, "expert_shared_count": None, "rope.dimension_count": 10},
    ),
    "DBRX": Case(
        "dbrx", "dbrx", {"rope_parameters": {**THETA, "rope_theta": 5e3}},
        {"attention.clamp_kqv": 2.0, "rope.freq_base": 5e3, "attention.layer_norm_rms_epsilon": None,
         "attention.layer_norm_epsilon": 1e-5, "attention.key_length": None, "attention.value_length": None},
    ),
    "Granite 3 (shared)": Case(
        "granitemoe", "granitemoeshared", {},
        {"attention.scale": 0.3, "embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0,
         "expert_shared_feed_forward_length": 20, "rope.dimension_count": 8},
    ),
}  # fmt: skip
# Architectures that gguf-py lacks, and one with tensors of the same names.
SIBLINGS = {"deepseek32": "glm-dsa", "cohere2moe": "glm4moe", "laguna": "dots1"}
# As the converter renames them, before gguf-py does.
RENAMED = (
    ("e_score_correction_bias", "e_score_correction.bias"), ("mlp.expert_bias", "mlp.expert_bias.bias"),
    ("mlp.experts.e_score", "mlp.gate.e_score"),
    ("block_sparse_moe.experts.gate_proj", "mlp.experts.gate_proj"),
    ("block_sparse_moe.experts.up_proj", "mlp.experts.up_proj"),
    ("block_sparse_moe.experts.down_proj", "mlp.experts.down_proj"),
)  # fmt: skip


def config_of(case: Case) -> dict[str, Any]:
    return tiny_config(case.model_type, **{"vocab_size": VOCAB, "rope_parameters": THETA, **case.config})


def metadata(case: Case) -> dict[str, Any]:
    config = config_of(case)
    spec = read_config(config).spec
    router = getattr(spec.layers[-1].mlp, "router", None)
    width = config.get("head_dim") or spec.hidden // 4
    pairs = {
        "context_length": 512, "embedding_length": spec.hidden,
        "feed_forward_length": config.get("intermediate_size", 17), "block_count": len(spec.layers),
        "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": width, "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": spec.final_norm.eps if spec.final_norm else 0.0,
        "rope.freq_base": config.get("rope_parameters", THETA).get(FULL, THETA)["rope_theta"], "vocab_size": VOCAB,
        "expert_count": router and router.experts, "expert_used_count": router and router.top_k,
    }  # fmt: skip
    named = {f"{case.architecture}.{key}": value for key, value in {**pairs, **case.more}.items() if value is not None}
    return {"general.architecture": case.architecture, **named, **VOCABULARY}


def stored(case: Case) -> dict[str, Array]:
    """The tensors of the file. Experts are together, gate and up apart (Mistral 4's together); kv_b is divided."""
    config, made = config_of(case), {}
    tensors = tiny_tensors(config, seed=3)
    shared = {
        name: tensors.pop(name) for name in list(tensors) if "shared_mlp" in name and "granite" in case.model_type
    }
    for name, array in (stacked(tensors, None) | shared).items():
        if name.endswith("kv_b_proj.weight"):
            each = array.reshape(config["num_attention_heads"], -1, array.shape[1])
            nope = config["qk_nope_head_dim"]
            made[name.replace("kv_b", "k_b")] = each[:, :nope].swapaxes(1, 2)
            made[name.replace("kv_b", "v_b")] = each[:, nope:]
        elif name.endswith("experts.gate_up_proj") and case.architecture != "mistral4":
            gate, up = np.split(array.swapaxes(1, 2) if case.architecture == "llama4" else array, 2, axis=1)
            made[name.replace("gate_up", "gate") + ".weight"], made[name.replace("gate_up", "up") + ".weight"] = (
                gate,
                up,
            )
        elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made[f"{name}.weight"] = array.swapaxes(1, 2) if case.architecture == "llama4" else array
        elif match := re.search(r"ffn\.experts\.mlp\.(w1|v1|w2)$", name):
            whole = array.reshape(5, 17, -1)
            made[f"{name}.weight"] = whole.swapaxes(1, 2) if match[1] == "w2" else whole
        elif name.endswith("shared_mlp.input_linear.weight"):
            root = name.replace("shared_mlp.input_linear", "mlp.shared_expert.{}_proj")
            made[root.format("gate")], made[root.format("up")] = np.split(array, 2)
        else:
            made[name.replace("shared_mlp.output_linear", "mlp.shared_expert.down_proj")] = array
    mapped = SIBLINGS.get(case.architecture, case.architecture)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == mapped)
    names = gguf.get_tensor_name_map(number, 5)
    found = {}
    for name, array in made.items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        gate = re.sub(r"^model\.layers\.(\d+)\.self_attn\.g_proj", r"blk.\1.attn_gate", name)
        theirs = gate if gate != name else names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        found[theirs] = np.ascontiguousarray(array)
    return found


def write_case(folder: Path, case: Case) -> tuple[Path, Path]:
    """The same model in safetensors and in GGUF."""
    tensors = stored(case)
    if case.architecture == "granitemoe":
        for name in tensors:
            if match := re.search(r"\.attn_([qk])\.", name):
                tensors[name] = interleave(tensors[name], 4 if match[1] == "q" else 2)
    plain = write_tiny_checkpoint(folder / "plain", config_of(case), seed=3)
    return plain, write_gguf(folder / "model.gguf", metadata(case), tensors)


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_model_it_was_made_from(tmp_path: Path, name: str) -> None:
    plain, file = write_case(tmp_path, CASES[name])
    checkpoint = open_checkpoint(file)
    assert not checkpoint.warnings
    found, wanted = plan_model(checkpoint), plan_model(open_checkpoint(plain))
    assert replace(found.spec, model_type=wanted.spec.model_type) == wanted.spec
    assert found.program.sites == wanted.program.sites  # what adapters address
    np.testing.assert_array_equal(logits(file), logits(plain))


def test_older_files_have_the_whole_of_kv_b(tmp_path: Path) -> None:
    case = CASES["DeepSeek V2 Lite"]
    plain, _ = write_case(tmp_path, case)
    tensors = {name: array for name, array in stored(case).items() if not re.search(r"attn_[kv]_b\.", name)}
    config, whole = config_of(case), "model.layers.{}.self_attn.kv_b_proj.weight"
    tiny = tiny_tensors(config, seed=3)
    tensors |= {f"blk.{layer}.attn_kv_b.weight": tiny[whole.format(layer)] for layer in range(3)}
    older = {"attention.key_length": 16, "attention.value_length": 12, "attention.head_count_kv": 4}
    older |= {"attention.key_length_mla": None, "attention.value_length_mla": None}
    file = write_gguf(tmp_path / "old.gguf", metadata(case._replace(more={**case.more, **older})), tensors)
    np.testing.assert_array_equal(logits(file), logits(plain))


@pytest.mark.parametrize("name", ["DeepSeek V3", "GLM-5", "K-EXAONE", "Command (MoE)"])
def test_predictors_and_indexers_are_left_out(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    plain, _ = write_case(tmp_path, case)
    ones = {f"blk.3.{one}.weight": np.ones(32, np.float32) for one in ("attn_norm", "nextn.enorm", "nextn.hnorm")}
    if case.architecture == "glm-dsa":
        ones |= {f"blk.0.indexer.{one}.weight": np.ones((8, 8), np.float32) for one in ("attn_k", "attn_q_b", "proj")}
        ones |= {f"blk.0.indexer.k_norm.{kind}": np.ones(8, np.float32) for kind in ("weight", "bias")}
    more = {**case.more, "block_count": 4, "nextn_predict_layers": 1}
    file = write_gguf(tmp_path / "mtp.gguf", metadata(case._replace(more=more)), {**stored(case), **ones})
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
    "DeepSeek V3": {"attention.q_lora_rank": 32, "attention.kv_lora_rank": 32, "attention.key_length": 38,
                    "attention.value_length": 32, "attention.key_length_mla": 38, "attention.value_length_mla": 32,
                    "expert_feed_forward_length": 32},
    "MiniMax M2": {"rope.dimension_count": 8, "expert_feed_forward_length": 32},
    "Llama 4": {"rope.dimension_count": 16, "expert_feed_forward_length": 32, "feed_forward_length": 96},
    "Granite 3 (shared)": {"rope.dimension_count": 16, "expert_shared_feed_forward_length": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Q8_0", "MXFP4"])
@pytest.mark.parametrize("name", WIDE)
def test_quantised_files(tmp_path: Path, name: str, kind: str) -> None:
    """The values of the blocks, in safetensors, give the same logits; products of blocks nearly the same."""
    case = CASES[name]
    case = case._replace(config={**case.config, **WIDE[name]}, more={**case.more, **WIDER[name]})
    number = gguf.GGMLQuantizationType[kind]
    blocks: dict[str, Any] = {}
    values = {}
    for key, array in stored(case).items():
        if array.ndim < 2 or array.shape[-1] % 32 or "ffn_gate_inp." in key:
            blocks[key] = values[key] = array
            continue
        data = gguf.quants.quantize(array, number)
        blocks[key] = GgufBlocks(int(number), array.shape, data.tobytes())
        values[key] = gguf.quants.dequantize(data, number)
    if case.architecture == "granitemoe":  # a row is whole blocks
        for key in [key for key in blocks if re.search(r"\.attn_[qk]\.", key)]:
            heads, rows = (4 if "attn_q" in key else 2), np.arange(values[key].shape[0])
            order = interleave(rows, heads)
            data = np.frombuffer(blocks[key].data, np.uint8).reshape(len(rows), -1)[order]
            blocks[key] = replace(blocks[key], data=data.tobytes())
            values[key] = values[key][order]
    exact = write_gguf(tmp_path / "values.gguf", metadata(case), values)
    file = write_gguf(tmp_path / "blocks.gguf", metadata(case), blocks)
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
    tensors = {key: array.astype(np.float16) if array.ndim > 1 else array for key, array in stored(case).items()}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "half.gguf", metadata(case), tensors))
    info = checkpoint.info("model.layers.0.self_attn.kv_b_proj.weight")
    assert (info.values, checkpoint.read(info.name).dtype) == ("F16", np.float16)


def test_adapters_have_the_names_of_transformers(tmp_path: Path) -> None:
    plain, file = write_case(tmp_path, CASES["DeepSeek V3"])
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
    plain, file = write_case(tmp_path, case)
    tiny = TinyGguf(file, {}, stored(case), metadata(case))
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
    file = write_gguf(tmp_path / "m.gguf", metadata(case._replace(more={**case.more, **changed})), stored(case))
    with pytest.raises(TruffulaError, match=words):
        plan_model(open_checkpoint(file))


def test_halves_of_kv_b_that_do_not_fit(tmp_path: Path) -> None:
    case = CASES["DeepSeek V3"]
    tensors = stored(case)
    for changed in ({"blk.0.attn_k_b.weight": tensors["blk.0.attn_k_b.weight"][:3]}, {"blk.0.attn_v_b.weight": None}):
        kept = {key: array for key, array in {**tensors, **changed}.items() if array is not None}
        with pytest.raises(TruffulaError, match=r"kv_b_proj\.weight cannot be made of blk\.0\.attn_k_b\.weight"):
            open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata(case), kept))


def test_longrope_of_phimoe_is_refused(tmp_path: Path) -> None:
    case = CASES["Phi-3.5-MoE"]
    tables = {f"rope_factors_{name}.weight": np.full(4, 2, np.float32) for name in ("long", "short")}
    more = {**case.more, "rope.scaling.original_context_length": 128}
    file = write_gguf(tmp_path / "m.gguf", metadata(case._replace(more=more)), {**stored(case), **tables})
    with pytest.raises(UnsupportedModel, match="no keys for short_mscale"):
        open_checkpoint(file)
