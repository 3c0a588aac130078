"""Reads a config.json with its architecture's reader into a ``ModelSpec``, and checks that every key was used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from truffula.errors import UnsupportedModel
from truffula.model.architectures import ARCHITECTURES
from truffula.model.config_view import ConfigView, KeyUse, load_defaults
from truffula.model.spec import ModelSpec
from truffula.weights.quantised.config import read_scheme

# Other heads than a language model's. The body of such a checkpoint would load, with the wrong head.
_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "RewardModel")


@dataclass(frozen=True)
class ReadConfig:
    """A ``ModelSpec`` and more from its config. ``tie_default`` is the class default of ``tie_word_embeddings``."""

    spec: ModelSpec
    warnings: tuple[str, ...]
    tie_default: bool | None
    eos_default: Any
    bos_default: Any
    key_uses: tuple[KeyUse, ...] = ()


def read_config(config: Mapping[str, Any]) -> ReadConfig:
    """Read a config.json (or its equivalent made from GGUF metadata).

    Raises:
        UnsupportedModel: Unknown model_type or quantisation, an unsupported key with an effect, or an invalid value.
    """
    model_type = _model_type(config)
    table = load_defaults()
    view = ConfigView(config, model_type, table)
    warnings = list(_check_file(config))
    spec = ARCHITECTURES[model_type](view)
    warnings += view.finish()
    text = table[spec.model_type].fields
    return ReadConfig(
        spec=spec,
        warnings=(*warnings, *spec.notes),
        tie_default=table[model_type].fields.get("tie_word_embeddings"),
        eos_default=text.get("eos_token_id"),
        bos_default=text.get("bos_token_id"),
        key_uses=view.key_uses(),
    )


def _model_type(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return model_type
    remote = ""
    if config.get("auto_map"):
        remote = " It needs Python code from its repository (auto_map), which is never run."
    raise UnsupportedModel(
        f"config.json: model_type is {model_type!r}; supported are {', '.join(ARCHITECTURES)}.{remote}",
        param="model_type",
        value=repr(model_type),
        supported=list(ARCHITECTURES),
    )


def _check_file(config: Mapping[str, Any]) -> list[str]:
    """Warnings about keys that are independent of the architecture: quantisation, remote code, the saved class."""
    read_scheme(config)
    warnings = []
    if config.get("auto_map"):
        warnings.append(
            "config.json: auto_map names Python code in the repository; it is not run; the built-in architecture is "
            "used."
        )
    names = config.get("architectures")
    for name in names if isinstance(names, list) else [names]:
        if isinstance(name, str) and name.endswith(_OTHER_HEADS):
            raise UnsupportedModel(
                f"config.json: architectures names {name}, which is not a causal language model.",
                param="architectures",
                value=name,
            )
    return warnings
