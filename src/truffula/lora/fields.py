"""A verdict for every field of an ``adapter_config.json``: one table for validation, ``inspect`` and the docs.

serve: honoured exactly · check: compared with the tensors · ignore: has no effect on answers · refuse: would change
them and is not served yet, so an adapter that uses it is refused with the field's name. A field that is not in the
table is refused unless its value is null, false, 0 or empty: then it has no effect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from truffula.errors import AdapterError
from truffula.lora.foreign import MLX

Verdict = Literal["serve", "check", "ignore", "refuse"]
MAX_CONFIG_BYTES = 4 << 20
MAX_RANK = 65_536
MAX_ALPHA = 1e9
MAX_INVOCATION = 256  # the engine compares them with each place of a prompt


@dataclass(frozen=True)
class FieldRow:
    """One row of ``inspect``: a field, its value, its verdict, and the reason (of a refusal also what to do)."""

    field: str
    value: str
    verdict: Verdict
    note: str = ""


def is_empty(value: Any) -> bool:
    """Whether a value is null, false, 0 or empty, and so has no effect."""
    return value is None or value is False or value in (0, "", [], {})


def _absent(value: Any) -> bool:
    """For fields where PEFT takes even an empty object or list as a request."""
    return value is None or value is False


class BlockDiagonal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``use_bdlora``: A or B of modules whose names contain one of the texts is block-diagonal, of ``nblocks``."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: Annotated[int, msgspec.Meta(ge=1)] = 1
    match_strict: bool = True


@dataclass(frozen=True)
class Field:
    """How one field is treated. ``kind`` is the type of its values.

    ``harmless`` says whether a value of a refused field has no effect.
    """

    verdict: Verdict
    note: str
    kind: Any = Any
    harmless: Callable[[Any], bool] = is_empty


Rank = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, msgspec.Meta(ge=-MAX_ALPHA, le=MAX_ALPHA)]
_Flag = bool | None
_Names = str | list[str] | None
_List = list[str] | None
_Layers = int | list[int] | None
_Ids = list[Annotated[int, msgspec.Meta(ge=0)]]
_Init = bool | Literal["gaussian", "eva", "orthogonal", "mica", "pissa", "olora"] | None

MERGE = "merge it into its base (PEFT's merge_and_unload) and serve that as a model"
_TRAINING = "affects only training"
_SUBTRACTED = "the part of the base that training began with is computed when the adapter is loaded, and subtracted"
_FIRST_PATTERN = "the first matching pattern in the file's order applies"

FIELDS: Mapping[str, Field] = {
    "peft_type": Field("check", "LORA, or another method that is served", Literal["LORA"] | None),
    "task_type": Field(
        "check", "must be CAUSAL_LM or null: other tasks need another head", Literal["CAUSAL_LM"] | None
    ),
    "r": Field("serve", "rank of modules without an entry in rank_pattern", Rank),
    "lora_alpha": Field("serve", "scale is lora_alpha / r", Alpha),
    "use_rslora": Field("serve", "scale is lora_alpha / sqrt(r)", _Flag),
    "rank_pattern": Field("serve", _FIRST_PATTERN, dict[str, Rank] | None),
    "alpha_pattern": Field("serve", _FIRST_PATTERN, dict[str, Alpha] | None),
    "target_modules": Field("check", "must name exactly the modules that have tensors", _Names),
    "exclude_modules": Field("check", "takes precedence over target_modules", _Names),
    "layers_to_transform": Field("check", "limits target_modules to these layers", _Layers),
    "layers_pattern": Field("check", "name of the list of layers", _Names),
    "init_lora_weights": Field(
        "serve",
        "true, false, gaussian, eva, orthogonal and mica leave the base's weights unchanged; of pissa and olora "
        f"{_SUBTRACTED}",
        _Init,
    ),
    "bias": Field("serve", "trained biases take the place of the base's", Literal["none", "all", "lora_only"] | None),
    "lora_bias": Field("serve", "biases of B, scaled as B is", _Flag),
    "modules_to_save": Field(
        "serve", "linear layers, norms, embedding and head whose trained weights take the place of the base's", _List
    ),
    "use_dora": Field("serve", "DoRA: norms are computed from the base's weights when the adapter is loaded", _Flag),
    "trainable_token_indices": Field(
        "serve", "trained rows of embedding and head; on a tied base of both", _Ids | dict[str, _Ids] | None
    ),
    "ensure_weight_tying": Field("serve", "on a tied base, what is trained of the embedding is the head's, too", _Flag),
    "alora_invocation_tokens": Field(
        "serve",
        "activated LoRA: it acts from the last occurrence of these ids in the prompt on, and nowhere without one",
        Annotated[_Ids, msgspec.Meta(min_length=1, max_length=MAX_INVOCATION)] | None,
    ),
    "use_qalora": Field("serve", "A acts on means of groups of inputs", _Flag),
    "qalora_group_size": Field("serve", "inputs of a group, with use_qalora", Annotated[int, msgspec.Meta(ge=1)]),
    "kasa_config": Field("serve", f"KaSA: {_SUBTRACTED}", dict[str, Any] | None),
    "use_bdlora": Field("serve", "BD-LoRA: A or B is block-diagonal", BlockDiagonal | None),
    "auto_mapping": Field("ignore", "concerns only PEFT's classes"),
    "base_model_name_or_path": Field("ignore", "paths differ between machines; tensor shapes are checked instead"),
    "revision": Field("ignore", "revision of the base; tensor shapes are checked instead"),
    "peft_version": Field("ignore", "the version that wrote the file"),
    "inference_mode": Field("ignore", _TRAINING),
    "lora_dropout": Field("ignore", _TRAINING),
    "fan_in_fan_out": Field("ignore", "describes the base's weights; the adapter's tensors do not depend on it"),
    "loftq_config": Field("ignore", "parameters of init_lora_weights, which is checked"),
    "eva_config": Field("ignore", "parameters of init_lora_weights, which is checked"),
    "corda_config": Field("ignore", "parameters of init_lora_weights, which is checked"),
    "lora_ga_config": Field("ignore", "parameters of init_lora_weights, which is checked"),
    "runtime_config": Field("ignore", "affects only PEFT's memory use"),
    "velora_config": Field("ignore", "affects only training: compressed activations"),
    "monteclora_config": Field("ignore", "affects only training: sampling"),
    "megatron_core": Field("ignore", "name of a Python package"),
    "megatron_config": Field("refuse", "a parallel layer layout; export the adapter for the plain model"),
    "target_parameters": Field("check", "must name exactly the parameters (of experts) that have tensors", _List),
    "layer_replication": Field("refuse", f"changes the depth of the model and the layout of its KV cache; {MERGE}"),
    "arrow_config": Field("refuse", "Arrow mixes many adapters per token; serve one of them", harmless=_absent),
}


@dataclass(frozen=True)
class FieldTable:
    """The fields of one method. An adapter must have the ``required`` ones."""

    fields: Mapping[str, Field]
    required: tuple[str, ...] = ()


LORA = FieldTable(FIELDS, ("r", "lora_alpha"))

# What else to do about a refused initialisation, by how its name begins.
_CONVERT_INIT = (
    "this initialisation changed the base weights, and the change is not in the adapter; save it with "
    "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL), which writes a plain LoRA "
    "adapter (INITIAL: the adapter saved before the first training step)"
)
_INITS = (
    {"pissa_niter": f"its decomposition is drawn at random; {_CONVERT_INIT}"}
    | {
        "loftq": "LoftQ replaced the base weights by quantised ones, which are not in the adapter; merge it into the "
        "model that it was trained on (PEFT's merge_and_unload) and serve the result as a model",
    }
    | dict.fromkeys(("pissa", "corda", "lora_ga"), _CONVERT_INIT)
)


def parse_config(raw: bytes) -> dict[str, Any]:
    """``adapter_config.json`` as a dict; ``AdapterError`` when it is too large, no object, or holds NaN or Infinity."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise AdapterError(
            f"adapter_config.json has {len(raw)} bytes; the limit is {MAX_CONFIG_BYTES}.", param="config"
        )
    try:
        config = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise AdapterError(f"adapter_config.json is not valid JSON: {error}.", param="config") from error
    if not isinstance(config, dict):
        raise AdapterError("adapter_config.json is not a JSON object.", param="config")
    return config


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _field_row(name: str, value: Any, fields: Mapping[str, Field]) -> FieldRow:
    field = fields.get(name)
    if field is None:
        if is_empty(value):
            return FieldRow(name, _short(value), "ignore", "unknown, and empty")
        note = "unknown to truffula: it may change the answers; remove it only if you know that it does not"
        return FieldRow(name, _short(value), "refuse", note)
    try:
        msgspec.convert(value, field.kind)
    except msgspec.ValidationError as error:
        inits = _INITS if name == "init_lora_weights" else {}
        advice = next((text for start, text in inits.items() if str(value).startswith(start)), field.note)
        return FieldRow(name, _short(value), "refuse", f"{str(error)[:200]}; {advice}")
    if field.verdict == "refuse" and field.harmless(value):
        return FieldRow(name, _short(value), "ignore", "has no effect on the text")
    return FieldRow(name, _short(value), field.verdict, field.note)


