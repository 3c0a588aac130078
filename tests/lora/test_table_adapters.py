"""LoRA on the embedding and the head, against peft: files as ``save_pretrained`` writes them, on tied bases and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_backends import SINGLE, on_the_best
from served_base import Served

from truffula.errors import AdapterError
from truffula.kernels.backend import Backend
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint
from truffula.weights.safetensors import SafetensorsFile

TOLERANCE = 1e-4
# Embeddings of gemma are scaled, before adapters are added.
BASES: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 97, "tie_word_embeddings": False},
    "qwen2": {"vocab_size": 83, "tie_word_embeddings": True},
    "gemma3_text": {"num_hidden_layers": 2, "vocab_size": 61},
}
# (targets, rank, dtype of the base's file, further fields)
CASES: dict[str, tuple[Any, int, str, dict[str, Any]]] = {
    "embedding": (["embed_tokens"], 3, "float32", {}),
    "head": (["lm_head"], 5, "float32", {}),
    "both": (["embed_tokens", "lm_head"], 16, "bfloat16", {}),
    "both and layers": (["embed_tokens", "lm_head", "q_proj", "down_proj"], 1, "float16", {"use_rslora": True}),
    "wide": (["embed_tokens", "lm_head", "v_proj"], 48, "bfloat16", {"rank_pattern": {"lm_head": 33}}),
    "a regex": (r".*(embed_tokens|\.1\.mlp\.up_proj)", 4, "float32", {"lora_alpha": -3}),
}


def written_by_peft(
    folder: Path, base: Path, seed: int, targets: Any, rank: int, *, copies: Any = "auto", **more
) -> Path:
    """What ``save_pretrained`` leaves of an adapter with random A and B; ``copies``: its ``save_embedding_layers``."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    settings = {"lora_alpha": 2 * rank, "task_type": "CAUSAL_LM", "init_lora_weights": False} | more
    made = get_peft_model(model, LoraConfig(r=rank, target_modules=targets, **settings))
    for name, parameter in made.named_parameters():
        if "lora_" in name:  # as large as what training leaves, whatever peft begins with
            torch.nn.init.normal_(parameter, std=0.3 / parameter.shape[int("_B" in name)] ** 0.5)
    made.save_pretrained(folder, save_embedding_layers=copies)
    return folder


@on_the_best
@pytest.mark.parametrize("model_type", BASES)
def test_tables_agree_with_peft_alone_and_mixed(tmp_path: Path, model_type: str, backend: Backend) -> None:
    """Each adapter by itself and all in one batch with base rows, which stay as they are to the bit."""
    by_dtype: dict[str, Served] = {}
    for dtype in ("float32", "float16", "bfloat16"):
        config = tiny_config(model_type, **BASES[model_type])
        path = write_tiny_checkpoint(tmp_path / dtype / "model", config, seed=5, dtype=dtype)
        by_dtype[dtype] = Served(path, backend)
    assert by_dtype["float32"].tied == (model_type != "llama")
    rows: dict[str, list[tuple[int | None, list[int]]]] = {dtype: [] for dtype in by_dtype}
    for number, (name, (targets, rank, dtype, more)) in enumerate(CASES.items()):
        served = by_dtype[dtype]
        folder = written_by_peft(tmp_path / name, served.path, number, targets, rank, **more)
        slot, ids = served.add(folder), served.prompt(number)
        (alone,), (base,) = served.run([(slot, ids)]), served.run([(None, ids)])
        theirs = served.peft(folder, ids)
        limit = TOLERANCE * max(1.0, float(np.abs(theirs).max()) / 10)
        np.testing.assert_allclose(alone, theirs, atol=limit, err_msg=name)
        assert np.abs(theirs - base).max() > 30 * limit, f"{name} does not show"
        rows[dtype].append((slot, ids))
        np.testing.assert_array_equal(alone, served.run([*rows[dtype], (None, ids)])[-2], err_msg=name)
        np.testing.assert_array_equal(base, served.run([*rows[dtype], (None, ids)])[-1], err_msg=name)


@on_the_best
def test_on_a_tied_base_each_side_changes_alone(tmp_path: Path, backend: Backend) -> None:
    """An adapter on the head leaves what the layers see, one on the embedding leaves the head: as with peft, whose
    modules share their weight and not their adapters."""
    served = Served(write_tiny_checkpoint(tmp_path / "model", tiny_config("qwen2", **BASES["qwen2"]), seed=5), backend)
    ids = served.prompt(1)
    (base,) = served.run([(None, ids)])
    for number, table in enumerate(("embed_tokens", "lm_head")):
        folder = written_by_peft(tmp_path / table, served.path, number, [table], 4)
        (mine,) = served.run([(served.add(folder), ids)])
        np.testing.assert_allclose(mine, served.peft(folder, ids), atol=TOLERANCE)
        # The first row's hidden state is that of the base iff the embedding is: the head then adds to it linearly.
        tensors = SafetensorsFile(folder / "adapter_model.safetensors")
        rank_of = np.linalg.matrix_rank(mine - base, tol=1e-3)
        assert (rank_of <= 4) == (table == "lm_head")
        assert {key.rpartition("lora_")[2] for key in tensors.tensors if "lora_" in key} == (
            {"embedding_A", "embedding_B"} if table == "embed_tokens" else {"A.weight", "B.weight"}
        )


