"""The report this project began with.

    "I gave the server Qwen/Qwen2.5-3B-Instruct and it would not start: it asked for lm_head.weight, which the
    checkpoint does not have, because tie_word_embeddings is true."

First the published config at full size, planned from headers alone; then the same model, narrow and shallow, which
loads and answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_safetensors import write_raw_safetensors

from truffula.errors import TyingError
from truffula.kernels.reference import ReferenceBackend
from truffula.model.load import WeightReader, plan_model
from truffula.model.names import WeightNames
from truffula.model.read import read_config
from truffula.testing.oracle import Oracle
from truffula.testing.programs import Driver, capacity_for
from truffula.testing.tiny import tiny_tensors, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint
from truffula.weights.tying import Tie

QWEN25_3B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "max_window_layers": 70,
    "model_type": "qwen2",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GENERATION = {"bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "temperature": 0.7}
SMALL = QWEN25_3B | {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 112, "vocab_size": 503,
                     "bos_token_id": 501, "eos_token_id": 502}  # fmt: skip
PROMPT = [11, 402, 7, 33, 250, 9, 9, 128]


def published(folder: Path) -> Path:
    """Two shards and their index with every name, shape and dtype of the real files, and holes for data."""
    spec = read_config(QWEN25_3B).spec
    names = WeightNames.canonical(spec, has_head=False)
    shapes = {names.embed: [spec.vocab_size, spec.hidden]}
    for row in spec.rows:
        for part, item in zip(names.parts.get(row.key, ()), row.slices, strict=False):
            shapes[part.name] = [item.rows, row.width] if row.width else [item.rows]
    index, total = {}, 0
    listed = list(shapes.items())
    for number, chunk in enumerate((listed[: len(listed) // 2], listed[len(listed) // 2 :]), 1):
        header, offset, file = {}, 0, f"model-{number:05}-of-00002.safetensors"
        for name, shape in chunk:
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
            index[name] = file
        path = write_raw_safetensors(folder / file, header, b"")
        with path.open("r+b") as handle:
            handle.truncate(path.stat().st_size + offset)
        total += offset
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(QWEN25_3B))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def test_the_published_config_is_planned_without_a_head_in_the_files(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(published(tmp_path))
    assert "lm_head.weight" not in checkpoint.tensors
    plan = plan_model(checkpoint)
    assert plan.tying.tie is Tie.TIED
    assert "no lm_head.weight" in plan.tying.reason
    assert plan.warnings == ()
    # 434 tensors, 3,085,938,688 weights in bfloat16: the published model's own numbers.
    assert len(checkpoint.tensors) == 434
    assert plan.stored_bytes == 2 * 3_085_938_688
    assert plan.saved_bytes == 2 * 151_936 * 2048
    assert plan.stored_dtype == "bfloat16"
    tables = [decl for decl in plan.program.weights if decl.shape == (151_936, 2048)]
    assert [decl.uses for decl in tables] == [frozenset({"rows", "matmul"})]
    assert plan.eos_token_ids == (151_645, 151_643)
    assert plan.max_model_len == 32_768
    # The window is written, and dead.
    assert {layer.mixer.window for layer in plan.spec.layers} == {None}


def answer(folder: Path) -> tuple[list[int], Any]:
    checkpoint = open_checkpoint(folder)
    plan = plan_model(checkpoint)
    capacity = capacity_for(len(PROMPT) + 16)
    pull = WeightReader(checkpoint, plan)
    executable = ReferenceBackend().load(plan.program, "float32", pull, capacity)
    pull.finish()
    tokens, _ = Driver(executable, capacity).greedy(PROMPT, 16)
    return tokens, plan


def expected(folder: Path, tokens: list[int], *, tied: bool) -> list[int]:
    """What transformers chooses behind the same tokens."""
    logits = Oracle(folder, tied=tied).logits([*PROMPT, *tokens[:-1]])
    return [int(row.argmax()) for row in logits[len(PROMPT) - 1 :]]


def test_it_loads_and_answers_as_transformers_does(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, SMALL, seed=4, dtype="bfloat16")
    tokens, plan = answer(tmp_path)
    assert "lm_head.weight" not in open_checkpoint(tmp_path).tensors
    assert plan.tying.tie is Tie.TIED
    assert tokens == expected(tmp_path, tokens, tied=True)
    assert len(set(tokens)) > 3


def test_untied_without_a_head_is_refused_by_name(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, SMALL | {"tie_word_embeddings": False}, drop=["lm_head.weight"])
    with pytest.raises(TyingError, match=r"lm_head\.weight is not in the files.*tie_word_embeddings: false") as caught:
        plan_model(open_checkpoint(tmp_path))
    assert caught.value.param == "lm_head.weight"


@pytest.mark.parametrize("flag", [True, False])
def test_a_head_of_its_own_is_the_one_that_answers(tmp_path: Path, flag: bool) -> None:
    head = tiny_tensors(SMALL | {"tie_word_embeddings": False}, seed=9)["lm_head.weight"]
    write_tiny_checkpoint(tmp_path, SMALL | {"tie_word_embeddings": flag}, seed=4, extra={"lm_head.weight": head})
    tokens, plan = answer(tmp_path)
    assert plan.tying.tie is Tie.SEPARATE
    assert bool(plan.warnings) is flag
    assert tokens == expected(tmp_path, tokens, tied=False)
    write_tiny_checkpoint(tmp_path / "tied", SMALL, seed=4)
    assert tokens != answer(tmp_path / "tied")[0]
