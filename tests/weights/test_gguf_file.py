"""GGUF files: the tensors and config that went in come out, as Hugging Face has them; damage is refused."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from gguf_models import (
    FAMILIES,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    interleave,
    metadata_of,
    write_tiny_gguf,
)
from gguf_writer import GgufBlocks, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from truffula.errors import CheckpointError, TruffulaError, UnsupportedModel
from truffula.kernels.mapped import release_pages
from truffula.model.load import plan_model
from truffula.model.read import read_config
from truffula.weights.gguf.checkpoint import GgufCheckpoint
from truffula.weights.gguf.header import OTHER_TYPES
from truffula.weights.gguf.quants import FORMATS, dequantize
from truffula.weights.open import open_checkpoint
from truffula.weights.texts import read_texts

PACKED = sorted(kind for kind, format in FORMATS.items() if format.unpack is not None)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: FORMATS[kind].name)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 40), blocks=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_blocks_are_unpacked_bit_for_bit(kind: int, seed: int, rows: int, blocks: int) -> None:
    format = FORMATS[kind]
    data = np.random.default_rng(seed).integers(0, 256, (rows, blocks * format.nbytes), np.uint8)
    with np.errstate(all="ignore"):
        wanted = quants.dequantize(data, GGMLQuantizationType(kind))
    found = dequantize(format, data.reshape(-1), (rows, blocks * format.size))
    assert same_bits(found, wanted)


def test_the_table_of_types_is_the_formats_own() -> None:
    for kind, format in FORMATS.items():
        assert GGMLQuantizationType(kind).name == format.name
    for kind, name in OTHER_TYPES.items():
        assert kind not in FORMATS
        assert kind not in set(GGMLQuantizationType) or GGMLQuantizationType(kind).name == name


def test_our_writer_writes_what_the_formats_reader_reads(tmp_path: Path) -> None:
    pairs = {"general.architecture": "x", "a.b": 7, "a.c": [1.5, -2.0], "a.d": ["é", ""], "a.e": True, "a.f": -3}
    tensors = {"t": np.arange(6, dtype=np.float32).reshape(2, 3), "h": np.ones(5, np.float16)}
    reader = GGUFReader(write_gguf(tmp_path / "x.gguf", pairs, tensors, alignment=64))
    assert {key: reader.fields[key].contents() for key in pairs} == pairs
    assert {tensor.name: tensor.data.tolist() for tensor in reader.tensors} == {
        k: v.tolist() for k, v in tensors.items()
    }


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__)
def test_tensors_come_out_as_they_went_in(tmp_path: Path, architecture: str, head: bool, dtype: Any) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", architecture, head=head, dtype=dtype)
    checkpoint = open_checkpoint(tiny.path)
    assert checkpoint.format == "gguf"
    assert checkpoint.tensors.keys() == tiny.tensors.keys()
    for name, wanted in tiny.tensors.items():
        assert same_bits(checkpoint.read(name), wanted), name
        assert checkpoint.tensors[name].shape == wanted.shape
        release_pages(checkpoint.raw(name))
        assert same_bits(checkpoint.read(name), wanted), name
    assert "tie_word_embeddings" not in checkpoint.config
    assert checkpoint.generation_config == {"eos_token_id": [2]}
    assert checkpoint.warnings == ()
    checkpoint.close()


def from_transformers(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    config = model.config.to_dict()
    # Keys that the class stores under another name: num_experts as num_local_experts.
    config |= {key: config[name] for key, name in model.config.attribute_map.items() if name in config}
    return {name: value.numpy() for name, value in model.state_dict().items()}, config


# transformers takes the widths of heads and experts, and gemma's scale, from the class's default: files are made to
# agree with it. It takes Mixtral's files (of the architecture llama) for Llama's: they have their own test.
AGREED = {
    "llama": {},
    "qwen2": {"hidden": 64},
    "qwen3": {"width": 128},
    "qwen2moe": {"hidden": 64, "expert_feed_forward_length": 1408, "expert_shared_feed_forward_length": 5632},
    "qwen3moe": {"expert_feed_forward_length": 768},
    "gemma2": {"width": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {"width": 256},
}


def as_transformers_stacks(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``tensors`` with the experts of a layer as transformers has them: gate above up in one, names without .weight."""
    found = {}
    for name, values in tensors.items():
        stem = name.removesuffix("gate_proj.weight")
        if ".experts." not in name:
            found[name] = values
        elif name.endswith("down_proj.weight"):
            found[name.removesuffix(".weight")] = values
        elif stem != name:
            found[f"{stem}gate_up_proj"] = np.concatenate([values, tensors[f"{stem}up_proj.weight"]], 1)
    return found


