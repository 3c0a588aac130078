"""Reads a config.json with its architecture's reader into a ``ModelSpec``, and checks that every key was used."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from truffula.errors import MissingDependency, UnsupportedModel
from truffula.kernels.installation import CPU_TORCH, installation
from truffula.model.architectures import ARCHITECTURES
from truffula.model.config_view import ConfigView, KeyUse, load_defaults
from truffula.model.spec import ModelSpec
from truffula.weights.quantised.config import read_scheme

# Other heads than a language model's. The body of such a checkpoint would load, with the wrong head.
_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "RewardModel")


# Types of files from before transformers had the class, and their names of its keys.
_OLD_TYPES = {"RefinedWeb": "falcon", "RefinedWebModel": "falcon"}
_OLD_KEYS = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}


@dataclass(frozen=True)
class ReadConfig:
    """A ``ModelSpec`` and more from its config. ``tie_default`` is the class default of ``tie_word_embeddings``."""

    spec: ModelSpec
    warnings: tuple[str, ...]
    tie_default: bool
    eos_default: Any
    bos_default: Any
    key_uses: tuple[KeyUse, ...] = ()


def read_config(config: Mapping[str, Any]) -> ReadConfig:
    """Read a config.json (or its equivalent made from GGUF metadata).

    Raises:
        UnsupportedModel: Unknown model_type or quantisation, an unsupported key with an effect, or an invalid value.
    """
    config = _renamed(config)
    model_type = _model_type(config)
    table = load_defaults()
    view = ConfigView(config, model_type, table)
    warnings = list(check_file(config))
    spec = ARCHITECTURES[model_type](view)
    warnings += view.finish()
    text = table[spec.model_type].fields
    return ReadConfig(
        spec=spec,
        warnings=(*warnings, *spec.notes),
        tie_default=bool(table[model_type].fields.get("tie_word_embeddings")),  # a class without the field ties nothing
        eos_default=text.get("eos_token_id"),
        bos_default=text.get("bos_token_id"),
        key_uses=view.key_uses(),
    )


def _renamed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config of an old type in the terms of transformers' class."""
    if config.get("model_type") not in _OLD_TYPES:
        return config
    renamed = {_OLD_KEYS.get(key, key): value for key, value in config.items()}
    # Of these types, only the one with groups of KV heads has the key.
    grouped = {"new_decoder_architecture": True} if "n_head_kv" in config else {}
    return renamed | {"model_type": _OLD_TYPES[config["model_type"]]} | grouped


def is_native(config: Mapping[str, Any], implementation: str = "auto") -> bool:
    """Whether truffula's own code computes a model: the option decides, else whether there is an architecture for it.

    A config without a ``model_type`` counts as native, so that ``read_config`` refuses it.
    """
    model_type = config.get("model_type")
    return implementation == "native" or (
        implementation == "auto" and (not isinstance(model_type, str) or model_type in (*ARCHITECTURES, *_OLD_TYPES))
    )


def require_transformers(config: Mapping[str, Any]) -> None:
    """Raise ``MissingDependency`` when torch or transformers, which compute a model without an architecture, is not
    installed."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"config.json: model_type {config.get('model_type')!r} would be computed by transformers' code, but "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            f"{installation().pip_install('torch,hf')} ({CPU_TORCH}).{_remote_code(config)}",
            param=missing[0],
        )


def _model_type(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return model_type
    raise UnsupportedModel(
        f"config.json: model_type is {model_type!r}; supported are {', '.join(ARCHITECTURES)}.{_remote_code(config)}",
        param="model_type",
        value=repr(model_type),
        supported=list(ARCHITECTURES),
    )


def _remote_code(config: Mapping[str, Any]) -> str:
    return " It needs Python code from its repository (auto_map), which is never run." if config.get("auto_map") else ""


def check_file(config: Mapping[str, Any]) -> list[str]:
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
