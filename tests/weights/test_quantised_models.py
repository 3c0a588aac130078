"""Whole models from quantised files: the answers, memory and decisions are those of their plain values."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantised_files import (
    CAPACITY,
    LINEAR,
    MODEL,
    PATH,
    PROMPT,
    Fixture,
    as_model,
    digest,
    gpt_oss_model,
    run,
    write_folder,
)

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.kernels.cpu import CpuBackend
from truffula.testing.files import Array
from truffula.testing.oracle import Oracle
from truffula.testing.parity import verify_model
from truffula.weights.open import open_checkpoint
from truffula.weights.safetensors import DTYPES
from truffula.weights.tying import Tie

Tensors = dict[str, Array]


def plain_copy(path: Path, config: dict[str, Any], folder: Path) -> Path:
    """The same model with dequantised values in the dtype that they have."""
    opened = open_checkpoint(path)
    values = {name: opened.read(name) for name in opened.tensors}
    return write_folder(folder, {key: config[key] for key in config if key != "quantization_config"}, values)


FAST = ("awq-gemm", "bnb-nf4-double", "ct-int4-asymmetric", "ct-nvfp4", "fp8-block", "gptq-4-act-order", "hqq-4")


@pytest.mark.parametrize("mode", [("float32", "none"), ("bfloat16", "none")])
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LINEAR]
)  # the slow ones together take 10 s
def test_answers_and_memory_are_those_of_the_plain_values(tmp_path: Path, name: str, mode: tuple[str, str]) -> None:
    config, tensors = as_model(Fixture(name))
    path = write_folder(tmp_path / "quantised", config, tensors)
    plan, logits = run(path, *mode)
    plain, wanted = run(plain_copy(path, config, tmp_path / "plain"), *mode)
    assert np.array_equal(logits, wanted) and np.abs(logits).max() > 1
    assert plan.stored_bytes < plain.stored_bytes
    if mode[0] == "bfloat16":
        backend = CpuBackend(1, exact=True)
        planned = [backend.plan(p.program, mode[0], CAPACITY, p.stored_types) for p in (plan, plain)]
        assert planned[0] == planned[1]


@pytest.mark.parametrize(
    ("changed", "missing"), [({"symmetric": False}, "weight_zero_point"), ({"actorder": "group"}, "weight_g_idx")]
)
@pytest.mark.parametrize("name", ["ct-int4-group", "ct-int8"])
def test_tensors_that_the_config_groups_speak_of_must_be_there(
    tmp_path: Path, name: str, changed: dict[str, Any], missing: str
) -> None:
    fixture = Fixture(name)
    fixture.config["config_groups"]["group_0"]["weights"] |= changed
    path = write_folder(tmp_path, {**MODEL, "quantization_config": fixture.config}, fixture.tensors)
    if (name, missing) == ("ct-int8", "weight_g_idx"):
        return open_checkpoint(path).close()  # one group per row
    with pytest.raises(CheckpointError, match=f"{missing} in .* is missing"):
        open_checkpoint(path)


def test_zeros_of_floats_that_are_zero_change_nothing(tmp_path: Path) -> None:
    fixture = Fixture("ct-fp8-channel")
    fixture.tensors["tall.weight_zero_point"] = np.zeros((128, 1), np.int8)
    path = write_folder(tmp_path, {**MODEL, "quantization_config": fixture.config}, fixture.tensors)
    assert digest(open_checkpoint(path).read("tall.weight")) == fixture.expected["tall"][1]


def test_a_few_rows_of_long_groups_take_little_memory(tmp_path: Path) -> None:
    """HQQ's axis 0 has groups across all rows, so that a row of its view is as long as there are groups."""
    module = {key: value for key, value in Fixture("hqq-8").module("tall").items() if key != ".compute_dtype"}
    module |= {".shape": np.array([2048, 1024]), ".group_size": np.array([2]), ".axis": np.array([0])}
    module |= {".W_q": np.arange(2048 * 1024, dtype=np.uint8).reshape(2, -1)}
    module |= {name: np.full((1, 1024 * 1024), value, np.float16) for name, value in ((".scale", 0.5), (".zero", 2))}
    config = {**MODEL, "quantization_config": Fixture("hqq-8").config}
    opened = open_checkpoint(write_folder(tmp_path, config, {f"x{key}": value for key, value in module.items()}))
    computed = opened.computed("x.weight")
    assert computed is not None
    tracemalloc.start()
    rows = computed.read(1020, 1028)  # across the border of the view's two rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(rows, ((np.arange(8192) % 256 - 2) * 0.5).reshape(8, 1024))
    assert peak < 1 << 20


