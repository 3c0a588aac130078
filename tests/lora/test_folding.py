"""A folded model, loaded by transformers alone, computes what transformers and peft do with base and adapter."""

from __future__ import annotations

import json
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from fallback_types import small_config, write_small
from gguf_models import write_tiny_gguf
from parity import prompt_ids
from parity_adapters import FAMILIES, KINDS, write_base
from parity_kinds import Kind
from quantised_files import Fixture, as_model, write_folder
from transformers import AutoModelForCausalLM

from truffula.errors import AdapterError, UnsupportedModel
from truffula.lora.folding import fold_adapter
from truffula.testing.adapters import tiny_config, tiny_tensors, write_adapter
from truffula.testing.files import write_safetensors
from truffula.testing.oracle import Oracle
from truffula.weights.folder import INDEX
from truffula.weights.open import open_checkpoint
from truffula.weights.safetensors import SafetensorsFile

PROMPT = [5, 9, 4, 31, 7, 50, 12, 60]
REFUSED = {"aLoRA": "invocation", "lora_bias": "the base has none there"} | dict.fromkeys(
    ("prompt tuning", "P-tuning", "prefix tuning"), "virtual tokens"
)
FAST = {
    ("llama", False): {"plain", "DoRA", "bias all", "saved norms and layer", "trained tokens"},
    ("gemma3_text", True): {"tied tokens", "embedding and head", "saved embedding", "saved norms and layer"},
    ("gpt2", True): {"plain", "bias all", "saved norms and layer"},
    ("mixtral", False): {"experts"},
}


def logits(folder: Path, prompt: list[int] = PROMPT) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    with torch.inference_mode():
        return model(input_ids=torch.tensor([prompt])).logits[0].numpy()


def cases() -> list:
    found = []
    for family in FAMILIES:
        for tied in (False, True):
            for kind in KINDS:
                quick = kind.name in FAST.get((family, tied), ())
                marks = () if quick else (pytest.mark.slow,)
                found.append(pytest.param(family, tied, kind, marks=marks, id=f"{family}-{tied}-{kind.name}"))
    return found


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # peft, of its own patterns of parameters
@pytest.mark.parametrize(("family", "tied", "kind"), cases())
def test_every_kind_on_every_family(tmp_path: Path, family: str, tied: bool, kind: Kind) -> None:
    base = write_base(tmp_path / "base", family, tied=tied)
    if not kind.applies(base):
        pytest.skip("peft does not make it for this base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = kind.make(tmp_path / "adapter", base, 3)
    try:
        folded = fold_adapter(base, adapter, tmp_path / "folded")
    except AdapterError as error:
        reason = next((text for name, text in REFUSED.items() if name.lower() in kind.name.lower()), None)
        assert reason is not None and reason in error.message, error.message
        return
    text = json.loads((base / "config.json").read_text())
    prompt = PROMPT + prompt_ids(0, text.get("text_config", text)["vocab_size"])  # the kinds train tokens of it
    expected = Oracle(base, tied=tied, adapter=adapter).logits(prompt)
    got = logits(tmp_path / "folded", prompt)
    scale = max(1.0, float(np.abs(expected).max()) / 10)
    # Float32 on both sides, over 31 tokens: qwen3_5's recurrent layers differ by 1.0e-4.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2 * kind.tolerance * scale)
    assert np.abs(got - logits(base, prompt)).max() > 1e-2, "the adapter does not show"
    config = json.loads((tmp_path / "folded/config.json").read_text())
    assert folded.untied == (tied and config.get("tie_word_embeddings") is False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", "llama", tied=False)


def adapter_of(folder: Path, base: Path, **fields) -> Path:
    config = tiny_config(**{"rank": 3, "alpha": 6, "targets": "all-linear"} | fields)
    write_adapter(folder, config, tiny_tensors(base, config))
    return folder


def test_shards_dtypes_and_other_files_stay(tmp_path: Path, base: Path) -> None:
    whole = SafetensorsFile(base / "model.safetensors")
    names = list(whole.tensors)
    half = {name: whole.read(name).astype(np.float16) for name in names}
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, own in shards.items():
        write_safetensors(base / shard, {name: half[name] for name in own}, {"format": "pt"})
    (base / "model.safetensors").unlink()
    weight_map = {name: shard for shard, own in shards.items() for name in own}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"x")
    adapter = adapter_of(tmp_path / "adapter", base, targets=["q_proj"])
    (tmp_path / "out").mkdir()
    folded = fold_adapter(base, adapter, tmp_path / "out")
    assert (folded.changed, folded.untied) == (2, False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["config.json", INDEX, "tokenizer.json", *shards]
    )
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"] == weight_map
    for shard, own in shards.items():
        file = SafetensorsFile(tmp_path / "out" / shard)
        assert set(file.tensors) == set(own)
        for name in own:
            read = file.read(name)
            assert read.dtype == np.float16
            assert np.array_equal(read, half[name]) == ("q_proj.weight" not in name)


def test_a_value_that_its_dtype_cannot_hold_is_refused(tmp_path: Path, base: Path) -> None:
    whole = SafetensorsFile(base / "model.safetensors")
    tensors = {name: whole.read(name).astype(np.float16) for name in whole.tensors}
    write_safetensors(base / "model.safetensors", tensors)
    adapter = adapter_of(tmp_path / "adapter", base, alpha=1e7)
    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterError, match="cannot hold"):
        fold_adapter(base, adapter, tmp_path / "out")


def test_a_quantised_base_is_dequantised_on_request(tmp_path: Path) -> None:
    config, tensors = as_model(Fixture("gptq-4"))
    quantised = write_folder(tmp_path / "quantised", {**config, "torch_dtype": "float32"}, tensors)
    with closing(open_checkpoint(quantised)) as opened:
        values = {name: np.array(opened.read(name), np.float32) for name in opened.tensors}
    del config["quantization_config"]
    plain = write_folder(tmp_path / "plain", config, values)
    adapter = adapter_of(tmp_path / "adapter", plain, alpha=1)
    with pytest.raises(UnsupportedModel, match="--dequantize"):
        fold_adapter(quantised, adapter, tmp_path / "refused")
    fold_adapter(quantised, adapter, tmp_path / "folded", dequantize=True)
    fold_adapter(plain, adapter, tmp_path / "expected")
    assert "quantization_config" not in json.loads((tmp_path / "folded/config.json").read_text())
    np.testing.assert_allclose(logits(tmp_path / "folded"), logits(tmp_path / "expected"), atol=1e-4)
    assert np.abs(logits(tmp_path / "folded") - logits(plain)).max() > 1e-2


def test_bases_that_are_not_folded(tmp_path: Path, base: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", base)
    write_tiny_gguf(tmp_path / "model.gguf", "llama")
    for place in (tmp_path / "model.gguf", write_small(tmp_path / "small", small_config("persimmon"))):
        with pytest.raises(UnsupportedModel):
            fold_adapter(place, adapter, tmp_path / "out")
