"""Adapters trained after ``resize_token_embeddings``, as ``save_pretrained`` writes them, against the resized
model with peft: on bases whose tables have rows for the added tokens (published ones are often padded)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from kernel_backends import SINGLE, on_the_best
from served import OPTIONS, write_model
from served_base import Served
from tiny_tokenizers import byte_level_json
from tokenizers import Tokenizer as Library

from truffula import LLM, SamplingParams
from truffula.errors import AdapterError, InvalidRequest
from truffula.kernels.backend import Backend, QuantisedArray
from truffula.kernels.cpu.formats import BLOCK_KINDS
from truffula.lora.folding import fold_adapter
from truffula.lora.peft import BaseFacts, validate_adapter
from truffula.model.load import zeros_like
from truffula.testing.adapters import write_adapter
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint
from truffula.weights.gguf.quants import values_of_blocks
from truffula.weights.quantised.packing import BY_KIND

TOLERANCE = 1e-4
BASES: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 97, "tie_word_embeddings": False},
    "qwen2": {"vocab_size": 96, "tie_word_embeddings": True},
}
FEWER, MORE = 91, 101
REST = [("llama", FEWER), ("qwen2", MORE)]
CASES: dict[str, dict[str, Any]] = {
    "tables": {"target_modules": ["q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "pairs": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "dora": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "rows": {"target_modules": ["k_proj"], "trainable_token_indices": [5, FEWER - 1, 88]},
    "tied": {"target_modules": ["embed_tokens", "k_proj"], "ensure_weight_tying": True},
}


def trained(folder: Path, base: Path, rows: int, ids: list[int], **settings: Any) -> npt.NDArray[np.float32]:
    """An adapter of the base resized to ``rows`` rows, with random weights; its logits of ``ids``."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(len(settings))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(rows)
    made = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **settings))
    for name, parameter in made.named_parameters():
        if parameter.requires_grad and ("modules_to_save" in name or "token_adapter" in name or "embedding" in name):
            torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(folder, save_embedding_layers=True)
    with torch.no_grad():
        return made.eval()(torch.tensor([ids])).logits[0].numpy()


