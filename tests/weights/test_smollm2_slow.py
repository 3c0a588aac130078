"""The real file: SmolLM2-135M-Instruct, fetched as a user fetches it, against transformers' reading of the same
file.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from truffula.weights.finite import first_non_finite
from truffula.weights.gguf.checkpoint import GgufCheckpoint
from truffula.weights.open import open_checkpoint
from truffula.weights.sources import resolve_source
from truffula.weights.texts import read_texts

pytestmark = pytest.mark.slow

TEXTS = [
    "Hello world",
    "  two spaces 123 4567",
    "don't stop; it's é à ü — “quotes”",
    "def f(x):\n    return x**2\n\n\n\tpass\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "日本語のテキスト 漢字",
    "😀👨‍👩‍👧 emoji 🦙",
    "",
    " ",
    "\n\n \n",
    "12 345.67e-8 x1y2",
    "tab\there\r\ncrlf \x00\x01",
]


@pytest.fixture(scope="module")
def checkpoint() -> GgufCheckpoint:
    found = open_checkpoint(resolve_source("smollm2", cache_dir=None, offline=False))
    assert isinstance(found, GgufCheckpoint)
    return found


def parts(path: Path) -> tuple[Path, str]:
    real = path.resolve()
    return real.parent, real.name


def test_every_tensor_and_the_config(checkpoint: GgufCheckpoint) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    folder, name = parts(checkpoint.path)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    wanted = {key: value.numpy() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    assert checkpoint.tensors.keys() == wanted.keys()
    for key, value in wanted.items():
        found = checkpoint.read(key)
        assert np.array_equal(found.view(np.uint32), value.view(np.uint32)), key
        assert first_non_finite(found) is None
    config = model.config.to_dict()
    for key, value in checkpoint.config.items():
        if key == "rms_norm_eps":
            assert np.float32(value) == np.float32(config[key])
        elif key != "architectures":
            assert value == config[key], key
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in checkpoint.tensors


def test_the_tokenizer(checkpoint: GgufCheckpoint) -> None:
    from transformers import AutoTokenizer

    folder, name = parts(checkpoint.path)
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    files = read_texts(checkpoint.path).tokenizer
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == theirs(text).input_ids, text
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert ours.get_vocab_size() == checkpoint.config["vocab_size"]
    # transformers forgets that this tokenizer cuts digits apart before all else; the model's own does not
    assert ours.encode("a  1").tokens == ["a", "ĠĠ", "1"]
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert "<|im_start|>" in config["chat_template"]