@pytest.mark.parametrize("architecture", FAMILIES)
def test_tensors_and_config_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    head = architecture != "gemma2"  # transformers leaves a separate head out there
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", architecture, head=head, **AGREED[architecture])
    checkpoint = open_checkpoint(tiny.path)
    tensors, config = from_transformers(tiny.path)
    tied = set() if head else {"lm_head.weight"}
    read = as_transformers_stacks({name: checkpoint.read(name) for name in checkpoint.tensors})
    assert read.keys() == tensors.keys() - tied
    for name, values in read.items():
        assert same_bits(values, tensors[name]), name
    differing = {key: (value, config.get(key)) for key, value in checkpoint.config.items() if config.get(key) != value}
    # transformers keeps the float32 spelling of a number, and forgets which class it built
    assert differing.pop("rms_norm_eps")[1] == pytest.approx(1e-6, rel=1e-6)
    differing.pop("architectures")
    assert differing == {}


def test_a_llama_file_with_experts_is_mixtral(tmp_path: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", expert_count=5, expert_used_count=2)
    checkpoint = open_checkpoint(tiny.path)
    assert checkpoint.warnings == ()
    assert checkpoint.tensors.keys() == tiny.tensors.keys()
    for name, wanted in tiny.tensors.items():
        assert same_bits(checkpoint.read(name), wanted), name
    keys = ("model_type", "num_local_experts", "num_experts_per_tok", "intermediate_size")
    assert [checkpoint.config[key] for key in keys] == ["mixtral", 5, 2, INNER]
    assert plan_model(checkpoint).size.model_type == "mixtral"
    for key, value in (("expert_count", 4), ("expert_used_count", None), ("expert_weights_scale", 2.0)):
        pairs = {k: v for k, v in {**tiny.metadata, f"llama.{key}": value}.items() if v is not None}
        with pytest.raises(TruffulaError, match=f"llama.{key}") as caught:
            open_checkpoint(write_gguf(tmp_path / "x.gguf", pairs, tiny.stored))
        assert caught.value.param == f"llama.{key}"


@pytest.mark.parametrize("kind", [2, 3, 6, 7, 8], ids=lambda kind: FORMATS[kind].name)
def test_packed_rows_are_put_back_in_order(tmp_path: Path, kind: int) -> None:
    """q and k of a llama file, quantised: rows move as whole blocks, and come out as if unpacked first."""
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", hidden=64)
    stored: dict[str, Any] = dict(tiny.stored)
    wanted = {}
    for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS), ("attn_v", 0)):
        name, ours = f"blk.0.{part}.weight", f"model.layers.0.self_attn.{part[-1]}_proj.weight"
        data = quants.quantize(tiny.tensors[ours], GGMLQuantizationType(kind))
        wanted[ours] = quants.dequantize(data, GGMLQuantizationType(kind))
        stored[name] = GgufBlocks(kind, stored[name].shape, (interleave(data, heads) if heads else data).tobytes())
    checkpoint = open_checkpoint(write_gguf(tmp_path / "packed.gguf", tiny.metadata, stored))
    for name, values in wanted.items():
        assert same_bits(checkpoint.read(name), values), name
        assert checkpoint.tensors[name].dtype == FORMATS[kind].name
        assert checkpoint.raw(name).nbytes == checkpoint.tensors[name].nbytes


