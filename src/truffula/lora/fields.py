"""A verdict for every field of an ``adapter_config.json``: one table for validation, ``inspect`` and the docs.

serve: honoured exactly · check: compared with the tensors · ignore: has no effect on answers · refuse: would change
them and is not served yet, so an adapter that uses it is refused with the field's name. A field that is not in the
table is refused unless its value is null, false, 0 or empty: then it has no effect.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from truffula.errors import AdapterError, did_you_mean, nearest
from truffula.lora.foreign import MLX
from truffula.lora.roots import other_part

Verdict = Literal["serve", "check", "ignore", "refuse"]
MAX_CONFIG_BYTES = 4 << 20
MAX_RANK = 65_536
MAX_ALPHA = 1e9


@dataclass(frozen=True)
class FieldRow:
    """One row of ``inspect``: a field, its value, its verdict, and the reason (of a refusal also what to do)."""

    field: str
    value: str
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True)
class Field:
    """How one field is treated. ``accepts`` returns why a value is of the wrong kind, or None.

    ``harmless`` says whether a value of a refused field has no effect.
    """

    verdict: Verdict
    note: str
    accepts: Callable[[Any], str | None] = lambda value: None
    harmless: Callable[[Any], bool] = lambda value: is_empty(value)


def is_empty(value: Any) -> bool:
    """Whether a value is null, false, 0 or empty, and so has no effect."""
    return value is None or value is False or value in (0, "", [], {})


def _only_other_parts(value: Any) -> bool:
    """For ``modules_to_save``: image and audio parts, which text does not pass through."""
    return isinstance(value, list) and all(isinstance(v, str) and other_part(f"{v}.") is not None for v in value)


def _absent(value: Any) -> bool:
    """For fields where PEFT takes even an empty object or list as a request."""
    return value is None or value is False


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rank(value: Any) -> str | None:
    if not _is_int(value):
        return "must be an integer"
    return None if 1 <= value <= MAX_RANK else f"must lie in 1 … {MAX_RANK}"


def _alpha(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "must be a number"
    return None if math.isfinite(value) and abs(value) <= MAX_ALPHA else f"must be finite and at most {MAX_ALPHA:g}"


def _flag(value: Any) -> str | None:
    return None if value is None or isinstance(value, bool) else "must be true or false"


def _pattern(inner: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    def accepts(value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, dict):
            return "must be an object of pattern: value"
        for pattern, item in value.items():
            reason = inner(item)
            if reason is not None:
                return f"[{pattern!r}] is {item!r:.60}, it {reason}"
        return None

    return accepts


def _names(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return None
    good = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return None if good else "must be a string or a list of strings"


def _layers(value: Any) -> str | None:
    good = value is None or _is_int(value) or (isinstance(value, list) and all(_is_int(item) for item in value))
    return None if good else "must be an integer or a list of integers"


MERGE = "merge it into its base (PEFT's merge_and_unload) and serve that as a model"
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Initialisations that change the base; PEFT can convert them to plain LoRA when saving.
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")
TASKS = ("CAUSAL_LM",)

_TRAINING = "affects only training"
_LATER = "not served yet"

FIELDS: Mapping[str, Field] = {
    "peft_type": Field("check", "must be LORA"),
    "task_type": Field("check", "must be CAUSAL_LM or null: other tasks need another head"),
    "r": Field("serve", "rank of modules without an entry in rank_pattern", _rank),
    "lora_alpha": Field("serve", "scale is lora_alpha / r", _alpha),
    "use_rslora": Field("serve", "scale is lora_alpha / sqrt(r)", _flag),
    "rank_pattern": Field("serve", "the first matching pattern in the file's order applies", _pattern(_rank)),
    "alpha_pattern": Field("serve", "the first matching pattern in the file's order applies", _pattern(_alpha)),
    "target_modules": Field("check", "must name exactly the modules that have tensors", _names),
    "exclude_modules": Field("check", "takes precedence over target_modules", _names),
    "layers_to_transform": Field("check", "limits target_modules to these layers", _layers),
    "layers_pattern": Field("check", "name of the list of layers", _names),
    "init_lora_weights": Field(
        "check",
        "an initialisation that leaves the base weights unchanged: true, false, gaussian, eva, orthogonal, mica",
    ),
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
    "qalora_group_size": Field("ignore", "a parameter of use_qalora, which is refused"),
    "megatron_config": Field("refuse", "a parallel layer layout; export the adapter for the plain model"),
    "bias": Field(
        "refuse",
        f"trained biases: {_LATER}; train with bias='none', or {MERGE}",
        lambda value: None if value in ("none", "all", "lora_only") else "must be none, all or lora_only",
        lambda value: value == "none",
    ),
    "lora_bias": Field("refuse", f"biases on B: {_LATER}; train with lora_bias=false, or {MERGE}", _flag),
    "modules_to_save": Field(
        "refuse",
        f"fully trained modules: {_LATER}; train without it and name linear layers in target_modules instead",
        _names,
        lambda value: is_empty(value) or _only_other_parts(value),
    ),
    "use_dora": Field("refuse", f"DoRA: {_LATER}; train with use_dora=false, or {MERGE}", _flag),
    "trainable_token_indices": Field("refuse", f"trained token embeddings: {_LATER}; train without them"),
    "target_parameters": Field("refuse", f"LoRA on parameters (experts): {_LATER}; name modules in target_modules"),
    "ensure_weight_tying": Field("refuse", f"tied adapters of embedding and head: {_LATER}; train without it", _flag),
    "layer_replication": Field("refuse", f"changes the depth of the model and the layout of its KV cache; {MERGE}"),
    "alora_invocation_tokens": Field("refuse", f"activated LoRA: {_LATER}; train plain LoRA", harmless=_absent),
    "use_qalora": Field("refuse", "QALoRA: A is grouped for a quantised base; train with use_qalora=false", _flag),
    "kasa_config": Field(
        "refuse", f"KaSA changes the base weights by their singular values; {MERGE}", harmless=_absent
    ),
    "use_bdlora": Field("refuse", f"block-diagonal A or B: {_LATER}; {MERGE}", harmless=_absent),
    "arrow_config": Field("refuse", "Arrow mixes many adapters per token; serve one of them", harmless=_absent),
}

_SVD = "PEFT's convert_to_lora / save_as_lora gives an approximate LoRA adapter"
_UPDATES = (
    "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "LILY",
    "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA",
    "UNILORA", "VBLORA", "WAVEFT",
)  # fmt: skip
_UPDATE = f"not a low-rank update ({_SVD})"
_METHODS: Mapping[str, str] = {
    "ADALORA": f"its ranks were pruned in training; {_LATER}",
    "VERA": f"shared frozen projections; {_LATER}",
    "IA3": f"scales activations; {_LATER}",
    "LOHA": f"a Hadamard product; {_LATER} ({_SVD})",
    "LOKR": f"a Kronecker product; {_LATER} ({_SVD})",
    "TRAINABLE_TOKENS": f"trained token embeddings; {_LATER}",
    "LN_TUNING": f"trained norm weights; {_LATER}",
    "PROMPT_TUNING": f"virtual tokens; {_LATER}",
    "P_TUNING": f"virtual tokens; {_LATER}",
    "PREFIX_TUNING": f"a prefix of keys and values; {_LATER}",
    "MULTITASK_PROMPT_TUNING": "needs a task id for each request",
    "CPT": "needs label masks",
    "CARTRIDGE": "a long stored cache",
    "ADAPTION_PROMPT": "changes attention itself",
    "XLORA": "mixes adapters per token",
    "POLY": "mixes adapters per task",
} | dict.fromkeys(_UPDATES, _UPDATE)
"""PEFT's methods other than LORA, and why each is not served."""


