"""One layer of published models at their true widths, with random weights: it loads and generates, in known memory.

Qwen3.6 has one of each kind of layer. Of the experts Kimi's layer has 24 of 384 and Qwen's have 128 of 256, and all
have fewer ids, so that the files stay below 4 GB. About 3 minutes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernel_backends import needs_native

from truffula import LLM, SamplingParams
from truffula.model.names import written_tensors
from truffula.model.read import read_config

pytestmark = [pytest.mark.slow, needs_native, pytest.mark.timeout(1200)]
BLOCK = 1 << 20

# As in the repositories' config.json, but the number of layers, of ids and of experts.
GLM_FLASH: dict[str, Any] = {
    "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"], "hidden_size": 2048,
    "intermediate_size": 10240, "moe_intermediate_size": 1536, "num_attention_heads": 20, "num_key_value_heads": 20,
    "n_routed_experts": 64, "num_experts_per_tok": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 1.8, "topk_method": "noaux_tc", "q_lora_rank": 768,
    "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "rope_theta": 1e6,
    "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "num_hidden_layers": 1, "mlp_layer_types": ["sparse"],
    "vocab_size": 32768, "tie_word_embeddings": False, "num_nextn_predict_layers": 1, "eos_token_id": 1,
}  # fmt: skip
KIMI_TEXT: dict[str, Any] = {
    "model_type": "kimi_k2", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 24, "num_experts_per_tok": 8,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 50000.0,
    "rope_scaling": {"type": "yarn", "factor": 64.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    "max_position_embeddings": 262144, "rms_norm_eps": 1e-5, "num_hidden_layers": 1, "first_k_dense_replace": 0,
    "vocab_size": 20480, "tie_word_embeddings": False, "num_nextn_predict_layers": 0, "eos_token_id": 1,
}  # fmt: skip
KIMI = {
    "model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"], "text_config": KIMI_TEXT,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN_TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text", "hidden_size": 2048, "num_hidden_layers": 2, "head_dim": 256,
    "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 16, "num_key_value_heads": 2,
    "attn_output_gate": True, "linear_conv_kernel_dim": 4, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "moe_intermediate_size": 512, "num_experts": 128,
    "num_experts_per_tok": 8, "shared_expert_intermediate_size": 512, "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6, "vocab_size": 32768, "tie_word_embeddings": False, "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                        "mrope_interleaved": True, "mrope_section": [11, 11, 10]},
}  # fmt: skip
QWEN = {
    "model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": QWEN_TEXT,
    "tie_word_embeddings": False,
}  # fmt: skip


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Names, shapes and scales of the model's tensors, as its files have them."""
    for item in written_tensors(read_config(config).spec, has_head=True):
        kind = item.row.kind
        scale = 1.0 if kind == "embed" else 0.0 if kind == "vector" else item.row.width**-0.5
        yield item.name, item.shape, scale


def write_random(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of random bfloat16 numbers, written piece by piece; the numbers of norms are 1."""
    header, end = {}, 0
    for name, shape, _ in tensors(config):
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    random = np.random.default_rng(0).standard_normal(BLOCK, np.float32)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _, shape, scale in tensors(config):
            block = (random * scale if scale else np.ones_like(random)).astype(ml_dtypes.bfloat16)
            for left in range(math.prod(shape), 0, -BLOCK):
                file.write(np.roll(block, left % 997)[:left].tobytes())
    return folder


@pytest.mark.parametrize(
    ("config", "kv_widths"),
    [
        pytest.param(GLM_FLASH, [(512 + 64,)], id="GLM-4.7-Flash"),
        pytest.param(KIMI, [(512 + 64,)], id="Kimi-K2.5"),
        pytest.param(QWEN, [(), (2 * 256, 2 * 256)], id="Qwen3.6-35B-A3B"),
    ],
)
def test_one_layer_of_true_widths_loads_and_generates(
    tmp_path: Path, config: dict[str, Any], kv_widths: list[tuple[int, ...]]
) -> None:
    folder = write_random(tmp_path / "model", config)
    nbytes = (folder / "model.safetensors").stat().st_size
    assert [layer.mixer.kv_widths for layer in read_config(config).spec.layers] == kv_widths
    llm = LLM(str(folder), dtype="bfloat16", memory_bytes=nbytes + (1 << 30), max_model_len=512, step_tokens=64)
    try:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
        prompts = [list(range(7, 107)), [5, 6, 7]]
        together = llm.generate(prompts, params)
        alone = [llm.generate([prompt], params)[0] for prompt in prompts]
        for one, same in zip(together, alone, strict=True):
            assert len(one.token_ids) == 8
            assert one.token_ids == same.token_ids
            assert all(math.isfinite(value) for step in one.logprobs or () for value in step.values())
    finally:
        llm.close()