@on_the_best
def test_a_tied_head_without_tensors_has_a_scale_of_its_own(tmp_path: Path, backend: Backend) -> None:
    """PEFT looks for the patterns of each table by its own name. A magnitude of DoRA is not shared."""
    from safetensors.numpy import load_file, save_file

    served = Served(write_tiny_checkpoint(tmp_path / "model", tiny_config("qwen2", **BASES["qwen2"]), seed=5), backend)
    ids, tied = served.prompt(1), {"ensure_weight_tying": True, "alpha_pattern": {"embed_tokens": 1}}
    ranks = ({"embed_tokens": 8}, {"lm_head": 8}, {"embed_tokens": 8, "lm_head": 3})
    of_ranks = [(f"ranks {number}", {"rank_pattern": pattern}) for number, pattern in enumerate(ranks)]
    for name, more in (("plain", {}), *of_ranks, ("dora", {"use_dora": True})):
        folder = written_by_peft(tmp_path / name, served.path, 0, ["embed_tokens", "q_proj"], 4, **tied, **more)
        theirs, path = served.peft(folder, ids), folder / "adapter_model.safetensors"
        limit = TOLERANCE * max(1.0, float(np.abs(theirs).max()) / 10)
        np.testing.assert_allclose(served.run([(served.add(folder), ids)])[0], theirs, atol=limit)
        save_file({key: value for key, value in load_file(path).items() if "lm_head" not in key}, path)
        if "use_dora" in more:
            with pytest.raises(AdapterError, match="the file has no pair of the head"):
                served.add(folder)
        else:
            np.testing.assert_allclose(served.run([(served.add(folder), ids)])[0], theirs, atol=limit)


ODD = {
    **dict.fromkeys(("afmoe", "cohere", "gemma4_text", "glm_moe_dsa", "granitemoehybrid", "lfm2"), "embed_tokens"),
    **dict.fromkeys(("gpt2", "gpt_neo", "mpt"), "wte"), "gpt_neox": "embed_in", "bloom": "word_embeddings",
    "falcon": "word_embeddings", "opt": "embed_tokens", "phi": "embed_tokens",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ODD)
def test_tied_tables_of_odd_names_scales_and_shapes(tmp_path: Path, model_type: str) -> None:
    """15 s. peft copies the bias of phi's head, too."""
    more = {"word_embed_proj_dim": 20} if model_type == "opt" else {}
    config = tiny_config(model_type, vocab_size=61, tie_word_embeddings=True, **more)
    served = Served(write_tiny_checkpoint(tmp_path / "model", config, seed=5), list(SINGLE.values())[-1])
    folder, targets, ids = tmp_path / "adapter", [ODD[model_type], "lm_head"], served.prompt(1)
    assert served.tied
    written_by_peft(folder, served.path, 0, targets, 4)
    (mine,), (base,) = served.run([(served.add(folder), ids)]), served.run([(None, ids)])
    theirs = served.peft(folder, ids)
    np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)
    assert np.abs(theirs - base).max() > 0.5


@pytest.fixture
def served(tmp_path: Path) -> Served:
    from kernel_backends import BEST

    path = write_tiny_checkpoint(tmp_path / "model", tiny_config("llama", **BASES["llama"]), seed=5, dtype="bfloat16")
    return Served(path, BEST["reference"])


def test_without_copies_and_with_equal_ones_an_adapter_is_the_same(tmp_path: Path, served: Served) -> None:
    """peft writes copies of the targeted tables unless it is told not to."""
    targets, ids = ["embed_tokens", "lm_head"], served.prompt(0)
    made = [
        written_by_peft(tmp_path / str(copies), served.path, 7, targets, 4, copies=copies) for copies in ("auto", False)
    ]
    keys = [list(SafetensorsFile(folder / "adapter_model.safetensors").tensors) for folder in made]
    assert [sum("base_layer" in key for key in some) for some in keys] == [2, 0]
    with_copies, without = (served.run([(served.add(folder), ids)])[0] for folder in made)
    np.testing.assert_array_equal(with_copies, without)


@on_the_best
@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_of_another_table_is_the_adapters_own(tmp_path: Path, tied: bool, backend: Backend) -> None:
    """One row differs: a table that was trained. PEFT loads it into the base, for all adapters, and on a tied base into
    both tables; here the base stays as it is."""
    from safetensors.torch import load_file, save_file

    config = tiny_config("llama", vocab_size=97, tie_word_embeddings=tied)
    served = Served(write_tiny_checkpoint(tmp_path / "model", config, seed=5), backend)
    folder = written_by_peft(tmp_path / "a", served.path, 7, ["lm_head"], 4)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"][50:60] += 1
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    slot, ids = served.add(folder), list(range(50, 60))
    mine, base = served.run([(slot, ids), (None, ids)])
    np.testing.assert_allclose(mine, served.peft(folder, ids), atol=2 * TOLERANCE)
    np.testing.assert_allclose(base, served.peft(None, ids), atol=TOLERANCE)


def test_a_copy_is_never_compared_with_a_file_that_was_replaced(tmp_path: Path, served: Served) -> None:
    folder = written_by_peft(tmp_path / "a", served.path, 7, ["lm_head"], 4)
    model = served.path / "model.safetensors"
    (tmp_path / "other").write_bytes(model.read_bytes())
    (tmp_path / "other").rename(model)
    with pytest.raises(AdapterError, match="was replaced since it was loaded"):
        served.add(folder)