def test_groups_out_of_order_are_served_by_their_values(tmp_path: Path) -> None:
    config, tensors = as_model(Fixture("gptq-4-act-order"))
    config["quantization_config"]["desc_act"] = False
    path = write_folder(tmp_path / "m", config, tensors)
    assert open_checkpoint(path).blocks(f"{PATH}.weight") is None
    assert np.isfinite(run(path, exact=False)[1]).all()


def test_a_quantised_head_under_a_tied_flag_is_the_head(tmp_path: Path) -> None:
    config, tensors = as_model(Fixture("gptq-4"), head=True, tie_word_embeddings=True)
    plan, _ = run(write_folder(tmp_path / "m", config, tensors))
    assert plan.tying.tie is Tie.SEPARATE
    assert any("lm_head.weight differs from model.embed_tokens.weight" in text for text in plan.warnings)


@pytest.mark.parametrize("equal", [True, False])
def test_two_quantised_tables_are_tied_when_their_stored_parts_are_equal(tmp_path: Path, equal: bool) -> None:
    fixture = Fixture("ct-int4-group")
    config, tensors = as_model(fixture, head=True, tie_word_embeddings=True)
    del tensors["model.embed_tokens.weight"]
    tensors |= {f"model.embed_tokens{suffix}": value.copy() for suffix, value in fixture.module("tall").items()}
    if not equal:
        tensors["model.embed_tokens.weight_scale"][3, 1] *= 2
    plan, _ = run(write_folder(tmp_path / "m", config, tensors))
    assert (plan.tying.tie is Tie.TIED) is equal
    assert (plan.saved_bytes > 0) is equal


def test_fused_modules_are_quantised_as_one(tmp_path: Path) -> None:
    fixture = Fixture("gptq-4-act-order")
    config, tensors = as_model(fixture, intermediate_size=64)
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            for suffix in (".qweight", ".qzeros", ".scales", ".g_idx"):
                del tensors[f"{mlp}.{leaf}{suffix}"]
        for leaf, module in (("gate_up_proj", "tall"), ("down_proj", "square")):
            tensors |= {f"{mlp}.{leaf}{suffix}": value for suffix, value in fixture.module(module).items()}
    path = write_folder(tmp_path / "m", config, tensors)
    _, logits = run(path)
    _, wanted = run(plain_copy(path, config, tmp_path / "plain"))
    assert np.array_equal(logits, wanted)


@pytest.mark.parametrize("name", ["gptq-4", "fp8-block", "fp8-channel"])
def test_experts_are_modules_like_others(tmp_path: Path, name: str) -> None:
    moe = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    config, tensors = as_model(Fixture(name), model_type="qwen3_moe", head_dim=16, norm_topk_prob=True, **moe)
    assert any("experts.3.down_proj" in key and ("weight" in key) == name.startswith("fp8") for key in tensors)
    path = write_folder(tmp_path / "m", config, tensors)
    _, logits = run(path)
    _, wanted = run(plain_copy(path, config, tmp_path / "plain"))
    assert np.array_equal(logits, wanted)
    plan, packed = run(path, exact=False)
    assert np.abs(packed - logits).max() < (logits.std() if name == "gptq-4" else 1e-4)
    formats = CpuBackend(1).plan(plan.program, "bfloat16", CAPACITY, plan.stored_types).weight_formats
    assert ("fp8_128" in formats) == (name == "fp8-channel")


def test_scales_of_activations_and_of_the_cache_are_left_out_and_said(tmp_path: Path) -> None:
    config, tensors = as_model(Fixture("fp8-tensor"))
    config["quantization_config"] |= {"activation_scheme": "static", "kv_cache_scheme": {"num_bits": 8}}
    one = np.ones(1, np.float32)
    tensors |= {
        f"model.layers.0.self_attn.{name}": one
        for name in ("q_proj.input_scale", "k_proj.k_scale", "k_scale", "v_scale")
    }
    plan, logits = run(write_folder(tmp_path / "m", config, tensors))
    assert np.isfinite(logits).all() and len(plan.unused) == 4
    assert sum("here" in text and "not rounded" in text for text in plan.warnings) == 2


