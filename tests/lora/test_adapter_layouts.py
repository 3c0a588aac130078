"""One adapter in the layouts of several trainers is the same as in PEFT's, which the parity tests hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from truffula.errors import AdapterError
from truffula.kernels.adapters import LowRank, SiteTensors, tensors_of
from truffula.lora.base import BaseWeights, base_source
from truffula.lora.peft import BaseFacts, validate_adapter
from truffula.model.load import plan_model
from truffula.testing.adapters import PREFIX, tiny_config, write_adapter
from truffula.testing.tiny import tiny_config as model_config
from truffula.testing.tiny import write_tiny_checkpoint
from truffula.weights.open import open_checkpoint

Tensors = dict[str, np.ndarray]
R = 3


class Base:
    def __init__(self, folder: Path, model_type: str, **fields: Any) -> None:
        checkpoint = open_checkpoint(write_tiny_checkpoint(folder, model_config(model_type, **fields), seed=1))
        plan = plan_model(checkpoint)
        self.sites = plan.program.sites
        self.facts = BaseFacts(model_type, BaseWeights(base_source(plan, checkpoint)))

    def changes(self, folder: Path, config: dict[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
        """Module → what the adapter adds to its weight."""
        write_adapter(folder, config, tensors)
        found = validate_adapter(folder, self.sites, base=self.facts)
        return {self.sites[one.site].module: dense(one) for one in found.sites}


def dense(tensors: SiteTensors) -> np.ndarray:
    (part,) = tensors.parts
    assert isinstance(part, LowRank)
    return part.scale * part.b @ part.a


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(0, 1, shape).astype(np.float32)


def expect_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys() and one
    for module, change in one.items():
        np.testing.assert_allclose(other[module], change, rtol=1e-5, atol=1e-6, err_msg=module)


@pytest.fixture(params=["qwen3_moe", "mixtral"])
def moe(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    return Base(tmp_path / "model", request.param)


def shared_outer(base: Base, seed: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Of each layer: its module of experts; A of gates and ups [1, r, I], B of downs [1, I, r], the rest by expert."""
    rng = np.random.default_rng(seed)
    for site in base.sites:
        place = site.stacked
        if place is not None and place.expert == 0 and place.lo == 0 and place.of > site.out_features:
            e, hidden, inner = place.experts, site.in_features, site.out_features
            yield place.name.rpartition(".")[0], {
                "a": normal(rng, 1, R, hidden), "gate": normal(rng, e, inner, R), "up": normal(rng, e, inner, R),
                "down_a": normal(rng, e, R, inner), "b": normal(rng, 1, hidden, R),
            }  # fmt: skip


def as_modules(base: Base, seed: int) -> Tensors:
    """A pair for each module of each expert, as PEFT has them."""
    made: Tensors = {}
    for owner, values in shared_outer(base, seed):
        names = [s.module for s in base.sites if s.stacked is not None and s.stacked.name.startswith(f"{owner}.")]
        for name in names:
            path, leaf = name.rsplit(".", 1)
            e = int(path.rpartition(".")[2])
            down = leaf in ("down_proj", "w2")
            b = values["b"][0] if down else values["gate" if leaf in ("gate_proj", "w1") else "up"][e]
            made[f"{PREFIX}{name}.lora_A.weight"] = values["down_a"][e] if down else values["a"][0]
            made[f"{PREFIX}{name}.lora_B.weight"] = b
    return made


MODULES = tiny_config(rank=R, alpha=5, targets=["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"])


@pytest.mark.parametrize("names", [("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")])
def test_experts_that_share_the_outer_matrix(moe: Base, tmp_path: Path, names: tuple[str, str, str]) -> None:
    """As Tinker writes it: all-linear, and a pair for each projection, with A or B of all experts stored once."""
    tensors: Tensors = {}
    for owner, values in shared_outer(moe, 0):
        for name, a, b in zip(names, ("a", "a", "down_a"), ("gate", "up", "b"), strict=True):
            tensors[f"{PREFIX}{owner}.{name}.lora_A.weight"] = values[a]
            tensors[f"{PREFIX}{owner}.{name}.lora_B.weight"] = values[b]
    config = tiny_config(rank=R, alpha=5, targets="all-linear")
    found = moe.changes(tmp_path / "shared", config, tensors)
    expect_equal(moe.changes(tmp_path / "modules", MODULES, as_modules(moe, 0)), found)


