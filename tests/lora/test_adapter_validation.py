"""An adapter is served exactly or refused by the key that is wrong: what PEFT lets through is an error here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from lora_bases import BASE, D, F, fused_sites, llama_sites, pairs, validate
from msgspec.structs import replace
from raw_safetensors import write_raw_safetensors

from truffula.errors import AdapterError, AdapterNotFound, InsufficientMemory
from truffula.lora.peft import inspect_adapter, validate_adapter
from truffula.testing.adapters import Array, tiny_config, tiny_tensors, write_adapter, write_tiny_adapter
from truffula.testing.files import write_safetensors

ROOT = "base_model.model.model.layers."
Q0A, Q0B = f"{ROOT}0.self_attn.q_proj.lora_A.weight", f"{ROOT}0.self_attn.q_proj.lora_B.weight"
CONFIG = tiny_config(rank=4, alpha=8, targets=["q_proj", "v_proj"])
Tensors = dict[str, Array]


def tensors(**overrides: Any) -> Tensors:
    return tiny_tensors(llama_sites(), CONFIG | overrides)


def write(folder: Path, change: Callable[[Tensors], None] = lambda t: None, **overrides: Any) -> Path:
    made = tensors()
    change(made)
    return write_adapter(folder, CONFIG | overrides, made)


def refused(folder: Path, sites: Any = None) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        validate(folder, sites)
    assert str(folder) not in caught.value.message
    return caught.value


# ---- what is served


def test_a_sound_adapter_is_laid_out_per_site(tmp_path: Path) -> None:
    made = tensors()
    write(tmp_path)
    adapter = validate(tmp_path)
    by_module = {llama_sites()[s.site].module: s for s in pairs(adapter.sites)}
    assert set(by_module) == {f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ("q_proj", "v_proj")}
    for module, site in by_module.items():
        assert np.array_equal(site.a, made[f"base_model.model.{module}.lora_A.weight"])
        assert np.array_equal(site.b, made[f"base_model.model.{module}.lora_B.weight"])
        assert site.scale == 2.0
    raw = [(tmp_path / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    assert adapter.generation == hashlib.sha256(len(raw[0]).to_bytes(8, "little") + raw[0] + raw[1]).hexdigest()
    assert adapter.rank == 4 and adapter.warnings == ()


def test_scales_and_ranks_follow_patterns_and_rslora(tmp_path: Path) -> None:
    write_tiny_adapter(
        tmp_path,
        llama_sites(),
        rank=8,
        alpha=16,
        targets=["q_proj", "v_proj"],
        use_rslora=True,
        rank_pattern={"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
        alpha_pattern={"layers.0.self_attn.v_proj": 5},
    )
    adapter = validate(tmp_path)
    name = lambda pair: llama_sites()[pair.site].module.removeprefix("model.layers.")
    found = {name(pair): (pair.a.shape[0], pair.scale) for pair in pairs(adapter.sites)}
    f32 = lambda x: float(np.float32(x))
    assert found == {
        "0.self_attn.q_proj": (8, f32(16 / 8**0.5)),
        "0.self_attn.v_proj": (2, f32(5 / 2**0.5)),
        "1.self_attn.q_proj": (3, f32(16 / 3**0.5)),
        "1.self_attn.v_proj": (2, f32(16 / 2**0.5)),
    }
    assert adapter.rank == 8


def test_patterns_that_overlap_with_different_values_are_warned_of(tmp_path: Path) -> None:
    write(tmp_path, alpha_pattern={".*q_proj": 3, "layers.1.self_attn.q_proj": 100, "nowhere": 1})
    warnings = validate(tmp_path).warnings
    assert any("alpha_pattern" in w and "layers.1.self_attn.q_proj" in w for w in warnings)
    assert any("nowhere" in w for w in warnings)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(".weight", ".pirate.weight"),
    ],
    ids=["no prefix", "adapter name inside"],
)
def test_other_spellings_of_the_same_keys_are_the_same_adapter(tmp_path: Path, rename: Callable[[str], str]) -> None:
    write_adapter(tmp_path / "a", CONFIG, tensors())
    write_adapter(tmp_path / "b", CONFIG, {rename(key): value for key, value in tensors().items()})
    first, second = validate(tmp_path / "a"), validate(tmp_path / "b")
    for x, y in zip(pairs(first.sites), pairs(second.sites), strict=True):
        assert x.site == y.site and np.array_equal(x.a, y.a) and np.array_equal(x.b, y.b)
    assert first.generation != second.generation


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_bits_survive(tmp_path: Path, dtype: str) -> None:
    write_tiny_adapter(tmp_path, llama_sites(), dtype=dtype)
    made = tiny_tensors(llama_sites(), CONFIG, dtype=dtype)
    site = pairs(validate(tmp_path).sites)[0]
    assert site.a.dtype == made[Q0A].dtype and site.a.tobytes() == made[Q0A].tobytes()


def test_a_fused_module_gives_each_site_its_rows_of_b_and_one_a(tmp_path: Path) -> None:
    config = tiny_config(rank=4, alpha=8, targets=["qkv_proj"])
    rng = np.random.default_rng(0)
    key = f"{ROOT}0.self_attn.qkv_proj"
    a, b = rng.normal(size=(4, D)).astype(np.float32), rng.normal(size=(32, 4)).astype(np.float32)
    write_adapter(tmp_path, config, {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b})
    sites = pairs(validate(tmp_path, fused_sites()).sites)
    assert [s.site for s in sites] == [0, 1, 2]
    assert sites[0].a is sites[1].a is sites[2].a
    assert np.array_equal(np.concatenate([s.b for s in sites]), b)


def test_a_base_we_fuse_serves_adapters_that_name_the_parts(tmp_path: Path) -> None:
    write_tiny_adapter(tmp_path, fused_sites(), targets=["q_proj", "v_proj"])
    assert [s.site for s in validate(tmp_path, fused_sites()).sites] == [0, 2]


def test_a_pattern_does_not_mean_fused_names_that_are_not_in_use(tmp_path: Path) -> None:
    write_tiny_adapter(tmp_path, fused_sites(), targets=r".*(k|v)_proj")  # also the end of qkv_proj
    assert [s.site for s in validate(tmp_path, fused_sites()).sites] == [1, 2]


def test_a_fused_target_without_its_tensors_is_missing(tmp_path: Path) -> None:
    write_tiny_adapter(tmp_path, fused_sites(), targets=["q_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "qkv_proj"]}))
    assert "k_proj" in refused(tmp_path, fused_sites()).message


def test_both_names_of_one_site_are_ambiguous(tmp_path: Path) -> None:
    made = tiny_tensors(fused_sites(), tiny_config(rank=4, alpha=8, targets=["q_proj"]))
    made[f"{ROOT}0.self_attn.qkv_proj.lora_A.weight"] = np.ones((4, D), np.float32)
    made[f"{ROOT}0.self_attn.qkv_proj.lora_B.weight"] = np.ones((32, 4), np.float32)
    write_adapter(tmp_path, tiny_config(rank=4, alpha=8, targets=["q_proj", "qkv_proj"]), made)
    assert "both adapt" in refused(tmp_path, fused_sites()).message


@pytest.mark.parametrize(
    "overrides",
    [
        {"targets": ["q_proj"]},
        {"targets": "all-linear"},
        {"targets": "ALL-LINEAR"},
        {"targets": r".*\.layers\.[0-1]\..*\.(q|down)_proj"},
        {"targets": r"^(?!.*mlp).*_proj"},
        {"targets": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"targets": ["q_proj", "up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"targets": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {"targets": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
        {"targets": ["q_proj", "v_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"targets": ["self_attn.q_proj"], "exclude_modules": r".*\.1\..*"},
        {"targets": "all-linear", "exclude_modules": ["mlp.down_proj", "k_proj"]},
    ],
    ids=str,
)
def test_the_configuration_targets_exactly_the_tensors(tmp_path: Path, overrides: dict[str, Any]) -> None:
    write_tiny_adapter(tmp_path, llama_sites(), **overrides)
    made = tiny_tensors(llama_sites(), json.loads((tmp_path / "adapter_config.json").read_text()))
    assert len(validate(tmp_path).sites) == len(made) // 2
    gone = min(key for key in made if ".lora_A." in key).removesuffix(".lora_A.weight")
    less = {key: value for key, value in made.items() if not key.startswith(gone)}
    write_safetensors(tmp_path / "adapter_model.safetensors", less)
    named = gone.removeprefix("base_model.model.") if less else "no tensors"
    assert named in refused(tmp_path).message


@pytest.mark.parametrize(
    "overrides",
    [
        {"target_modules": ["v_proj"]},
        {"target_modules": r".*v_proj"},
        {"target_modules": []},
        {"exclude_modules": ["q_proj"]},
        {"exclude_modules": r".*\.0\..*q_proj"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": [0, 1], "layers_pattern": "h"},
    ],
    ids=str,
)
def test_tensors_that_the_configuration_does_not_target_are_named(tmp_path: Path, overrides: dict[str, Any]) -> None:
    write(tmp_path, **overrides)
    error = refused(tmp_path)
    assert error.param == "target_modules" and Q0A in error.message


def test_entries_that_name_nothing_are_warned_of(tmp_path: Path) -> None:
    write(tmp_path, target_modules=["q_proj", "v_proj", "query_key_value"])
    assert any("query_key_value" in w for w in validate(tmp_path).warnings)


# ---- what PEFT lets through


def drop(*keys: str) -> Callable[[Tensors], None]:
    def change(made: Tensors) -> None:
        for key in keys:
            del made[key]

    return change


def put(key: str, value: Any) -> Callable[[Tensors], None]:
    return lambda made: made.__setitem__(key, value)


def poke(key: str, value: float, dtype: Any = np.float32) -> Callable[[Tensors], None]:
    def change(made: Tensors) -> None:
        made[key] = made[key].astype(dtype)
        made[key][1, 2] = value

    return change


ONES = np.ones((4, D), np.float32)
CORRUPT: list[tuple[str, Callable[[Tensors], None], str]] = [
    ("half a pair: B gone", drop(Q0B), Q0A),
    ("half a pair: A gone", drop(Q0A), Q0B),
    ("a configured target absent", drop(Q0A, Q0B), "model.layers.0.self_attn.q_proj"),
    ("an unknown module", put(f"{ROOT}0.self_attn.z_proj.lora_A.weight", ONES), "z_proj"),
    ("a layer beyond the model", put(f"{ROOT}7.self_attn.q_proj.lora_A.weight", ONES), "layers.7"),
    ("NaN", poke(Q0A, np.nan), Q0A),
    ("infinity", poke(Q0B, -np.inf), Q0B),
    ("NaN in float16", poke(Q0A, np.nan, np.float16), Q0A),
    ("infinity in bfloat16", poke(Q0A, np.inf, ml_dtypes.bfloat16), Q0A),
    ("int8", put(Q0A, np.ones((4, D), np.int8)), Q0A),
    ("float64", put(Q0A, np.ones((4, D), np.float64)), Q0A),
    ("float8", put(Q0A, np.ones((4, D), ml_dtypes.float8_e4m3fn)), Q0A),
    ("A too wide", put(Q0A, np.ones((4, D + 1), np.float32)), Q0A),
    ("B too tall", put(Q0B, np.ones((99, 4), np.float32)), Q0B),
    ("rank not the configured", put(Q0A, np.ones((5, D), np.float32)), Q0A),
    ("A a vector", put(Q0A, np.ones(4, np.float32)), Q0A),
    ("A a scalar", put(Q0A, np.ones((), np.float32)), Q0A),
    ("an empty A", put(Q0A, np.ones((0, D), np.float32)), Q0A),
    ("two names of one half", put(Q0A.replace("lora_A", "lora_A.default"), ONES), Q0A),
    ("two adapters", put(f"{ROOT}0.self_attn.k_proj.lora_A.other.weight", ONES), "several adapters"),
    ("DoRA's magnitudes", put(f"{ROOT}0.self_attn.q_proj.lora_magnitude_vector", np.ones(16, np.float32)), "use_dora"),
    ("a bias on B", put(f"{ROOT}0.self_attn.q_proj.lora_B.bias", np.ones(16, np.float32)), "lora_bias"),
    ("a trained bias", put(f"{ROOT}0.self_attn.q_proj.base_layer.bias", np.ones(16, np.float32)), "bias"),
    ("a norm's bias", put(f"{ROOT}0.input_layernorm.bias", np.ones(D, np.float32)), "bias"),
    (
        "embedding LoRA",
        put("base_model.model.model.embed_tokens.lora_embedding_A", np.ones((4, 97), np.float32)),
        "embed",
    ),
    ("a copied table", put("base_model.model.lm_head.weight", np.ones((97, D), np.float32)), "save_embedding_layers"),
    ("a base layer's copy", put("base_model.model.lm_head.base_layer.weight", ONES), "lm_head.base_layer"),
    (
        "a pair on the head, half of it under an embedding's name",
        lambda made: made.update(
            {
                "base_model.model.lm_head.lora_embedding_A": ONES,
                "base_model.model.lm_head.lora_B.weight": np.ones((97, 4), np.float32),
            }
        ),
        "lora_embedding_A",
    ),
    ("a saved norm", put("base_model.model.model.norm.weight", np.ones(D, np.float32)), "modules_to_save"),
    ("a classifier", put("base_model.model.score.weight", np.ones((2, D), np.float32)), "modules_to_save"),
    (
        "replaced rows",
        put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", ONES),
        "trainable",
    ),
    ("half of experts", put(f"{ROOT}0.mlp.experts.lora_A.weight", ONES), "Incomplete pair"),
    ("KaSA's diagonal", put(f"{ROOT}0.self_attn.q_proj.lora_diag", np.ones(4, np.float32)), "kasa_config"),
    ("noise", put("banana", ONES), "banana"),
    ("an endless name", put("x" * 5000, ONES), "characters"),
    ("all B zero", lambda made: [made[k].fill(0) for k in made if "lora_B" in k], "changes nothing"),
    ("all A minus zero", lambda made: [made[k].fill(-0.0) for k in made if "lora_A" in k], "changes nothing"),
    ("no tensors", lambda made: made.clear(), "no tensors"),
]


@pytest.mark.parametrize(("change", "names"), [c[1:] for c in CORRUPT], ids=[c[0] for c in CORRUPT])
def test_a_tensor_that_is_wrong_is_named(tmp_path: Path, change: Callable[[Tensors], Any], names: str) -> None:
    write(tmp_path, change)
    error = refused(tmp_path)
    assert names in f"{error.message} {error.param}", error.message


def test_an_untrained_adapter_may_be_zero_but_not_its_scale(tmp_path: Path) -> None:
    write(tmp_path, lambda made: [made[k].fill(0) for k in made if "lora_B" in k])  # type: ignore[func-returns-value]
    found = validate_adapter(tmp_path, llama_sites(), base=BASE, untrained=True)
    assert "are zero and change nothing" in found.warnings[0]
    write(tmp_path, lora_alpha=0)
    with pytest.raises(AdapterError, match="its scale is zero"):
        validate_adapter(tmp_path, llama_sites(), base=BASE, untrained=True)


TABLES: dict[str, Tensors] = {
    "lm_head": {
        "base_model.model.lm_head.lora_A.weight": ONES,
        "base_model.model.lm_head.lora_B.weight": np.ones((97, 4), np.float32),
    },
    "embed_tokens": {
        "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 97), np.float32),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((D, 4), np.float32),
    },
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_a_site_like_others(tmp_path: Path, table: str) -> None:
    """And a pair of it that the configuration does not target is refused like others."""
    write(tmp_path, lambda made: made.update(TABLES[table]), target_modules=["q_proj", "v_proj", table])
    (found,) = (s for s in pairs(validate(tmp_path).sites) if llama_sites()[s.site].module.endswith(table))
    for mine, key in ((found.a, min(TABLES[table])), (found.b, max(TABLES[table]))):
        assert np.array_equal(mine, TABLES[table][key])
    write(tmp_path, lambda made: made.update(TABLES[table]))
    assert refused(tmp_path).param == "target_modules"


def test_a_tables_pair_under_the_names_of_a_linear_layer_is_refused(tmp_path: Path) -> None:
    def swapped(made: Tensors) -> None:
        made["base_model.model.model.embed_tokens.lora_A.weight"] = np.ones((4, 97), np.float32)
        made["base_model.model.model.embed_tokens.lora_B.weight"] = np.ones((D, 4), np.float32)

    write(tmp_path, swapped, target_modules=["q_proj", "v_proj", "embed_tokens"])
    error = refused(tmp_path)
    assert "lora_embedding_A" in error.message and "embed_tokens" in str(error.param)


@pytest.mark.parametrize("table", ["lm_head", "embed_tokens"])
def test_a_table_that_is_targeted_without_tensors_is_refused_too(tmp_path: Path, table: str) -> None:
    write(tmp_path, target_modules=["q_proj", "v_proj", table])
    error = refused(tmp_path)
    assert table in error.message and error.param == "target_modules"


def test_zero_alpha_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, lora_alpha=0)
    assert refused(tmp_path).param == "lora_alpha"


def test_some_untrained_modules_are_warned_of(tmp_path: Path) -> None:
    write(tmp_path, lambda made: made[Q0B].fill(0))
    assert any("model.layers.0.self_attn.q_proj" in w and "1 of 4" in w for w in validate(tmp_path).warnings)


def test_an_adapter_for_another_base_says_so_with_both_shapes(tmp_path: Path) -> None:
    write_tiny_adapter(tmp_path, llama_sites(), targets=["down_proj"])
    wider = tuple(
        site if not site.module.endswith("down_proj") else replace(site, in_features=F * 2) for site in llama_sites()
    )
    error = refused(tmp_path, wider)
    assert "another base" in error.message and BASE.model in error.message
    assert error.data["found"] == [4, F] and error.data["expected"] == [4, 2 * F]


def test_an_adapter_that_matches_nothing_lists_ten_keys(tmp_path: Path) -> None:
    made = {k.replace("self_attn", "attention"): v for k, v in tiny_tensors(llama_sites(12), CONFIG).items()}
    write_adapter(tmp_path, CONFIG, made)
    error = refused(tmp_path)
    assert "None of its modules" in error.message and "and 14 more" in error.message


def test_velora_buffers_are_ignored_with_a_word(tmp_path: Path) -> None:
    write(tmp_path, put(f"{ROOT}0.self_attn.q_proj.lora_velora_embed", ONES))
    assert any("velora" in w for w in validate(tmp_path).warnings)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.alpha"], "kohya"),
        (["layers.0.self_attn.q_proj.lora_down.weight"], "kohya"),
        (["model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"], "lora_a"),
        (
            ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"],
            "full \\(merged\\) model",
        ),
        (["base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a"], "LoHa"),
        (["base_model.model.model.layers.0.self_attn.q_proj.lora_E"], "AdaLoRA"),
        (["prompt_embeddings"], "prompt"),
    ],
)
def test_other_formats_are_recognised(tmp_path: Path, keys: list[str], says: str) -> None:
    write_adapter(tmp_path, CONFIG, dict.fromkeys(keys, ONES))
    with pytest.raises(AdapterError, match=says):
        validate(tmp_path)


# ---- files


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def overlap(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [4, D], "data_offsets": [0, 4 * D * 4]}
    write_raw_safetensors(path, {Q0A: entry, Q0B: entry}, bytes(4 * D * 4))


def absurd_header(path: Path) -> None:
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (truncate, "truncated"),
        (overlap, "overlap"),
        (absurd_header, "header claims"),
        (lfs_pointer, "LFS pointer"),
        (lambda path: path.write_bytes(b""), "empty"),
        (a_pipe, "not a regular file"),
        (a_folder, "not a regular file"),
    ],
    ids=["truncated", "overlapping", "absurd header", "LFS pointer", "empty", "pipe", "folder"],
)
def test_a_broken_file_is_refused(tmp_path: Path, break_it: Callable[[Path], Any], says: str) -> None:
    write(tmp_path)
    break_it(tmp_path / "adapter_model.safetensors")
    assert says in refused(tmp_path).message


def test_a_pickle_is_refused_with_the_conversion(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    error = refused(tmp_path)
    assert "adapter_model.bin" in error.message and "save_pretrained" in error.message


def test_beside_a_pickle_the_safetensors_file_is_used(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert validate(tmp_path).sites


def test_a_full_model_in_an_adapters_place_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "full model" in refused(tmp_path).message


def test_a_place_without_anything(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound):
        validate(tmp_path / "nowhere")
    assert "adapter_config.json" in refused(tmp_path).message


def test_the_limits_are_checked_before_tensors_are_read(tmp_path: Path) -> None:
    write(tmp_path, poke(Q0A, np.nan))  # would be found on reading
    with pytest.raises(InsufficientMemory) as caught:
        validate_adapter(tmp_path, llama_sites(), base=BASE, max_bytes=100)
    assert caught.value.data["limit_bytes"] == 100 and caught.value.data["requested_bytes"] > 100
    with pytest.raises(AdapterError, match="the limit is 1000"):
        validate_adapter(tmp_path, llama_sites(), base=BASE, max_file_bytes=1000)


def test_inspect_reads_no_tensor_data(tmp_path: Path) -> None:
    write(tmp_path, poke(Q0A, np.nan))
    report = inspect_adapter(tmp_path, llama_sites(), BASE)
    assert report.error is None and report.modules == 4 and report.rank == 4
    alone = inspect_adapter(tmp_path)
    assert alone.error is None and alone.modules == 4 and alone.nbytes == report.nbytes


def test_equal_bytes_are_one_generation_wherever_they_lie(tmp_path: Path) -> None:
    write(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert validate(tmp_path / "a").generation == validate(tmp_path / "b").generation
    write(tmp_path / "b", lora_alpha=9)
    assert validate(tmp_path / "a").generation != validate(tmp_path / "b").generation