def test_fbgemm_is_float8_with_a_scale_per_row(tmp_path: Path) -> None:
    """Its library computes on a GPU only; the form is that of fp8 with scales per row, under another name."""
    fixture = Fixture("fp8-channel")
    renamed = {name.replace("weight_scale_inv", "weight_scale"): value for name, value in fixture.tensors.items()}
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    opened = open_checkpoint(write_folder(tmp_path / "m", {**MODEL, "quantization_config": config}, renamed))
    for module, (_, wanted) in fixture.expected.items():
        assert digest(opened.read(f"{module}.weight")) == wanted


@pytest.mark.parametrize(
    ("shape", "block", "kind"), [((72, 40), 32, ""), ((200, 288), 128, "FP8_128"), ((72, 96), 64, "FP8_32")]
)
def test_blocks_that_do_not_divide_the_weight_are_cropped(
    tmp_path: Path, shape: tuple[int, int], block: int, kind: str
) -> None:
    """kv_a_proj_with_mqa of DeepSeek has 576 rows in blocks of 128."""
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 0x7F, shape, np.uint8).view(DTYPES["F8_E4M3"])
    scales = rng.random([-(-size // block) for size in shape], np.float32)
    config = {**MODEL, "quantization_config": {"quant_method": "fp8", "weight_block_size": [block, block]}}
    opened = open_checkpoint(write_folder(tmp_path, config, {"x.weight": weight, "x.weight_scale_inv": scales}))
    wanted = weight.astype(np.float32) * scales.repeat(block, 0).repeat(block, 1)[: shape[0], : shape[1]]
    np.testing.assert_array_equal(opened.read("x.weight"), wanted)
    blocks = opened.blocks("x.weight")
    assert (blocks.kind if blocks is not None else "") == kind
    if blocks is not None:
        np.testing.assert_array_equal(blocks.dequantise(), wanted)


def _drop(suffix: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(f"{PATH}{suffix}")


def _put(suffix: str, change: Callable[[Array], Array]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{PATH}{suffix}": change(tensors[f"{PATH}{suffix}"].copy())})


def _add(suffix: str, value: Array) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{PATH}{suffix}": value})


def _narrow(packed: str, scales: str) -> Callable[[Tensors], None]:
    """Three groups and a half, with scales for three."""

    def changed(tensors: Tensors) -> None:
        _put(packed, lambda a: a[:, :-4])(tensors)
        _put(scales, lambda a: a[:, :-1])(tensors)

    return changed


def _state(**values: int) -> Callable[[Tensors], None]:
    """Overwrites numbers in the JSON of bitsandbytes."""

    def changed(array: Array) -> Array:
        return np.frombuffer(json.dumps({**json.loads(array.tobytes()), **values}).encode(), np.uint8)

    return _put(".weight.quant_state.bitsandbytes__nf4", changed)


def _nan(array: Array) -> Array:
    array.reshape(-1)[-1] = np.nan
    return array


def _far(array: Array) -> Array:
    array[7] = 10_000
    return array


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("gptq-4", _drop(".qzeros"), r"up_proj.qzeros in .* is missing"),
        ("gptq-4", _drop(".qweight"), r"up_proj.qweight in .* is missing"),
        ("gptq-4", _put(".scales", lambda a: a[:1]), r"up_proj.qzeros .*shape \[2, 16\].* need \[1, 16\]"),
        ("gptq-4", _put(".scales", lambda a: a.astype(np.int32)), r"up_proj.scales .* stored as I32"),
        ("gptq-4", _put(".qweight", lambda a: a[:-1]), r"up_proj.g_idx .* shape \[64\].* need \[56\]"),
        ("gptq-4", _put(".qweight", lambda a: a[0]), r"up_proj.qweight .* expected 2 dimensions"),
        ("gptq-4", _put(".g_idx", _far), r"up_proj.g_idx .* names group 10000; .*up_proj.scales has 2"),
        ("gptq-4", _put(".scales", _nan), r"up_proj.weight .* holds \d+ NaN .* computed from its scales"),
        ("gptq-4", _put(".scales", lambda a: a * np.float16(np.inf)), r"up_proj.weight .* NaN or infinite"),
        ("awq-gemm", _put(".scales", lambda a: a[:, :-8]), r"up_proj.scales .*shape \[2, 120\]"),
        ("awq-gemm", _drop(".scales"), r"up_proj.scales in .* is missing"),
        ("ct-int4-group", _drop(".weight_scale"), r"up_proj.weight_scale in .* is missing"),
        ("ct-int4-group", _put(".weight_shape", lambda a: a + 1), r"up_proj.weight_shape .* says \[129, 65\]"),
        ("ct-int4-group", _put(".weight_packed", lambda a: a[:, :-1]), r"up_proj.weight_packed .* fit none"),
        ("ct-int4-asymmetric", _put(".weight_zero_point", lambda a: a[:-1]), r"up_proj.weight_zero_point .*shape"),
        ("ct-nvfp4", _drop(".weight_global_scale"), r"up_proj.weight_global_scale in .* is missing"),
        ("ct-nvfp4", _put(".weight_global_scale", lambda a: a * 0), r"up_proj.weight .* NaN or infinite"),
        ("ct-int8", _put(".weight_scale", lambda a: a[:3]), r"up_proj.weight_scale .*shape \[3, 1\]"),
        ("fp8-block", _put(".weight_scale_inv", lambda a: a[:, :-1]), r"up_proj.weight_scale_inv .*shape \[4, 3\]"),
        ("fp8-block", _drop(".weight_scale_inv"), r"up_proj.weight_scale_inv in .* is missing"),
        ("fp8-block", _drop(".weight"), r"up_proj.weight in .* is missing"),
        ("fp8-block", _put(".weight_scale_inv", _nan), r"up_proj.weight .* NaN or infinite"),
        ("bnb-nf4", _drop(".weight.absmax"), r"up_proj.weight.absmax in .* is missing"),
        ("bnb-nf4", _drop(".weight.quant_state.bitsandbytes__nf4"), r"quant_state.bitsandbytes__nf4 in .* is missing"),
        ("bnb-nf4", _put(".weight.quant_state.bitsandbytes__nf4", lambda a: a[3:]), r"__nf4 .* is not the JSON"),
        ("bnb-nf4", _put(".weight", lambda a: a[:-1]), r"up_proj.weight .* has 4095 bytes; \[128, 64\] .* needs 4096"),
        ("bnb-nf4-double", _drop(".weight.nested_absmax"), r"up_proj.weight.nested_absmax in .* is missing"),
        ("bnb-nf4-double", _put(".weight.nested_absmax", _nan), r"up_proj.weight .* NaN or infinite"),
        ("bnb-int8", _drop(".SCB"), r"up_proj.SCB in .* is missing"),
        ("bnb-int8", _put(".weight_format", lambda a: a + 2), r"up_proj.weight_format .* reordered for a GPU"),
        ("hqq-4", _drop(".zero"), r"up_proj.zero in .* is missing"),
        ("hqq-4", _put(".shape", lambda a: a * 1_000_000_000), r"up_proj.shape .* says \[128000000000, 64000000000\]"),
        ("hqq-4", _put(".packing", lambda a: a + 1), r"up_proj.packing .* says '5cju`v9'"),
        ("hqq-4", _put(".W_q", lambda a: a[:-1]), r"up_proj.W_q .* bytes; 512 rows of 16 in 4bit_u8"),
        ("modelopt-nvfp4", _drop(".weight_scale_2"), r"up_proj.weight_scale_2 in .* is missing"),
        ("gptq-4-act-order", _drop(".g_idx"), r"up_proj.g_idx in .* is missing: desc_act is true"),
        ("awq-gemv", _put(".scales", lambda a: a[:, :1]), r"up_proj.scales .*shape \[128, 1\].* need \[128, 8\]"),
        (
            "ct-int4-channel",
            _put(".weight_packed", lambda a: a[:, :0]),
            r"up_proj.weight_packed .* has 0 words per row",
        ),
        ("ct-nvfp4", _narrow(".weight_packed", ".weight_scale"), r"up_proj.weight_scale .* need \[128, 4\]"),
        ("modelopt-nvfp4", _narrow(".weight", ".weight_scale"), r"up_proj.weight_scale .* need \[128, 4\]"),
        ("bnb-nf4", _state(blocksize=2**31 - 1), r"__nf4 .* is not the JSON .* <= 65536 - at `\$.blocksize`"),
        ("bnb-nf4-double", _state(nested_blocksize=2**31 - 1), r"at `\$.nested_blocksize`"),
        (
            "bnb-int8",
            _put(".weight_format", lambda a: np.full(9, 2, np.uint8)),
            r"weight_format .* reordered for a GPU",
        ),
        ("fp8-block", _add(".weight_scale", np.ones(1, np.float32)), r"up_proj.weight_scale in .* is not supported in"),
        (
            "modelopt-mxfp8",
            _add(".weight_scale_2", np.ones(1, np.float32)),
            r"weight_scale_2 in .* is not supported in",
        ),
        ("ct-int8", _add(".weight_global_scale", np.ones(1, np.float32)), r"weight_global_scale .* not supported in"),
        ("ct-fp8-channel", _add(".weight_zero_point", np.ones((128, 1), np.int8)), r"weight_zero_point .* is not zero"),
        ("fp8-tensor", _put(".weight", lambda a: np.full(a.shape, 0x7F, np.uint8).view(a.dtype)), r"holds 8192 NaN"),
    ],
)
def test_parts_that_do_not_fit_are_errors_that_name_the_tensor(
    tmp_path: Path, name: str, change: Callable[[Tensors], None], named: str
) -> None:
    config, tensors = as_model(Fixture(name))
    change(tensors)
    with pytest.raises(CheckpointError, match=named) as raised:
        run(write_folder(tmp_path / "m", config, tensors))
    assert PATH in str(raised.value.data["tensor"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.__delitem__("tall_scales"), r"tall_scales in .* is missing"),
        (lambda tensors: tensors.update(tall_scales=tensors["tall_scales"][:1]), r"tall_scales .* shape \[1, 128, 2\]"),
        (lambda tensors: tensors.update(tall_blocks=tensors["tall_blocks"][..., :8]), r"tall_blocks .* 16 bytes"),
    ],
)
def test_parts_of_experts_that_do_not_fit_are_errors(tmp_path: Path, change: Any, named: str) -> None:
    fixture = Fixture("mxfp4-experts")
    change(fixture.tensors)
    config = {**MODEL, "quantization_config": fixture.config}
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(write_folder(tmp_path / "m", config, fixture.tensors))


@pytest.mark.parametrize(
    ("file", "name", "written"),
    [
        ("quantize_config.json", "gptq-4-v2", lambda values: values),
        ("quant_config.json", "awq-gemm", lambda values: {**values, "w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
        (
            "hf_quant_config.json",
            "modelopt-nvfp4",
            lambda values: {"producer": values["producer"], "quantization": {"quant_algo": "NVFP4", "group_size": 16}},
        ),
    ],
)
def test_a_config_in_a_file_of_its_own_is_read(tmp_path: Path, file: str, name: str, written: Any) -> None:
    fixture = Fixture(name)
    _, tensors = as_model(fixture)
    path = write_folder(tmp_path / "m", MODEL, tensors)
    values = {key: value for key, value in fixture.config.items() if key != "quant_method"}
    (path / file).write_text(json.dumps(written(values)))
    config, _ = as_model(fixture)
    _, logits = run(path)
    _, wanted = run(write_folder(tmp_path / "usual", config, tensors))
    assert np.array_equal(logits, wanted)


def test_a_key_beside_the_quantisation_of_a_side_file_is_refused_by_name(tmp_path: Path) -> None:
    fixture = Fixture("modelopt-nvfp4")
    path = write_folder(tmp_path, MODEL, fixture.tensors)
    written = {"quantization": {"quant_algo": "NVFP4"}, "rotation": {"kind": "hadamard"}}
    (path / "hf_quant_config.json").write_text(json.dumps(written))
    with pytest.raises(UnsupportedModel, match=r"rotation is .*this key is not supported"):
        open_checkpoint(path)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([], r"quantization_config is \[\]; it must be an object"),
        ({"quant_method": "quip"}, r"quant_method is \"quip\"; supported are"),
        ({"bits": 4}, r"quant_method is null"),
        (GPTQ | {"bits": 5}, r"quantization_config.bits is 5"),
        (GPTQ | {"bits": True}, r"bits is true; it must be an integer"),
        (GPTQ | {"bits": 10**30}, r"bits is 10+"),
        (GPTQ | {"group_size": 0}, r"group_size is 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format is \"marlin\"; supported are gptq, gptq_v2"),
        (GPTQ | {"planar": True}, r"planar is true; this key is not supported"),
        (GPTQ | {"rotation": "hadamard"}, r"rotation is \"hadamard\""),
        (GPTQ | {"dynamic": {"+:.*": 3}}, r"dynamic is .*the entry '\+:\.\*'"),
        (
            {"quant_method": "awq", "bits": 4, "version": "gemv_fast"},
            r"version is \"gemv_fast\"; supported are gemm, gemv",
        ),
        ({"quant_method": "awq", "bits": 8}, r"bits is 8; only 4"),
        ({"quant_method": "awq", "bits": 4, "group_size": 0}, r"group_size is 0"),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 0, "packing_format": "auto_round:awq"}, r"size is 0"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, r"fmt is \"e5m2\""),
        (CT | {"format": "marlin-24"}, r"format is \"marlin-24\""),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config is .*only dense"),
        (CT | {"transform_config": {"config_groups": {"a": {}}}}, r"transform_config is .*only dense"),
        (CT | {"transform_config": {"format": "dense", "config_groups": {"a": {}}}}, r"transform_config is"),
        (CT | {"config_groups": {"g": {"weights": {"block_structure": "9" * 5000 + "x1"}}}}, r"two positive integers"),
        (CT | {"config_groups": {"g": {"weights": {"actorder": "up"}}}}, r"actorder is \"up\"; supported are group"),
        (CT | {"config_groups": {"g": {"weights": {"num_bits": 9}}}}, r"config_groups.g.weights.num_bits is 9"),
        (CT | {"config_groups": {"g": {"weights": {"zeta": 9}}}}, r"config_groups.g.weights.zeta is 9; this key"),
        (CT | {"config_groups": {"g": {"output_activations": {"num_bits": 8}}}}, r"output_activations"),
        (CT | {"ignore": "lm_head"}, r"ignore is \"lm_head\"; it must be a list of strings"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:mlx"}, r"packing_format"),
        ({"quant_method": "auto-round", "bits": 4, "act_bits": 8}, r"act_bits is 8"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_name(tmp_path: Path, values: Any, named: str) -> None:
    _, tensors = as_model(Fixture("gptq-4"))
    path = write_folder(tmp_path / "m", {**MODEL, "quantization_config": values}, tensors)
    with pytest.raises(UnsupportedModel, match=named) as raised:
        open_checkpoint(path)
    assert "quantization_config" in str(raised.value.param)


def test_auto_round_of_version_0_4_names_its_layout_as_backend(tmp_path: Path) -> None:
    for name, backend in (("auto-round", "auto_round:gptq:exllamav2"), ("awq-gemm", "auto_round:awq:gemm")):
        fixture = Fixture(name)
        config = {"quant_method": "intel/auto-round", "bits": 4, "group_size": 32, "sym": False, "backend": backend}
        folder = write_folder(tmp_path / name, {**MODEL, "quantization_config": config}, fixture.tensors)
        assert digest(open_checkpoint(folder).read("tall.weight")) == fixture.expected["tall"][1]


def test_widths_that_differ_by_module_follow_from_the_shapes(tmp_path: Path) -> None:
    """GPTQ ``dynamic``, and config groups with ``re:`` targets: no pattern is matched."""
    config, tensors = as_model(Fixture("gptq-4"))
    name = "model.layers.0.mlp.down_proj"
    tensors |= {f"{name}{suffix}": value for suffix, value in Fixture("gptq-8").module("wide").items()}
    config["quantization_config"]["dynamic"] = {r"+:.*\.down_proj": {"bits": 8}, "-:.*lm_head": {}}
    opened = open_checkpoint(write_folder(tmp_path / "gptq", config, tensors))
    assert opened.info(f"{name}.weight").dtype == "GPTQ-8"
    assert opened.info(f"{PATH}.weight").dtype == "GPTQ-4"
    config, tensors = as_model(Fixture("ct-int4-group"))
    other = Fixture("ct-int8-packed")
    for suffix, value in other.module("wide").items():
        tensors[f"{name}{suffix}"] = value
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {**other.config["config_groups"]["group_0"], "targets": ["re:.*down_proj"]}
    opened = open_checkpoint(write_folder(tmp_path / "ct", config, tensors))
    assert opened.info(f"{name}.weight").dtype == "INT8"
    assert opened.info(f"{PATH}.weight").dtype == "INT4"


def test_verify_compares_with_transformers_on_the_dequantised_values(tmp_path: Path) -> None:
    config, tensors = as_model(Fixture("gptq-4"))
    report = verify_model(write_folder(tmp_path / "m", config, tensors), prompts=[PROMPT], new_tokens=3)
    assert report.ok, report.first_divergence
    assert "dequantised" in report.warnings[-1]


def test_experts_of_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    config, tensors = gpt_oss_model()
    path = write_folder(tmp_path / "m", config, tensors)
    _, logits = run(path)
    _, wanted = run(plain_copy(path, config, tmp_path / "plain"))
    assert np.array_equal(logits, wanted)
    plan, packed = run(path, exact=False)
    assert np.abs(packed - logits).max() < 0.2 * logits.std()
    assert "q5_0" in CpuBackend(1).plan(plan.program, "bfloat16", CAPACITY, plan.stored_types).weight_formats
    np.testing.assert_allclose(logits, Oracle(path, tied=False).logits(PROMPT), atol=1e-4)
