"""A model of transformers without weights: its class and configuration for a config.json, or the reason for none."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.auto_factory import _get_model_class

from truffula.errors import UnsupportedModel
from truffula.model.architectures.pieces import MOST_LAYERS
from truffula.model.config_view import KeyUse, shown

# Of the file, not of the model: the checkpoint layer dequantises, and code from repositories is never run.
_NOT_PASSED = (
    *("quantization_config", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
)
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
_UNLIMITED = 2**17
_PYTHON = ("architectures", "model_type", "_name_or_path")


@dataclass(frozen=True)
class Skeleton:
    """A class of transformers with its configuration. ``built`` returns it on the meta device, without memory."""

    model_type: str
    model_class: Any
    config: Any
    unknown: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        if not self.unknown:
            return ()
        return (f"config.json: {type(self.config).__name__} of transformers does not know {', '.join(self.unknown)}.",)

    def key_uses(self, given: Mapping[str, Any]) -> tuple[KeyUse, ...]:
        """The use of every key of a config.json, in its order."""
        reader = f"read by {type(self.config).__name__} of transformers"
        uses = {
            **dict.fromkeys(self.unknown, "unknown, not used"),
            **dict.fromkeys(_NOT_PASSED, "without effect when serving"),
        }
        uses |= {"quantization_config": "used", "tie_word_embeddings": "used"}
        return tuple(KeyUse(key, shown(value), uses.get(key, reader)) for key, value in given.items())

    @cached_property
    def text(self) -> Any:
        """The configuration of the text model, which may be a part."""
        return self.config.get_text_config()

    @cached_property
    def arguments(self) -> frozenset[str]:
        """The arguments of the model's ``forward``."""
        return frozenset(inspect.signature(self.model_class.forward).parameters)

    @cached_property
    def own_attention(self) -> str:
        """The implementation of attention that the class chooses itself."""
        return str(self.built().config._attn_implementation)

    @property
    def max_positions(self) -> int:
        """The longest sequence. Rotary tables that depend on the length of the batch are constant up to it."""
        given = [getattr(self.text, name, None) or 0 for name in _LENGTHS]
        longest = next((length for length in given if length > 0), _UNLIMITED)
        original = next((rope["original_max_position_embeddings"] for rope in self._growing_ropes), None)
        return int(longest if original is None else min(longest, original))

    @property
    def notes(self) -> tuple[str, ...]:
        """What an operator should know about the configuration."""
        if not self._growing_ropes:
            return ()
        kind = self._growing_ropes[0]["rope_type"]
        return (
            f"{self.model_type}: the rotary table of rope_type {kind} changes beyond {self.max_positions} positions "
            "for the whole batch; longer sequences are not served.",
        )

    @property
    def _growing_ropes(self) -> list[dict[str, Any]]:
        given = getattr(self.text, "rope_parameters", None) or {}
        tables = [given, *(value for value in given.values() if isinstance(value, Mapping))]
        longest = getattr(self.text, "max_position_embeddings", _UNLIMITED)
        outer = getattr(self.text, "original_max_position_embeddings", None)
        return [
            {"original_max_position_embeddings": outer or longest, **table}
            for table in tables
            if table.get("rope_type") in ("longrope", "dynamic")
        ]

    def tied(self, tied: bool) -> Skeleton:
        """The same model with the flag ``tie_word_embeddings`` set."""
        config = copy.deepcopy(self.config)
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
        return Skeleton(self.model_type, self.model_class, config, self.unknown)

    def built(self, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
        """The model on the meta device. ``attention`` None is the class's own implementation."""
        config = copy.deepcopy(self.config)
        if attention is not None:
            config._attn_implementation = attention
        config.dtype = dtype
        with ExitStack() as contexts:
            for context in self.model_class.get_init_context(dtype, False, False, False):
                contexts.enter_context(context)
            return self.model_class(config).eval()


def make_skeleton(given: Mapping[str, Any]) -> Skeleton:
    """The skeleton for a config.json.

    Raises:
        UnsupportedModel: transformers has no causal language model of this type, or refuses the configuration; names
            the key, and the file of code that would be needed.
    """
    model_type = given.get("model_type")
    version = f"transformers {transformers.__version__}"
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"config.json: model_type is {model_type!r}, which neither truffula nor {version} implements."
            f"{remote_code(given)}",
            param="model_type",
            value=repr(model_type),
        )
    _refuse_many_layers(given)
    config_class = CONFIG_MAPPING[model_type]
    values = {key: value for key, value in given.items() if key not in _NOT_PASSED}
    try:
        config = config_class.from_dict(config_class._decode_special_floats(values))
    except Exception as error:
        why = " ".join(str(error).split())
        raise UnsupportedModel(f"config.json: {version} refuses it: {why}", param="config", value=model_type) from error
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise UnsupportedModel(
            f"config.json: model_type is {model_type!r}, which in {version} is no causal language model.",
            param="model_type",
            value=repr(model_type),
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"config.json: model_type {model_type!r} is an encoder-decoder (is_encoder_decoder is true), not a causal "
            "language model.",
            param="is_encoder_decoder",
            value="True",
        )
    known = {*config_class().to_dict(), *getattr(config_class, "attribute_map", {}), *_PYTHON, *_NOT_PASSED}
    unknown = sorted(key for key in given if key not in known and not hasattr(config_class, key))
    skeleton = Skeleton(model_type, _get_model_class(config, mapping), config, tuple(unknown))
    try:
        skeleton.built()
    except Exception as error:
        why = " ".join(str(error).split())
        raise UnsupportedModel(
            f"config.json: {skeleton.model_class.__name__} of {version} cannot be built from it: {why}",
            param="config",
            value=model_type,
        ) from error
    return skeleton


def _refuse_many_layers(values: Mapping[str, Any]) -> None:
    """Raise for more layers than are served: transformers' classes make a list or a module for each, at any depth."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _refuse_many_layers(value)
        elif str(key).endswith(("layer", "layers")) and isinstance(value, int) and value > MOST_LAYERS:
            why = f"config.json: {key} is {shown(value)}; at most {MOST_LAYERS} layers are served."
            raise UnsupportedModel(why, param=key, value=shown(value))


def remote_code(given: Mapping[str, Any]) -> str:
    """A sentence that names the files of Python code that ``auto_map`` asks for; empty without one."""
    named = given.get("auto_map")
    if not isinstance(named, Mapping):
        return ""
    classes = [value for value in named.values() if isinstance(value, str)]
    files = sorted({f"{value.rpartition('--')[2].partition('.')[0]}.py" for value in classes})
    return (
        f" Its auto_map names code from the repository ({', '.join(files)}), which is never run: only architectures "
        "built into truffula or transformers are served."
    )
