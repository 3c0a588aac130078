"""Every field of an adapter's configuration has a verdict, and a refusal names the field."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from lora_bases import llama_sites, validate

from truffula.errors import AdapterError
from truffula.lora.fields import FIELDS, MAX_CONFIG_BYTES, field_rows, parse_config, read_settings
from truffula.lora.peft import inspect_adapter
from truffula.testing.adapters import tiny_config, tiny_tensors, write_adapter, write_tiny_adapter

PLAIN = tiny_config(rank=4, alpha=8, targets=["q_proj", "v_proj"])

# What PEFT writes for an adapter that uses the field, and the verdict.
REFUSED: list[tuple[str, Any]] = [
    # without its tensors in the file
    ("use_dora", True),
    ("lora_bias", True),
    ("modules_to_save", ["embed_tokens", "lm_head"]),
    ("trainable_token_indices", [1, 2]),
    ("trainable_token_indices", {"embed_tokens": [1]}),
    ("kasa_config", {}),
    ("use_bdlora", {"nblocks": 2}),
    ("use_bdlora", {}),
    ("target_parameters", "mlp.experts.gate_up_proj"),
    ("layer_replication", [[0, 2], [1, 2]]),
    ("alora_invocation_tokens", [-5]),
    ("alora_invocation_tokens", []),
    ("arrow_config", {}),
    ("megatron_config", {"tensor_model_parallel_size": 2}),
    ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "brand_new"),
    ("init_lora_weights", 1),
    ("task_type", "SEQ_CLS"),
    ("task_type", "TOKEN_CLS"),
    ("made_up_field", True),
    ("made_up_field", 3),
    # values of a wrong kind
    ("r", 0),
    ("r", -1),
    ("r", "8"),
    ("r", 8.5),
    ("r", True),
    ("r", None),
    ("r", 10**9),
    ("lora_alpha", "16"),
    ("lora_alpha", None),
    ("lora_alpha", 1e300),
    ("use_rslora", "yes"),
    ("use_dora", "true"),
    ("use_qalora", 1),
    ("qalora_group_size", 0),
    ("modules_to_save", "lm_head"),
    ("trainable_token_indices", [-1]),
    ("kasa_config", True),
    ("use_bdlora", {"blocks": 2}),
    ("ensure_weight_tying", "yes"),
    ("rank_pattern", ["q_proj"]),
    ("rank_pattern", {"q_proj": "4"}),
    ("rank_pattern", {"q_proj": 0}),
    ("alpha_pattern", {"q_proj": [1]}),
    ("target_modules", 5),
    ("target_modules", [5]),
    ("exclude_modules", {"a": 1}),
    ("layers_to_transform", "0"),
    ("layers_to_transform", [0.5]),
    ("layers_pattern", "layers"),  # without layers_to_transform
    ("bias", "some"),
    # broken patterns
    ("target_modules", "(unclosed"),
    ("rank_pattern", {"(unclosed": 4}),
]
ACCEPTED: list[tuple[str, Any]] = [
    ("alora_invocation_tokens", [5, 6]),
    ("init_lora_weights", False),
    ("init_lora_weights", "gaussian"),
    ("init_lora_weights", "eva"),
    ("init_lora_weights", "orthogonal"),
    ("init_lora_weights", "mica"),
    ("task_type", None),
    ("fan_in_fan_out", True),
    ("lora_dropout", 0.5),
    ("lora_alpha", 3.5),
    ("lora_alpha", -4),
    ("bias", "none"),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("ensure_weight_tying", True),
    ("use_qalora", False),
    ("qalora_group_size", 16),
    ("lora_bias", False),
    ("kasa_config", None),
    ("use_bdlora", None),
    ("trainable_token_indices", None),
    ("modules_to_save", []),
    ("layer_replication", None),
    ("velora_config", {"rank": 1}),
    ("monteclora_config", {"n": 2}),
    ("eva_config", {"rho": 2.0}),
    ("loftq_config", {"loftq_bits": 4}),
    ("runtime_config", {"ephemeral_gpu_offload": False}),
    ("auto_mapping", {"parent_library": "x"}),
    ("revision", "main"),
    ("peft_version", "99.0"),
    ("megatron_core", "megatron.core"),
    ("made_up_field", None),
    ("made_up_field", False),
    ("made_up_field", {}),
    ("made_up_field", 0),
    ("exclude_modules", []),
    ("target_modules", None),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=lambda x: str(x)[:30])
def test_a_field_that_is_not_served_is_refused_by_its_name(tmp_path: Path, field: str, value: Any) -> None:
    write_adapter(tmp_path, PLAIN | {field: value}, tiny_tensors(llama_sites(), PLAIN))
    with pytest.raises(AdapterError) as caught:
        validate(tmp_path)
    assert caught.value.param == field
    assert field in caught.value.message
    report = inspect_adapter(tmp_path, llama_sites())
    assert report.error is not None and report.error.param == field


@pytest.mark.parametrize(("field", "value"), ACCEPTED, ids=lambda x: str(x)[:30])
def test_a_field_that_changes_nothing_is_accepted_and_reported(tmp_path: Path, field: str, value: Any) -> None:
    write_adapter(tmp_path, PLAIN | {field: value}, tiny_tensors(llama_sites(), PLAIN))
    validate(tmp_path)
    report = inspect_adapter(tmp_path, llama_sites())
    assert report.error is None
    assert next(row.verdict for row in report.rows if row.field == field) != "refuse"


def test_every_refused_field_is_named_at_once(tmp_path: Path) -> None:
    config = PLAIN | {"arrow_config": {}, "layer_replication": [[0, 2]]}
    write_adapter(tmp_path, config, tiny_tensors(llama_sites(), PLAIN))
    with pytest.raises(AdapterError, match=r"arrow_config.*layer_replication"):
        validate(tmp_path)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"use_dora": True, "lora_bias": True}, "lora_bias"),
        ({"use_dora": True, "use_bdlora": {}}, "use_bdlora"),
        ({"kasa_config": {}, "use_qalora": True}, "kasa_config"),
    ],
)
def test_variants_that_peft_does_not_combine_are_refused(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    write_adapter(tmp_path, PLAIN | fields, tiny_tensors(llama_sites(), PLAIN))
    with pytest.raises(AdapterError, match="PEFT does not combine it") as caught:
        validate(tmp_path)
    assert caught.value.param == param


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha"])
def test_a_field_without_which_nothing_is_known_may_not_be_missing(tmp_path: Path, field: str) -> None:
    config = {k: v for k, v in PLAIN.items() if k != field}
    write_adapter(tmp_path, config, tiny_tensors(llama_sites(), PLAIN))
    with pytest.raises(AdapterError, match="missing") as caught:
        validate(tmp_path)
    assert caught.value.param == field


@pytest.mark.parametrize("value", ["pissa", "olora"])
def test_what_training_took_from_the_base_needs_the_bases_weights(tmp_path: Path, value: str) -> None:
    write_adapter(tmp_path, PLAIN | {"init_lora_weights": value}, tiny_tensors(llama_sites(), PLAIN))
    with pytest.raises(AdapterError, match="needs the base's weights") as caught:
        validate(tmp_path)
    assert caught.value.param == "init_lora_weights"
    assert inspect_adapter(tmp_path, llama_sites()).error is None


def test_layers_to_transform_with_a_regular_expression_is_a_contradiction(tmp_path: Path) -> None:
    config = PLAIN | {"target_modules": ".*q_proj", "layers_to_transform": [0]}
    write_adapter(tmp_path, config, tiny_tensors(llama_sites(), PLAIN))
    with pytest.raises(AdapterError, match="regular expression") as caught:
        validate(tmp_path)
    assert caught.value.param == "layers_to_transform"


def test_every_field_of_the_installed_peft_has_a_verdict() -> None:
    from peft import LoraConfig

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert known - set(FIELDS) == set()


def test_every_field_has_its_row_in_this_table() -> None:
    tried = {field for field, _ in REFUSED + ACCEPTED}
    always = {"peft_type", "inference_mode", "base_model_name_or_path"}  # in every configuration of these tests
    only_beside_another = {"corda_config", "lora_ga_config"}
    assert set(FIELDS) - tried - always == only_beside_another
    rows = field_rows(PLAIN | {field: {"a": 1} for field in only_beside_another})
    assert {row.verdict for row in rows if row.field in only_beside_another} == {"ignore"}


def test_another_method_is_named_rather_than_its_unknown_fields(tmp_path: Path) -> None:
    write_adapter(tmp_path, {"peft_type": "HIRA", "r": 4, "alpha": 8}, tiny_tensors(llama_sites(), PLAIN))
    with pytest.raises(AdapterError, match=r"HIRA.*save_as_lora") as caught:
        validate(tmp_path)
    assert caught.value.param == "peft_type"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b'{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}', "not valid JSON"),
        (b'{"peft_type": "LORA", "r": 4, "lora_alpha": Infinity}', "not valid JSON"),
        (b'{"peft_type": "LORA", "r": 4, "lora_alpha": -Infinity}', "not valid JSON"),
        (b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1e400}', "not valid JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b" " * (MAX_CONFIG_BYTES + 1), "bytes"),
    ],
    ids=lambda x: repr(x)[:40],
)
def test_a_configuration_that_is_no_sound_json_object_is_refused(tmp_path: Path, raw: bytes, says: str) -> None:
    write_tiny_adapter(tmp_path, llama_sites())
    (tmp_path / "adapter_config.json").write_bytes(raw)
    with pytest.raises(AdapterError, match=says):
        validate(tmp_path)
    with pytest.raises(AdapterError, match=says):
        parse_config(raw)


def test_a_written_configuration_is_pefts_own(tmp_path: Path) -> None:
    from peft import LoraConfig

    write_tiny_adapter(tmp_path, llama_sites())
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(written) <= {field.name for field in dataclasses.fields(LoraConfig)}


def test_the_settings_of_lora_are_not_read_from_another_method() -> None:
    with pytest.raises(AdapterError) as caught:
        read_settings(PLAIN | {"peft_type": "HIRA"})
    assert caught.value.param == "peft_type"