def field_rows(config: Mapping[str, Any], table: FieldTable = LORA) -> list[FieldRow]:
    """A row per field that the file has, refusals included; never raises."""
    rows = [_field_row(name, value, table.fields) for name, value in config.items()]
    if config.get("peft_type") is None:
        rows.insert(0, FieldRow("peft_type", "", "refuse", "missing; PEFT writes LORA here"))
    missing = "missing, so the scale or size of the adapter is unknown; PEFT writes this field"
    rows += [FieldRow(name, "", "refuse", missing) for name in table.required if name not in config]
    return rows + _contradictions(config)


def _contradictions(config: Mapping[str, Any]) -> list[FieldRow]:
    """Rows for pairs of fields that PEFT refuses together."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    rows = []
    if isinstance(config.get("target_modules"), str) and layers is not None:
        rows.append(FieldRow("layers_to_transform", _short(layers), "refuse", "target_modules is a regular expression"))
    if isinstance(config.get("target_modules"), str) and pattern is not None:
        rows.append(FieldRow("layers_pattern", _short(pattern), "refuse", "target_modules is a regular expression"))
    variants = ("use_dora", "use_bdlora", "use_qalora", "kasa_config", "alora_invocation_tokens")
    given = [name for name in variants if config.get(name) not in (None, False)]
    if len(given) > 1:
        rows.append(FieldRow(given[1], _short(config[given[1]]), "refuse", f"PEFT does not combine it with {given[0]}"))
    if config.get("alora_invocation_tokens") is not None:
        given = [name for name in ("target_parameters",) if config.get(name)]
        given += ["init_lora_weights"] * (config.get("init_lora_weights") in ("pissa", "olora", "mica"))
        rows += [FieldRow(one, _short(config[one]), "refuse", "not with alora_invocation_tokens") for one in given]
    if config.get("lora_bias") and config.get("use_dora"):
        rows.append(FieldRow("lora_bias", "true", "refuse", "PEFT does not combine it with use_dora"))
    if pattern and layers is None:
        rows.append(FieldRow("layers_pattern", _short(pattern), "refuse", "needs layers_to_transform"))
    return rows


class LoraSettings(msgspec.Struct, frozen=True):
    """The fields that are served or checked."""

    r: Rank
    lora_alpha: Alpha
    use_rslora: _Flag = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    target_modules: _Names = None
    target_parameters: _List = None
    exclude_modules: _Names = None
    layers_to_transform: _Layers = None
    layers_pattern: _Names = None
    init_lora_weights: _Init = None
    bias: str | None = None
    lora_bias: _Flag = None
    modules_to_save: _List = None
    use_dora: _Flag = None
    trainable_token_indices: _Ids | dict[str, _Ids] | None = None
    ensure_weight_tying: _Flag = None
    alora_invocation_tokens: _Ids | None = None
    use_qalora: _Flag = None
    qalora_group_size: int = 16
    kasa_config: dict[str, Any] | None = None
    use_bdlora: BlockDiagonal | None = None


def read_settings(config: Mapping[str, Any]) -> LoraSettings:
    """The fields that decide how a LoRA adapter is served; raises as ``check_fields``."""
    check_fields(config)
    return msgspec.convert(config, LoraSettings)


def check_fields(config: Mapping[str, Any], table: FieldTable = LORA) -> None:
    """Raise ``AdapterError`` that names the fields that are refused (``param``: the first)."""
    if "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config):
        raise AdapterError(
            f"adapter_config.json is MLX's (lora_parameters, fine_tune_type); PEFT's format is served. {MLX}",
            param="peft_type",
        )
    refused = [row for row in field_rows(config, table) if row.verdict == "refuse"]
    if refused:
        lines = "; ".join(f"{row.field} = {row.value}: {row.note}" if row.value else f"{row.field}: {row.note}"
                          for row in refused[:10])  # fmt: skip
        raise AdapterError(f"adapter_config.json cannot be served: {lines}.", param=refused[0].field)
