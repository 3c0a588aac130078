"""Methods of PEFT other than LoRA: a verdict for each of them and for each of their fields, and what is refused.

That the served ones answer as PEFT does is in the parity table (``parity_methods.py``).
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from lora_bases import BASE, KV, D, F, llama_sites
from parity_adapters import write_base
from parity_kinds import Kind
from parity_methods import KINDS

from truffula.errors import AdapterError
from truffula.kernels.adapters import InputScale, LowRank, Rows
from truffula.lora.base import BaseSource, BaseWeights, KvLayer
from truffula.lora.method_fields import TABLES
from truffula.lora.methods import METHODS
from truffula.lora.peft import BaseFacts, inspect_adapter, validate_adapter
from truffula.lora.refused import REFUSED
from truffula.testing.adapters import PREFIX, write_adapter
from truffula.testing.parity import verify_model

Tensors = dict[str, Any]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SOURCE = BaseSource("", (), {}, {}, kv=(KvLayer(3, 2, 4), KvLayer(7, 2, 4)))
SHAPES = {Q: (16, D), DOWN: (D, F)}
VERIFIED = ("aLoRA", "prompt tuning", "prefix tuning")


def values(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def of_modules(**leaves: Any) -> Tensors:
    """The tensors of q and down of layer 0: each leaf a function of outputs and inputs."""
    return {f"{PREFIX}{module}.{leaf}": make(*SHAPES[module]) for module in SHAPES for leaf, make in leaves.items()}


TARGETS = {"target_modules": [Q, DOWN]}
ADAPTERS: dict[str, tuple[dict[str, Any], Tensors]] = {
    "ADALORA": (
        {"init_r": 2, "lora_alpha": 6, "r": 8, **TARGETS},
        of_modules(
            lora_A=lambda o, i: values(2, i), lora_B=lambda o, i: values(o, 2), lora_E=lambda o, i: values(2, 1)
        ),
    ),
    "VERA": (
        {"r": 3, "save_projection": True, **TARGETS},
        of_modules(vera_lambda_b=lambda o, i: values(o), vera_lambda_d=lambda o, i: values(3))
        | {"base_model.vera_A": values(3, F), "base_model.vera_B": values(16, 3)},
    ),
    "IA3": (
        {"feedforward_modules": [DOWN], **TARGETS},
        {f"{PREFIX}{Q}.ia3_l": values(16, 1), f"{PREFIX}{DOWN}.ia3_l": values(1, F)},
    ),
    "LOHA": (
        {"r": 1, "alpha": 4, **TARGETS},
        of_modules(
            hada_w1_a=lambda o, i: values(o, 1), hada_w1_b=lambda o, i: values(1, i),
            hada_w2_a=lambda o, i: values(o, 1), hada_w2_b=lambda o, i: values(1, i),
        ),
    ),
    "LOKR": (
        {"r": 1, "alpha": 4, **TARGETS},
        of_modules(
            lokr_w1=lambda o, i: values(2, 2), lokr_w2_a=lambda o, i: values(o // 2, 1),
            lokr_w2_b=lambda o, i: values(1, i // 2),
        ),
    ),
    "PROMPT_TUNING": ({"num_virtual_tokens": 3, "token_dim": D}, {"prompt_embeddings": values(3, D)}),
    "P_TUNING": ({"num_virtual_tokens": 3, "token_dim": D}, {"prompt_embeddings": values(3, D)}),
    "PREFIX_TUNING": (
        {"num_virtual_tokens": 3, "token_dim": 8, "num_attention_heads": 2, "num_layers": 2},
        {"prompt_embeddings": values(3, 2 * 2 * 8)},
    ),
}  # fmt: skip


def validate(folder: Path, method: str, changes: Tensors | None = None, **fields: Any) -> Any:
    config, tensors = ADAPTERS[method]
    every = {key: value for key, value in (tensors | (changes or {})).items() if value is not None}
    write_adapter(folder, {"peft_type": method, **config, **fields}, every)
    return validate_adapter(folder, llama_sites(), base=BaseFacts(BASE.model, BaseWeights(SOURCE)))


def test_every_method_of_the_installed_peft_is_served_or_refused() -> None:
    from peft import PeftType

    assert {method.value for method in PeftType} == {"LORA", *METHODS, *REFUSED}
    assert not METHODS.keys() & REFUSED.keys()


def test_every_field_of_every_served_method_has_a_verdict() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert TABLES.keys() == METHODS.keys()
    for method, table in TABLES.items():
        fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[method])}
        assert fields ^ table.fields.keys() == set(), method
        assert set(table.required) <= fields


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_what_a_refusal_says_can_be_done(method: str) -> None:
    _, advice = REFUSED[method]
    if "save_as_lora" not in advice and "merge_and_unload" not in advice:
        return
    layers = importlib.import_module(f"peft.tuners.{method.lower()}.layer")
    classes = [kind for kind in vars(layers).values() if isinstance(kind, type) and kind.__module__ == layers.__name__]
    if "save_as_lora" in advice:
        assert any("supports_lora_conversion" in vars(kind) for kind in classes)
    assert any("merge" in vars(kind) for kind in classes)


@pytest.mark.parametrize("method", [method for method in ADAPTERS if method != "IA3"])
def test_an_adapter_is_served_and_inspected(tmp_path: Path, method: str) -> None:
    adapter = validate(tmp_path, method)
    assert bool(adapter.sites) != (adapter.prefix is not None)
    report = inspect_adapter(tmp_path, llama_sites(), BaseFacts(BASE.model, BaseWeights(SOURCE)))
    assert report.error is None and report.rank == adapter.rank
    assert {row.verdict for row in report.rows} <= {"serve", "check", "ignore"}
    assert inspect_adapter(tmp_path).error is None


CASES: list[tuple[str, Tensors, dict[str, Any], str, str]] = [
    ("ADALORA", {}, {"rank_pattern": {f"{Q}.lora_E": [True, False]}}, f"{PREFIX}{Q}.lora_A", "has rank 2"),
    ("ADALORA", {}, {"use_dora": True}, "use_dora", "not with AdaLoRA"),
    ("ADALORA", {}, {"bias": "all"}, "bias", "trained biases"),
    ("ADALORA", {f"{PREFIX}{Q}.lora_E": None}, {}, f"{PREFIX}{Q}.lora_A", "incomplete"),
    ("ADALORA", {f"{PREFIX}{Q}.lora_E": np.full((2, 1), np.nan, np.float32)}, {}, f"{PREFIX}{Q}.lora_E", "NaN"),
    ("ADALORA", {f"{PREFIX}{Q}.lora_C": values(2, 2)}, {}, f"{PREFIX}{Q}.lora_C", "lora_A, lora_B, lora_E"),
    ("ADALORA", {}, {"target_modules": ["k_proj"]}, "target_modules", "does not target"),
    ("ADALORA", {}, {"made_up": 1}, "made_up", "unknown"),
    ("VERA", {"base_model.vera_A": None, "base_model.vera_B": None}, {}, "save_projection", "random seed"),
    ("VERA", {"base_model.vera_A": values(3, D)}, {}, "base_model.vera_A", "shape"),
    ("VERA", {f"{PREFIX}{Q}.vera_lambda_b": values(15)}, {}, f"{PREFIX}{Q}.vera_lambda_b", "shape"),
    ("IA3", {}, {"feedforward_modules": [Q]}, "feedforward_modules", "says otherwise"),
    ("IA3", {f"{PREFIX}{Q}.ia3_l": values(15, 1)}, {}, f"{PREFIX}{Q}.ia3_l", "shape"),
    ("LOHA", {}, {"r": 2}, f"{PREFIX}{Q}.hada_w1_a", "shape"),
    ("LOHA", {f"{PREFIX}{Q}.hada_t1": values(1, 1, 1, 1)}, {}, f"{PREFIX}{Q}.hada_t1", "hada_w1_a"),
    ("LOKR", {f"{PREFIX}{Q}.lokr_w1": values(2, 3)}, {}, f"{PREFIX}{Q}.lokr_w1", "make a matrix [16, 18]"),
    ("LOKR", {f"{PREFIX}{Q}.lokr_w2_b": values(2, 6)}, {}, f"{PREFIX}{Q}.lokr_w2_b", "shape"),
    ("PROMPT_TUNING", {}, {"num_virtual_tokens": 4}, "prompt_embeddings", "shape"),
    ("PROMPT_TUNING", {}, {"token_dim": 5}, "token_dim", "embeddings of width 12"),
    ("PROMPT_TUNING", {}, {"num_transformer_submodules": 2}, "num_transformer_submodules", "encoder-decoder"),
    ("PROMPT_TUNING", {}, {"num_virtual_tokens": 0}, "num_virtual_tokens", "0"),
    ("PROMPT_TUNING", {"other": values(2)}, {}, "other", "prompt_embeddings"),
    ("PREFIX_TUNING", {}, {"num_attention_heads": 4}, "token_dim", "2 heads, 8 numbers"),
    ("PREFIX_TUNING", {}, {"num_layers": 3}, "token_dim", "2 layers"),
]


@pytest.mark.parametrize(("method", "changes", "fields", "param", "says"), CASES)
def test_what_does_not_fit_is_refused(tmp_path: Path, method, changes, fields, param, says) -> None:
    with pytest.raises(AdapterError) as caught:
        validate(tmp_path, method, changes, **fields)
    assert caught.value.param == param
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("method", "zero"),
    [("ADALORA", "lora_E"), ("VERA", "vera_lambda_b"), ("LOHA", "hada_w2_b"), ("LOKR", "lokr_w1")],
)
def test_an_adapter_as_before_training_changes_nothing_and_is_refused(tmp_path: Path, method: str, zero: str) -> None:
    _, tensors = ADAPTERS[method]
    empty = {key: np.zeros_like(value) for key, value in tensors.items() if key.endswith(zero)}
    with pytest.raises(AdapterError, match="changes nothing"):
        validate(tmp_path, method, empty)


def test_adalora_divides_by_the_rank_that_it_began_with(tmp_path: Path) -> None:
    kept = {f"{Q}.lora_E": [True, False], f"{DOWN}.lora_E": [False, False]}
    smaller = of_modules(
        lora_A=lambda o, i: values(1 if o == 16 else 0, i), lora_B=lambda o, i: values(o, 1 if o == 16 else 0),
        lora_E=lambda o, i: values(1 if o == 16 else 0, 1),
    )  # fmt: skip
    adapter = validate(tmp_path, "ADALORA", smaller, rank_pattern=kept)
    (part,) = adapter.sites[0].parts
    assert len(adapter.sites) == 1 and isinstance(part, LowRank)
    assert part.scale == pytest.approx(6 / (2 + 1e-5)) and part.a.shape == (1, D)
    assert any("kept no rank" in warning for warning in adapter.warnings)
    (part,) = validate(tmp_path, "ADALORA", smaller, rank_pattern=kept, lora_alpha=-3).sites[0].parts
    assert part.scale == pytest.approx(1 / (2 + 1e-5))


@pytest.mark.parametrize(("w1", "w2"), [((2, 2), (8, 6)), ((2, 3), (8, 4)), ((4, 4), (4, 3)), ((1, 12), (16, 1))])
def test_a_kronecker_product_is_the_product_of_its_factors(tmp_path: Path, w1, w2) -> None:
    whole, right = values(*w1, seed=1), values(*w2, seed=2)
    left = {"lokr_w1": whole, "lokr_w2": right}
    tensors = {f"{PREFIX}{Q}.{name}": value for name, value in left.items()}
    config = {"peft_type": "LOKR", "r": 1, "alpha": 4, "target_modules": [Q]}
    write_adapter(tmp_path, config, tensors)
    (part,) = validate_adapter(tmp_path, llama_sites(), base=BASE).sites[0].parts
    np.testing.assert_allclose(part.b @ part.a, np.kron(whole, right), rtol=1e-5)


def test_virtual_tokens_are_rows_beyond_the_table(tmp_path: Path) -> None:
    adapter = validate(tmp_path, "PROMPT_TUNING")
    (part,) = adapter.sites[0].parts
    assert isinstance(part, Rows)
    assert adapter.facts.virtual_ids == tuple(part.ids) == (97, 98, 99)


def test_a_prefix_is_keys_and_values_of_each_layer(tmp_path: Path) -> None:
    adapter = validate(tmp_path, "PREFIX_TUNING")
    stored = ADAPTERS["PREFIX_TUNING"][1]["prompt_embeddings"].reshape(3, 4, 8)
    assert adapter.facts.kv_ops == (3, 7)
    for layer in range(2):
        for half in range(2):
            np.testing.assert_array_equal(adapter.prefix[layer, half], stored[:, 2 * layer + half])


@pytest.mark.parametrize(
    ("kv", "says"),
    [("it has recurrent layers", "recurrent"), ((KvLayer(1, 2, 4), KvLayer(2, 1, 4)), "different sizes")],
)
def test_a_prefix_needs_layers_that_keep_all_keys(tmp_path: Path, kv, says: str) -> None:
    config, tensors = ADAPTERS["PREFIX_TUNING"]
    write_adapter(tmp_path, {"peft_type": "PREFIX_TUNING", **config}, tensors)
    weights = BaseWeights(dataclasses.replace(SOURCE, kv=kv))
    with pytest.raises(AdapterError, match=says) as caught:
        validate_adapter(tmp_path, llama_sites(), base=BaseFacts(BASE.model, weights))
    assert caught.value.param == "peft_type"


def test_a_base_that_cannot_be_given_embeddings_has_no_virtual_tokens(tmp_path: Path) -> None:
    config, tensors = ADAPTERS["PROMPT_TUNING"]
    write_adapter(tmp_path, {"peft_type": "PROMPT_TUNING", **config}, tensors)
    sites = tuple(msgspec.structs.replace(site, virtual_scale=None) for site in llama_sites())
    with pytest.raises(AdapterError, match="prompt tuning is not served"):
        validate_adapter(tmp_path, sites, base=BASE)
    scaled = tuple(msgspec.structs.replace(site, virtual_scale=3.0) for site in llama_sites())
    (part,) = validate_adapter(tmp_path, scaled, base=BASE).sites[0].parts
    np.testing.assert_array_equal(part.values, tensors["prompt_embeddings"] * np.float32(3))


def test_a_feed_forward_module_scales_its_input(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}{DOWN}.ia3_l": values(1, F)}
    write_adapter(tmp_path, {"peft_type": "IA3", "target_modules": [DOWN], "feedforward_modules": None}, tensors)
    ((part,),) = [site.parts for site in validate_adapter(tmp_path, llama_sites(), base=BASE).sites]
    assert isinstance(part, InputScale)


@pytest.mark.parametrize(
    ("tensor", "shape"), [("embed_tokens", (3, D)), ("lm_head", (3, D)), ("layers.0.self_attn.k_proj", (KV, D))]
)
def test_trained_tokens_must_be_of_a_table_that_is_named(tmp_path: Path, tensor: str, shape: tuple[int, int]) -> None:
    name = tensor if tensor == "lm_head" else f"model.{tensor}"
    tensors = {f"{PREFIX}{name}.trainable_tokens_delta": values(*shape)}
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2, 500], "target_modules": "model.embed_tokens"}
    write_adapter(tmp_path, config, tensors)
    with pytest.raises(AdapterError) as caught:
        validate_adapter(tmp_path, llama_sites(), base=BASE)
    assert caught.value.param == ("token_indices" if tensor == "embed_tokens" else "target_modules")


def test_a_tensor_may_not_be_in_the_file_under_two_names(tmp_path: Path) -> None:
    tensors = {f"{prefix}{DOWN}.ia3_l": values(1, F, seed=n) for n, prefix in enumerate(("", PREFIX))}
    write_adapter(tmp_path, {"peft_type": "IA3", "target_modules": [DOWN], "feedforward_modules": [DOWN]}, tensors)
    with pytest.raises(AdapterError, match="are the same tensor of one module"):
        validate_adapter(tmp_path, llama_sites(), base=BASE)


Q_PAIR = {f"{PREFIX}{Q}.lora_A.weight": values(2, D), f"{PREFIX}{Q}.lora_B.weight": values(16, 2)}
OVERFLOW = {
    "a row of A times E": (
        {"peft_type": "ADALORA", "init_r": 1, "lora_alpha": 2},
        {
            f"{PREFIX}{Q}.lora_A": values(1, D) * np.float32(1e30), f"{PREFIX}{Q}.lora_B": values(16, 1),
            f"{PREFIX}{Q}.lora_E": np.full((1, 1), 1e20, np.float32),
        },
    ),
    "a bias of B times the scale": (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 1e9, "lora_bias": True},
        Q_PAIR | {f"{PREFIX}{Q}.lora_B.bias": np.full(16, 3e38, np.float32)},
    ),
    "a mean of inputs times their number": (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_qalora": True, "qalora_group_size": 1},
        {name: value * np.float32(1e38) for name, value in Q_PAIR.items()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OVERFLOW)
def test_what_is_computed_must_be_finite(tmp_path: Path, what: str) -> None:
    config, tensors = OVERFLOW[what]
    write_adapter(tmp_path, {**config, "target_modules": [Q]}, tensors)
    with pytest.raises(AdapterError, match="beyond the range of float32") as caught:
        validate_adapter(tmp_path, llama_sites(), base=BASE)
    assert caught.value.param in tensors


CALLED = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alora_invocation_tokens": [5, 6]}


def test_an_activated_lora_has_its_invocation_among_its_facts(tmp_path: Path) -> None:
    write_adapter(tmp_path, {**CALLED, "target_modules": [Q]}, Q_PAIR)
    assert validate_adapter(tmp_path, llama_sites(), base=BASE).facts.invocation == (5, 6)


@pytest.mark.parametrize(
    ("fields", "tensors", "param", "says"),
    [
        ({"target_modules": [Q], "init_lora_weights": "pissa"}, Q_PAIR, "init_lora_weights", "not with alora"),
        (
            {"target_modules": [Q], "target_parameters": ["mlp.gate.weight"]},
            Q_PAIR,
            "target_parameters",
            "not with alora",
        ),
        ({"target_modules": [Q], "use_dora": True}, Q_PAIR, "alora_invocation_tokens", "does not combine"),
        ({"target_modules": [Q], "alora_invocation_tokens": [5, 97]}, Q_PAIR, "alora_invocation_tokens", "97 rows"),
        ({"target_modules": [Q], "alora_invocation_tokens": [5] * 257}, Q_PAIR, "alora_invocation_tokens", "<= 256"),
        (
            {"target_modules": ["embed_tokens"]},
            {
                f"{PREFIX}model.embed_tokens.lora_embedding_A": values(2, 97),
                f"{PREFIX}model.embed_tokens.lora_embedding_B": values(D, 2),
            },
            "alora_invocation_tokens",
            "embedding",
        ),
    ],
)
def test_an_activated_lora_of_what_peft_does_not_activate_is_refused(tmp_path, fields, tensors, param, says) -> None:
    write_adapter(tmp_path, {**CALLED, **fields}, tensors)
    with pytest.raises(AdapterError, match=says) as caught:
        validate_adapter(tmp_path, llama_sites(), base=BASE)
    assert caught.value.param == param


def test_an_activated_lora_needs_a_model_that_computes_rows_apart(tmp_path: Path) -> None:
    write_adapter(tmp_path, {**CALLED, "target_modules": [Q]}, Q_PAIR)
    weights = BaseWeights(dataclasses.replace(SOURCE, serial=True))
    with pytest.raises(AdapterError, match="one sequence at a time"):
        validate_adapter(tmp_path, llama_sites(), base=BaseFacts(BASE.model, weights))


@pytest.mark.slow  # peft makes them
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in VERIFIED], ids=lambda kind: kind.name)
def test_verify_compares_what_acts_in_peft_s_wrapper(tmp_path: Path, kind: Kind) -> None:
    base = write_base(tmp_path / "model", "llama", tied=False)
    report = verify_model(base, adapter=kind.make(tmp_path / "adapter", base, 0), new_tokens=6)
    assert report.ok and len(report.rows) > 10, report.first_divergence