def refuse_method(name: str) -> AdapterError:
    """The error for a ``peft_type`` other than LORA."""
    if name in _METHODS:
        what = f"peft_type {name}: {_METHODS[name]}. truffula serves LORA; train with LoraConfig, or {MERGE}."
    else:
        meant = did_you_mean(nearest(name.upper(), ("LORA", *_METHODS)))
        what = (
            f"peft_type {name} is not a PEFT method.{meant} truffula serves LORA; recognised but not served: "
            f"{', '.join(sorted(_METHODS))}."
        )
    return AdapterError(what, param="peft_type", peft_type=name)


def parse_config(raw: bytes) -> dict[str, Any]:
    """``adapter_config.json`` as a dict; ``AdapterError`` when it is too large, no object, or holds NaN or Infinity."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise AdapterError(
            f"adapter_config.json has {len(raw)} bytes; the limit is {MAX_CONFIG_BYTES}.", param="config"
        )

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is not valid in JSON")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is too large a number")
        return value

    try:
        config = json.loads(raw.decode("utf-8"), parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"adapter_config.json is not valid JSON: {error}.", param="config") from error
    if not isinstance(config, dict):
        raise AdapterError("adapter_config.json is not a JSON object.", param="config")
    return config


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _init_row(value: Any) -> FieldRow:
    if value is None or any(value is plain or (isinstance(plain, str) and value == plain) for plain in PLAIN_INITS):
        return FieldRow("init_lora_weights", _short(value), "check", "the base weights are unchanged")
    if isinstance(value, str) and value.startswith(_CONVERTIBLE_INITS):
        note = (
            "this initialisation changed the base weights, and the change is not in the adapter; save it with "
            "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL), which writes a plain LoRA "
            "adapter (INITIAL: the adapter saved before the first training step)"
        )
    elif value == "loftq":
        note = (
            "LoftQ replaced the base weights by quantised ones, which are not in the adapter; merge it into the model "
            "that it was trained on (PEFT's merge_and_unload) and serve the result as a model"
        )
    else:
        note = f"not one of {', '.join(map(str, PLAIN_INITS))}"
    return FieldRow("init_lora_weights", _short(value), "refuse", note)


def _task_row(value: Any) -> FieldRow:
    if value is None or value in TASKS:
        return FieldRow("task_type", _short(value), "check", FIELDS["task_type"].note)
    return FieldRow("task_type", _short(value), "refuse", "trained for another task than text generation (CAUSAL_LM)")


def _field_row(name: str, value: Any) -> FieldRow:
    if name == "init_lora_weights":
        return _init_row(value)
    if name == "task_type":
        return _task_row(value)
    field = FIELDS.get(name)
    if field is None:
        if is_empty(value):
            return FieldRow(name, _short(value), "ignore", "unknown, and empty")
        note = "unknown to truffula: it may change the answers; remove it only if you know that it does not"
        return FieldRow(name, _short(value), "refuse", note)
    reason = field.accepts(value)
    if reason is not None:
        return FieldRow(name, _short(value), "refuse", reason)
    if field.verdict == "refuse" and field.harmless(value):
        return FieldRow(name, _short(value), "ignore", "has no effect on the text")
    return FieldRow(name, _short(value), field.verdict, field.note)


def field_rows(config: Mapping[str, Any]) -> list[FieldRow]:
    """A row per field that the file has, refusals included; never raises."""
    rows = []
    kind = config.get("peft_type")
    if kind is None:
        rows.append(FieldRow("peft_type", "", "refuse", "missing; PEFT writes LORA here"))
    elif kind != "LORA":
        rows.append(FieldRow("peft_type", _short(kind), "refuse", refuse_method(str(kind)[:60]).message.rstrip(".")))
    rows += [_field_row(name, value) for name, value in config.items() if name != "peft_type" or kind == "LORA"]
    missing = "missing, so the scale is unknown; PEFT writes this field"
    rows += [FieldRow(name, "", "refuse", missing) for name in ("r", "lora_alpha") if name not in config]
    return rows + _contradictions(config)


def _contradictions(config: Mapping[str, Any]) -> list[FieldRow]:
    """Rows for pairs of fields that PEFT refuses together."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    rows = []
    if isinstance(config.get("target_modules"), str) and layers is not None:
        rows.append(FieldRow("layers_to_transform", _short(layers), "refuse", "target_modules is a regular expression"))
    if isinstance(config.get("target_modules"), str) and pattern is not None:
        rows.append(FieldRow("layers_pattern", _short(pattern), "refuse", "target_modules is a regular expression"))
    if pattern and layers is None:
        rows.append(FieldRow("layers_pattern", _short(pattern), "refuse", "needs layers_to_transform"))
    return rows