def test_a_shared_matrix_may_lack_its_axis_and_is_stored_once(moe: Base, tmp_path: Path) -> None:
    tensors: Tensors = {}
    for owner, values in shared_outer(moe, 1):
        tensors[f"{PREFIX}{owner}.w1.lora_A.weight"] = values["a"][0]
        tensors[f"{PREFIX}{owner}.w1.lora_B.weight"] = values["gate"]
    write_adapter(tmp_path / "a", tiny_config(rank=R, alpha=5, targets=["w1"]), tensors)
    found = validate_adapter(tmp_path / "a", moe.sites, base=moe.facts)
    layers = {moe.sites[one.site].layer for one in found.sites}
    assert len({id(part.a) for one in found.sites for part in one.parts if isinstance(part, LowRank)}) == len(layers)


def test_gates_and_ups_together(moe: Base, tmp_path: Path) -> None:
    """As Miles writes it: one pair on gate_up_proj, whose B has gates, then ups, by expert."""
    tensors: Tensors = {}
    for owner, values in shared_outer(moe, 2):
        both = np.concatenate([values["gate"], values["up"]], axis=1)
        for name, a, b in (("gate_up_proj", values["a"], both), ("down_proj", values["down_a"], values["b"])):
            tensors[f"{PREFIX}{owner}.{name}.lora_A.weight"] = a
            tensors[f"{PREFIX}{owner}.{name}.lora_B.weight"] = b
    config = tiny_config(rank=R, alpha=5, targets=["gate_up_proj", "down_proj"])
    found = moe.changes(tmp_path / "shared", config, tensors)
    expect_equal(moe.changes(tmp_path / "modules", MODULES, as_modules(moe, 2)), found)


def test_a_stack_of_other_experts_is_refused(moe: Base, tmp_path: Path) -> None:
    owner, values = next(iter(shared_outer(moe, 0)))
    tensors = {
        f"{PREFIX}{owner}.w1.lora_A.weight": values["a"],
        f"{PREFIX}{owner}.w1.lora_B.weight": values["gate"][:2],
    }
    write_adapter(tmp_path / "a", tiny_config(rank=R, alpha=5, targets="all-linear"), tensors)
    with pytest.raises(AdapterError, match=r"lora_B.weight has shape \[2, .*experts needs"):
        validate_adapter(tmp_path / "a", moe.sites, base=moe.facts)


def test_tinkers_name_of_the_head(tmp_path: Path) -> None:
    base, rng = Base(tmp_path / "model", "qwen3_moe"), np.random.default_rng(0)
    head = next(site for site in base.sites if site.kind == "head")
    pair = {"A": normal(rng, R, head.in_features), "B": normal(rng, head.out_features, R)}
    tensors = {f"{PREFIX}model.unembed_tokens.lora_{half}.weight": value for half, value in pair.items()}
    found = base.changes(tmp_path / "a", tiny_config(rank=R, alpha=R, targets="all-linear"), tensors)
    expect_equal({"lm_head": pair["B"] @ pair["A"]}, found)


