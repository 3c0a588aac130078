"""Every tensor name of a checkpoint ends somewhere on purpose, or the checkpoint is refused by that name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from truffula.errors import CheckpointError, KernelError
from truffula.kernels.backend import as_array
from truffula.model.load import WeightReader, plan_model
from truffula.model.names import WeightNames, resolve_names
from truffula.model.read import read_config
from truffula.testing.tiny import tiny_config, tiny_tensors, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint

LAYER = "model.layers.1."


def plan(folder: Path) -> Any:
    return plan_model(open_checkpoint(folder))


def renamed(folder: Path, rename: Callable[[str], str], model_type: str = "llama") -> Path:
    tensors = tiny_tensors(tiny_config(model_type))
    extra = {rename(name): array for name, array in tensors.items()}
    return write_tiny_checkpoint(folder, tiny_config(model_type), drop=tensors, extra=extra)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.removeprefix("model."),
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
        lambda name: f"language_model.{name}",
        lambda name: name.replace("model.", "model.language_model."),
    ],
)
def test_prefixes_and_wrappers(tmp_path: Path, rename: Callable[[str], str]) -> None:
    made = plan(renamed(tmp_path, rename))
    assert made.unused == () and made.warnings == ()
    # The canonical names do not depend on how the file spells them, nor do the modules that adapters address.
    assert made.program.weights[3].name == "layers.0.self_attn.qkv_proj.weight"
    assert made.program.sites[1].module == "model.layers.0.self_attn.q_proj"


def test_two_bodies_are_one_too_many(tmp_path: Path) -> None:
    tensors = tiny_tensors(tiny_config())
    extra = {name.removeprefix("model."): array for name, array in tensors.items()}
    with pytest.raises(CheckpointError, match="two language models"):
        plan(write_tiny_checkpoint(tmp_path, tiny_config(), extra=extra))


def test_a_mixed_prefix_leaves_both_a_gap_and_a_leftover(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*Unknown tensors instead: norm\.weight"):
        plan(renamed(tmp_path, lambda name: "norm.weight" if name == "model.norm.weight" else name))


@pytest.mark.parametrize("name", ["mlp.up_proj.weight", "self_attn.k_proj.weight", "input_layernorm.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        plan(write_tiny_checkpoint(tmp_path, drop=[LAYER + name]))
    assert LAYER + name in str(caught.value)
    assert caught.value.data["tensors"] == [LAYER + name]


def test_a_missing_bias_is_no_zero_bias(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_proj\.bias"):
        plan(write_tiny_checkpoint(tmp_path, tiny_config("qwen2"), drop=[LAYER + "self_attn.v_proj.bias"]))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.q_proj.weight",
        LAYER + "self_attn.q_proj.bias",
        LAYER + "self_attn.q_proj.lora_A.weight",
        LAYER + "mlp.router.weight",
        "score.weight",
        "lm_head.bias",
        "lm_head.qweight",
        "vision_tower.patch.weight",
    ],
)
def test_a_leftover_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        plan(write_tiny_checkpoint(tmp_path, extra={name: np.zeros((2, 2), np.float32)}))
    assert name in str(caught.value)


def test_many_leftovers_are_counted_and_ten_are_shown(tmp_path: Path) -> None:
    extra = {f"model.layers.{i}.x.weight": np.zeros(2, np.float32) for i in range(3, 28)}
    with pytest.raises(CheckpointError, match=r"^25 tensors .* and 15 more") as caught:
        plan(write_tiny_checkpoint(tmp_path, extra=extra))
    assert len(caught.value.data["tensors"]) == 10


def test_an_unmerged_peft_save_is_recognised(tmp_path: Path) -> None:
    folder = renamed(tmp_path, lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"))
    with pytest.raises(CheckpointError, match="unmerged PEFT save"):
        plan(folder)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "model.embeddings.position_ids"],
)
def test_recomputed_buffers_are_left_out_knowingly(tmp_path: Path, name: str) -> None:
    made = plan(write_tiny_checkpoint(tmp_path, extra={name: np.full(3, np.nan, np.float32)}))
    assert made.unused == (name,)


def test_half_a_fused_weight_is_none(tmp_path: Path) -> None:
    fused = {LAYER + "mlp.gate_up_proj.weight": np.zeros((112, 32), np.float32)}
    with pytest.raises(CheckpointError, match=r"up_proj.*Unknown tensors instead: .*gate_up_proj"):
        plan(write_tiny_checkpoint(tmp_path, drop=[LAYER + "mlp.up_proj.weight"], extra=fused))


# Shapes and types


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (LAYER + "mlp.up_proj.weight", (55, 32)),
        (LAYER + "mlp.up_proj.weight", (56, 31)),
        (LAYER + "mlp.up_proj.weight", (56 * 32,)),
        (LAYER + "input_layernorm.weight", (33,)),
        ("lm_head.weight", (100, 32)),
        ("model.embed_tokens.weight", (128, 32)),
    ],
)
def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    folder = write_tiny_checkpoint(tmp_path, extra={name: np.zeros(shape, np.float32)})
    with pytest.raises(CheckpointError) as caught:
        plan(folder)
    assert name in str(caught.value) and str(list(shape)) in str(caught.value)
    assert ("vocab_size is 101" in str(caught.value)) is (name in ("lm_head.weight", "model.embed_tokens.weight"))


def test_swapped_heights_that_add_up_are_found(tmp_path: Path) -> None:
    swap = {"self_attn.q_proj.weight": (16, 32), "self_attn.k_proj.weight": (32, 32)}
    extra = {LAYER + name: np.zeros(shape, np.float32) for name, shape in swap.items()}
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        plan(write_tiny_checkpoint(tmp_path, extra=extra))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.bool_])
def test_a_weight_of_integers_is_refused(tmp_path: Path, dtype: Any) -> None:
    extra = {LAYER + "mlp.down_proj.weight": np.zeros((32, 56), dtype)}
    with pytest.raises(CheckpointError, match=r"down_proj\.weight in model\.safetensors is stored as"):
        plan(write_tiny_checkpoint(tmp_path, extra=extra))


# Pulling


def test_each_weight_is_read_once_and_all_of_them_are(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path, tiny_config("gemma2"), dtype="bfloat16"))
    made = plan_model(checkpoint)
    pull = WeightReader(checkpoint, made)
    for decl in made.program.weights[:-1]:
        parts = pull(decl)
        assert sum(part.shape[0] for part in parts) == decl.shape[0]
    with pytest.raises(KernelError, match=r"not read: norm\.weight"):
        pull.finish()
    with pytest.raises(KernelError, match="read twice"):
        pull(made.program.weights[0])
    (norm,) = pull(made.program.weights[-1])
    stored = checkpoint.read("model.norm.weight")
    # Gemma's 1 + w, in float32: in bfloat16 most of a small w would be lost.
    assert norm.dtype == np.float32
    np.testing.assert_array_equal(norm, stored.astype(np.float32) + 1)
    pull.finish()


def test_progress_counts_the_bytes_of_the_plan(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path))
    made = plan_model(checkpoint)
    seen: list[tuple[int, int | None]] = []
    pull = WeightReader(checkpoint, made, progress=lambda name, done, total: seen.append((done, total)))
    for decl in made.program.weights:
        pull(decl)
    assert seen == sorted(seen)
    assert seen[-1] == (made.stored_bytes, made.stored_bytes)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "bfloat16"), (-np.inf, "float16")])
def test_a_value_that_is_not_finite_is_refused_by_tensor_and_count(tmp_path: Path, value: float, dtype: str) -> None:
    name = LAYER + "mlp.down_proj.weight"
    bad = tiny_tensors(tiny_config(), dtype=dtype)[name]
    bad[3, 7] = bad[5, 1] = value
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path, dtype=dtype, extra={name: bad}))
    made = plan_model(checkpoint)
    pull = WeightReader(checkpoint, made)
    with pytest.raises(CheckpointError) as caught:
        for decl in made.program.weights:
            for part in pull(decl):
                as_array(part)
    assert name in str(caught.value) and "model.safetensors" in str(caught.value)
    assert caught.value.data["count"] == 2


# Special ids


@pytest.mark.parametrize(
    ("config", "generation", "ids", "warned"),
    [
        ({"eos_token_id": 2}, None, (2,), False),
        ({"eos_token_id": [4, 5]}, None, (4, 5), False),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 2]}, (7, 2), False),
        ({"eos_token_id": 2}, {"eos_token_id": 7}, (7, 2), True),
        ({"eos_token_id": None}, {"eos_token_id": 7}, (7,), False),
        ({"eos_token_id": 500}, {"eos_token_id": [7, 500]}, (7,), True),
        ({"eos_token_id": None}, None, (), False),  # the service, which knows the tokenizer's end token, says so
    ],
)
def test_every_end_id_counts(tmp_path: Path, config: Any, generation: Any, ids: Any, warned: bool) -> None:
    folder = write_tiny_checkpoint(tmp_path, tiny_config("qwen2", **config), generation_config=generation)
    made = plan(folder)
    assert made.eos_token_ids == ids
    assert any("end" in text or "eos" in text for text in made.warnings) is warned


def test_an_unwritten_end_id_is_the_class_default(tmp_path: Path) -> None:
    config = {key: value for key, value in tiny_config("llama").items() if key not in ("eos_token_id", "bos_token_id")}
    made = plan(write_tiny_checkpoint(tmp_path, config))
    assert (made.eos_token_ids, made.bos_token_id) == ((2,), 1)


def test_canonical_names_need_no_checkpoint() -> None:
    spec = read_config(tiny_config("qwen3")).spec
    names = WeightNames.canonical(spec)
    assert names.has_embed and names.has_head and names.unused == ()
    assert WeightNames.canonical(spec, has_head=False).has_head is False
    with pytest.raises(CheckpointError, match="no tensors"):
        resolve_names(spec, [])
