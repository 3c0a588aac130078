"""Capabilities of the spec that no shipped architecture uses yet, against transformers models that do.

Each case changes a llama spec in a few fields and must then equal another family exactly: layernorms with biases
(starcoder2), fused on disk (phi3), a parallel residual (stablelm).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from truffula.kernels.program import WeightDecl
from truffula.kernels.reference import ReferenceBackend
from truffula.model.decoder import build_program
from truffula.model.names import resolve_names
from truffula.model.read import read_config
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec
from truffula.testing.programs import Driver, capacity_for
from truffula.testing.tiny import tiny_config
from truffula.weights.tying import Tie, TyingDecision

Array = npt.NDArray[Any]


def each_layer(spec: ModelSpec, change: Callable[[int, LayerSpec], LayerSpec]) -> ModelSpec:
    return dataclasses.replace(spec, layers=tuple(change(i, layer) for i, layer in enumerate(spec.layers)))


def attention(layer: LayerSpec, **changes: Any) -> LayerSpec:
    return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, **changes))


def mlp(layer: LayerSpec, **changes: Any) -> LayerSpec:
    return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, **changes))


def starcoder2(spec: ModelSpec) -> ModelSpec:
    def norm(module: str) -> NormSpec:
        return NormSpec(module, 1e-5, kind="layer", cast="last", bias=True)

    def change(_: int, layer: LayerSpec) -> LayerSpec:
        layer = mlp(layer, gated=False, activation="gelu_tanh", in_bias=True, out_bias=True)
        layer = attention(layer, qkv_bias=True, out_bias=True)
        return dataclasses.replace(
            layer, before_mixer=norm("input_layernorm"), before_mlp=norm("post_attention_layernorm")
        )

    names = dataclasses.replace(spec.names, up="mlp.c_fc", down="mlp.c_proj")
    return each_layer(dataclasses.replace(spec, names=names, final_norm=norm("norm")), change)


def stablelm(spec: ModelSpec) -> ModelSpec:
    norm = NormSpec("input_layernorm", 1e-5, kind="layer", cast="last", bias=True)
    final = dataclasses.replace(norm, module="norm")
    return each_layer(
        dataclasses.replace(spec, final_norm=final),
        lambda i, layer: dataclasses.replace(layer, before_mixer=norm, before_mlp=None, parallel=True),
    )


def phi3(spec: ModelSpec) -> ModelSpec:
    return spec


CASES: list[tuple[Callable[[ModelSpec], ModelSpec], dict[str, Any]]] = [
    (starcoder2, {"use_bias": True, "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "sliding_window": None}),
    (
        stablelm,
        {
            "use_parallel_residual": True,
            "layer_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    ),
    (phi3, {"sliding_window": None}),
]


def run(spec: ModelSpec, tensors: Mapping[str, Array], ids: Sequence[int]) -> tuple[npt.NDArray[np.float32], list[str]]:
    names = resolve_names(spec, tensors)
    program = build_program(spec, names, TyingDecision(Tie.SEPARATE, "by hand"))

    def pull(decl: WeightDecl) -> list[Array]:
        return [tensors[part.name] for part in decl.parts]

    capacity = capacity_for(len(ids))
    executable = ReferenceBackend().load(program, "float32", pull, capacity)
    return Driver(executable, capacity).feed(ids, chunk=6), list(names.warnings)


@pytest.mark.parametrize(("family", "settings"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_few_fields_make_another_family(family: Callable[[ModelSpec], ModelSpec], settings: dict[str, Any]) -> None:
    base = tiny_config("llama", tie_word_embeddings=False)
    spec = family(read_config(base).spec)
    # What the other classes assume differently.
    same = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "pad_token_id": 0}
    more = {key: value for key, value in base.items() if key != "model_type"} | same | settings
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.__name__, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.dim() > 1 else 1.0, 0.25)
    tensors = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    ids = np.random.default_rng(0).integers(0, 101, 17).tolist()
    ours, warnings = run(spec, tensors, ids)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    # Fused on disk is read as one tensor, and said.
    assert (family is phi3) == any(
        "qkv_proj.weight is stored fused; read as q_proj | k_proj | v_proj" in w for w in warnings
    )
