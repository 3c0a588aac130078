"""The base's weights, as the loading worker reads them, are those of transformers' model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantised_files import Fixture, as_model, write_folder

from truffula.errors import AdapterError
from truffula.kernels.program import Site
from truffula.lora.base import BaseWeights, base_source, q8_0
from truffula.model.load import plan_model
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint

Float32 = npt.NDArray[np.float32]


def weights_of(path: Path, **held: Any) -> tuple[BaseWeights, tuple[Site, ...]]:
    checkpoint = open_checkpoint(path)
    plan = plan_model(checkpoint)
    return BaseWeights(base_source(plan, checkpoint, **held)), tuple(plan.interface.sites)


def whole(weights: BaseWeights, site: Site) -> Float32:
    blocks = list(weights.rows(site))
    assert [lo for lo, _ in blocks] == np.cumsum([0, *(len(values) for _, values in blocks[:-1])]).tolist()
    return np.concatenate([values for _, values in blocks])


def values_by_module(path: Path) -> dict[str, Float32]:
    """transformers' matrices [O, I] by module, of experts by module and number; biases under ``module.bias``."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    found: dict[str, Float32] = {}
    for name, module in model.named_modules():
        for kind, value in module.named_parameters(recurse=False):
            array = value.detach().numpy()
            key = name if kind == "weight" else f"{name}.{kind}"
            found[key] = array.T if kind == "weight" and isinstance(module, Conv1D) else array
    return found


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "gpt_neox", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3"]
)
def test_every_site_has_the_rows_of_its_module(tmp_path: Path, model_type: str) -> None:
    path = write_tiny_checkpoint(tmp_path / "model", tiny_config(model_type), seed=3)
    weights, sites = weights_of(path)
    theirs, seen = values_by_module(path), 0
    for site in sites:
        module = next((m for m in site.modules if m.name in theirs), None)
        if site.stacked is not None:
            values = theirs[site.stacked.name][site.stacked.expert]
            values = (values.T if site.stacked.columns else values)[site.stacked.lo :: site.stacked.step]
            expected = values[: site.out_features]
        elif module is not None:
            expected = theirs[module.name] if site.kind == "embed" else module.rows(theirs[module.name])
            bias = theirs.get(f"{module.name}.bias")
            found = weights.bias(site)
            assert (found is None) == (bias is None), site.module
            if found is not None and bias is not None:
                np.testing.assert_array_equal(found, module.rows(bias))
        else:
            continue
        seen += 1
        if site.kind == "norm":
            np.testing.assert_array_equal(weights.vector(site), expected + (site.transform == "plus_one"))
        else:
            np.testing.assert_array_equal(whole(weights, site), expected, err_msg=site.module)
    assert seen > len(sites) / 2


def test_rows_of_a_quantised_base_are_its_values(tmp_path: Path) -> None:
    config, tensors = as_model(Fixture("gptq-4-act-order"))
    path = write_folder(tmp_path / "quantised", config, tensors)
    weights, sites = weights_of(path)
    opened = open_checkpoint(path)
    site = next(site for site in sites if site.module.endswith("q_proj"))
    np.testing.assert_array_equal(whole(weights, site), np.asarray(opened.read(f"{site.module}.weight"), np.float32))


def test_rows_are_rounded_as_the_engine_rounds_them(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "model", tiny_config("llama"), seed=3)
    exact, sites = weights_of(path)
    rounded, _ = weights_of(path, dtype="bfloat16")
    quantised, _ = weights_of(path, dtype="bfloat16", quantize="q8_0")
    site = next(site for site in sites if site.module.endswith("q_proj"))
    values = whole(exact, site)
    np.testing.assert_array_equal(whole(rounded, site), values.astype(rounded_dtype()).astype(np.float32))
    np.testing.assert_array_equal(whole(quantised, site), q8_0(values))
    assert next(exact.rows(site, stored=True))[1].dtype == np.float32


def rounded_dtype() -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_q8_0_is_ggmls(rows: int, blocks: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(0, 1, (rows, blocks * 32)).astype(np.float32)
    values[0, :32] = 0
    kind = gguf.GGMLQuantizationType.Q8_0
    np.testing.assert_array_equal(q8_0(values), gguf.dequantize(gguf.quantize(values, kind), kind))


def test_a_base_that_was_replaced_is_not_read(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "model", tiny_config("llama"), seed=3)
    weights, sites = weights_of(path)
    write_tiny_checkpoint(tmp_path / "other", tiny_config("llama"), seed=4)
    (tmp_path / "other" / "model.safetensors").rename(path / "model.safetensors")
    with pytest.raises(AdapterError, match="was replaced since it was loaded"):
        list(weights.rows(sites[0]))