def test_megatrons_fused_names(tmp_path: Path) -> None:
    """linear_qkv has the rows of q, k and v of each KV head in turn, linear_fc1 gates, then ups; A is shared."""
    base, rng = Base(tmp_path / "model", "llama", num_hidden_layers=2), np.random.default_rng(0)
    own: Tensors = {}
    megatron: Tensors = {}
    for layer in range(2):
        sites = {s.module.rpartition(".")[2]: s for s in base.sites if s.layer == layer and s.kind == "linear"}
        for fused, leaves in (("self_attention.linear_qkv", ("q_proj", "k_proj", "v_proj")),
                              ("self_attention.linear_proj", ("o_proj",)), ("mlp.linear_fc2", ("down_proj",)),
                              ("mlp.linear_fc1", ("gate_proj", "up_proj"))):  # fmt: skip
            a = normal(rng, R, sites[leaves[0]].in_features)
            parts = [normal(rng, sites[leaf].out_features, R) for leaf in leaves]
            for leaf, b in zip(leaves, parts, strict=True):
                own[f"{PREFIX}{sites[leaf].module}.lora_A.weight"] = a
                own[f"{PREFIX}{sites[leaf].module}.lora_B.weight"] = b
            if "qkv" in fused:
                b = np.concatenate(
                    [np.concatenate([part.reshape(2, -1, R)[head] for part in parts]) for head in (0, 1)]
                )
            else:
                b = np.concatenate(parts)
            megatron[f"{PREFIX}decoder.layers.{layer}.{fused}.lora_A.weight"] = a
            megatron[f"{PREFIX}decoder.layers.{layer}.{fused}.lora_B.weight"] = b
    config = tiny_config(rank=R, alpha=5, targets=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
    plain = tiny_config(rank=R, alpha=5, targets="all-linear")
    expect_equal(base.changes(tmp_path / "own", plain, own), base.changes(tmp_path / "megatron", config, megatron))


Q_K_V = ("q_proj", "k_proj", "v_proj")


def fused(parts: list[np.ndarray]) -> np.ndarray:
    """Rows of q, k and v as linear_qkv has them, of two KV heads."""
    return np.concatenate([part.reshape(2, -1, *part.shape[1:])[head] for head in (0, 1) for part in parts])


@pytest.mark.parametrize(
    ("fields", "leaf"),
    [({}, None), ({"use_dora": True}, "lora_magnitude_vector"), ({"lora_bias": True}, "lora_B.bias")],
)
def test_a_pattern_and_vectors_of_megatrons_modules(tmp_path: Path, fields: dict[str, Any], leaf: str | None) -> None:
    """Patterns are written for the names in the file; magnitudes and biases of B are ordered as its rows are."""
    base, rng = Base(tmp_path / "model", "llama", num_hidden_layers=1), np.random.default_rng(0)
    sites = {s.module.rpartition(".")[2]: s for s in base.sites if s.kind == "linear"}
    a = normal(rng, R, sites["q_proj"].in_features)
    parts = {
        end: [normal(rng, sites[name].out_features, *shape) for name in Q_K_V]
        for end, shape in (("lora_B.weight", (R,)), *([(leaf, ())] if leaf else []))
    }
    root = f"{PREFIX}decoder.layers.0.self_attention.linear_qkv"
    megatron = {f"{root}.{end}": fused(each) for end, each in parts.items()} | {f"{root}.lora_A.weight": a}
    own: Tensors = {}
    for number, name in enumerate(Q_K_V):
        own |= {f"{PREFIX}{sites[name].module}.{end}": each[number] for end, each in parts.items()}
        own[f"{PREFIX}{sites[name].module}.lora_A.weight"] = a
    made = []
    for folder, tensors, targets in (("megatron", megatron, ("linear_qkv",)), ("own", own, Q_K_V)):
        config = tiny_config(rank=R, alpha=2, targets=list(targets), alpha_pattern=dict.fromkeys(targets, 7), **fields)
        write_adapter(tmp_path / folder, config, tensors)
        made.append(validate_adapter(tmp_path / folder, base.sites, base=base.facts).sites)
    for one, other in zip(*made, strict=True):
        assert one.site == other.site and len(one.parts) == len(other.parts) == 1 + bool(leaf)
        for mine, theirs in zip(one.parts, other.parts, strict=True):
            assert getattr(mine, "scale", 0) == getattr(theirs, "scale", 0)
            for left, right in zip(tensors_of(mine), tensors_of(theirs), strict=True):
                np.testing.assert_allclose(left, right, rtol=1e-6)


def test_a_whole_tensor_of_a_module_of_megatron_is_refused(tmp_path: Path) -> None:
    """Its rows are in another order than the base's."""
    base = Base(tmp_path / "model", "llama", num_hidden_layers=1, attention_bias=True)
    q = next(site for site in base.sites if site.module.endswith("q_proj"))
    tensors = {
        f"{PREFIX}{q.module}.lora_A.weight": np.ones((R, q.in_features), np.float32),
        f"{PREFIX}{q.module}.lora_B.weight": np.ones((q.out_features, R), np.float32),
        f"{PREFIX}decoder.layers.0.self_attention.linear_qkv.bias": np.ones(2 * q.out_features, np.float32),
    }
    write_adapter(tmp_path / "a", tiny_config(rank=R, alpha=2, targets=["q_proj"], bias="all"), tensors)
    with pytest.raises(AdapterError, match=r"linear_qkv\.bias is a whole tensor of a module of Megatron"):
        validate_adapter(tmp_path / "a", base.sites, base=base.facts)


def test_an_activated_lora_does_not_act_on_cached_latents(tmp_path: Path) -> None:
    """They are those of all tokens, also of those before the invocation."""
    base, rng = Base(tmp_path / "model", "deepseek_v3", num_hidden_layers=1), np.random.default_rng(0)
    for name in ("q_b_proj", "kv_b_proj"):
        site = next(site for site in base.sites if site.module.endswith(name))
        tensors = {
            f"{PREFIX}{site.module}.lora_A.weight": normal(rng, R, site.in_features),
            f"{PREFIX}{site.module}.lora_B.weight": normal(rng, site.out_features, R),
        }
        write_adapter(
            tmp_path / name, tiny_config(rank=R, alpha=2, targets=[name], alora_invocation_tokens=[5]), tensors
        )
    assert validate_adapter(tmp_path / "q_b_proj", base.sites, base=base.facts).facts.invocation == (5,)
    with pytest.raises(AdapterError, match=r"alora_invocation_tokens: .*kv_b_proj.*cached latents"):
        validate_adapter(tmp_path / "kv_b_proj", base.sites, base=base.facts)