@dataclass(frozen=True)
class LoraSettings:
    """The fields that are served or checked, validated."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: int | tuple[int, ...] | None
    layers_pattern: tuple[str, ...]


def read_settings(config: Mapping[str, Any]) -> LoraSettings:
    """The fields that decide how an adapter is served; ``AdapterError`` names those that are refused (``param``: the
    first)."""
    if "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config):
        raise AdapterError(
            f"adapter_config.json is MLX's (lora_parameters, fine_tune_type); PEFT's format is served. {MLX}",
            param="peft_type",
        )
    refused = [row for row in field_rows(config) if row.verdict == "refuse"]
    if refused and refused[0].field == "peft_type" and config.get("peft_type") is not None:
        raise refuse_method(str(config["peft_type"])[:60])
    if refused:
        lines = "; ".join(f"{row.field} = {row.value}: {row.note}" if row.value else f"{row.field}: {row.note}"
                          for row in refused[:10])  # fmt: skip
        raise AdapterError(f"adapter_config.json cannot be served: {lines}.", param=refused[0].field)

    def names(field: str) -> Any:
        value = config.get(field)
        return tuple(value) if isinstance(value, list) else value

    pattern = config.get("layers_pattern") or ()
    layers = config.get("layers_to_transform")
    return LoraSettings(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        target_modules=names("target_modules"),
        exclude_modules=names("exclude_modules") or (),
        layers_to_transform=tuple(layers) if isinstance(layers, list) else layers,
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern),
    )