def test_the_values_of_a_packed_vector_are_put_in_order(tmp_path: Path) -> None:
    """llama.cpp stores vectors as numbers: one in blocks has no rows of whole bytes."""
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    blocks = np.full(1, 1.0, "<f2").tobytes() + bytes(range(32)) + np.full(1, 2.0, "<f2").tobytes() + bytes(range(32))
    packed = {"blk.0.attn_q.bias": GgufBlocks(8, (64,), blocks), "blk.0.attn_k.bias": GgufBlocks(8, (32,), blocks[:34])}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", tiny.metadata, {**tiny.stored, **packed}))
    stored = np.concatenate([np.arange(32), 2 * np.arange(32)]).reshape(4, 8, 2)
    found = checkpoint.read("model.layers.0.self_attn.q_proj.bias")
    np.testing.assert_array_equal(found, stored.swapaxes(1, 2).reshape(-1))
    assert checkpoint.read("model.layers.0.self_attn.k_proj.bias").shape == (32,)


def test_rows_that_do_not_divide_into_the_heads_are_refused(tmp_path: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    odd = {"blk.0.attn_q.bias": np.zeros(36, np.float32)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", tiny.metadata, {**tiny.stored, **odd}))
    with pytest.raises(CheckpointError, match=r"x\.gguf.*q_proj\.bias.*36 rows .* in F32"):
        checkpoint.read("model.layers.0.self_attn.q_proj.bias")


def test_both_versions_and_other_alignments(tmp_path: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", "qwen2")
    for version, alignment in ((2, 32), (3, 8), (3, 256)):
        path = write_gguf(tmp_path / "x.gguf", tiny.metadata, tiny.stored, version=version, alignment=alignment)
        checkpoint = open_checkpoint(path)
        assert all(same_bits(checkpoint.read(name), wanted) for name, wanted in tiny.tensors.items())


def config_of(tmp_path: Path, architecture: str = "llama", **changed: Any) -> dict[str, Any]:
    return GgufCheckpoint(write_tiny_gguf(tmp_path / "x.gguf", architecture, **changed).path).config


def test_what_a_config_says_of_rotation(tmp_path: Path) -> None:
    plain = {"rope_type": "default", "rope_theta": 50000.0}
    assert config_of(tmp_path)["rope_parameters"] == plain
    assert config_of(tmp_path, rope__freq_base=None)["rope_parameters"] == {**plain, "rope_theta": 10000.0}
    linear = config_of(tmp_path, rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert linear["rope_parameters"] == {**plain, "rope_type": "linear", "factor": 4.0}
    old = config_of(tmp_path, rope__scale_linear=2.0)
    assert old["rope_parameters"] == {**plain, "rope_type": "linear", "factor": 2.0}
    yarn = config_of(
        tmp_path,
        "qwen2",
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=128,
        rope__scaling__yarn_beta_fast=16.0,
    )
    assert yarn["rope_parameters"] == {
        **plain,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
    }
    gemma = config_of(tmp_path, "gemma3", rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert gemma["rope_parameters"] == {
        "full_attention": {**plain, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }


def llama3_factors(theta: float, width: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """As llama.cpp's converter makes the table."""
    found = []
    for frequency in 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / width):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize(("low", "high", "original"), [(1, 4, 8192), (2, 8, 16384)])
def test_a_table_of_factors_rotates_as_the_llama3_scaling_it_was_made_of(
    tmp_path: Path, low: float, high: float, original: int
) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", rope__freq_base=500000.0, width=64)
    stored = {**tiny.stored, "rope_freqs.weight": llama3_factors(500000.0, 64, 8.0, low, high, original)}
    config = open_checkpoint(write_gguf(tmp_path / "x.gguf", tiny.metadata, stored)).config
    scaled = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": low}
    scaled |= {"high_freq_factor": high, "original_max_position_embeddings": original}
    found, wanted = (read_config({**config, "rope_parameters": p}).spec for p in (config["rope_parameters"], scaled))
    np.testing.assert_allclose(found.ropes[0].inv_freq, wanted.ropes[0].inv_freq, rtol=2e-6)


@pytest.mark.parametrize("table", [[0.0, 1.0, 1.0], [np.nan, 1, 1], [-1, 1, 1]])
def test_factors_that_are_no_positive_numbers_are_refused(tmp_path: Path, table: list[float]) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", width=6)
    stored = {**tiny.stored, "rope_freqs.weight": np.array(table, np.float32)}
    with pytest.raises(CheckpointError, match="rope_freqs"):
        open_checkpoint(write_gguf(tmp_path / "x.gguf", tiny.metadata, stored))


def test_a_file_with_factors(tmp_path: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", rope__freq_base=500000.0, width=64)
    table = llama3_factors(500000.0, 64, 8.0, 1, 4, 8192)
    stored = {**tiny.stored, "rope_freqs.weight": table}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", tiny.metadata, stored))
    assert checkpoint.config["rope_parameters"]["rope_type"] == "factors"
    assert checkpoint.config["rope_parameters"]["factors"] == table.tolist()
    assert checkpoint.tensors.keys() == tiny.tensors.keys()
    with pytest.raises(CheckpointError, match="factors"):
        open_checkpoint(write_gguf(tmp_path / "x.gguf", tiny.metadata, {**stored, "rope_freqs.weight": table[:5]}))


def test_details_of_the_families(tmp_path: Path) -> None:
    mistral = config_of(tmp_path, attention__sliding_window=64)
    assert (mistral["model_type"], mistral["sliding_window"]) == ("mistral", 64)
    gemma = config_of(tmp_path, "gemma2")
    assert (gemma["attn_logit_softcapping"], gemma["final_logit_softcapping"]) == (40.0, 20.0)
    assert gemma["query_pre_attn_scalar"] == WIDTH
    kinds = config_of(tmp_path, "gemma3")["layer_types"]
    assert [kind == "full_attention" for kind in kinds] == [(layer + 1) % 6 == 0 for layer in range(LAYERS)]
    kinds = config_of(tmp_path, "gemma3", attention__sliding_window_pattern=[True, False] * 3 + [True])["layer_types"]
    assert kinds == ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]
    assert config_of(tmp_path, attention__key_length=None, attention__value_length=None, hidden=64)["head_dim"] == WIDTH
    assert config_of(tmp_path, attention__head_count_kv=[KV_HEADS] * LAYERS)["num_key_value_heads"] == KV_HEADS
    assert config_of(tmp_path, expert_count=0)["vocab_size"] == VOCAB


REFUSED = {
    "another architecture": ({"general.architecture": "mamba"}, UnsupportedModel, "mamba"),
    "no architecture": ({"general.architecture": 7}, UnsupportedModel, "general.architecture"),
    "split": ({"split.count": 3}, CheckpointError, "part 1 of 3"),
    "experts": ({"llama.expert_count": 8}, UnsupportedModel, "llama.expert_count"),
    "unknown attention": ({"llama.attention.temperature": 2.0}, UnsupportedModel, "llama.attention.temperature"),
    "partial rotation": ({"llama.rope.dimension_count": 8}, UnsupportedModel, "rope.dimension_count"),
    "values of another width": ({"llama.attention.value_length": 8}, UnsupportedModel, "value_length is 8"),
    "heads by layer": ({"llama.attention.head_count_kv": [2, 1] * 3 + [2]}, UnsupportedModel, "head_count_kv"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, UnsupportedModel, "longrope"),
    "yarn's own factor": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.attn_factor": 2.0},
        UnsupportedModel,
        "attn_factor",
    ),
    "no layers": ({"llama.block_count": 0}, CheckpointError, "llama.block_count"),
    "more layers than tensors": ({"llama.block_count": 2**32 - 32}, CheckpointError, "llama.block_count"),
    "width as text": ({"llama.embedding_length": "48"}, CheckpointError, "llama.embedding_length"),
    "eps not finite": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, CheckpointError, "rms_epsilon"),
    "no context": ({"llama.context_length": None}, CheckpointError, "llama.context_length"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, case: str) -> None:
    changed, error, words = REFUSED[case]
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    pairs = {key: value for key, value in {**tiny.metadata, **changed}.items() if value is not None}
    with pytest.raises(error) as caught:
        open_checkpoint(write_gguf(tmp_path / "x.gguf", pairs, tiny.stored))
    assert type(caught.value) is error
    assert words in caught.value.message


def test_unknown_tensors_types_and_keys(tmp_path: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    extra = {
        "blk.0.ffn_gate_exps.weight": np.zeros((2, 2), np.float32),
        "blk.01.attn_q.weight": np.zeros(2, np.float32),
    }
    with pytest.raises(CheckpointError, match="no such tensors: ") as caught:
        open_checkpoint(write_gguf(tmp_path / "x.gguf", tiny.metadata, {**tiny.stored, **extra}))
    assert all(name in caught.value.message for name in extra)
    for kind in (9, 15, 41, 999):
        odd = GgufBlocks(kind, (256, 256), bytes(1000))
        with pytest.raises(UnsupportedModel, match="output") as refused:
            open_checkpoint(write_gguf(tmp_path / "x.gguf", tiny.metadata, {**tiny.stored, "output.weight": odd}))
        assert OTHER_TYPES.get(kind, "type 999") in refused.value.message
    warned = open_checkpoint(write_tiny_gguf(tmp_path / "y.gguf", "llama", something_new=3).path)
    assert "llama.something_new" in warned.warnings[0]
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        warned.read("x")


BROKEN = {
    "empty": (b"", "empty"),
    "another format": (b"PK\x03\x04" + bytes(40), "does not begin"),
    "a pointer": (b"version https://git-lfs.example/spec/v1\n", "git lfs pull"),
    "cut in the counts": (b"GGUF" + struct.pack("<I", 3) + b"\1", "truncated"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "version 9": (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "absurd pairs": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "truncated or damaged"),
    "absurd tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "truncated or damaged"),
    "absurd string": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(20), "truncated or damaged"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, case: str) -> None:
    raw, words = BROKEN[case]
    (tmp_path / "broken.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"broken\.gguf") as caught:
        open_checkpoint(tmp_path / "broken.gguf")
    assert words in caught.value.message


def test_damaged_lists_of_tensors(tmp_path: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    whole = tiny.path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-64])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(tmp_path / "cut.gguf")
    for name, kind, shape, words in (
        ("output.weight", 8, (VOCAB, HIDDEN), "multiple of the Q8_0 block size"),
        ("output.weight", 0, (2**40, 2**40), "truncated"),
        ("output.weight", 0, (1,) * 9, "dimensions"),
    ):
        stored = {**tiny.stored, name: GgufBlocks(kind, shape, b"")}
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(write_gguf(tmp_path / "x.gguf", tiny.metadata, stored))
    # the second tensor's offset set to the first's
    at = whole.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4
    (tmp_path / "x.gguf").write_bytes(whole[:at] + bytes(8) + whole[at + 8 :])
    with pytest.raises(CheckpointError, match="overlap"):
        open_checkpoint(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="power of two"):
        open_checkpoint(write_gguf(tmp_path / "x.gguf", {**tiny.metadata, "general.alignment": 48}, tiny.stored))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_damage_gives_anything_but_our_errors(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        stored = {"token_embd.weight": np.zeros((4, 8), np.float32), "rope_freqs.weight": np.ones(8, np.float32)}
        write_gguf(path, {**metadata_of("llama"), "llama.embedding_length": 8}, stored)
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(raw)))
            raw[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
        path.write_bytes(bytes(raw))
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.tensors:
                checkpoint.read(name)
            read_texts(path)
        except TruffulaError as error:
            assert isinstance(error, CheckpointError | UnsupportedModel)


def test_an_empty_tensor_that_no_array_can_be_is_refused(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "x.gguf", metadata_of("llama"), {"token_embd.weight": GgufBlocks(0, (2**40, 2**40, 0), b"")}
    )
    with pytest.raises(CheckpointError, match=r"x\.gguf.*token_embd\.weight.*too large for an array"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embedding_length", "32"),
        ("rope.freq_base", "5e4"),
        ("attention.value_length", 99),
        ("general.architecture", ""),
    ],
)
def test_what_is_said_of_a_key_names_the_file(tmp_path: Path, key: str, value: Any) -> None:
    name = key if key.startswith("general") else f"llama.{key}"
    path = write_gguf(tmp_path / "x.gguf", {**metadata_of("llama"), name: value}, {})
    with pytest.raises(TruffulaError, match=r"x\.gguf: ") as caught:
        open_checkpoint(path)
    assert caught.value.param
