"""Variants of LoRA and names of tensors that the parity table does not reach."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_bases import llama_sites, pairs, validate

from truffula.errors import AdapterError
from truffula.lora.keys import plan_keys
from truffula.lora.variants import Form, largest_parts, smallest_parts
from truffula.testing.adapters import PREFIX, tiny_config, write_adapter


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_qalora_is_pefts(groups: int, group: int, rank: int, seed: int) -> None:
    """PEFT has it for GPTQ layers only: the pair that is served computes what its variant does."""
    import torch
    from peft.tuners.lora.variants import QALoraLinearVariant

    generator = torch.Generator().manual_seed(seed)
    inputs, outputs, scale = groups * group, 3, 0.7
    a, b, x = (torch.randn(*shape, generator=generator) for shape in ((rank, groups), (outputs, rank), (5, inputs)))
    module = SimpleNamespace(
        lora_A={"a": SimpleNamespace(weight=a)}, lora_B={"a": SimpleNamespace(weight=b)}, lora_dropout={"a": None},
        scaling={"a": scale}, qalora_group_size={"a": group}, training=False, in_features=inputs,
    )  # fmt: skip
    theirs = QALoraLinearVariant.forward(module, "a", x, torch.zeros(5, outputs)).numpy()
    own_a, own_b = Form(group=group).expand(a.numpy(), b.numpy())
    np.testing.assert_allclose(scale * (x.numpy() @ own_a.T) @ own_b.T, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("rank", [1, 4])
def test_parts_of_a_matrix_are_those_of_its_svd(shape: tuple[int, int], rank: int) -> None:
    weight = np.random.default_rng(rank).normal(size=shape).astype(np.float32)
    u, s, v = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    for make, some in ((largest_parts, slice(rank)), (smallest_parts, slice(-rank, None))):
        b, a = make(weight, rank)
        assert b.dtype == a.dtype == np.float32 and b.shape == (shape[0], rank) and a.shape == (rank, shape[1])
        np.testing.assert_allclose(b @ a, (u[:, some] * s[some]) @ v[some], atol=1e-6)


def test_an_adapter_of_qalora_has_as_many_inputs_as_groups(tmp_path: Path) -> None:
    config = tiny_config(rank=2, alpha=4, targets=["o_proj"], use_qalora=True, qalora_group_size=4)
    rng = np.random.default_rng(0)
    tensors = {
        f"{PREFIX}model.layers.{layer}.self_attn.o_proj.lora_{half}.weight": rng.normal(size=shape).astype(np.float32)
        for layer in (0, 1)
        for half, shape in (("A", (2, 4)), ("B", (12, 2)))
    }
    write_adapter(tmp_path, config, tensors)
    for pair in pairs(validate(tmp_path, llama_sites()).sites):
        assert pair.a.shape == (2, 16) and np.array_equal(pair.a[:, 0], pair.a[:, 3])
    write_adapter(tmp_path, config | {"qalora_group_size": 8}, tensors)
    with pytest.raises(AdapterError, match=r"has shape \[2, 4\], but .* needs \[2, 2\]"):
        validate(tmp_path, llama_sites())


def test_biases_of_saved_modules_may_be_in_the_file_twice() -> None:
    """As bias="all" leaves them; PEFT computes with neither the second one nor that of the replaced module."""
    names = ["weight", "bias", "modules_to_save.bias", "original_module.bias"]
    plan = plan_keys([f"{PREFIX}transformer.ln_f.{name}" for name in reversed(names)])
    assert plan.biases == {"transformer.ln_f": f"{PREFIX}transformer.ln_f.bias"} and len(plan.weights) == 1
    assert sorted(plan.unused) == [f"{PREFIX}transformer.ln_f.{name}" for name in names[2:]]


def test_a_saved_table_may_be_in_the_file_twice() -> None:
    """As save_embedding_layers leaves it; PEFT computes with the first."""
    keys = [f"{PREFIX}model.embed_tokens.{name}" for name in ("modules_to_save.weight", "weight")]
    plan = plan_keys(keys)
    assert (list(plan.weights.values()), plan.unused) == (keys[1:], keys[:1])
    assert list(plan_keys(keys[:1]).weights.values()) == keys[:1]
