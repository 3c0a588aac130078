"""Frequencies against transformers' own functions.

torch's float32 power is one unit in the last place from the rounded true value now and then, by machine; the blends of
llama3 and yarn can make a few units of it. Anything else in the formulas shows at 1e-3 or more.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from truffula.errors import UnsupportedModel
from truffula.model.read import read_config
from truffula.testing.tiny import tiny_config


def agree(config: dict[str, Any]) -> None:
    table = read_config(config).spec.ropes[0]
    module = LlamaRotaryEmbedding(AutoConfig.for_model(**config))
    theirs = module.inv_freq.numpy()
    np.testing.assert_allclose(np.float32(table.inv_freq), theirs, rtol=2e-6, atol=0)
    assert table.factor == pytest.approx(module.attention_scaling, rel=1e-12)
    assert table.dims == 2 * theirs.size


widths = st.sampled_from([8, 20, 64, 80, 96, 128, 256])
thetas = st.floats(50.0, 5e7)


@settings(max_examples=30, deadline=None)
@given(head_dim=widths, theta=thetas, factor=st.floats(1.0, 64.0))
def test_default_and_linear(head_dim: int, theta: float, factor: float) -> None:
    agree(tiny_config(head_dim=head_dim, rope_theta=theta))
    agree(tiny_config(head_dim=head_dim, rope_theta=theta, rope_scaling={"type": "linear", "factor": factor}))


@settings(max_examples=30, deadline=None)
@given(
    head_dim=widths,
    theta=thetas,
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.5, 3.0),
    more=st.floats(0.5, 8.0),
    original=st.sampled_from([64, 1000, 8192]),
)
def test_llama3(head_dim: int, theta: float, factor: float, low: float, more: float, original: int) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + more,
        "original_max_position_embeddings": original,
    }
    agree(tiny_config(head_dim=head_dim, rope_theta=theta, max_position_embeddings=131072, rope_scaling=rope))


@settings(max_examples=40, deadline=None)
@given(
    head_dim=widths,
    theta=thetas,
    more=st.fixed_dictionaries(
        {"factor": st.floats(1.0, 64.0)},
        optional={
            "original_max_position_embeddings": st.sampled_from([32, 4096, 32768]),
            "beta_fast": st.floats(8.0, 64.0),
            "beta_slow": st.floats(0.5, 4.0),
            "mscale": st.floats(0.5, 2.0),
            "mscale_all_dim": st.floats(0.5, 2.0),
            "attention_factor": st.floats(0.5, 2.0),
            "truncate": st.booleans(),
        },
    ),
)
def test_yarn(head_dim: int, theta: float, more: dict[str, Any]) -> None:
    rope = {"rope_type": "yarn", **more}
    agree(tiny_config(head_dim=head_dim, rope_theta=theta, max_position_embeddings=32768, rope_parameters=rope))


def test_gemma3_has_a_table_for_each_kind_of_layer() -> None:
    config = tiny_config("gemma3_text", rope_theta=9e5, rope_scaling={"rope_type": "linear", "factor": 8.0})
    spec = read_config(config).spec
    module = Gemma3RotaryEmbedding(AutoConfig.for_model(**config))
    for layer, kind in enumerate(module.config.layer_types):
        theirs = getattr(module, f"{kind}_inv_freq").numpy()
        rope = spec.layers[layer].mixer.rope
        assert rope is not None
        np.testing.assert_allclose(np.float32(spec.ropes[rope].inv_freq), theirs, rtol=2e-6, atol=0)


def test_every_kind_transformers_computes_is_supported_or_refused_by_name() -> None:
    assert set(ROPE_INIT_FUNCTIONS) == {"linear", "llama3", "yarn", "dynamic", "longrope", "proportional"}


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 1e-45},
        {"type": "linear", "factor": 1e-60},
        {"rope_type": "factors", "factors": [1.0, 1e-40, 1.0, 1e-60]},
        {"rope_type": "llama3", "factor": 1e-60, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 1e-60, "original_max_position_embeddings": 64},
    ],
    ids=lambda scaling: str(scaling)[:40],
)  # fmt: skip
def test_parameters_that_make_a_frequency_infinite_are_refused(scaling: dict[str, Any]) -> None:
    with warnings.catch_warnings(), pytest.raises(UnsupportedModel, match=r"rope|factor"):
        warnings.simplefilter("error")
        read_config(tiny_config(head_dim=8, rope_theta=10000.0, rope_scaling=scaling))