@on_the_best
@pytest.mark.parametrize(
    ("model_type", "rows"),
    [("llama", MORE), ("qwen2", FEWER), *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_resized_tables_agree_with_peft(tmp_path: Path, model_type: str, backend: Backend, rows: int) -> None:
    """``resize_token_embeddings(len(tokenizer))`` takes padding from a base, and adds rows to one without."""
    path = write_tiny_checkpoint(tmp_path / "model", tiny_config(model_type, **BASES[model_type]), seed=5)
    served, plain = Served(path, backend, more_ids=8), Served(path, backend)
    own = BASES[model_type]["vocab_size"]
    ids = [i % min(rows, own) for i in served.prompt(3)]
    (base,) = plain.run([(None, ids)])
    np.testing.assert_array_equal(served.run([(None, ids)])[0][:, :own], base)
    slots = []
    for name, settings in CASES.items():
        if name == "tied" and not served.tied:
            continue
        asked = [*ids[:-3], rows - 1, *ids[-2:]]
        theirs = trained(tmp_path / name, path, rows, asked, **settings)
        facts = validate_adapter(tmp_path / name, served.program.sites, base=BaseFacts("b", served.weights)).facts
        assert (facts.vocab_size, theirs.shape[1]) == (rows, rows), name
        slots.append(slot := served.add(tmp_path / name))
        (mine,) = served.run([(slot, asked)])
        limit = TOLERANCE * max(1.0, float(np.abs(theirs).max()) / 10)
        np.testing.assert_allclose(mine[:, :rows], theirs, atol=limit, err_msg=name)
        assert np.abs(theirs[:-3, :FEWER] - base[:-3, :FEWER]).max() > 30 * limit, f"{name} does not show"
        if rows < own:
            np.testing.assert_array_equal(plain.run([(plain.add(tmp_path / name), asked)])[0], mine[:, :own])
    *_, last = served.run([*((slot, ids) for slot in slots), (None, ids)])
    np.testing.assert_array_equal(last[:, :own], base)


def test_tables_that_disagree_or_are_larger_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = write_tiny_checkpoint(tmp_path / "model", tiny_config("llama", **BASES["llama"]), seed=5)
    served = Served(path, SINGLE["reference"])
    folder = tmp_path / "larger"
    trained(folder, path, 99, [1, 2], **CASES["tables"])
    with pytest.raises(
        AdapterError, match=r"has 99 rows, but the base's table has 97\..*--adapter-tokens 2 or more, or merge"
    ):
        served.add(folder)
    trained(folder, path, FEWER, [1, 2], **CASES["pairs"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors = {k: v[:90] if k.endswith("lm_head.base_layer.weight") else v for k, v in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AdapterError, match=r"lm_head.base_layer.weight has 90 rows, and others of its tables 91"):
        served.add(folder)


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_rows_for_added_tokens_are_stored_as_those_of_a_quantised_table(kind: str) -> None:
    format = BY_KIND[kind]
    blocks = np.random.default_rng(0).integers(0, 255, (2, 1, format.nbytes), np.uint8)
    table = QuantisedArray(kind, blocks, (2, format.size), partial(values_of_blocks, format))
    more = zeros_like(table, (3, format.size))
    assert isinstance(more, QuantisedArray) and more.kind == kind
    np.testing.assert_array_equal(more.dequantise(), np.zeros((3, format.size), np.float32))


def test_virtual_tokens_are_behind_the_rows_for_added_ones(tmp_path: Path) -> None:
    """They are no rows of the table, whose rows gemma scales."""
    path = write_tiny_checkpoint(tmp_path / "model", tiny_config("gemma3_text", vocab_size=61), seed=5)
    values = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    found = []
    for more_ids in (0, 8):
        served = Served(path, SINGLE["reference"], more_ids=more_ids)
        width = next(site.out_features for site in served.program.sites if site.kind == "embed")
        config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "token_dim": width}
        folder = write_adapter(tmp_path / str(more_ids), config, {"prompt_embeddings": np.resize(values, (3, width))})
        facts = validate_adapter(folder, served.program.sites, base=BaseFacts("b", served.weights)).facts
        assert facts.virtual_ids == tuple(range(61 + more_ids, 64 + more_ids))
        found.append(served.run([(served.add(folder), [*facts.virtual_ids, 5, 6, 7])])[0])
    np.testing.assert_array_equal(found[0], found[1][:, :61])


def test_an_adapter_with_a_vocabulary_of_its_own_is_not_folded(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "model", tiny_config("llama", **BASES["llama"]), seed=5)
    trained(tmp_path / "a", path, FEWER, [1, 2], **CASES["tables"])
    with pytest.raises(AdapterError, match="a vocabulary of its own, of 91 tokens"):
        fold_adapter(path, tmp_path / "a", tmp_path / "out")


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_tokens_that_were_added_in_training_are_read_and_written(tmp_path: Path, tied: bool) -> None:
    """From text to text, beside the base, against the resized model with peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base_tokens = Library.from_buffer(byte_level_json())
    size = base_tokens.get_vocab_size()
    model = write_model(tmp_path / "model", vocab_size=size, tie_word_embeddings=tied)
    base_tokens.add_tokens(["<SKU-7>", "<SKU-8>"])
    torch.manual_seed(3)
    resized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    resized.resize_token_embeddings(size + 2, mean_resizing=False)
    with torch.no_grad():
        resized.get_input_embeddings().weight[size:] *= 30
        resized.get_output_embeddings().weight[size:] *= 30
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    made = get_peft_model(resized, settings).eval()
    folder = tmp_path / "adapter"
    made.save_pretrained(folder, save_embedding_layers=True)
    base_tokens.save(str(folder / "tokenizer.json"))
    text = "buy <SKU-7> now"
    ids = base_tokens.encode(text).ids
    assert size in ids
    with LLM(model, {"skus": folder}, adapter_tokens=2, **OPTIONS) as llm:
        asked = SamplingParams(max_tokens=12, logprobs=4, temperature=0.0, ignore_eos=True)
        (mine,), (base,) = (llm.generate(text, asked, adapters=name) for name in ("skus", None))
        (again,) = llm.generate([size + 1, 5], SamplingParams(max_tokens=1), adapters="skus")
        with pytest.raises(InvalidRequest, match=f"{size + 1}"):
            llm.generate([size + 1, 5], SamplingParams(max_tokens=1))
        with pytest.raises(InvalidRequest, match=f"{size + 2}"):
            llm.generate([size + 2, 5], SamplingParams(max_tokens=1), adapters="skus")
    assert again.token_ids and max(base.token_ids) < size
    with torch.no_grad():
        theirs = made.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        scores = torch.log_softmax(made(theirs).logits[0], -1).numpy()
    tokens = theirs[0, len(ids) :].tolist()
    assert mine.token_ids == tokens and mine.text == base_tokens.decode(tokens, skip_special_tokens=False)
    assert {size, size + 1} & {*tokens}, "no added token was drawn"
    for at, tops in enumerate(mine.logprobs):
        for token, logprob in tops.items():
            assert logprob == pytest.approx(scores[len(ids) - 1 + at, token], abs=1e-3)
