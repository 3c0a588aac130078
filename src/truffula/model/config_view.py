"""Reads a config.json key by key, and checks the keys that were not read.

Three rules. A missing value is the default of transformers' class, from a generated table. A value of the wrong type is
an error that names its key. When all is read, a remaining key that transformers' class knows is an error unless it has
the class default or is on the inert list; a key that the class does not know is a warning.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any, TypeVar

from truffula.errors import UnsupportedModel
from truffula.weights.tying import SPELLINGS

T = TypeVar("T")

MOST = 2**31 - 1
"""The largest integer that a config may hold."""
# Keys of transformers' classes without effect on generation: of training; of the library, the file and the form of its
# Python results; dtypes, which are read from the files; padding, which batches do not have.
INERT = frozenset(
    {"attention_dropout", "attn_pdrop", "classifier_dropout", "embd_pdrop", "embed_dropout", "embedding_dropout"}
    | {"resid_dropout", "resid_pdrop", "residual_dropout"}
    | {"hidden_dropout", "initializer_range", "pretraining_tp", "problem_type"}
    | {"_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures", "attn_implementation"}
    | {"auto_map", "chunk_size_feed_forward", "experts_implementation", "id2label", "label2id", "model_type"}
    | {"name_or_path", "num_labels", "output_attentions", "output_hidden_states", "return_dict"}
    | {"output_router_logits", "router_aux_loss_coef", "transformers_version", "use_cache"}
    | {"dtype", "pad_token_id", "torch_dtype"}
)
# Read by model/read.py, weights/tying.py, weights/quantised/config.py and model/load.py (special ids).
READ_ELSEWHERE = frozenset(
    {"architectures", "bos_token_id", "eos_token_id", "model_type", *SPELLINGS}
    | {"quantization_config", "compression_config"}
)
# Written by transformers 4 for every model, removed in 5, without effect on a decoder: no warning for them.
OLD_BOOKKEEPING = frozenset(
    {"add_cross_attention", "cross_attention_hidden_size", "decoder_start_token_id", "finetuning_task", "prefix"}
    | {"pruned_heads", "sep_token_id", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder"}
    | {"tokenizer_class", "torchscript", "use_bfloat16", "is_decoder", "cache_implementation"}
)
_DEFAULT, _BOOKKEEPING, _UNKNOWN = "at its default", "known bookkeeping", "unknown, not used"


@dataclass(frozen=True)
class TypeDefaults:
    """The fields of transformers' configuration class of one model type, with their defaults and older names.

    ``rope_theta`` and ``partial_rotary_factor`` are the class's values for a rope whose parameters leave them out.
    ``aliases`` are other names of fields.
    """

    model_type: str
    class_name: str
    rope_theta: Any
    partial_rotary_factor: float | None
    fields: Mapping[str, Any]
    nullable: frozenset[str]
    aliases: Mapping[str, str]
    known: frozenset[str]
    generation: frozenset[str]


@functools.cache
def load_defaults() -> Mapping[str, TypeDefaults]:
    """The generated table (scripts/generate_config_defaults.py), by model type."""
    text = resources.files("truffula.model").joinpath("config_defaults.json").read_text(encoding="utf-8")
    table = json.loads(text)
    generation = frozenset(table["generation"])
    return MappingProxyType(
        {
            name: TypeDefaults(
                model_type=name,
                class_name=entry["class"],
                rope_theta=entry["rope_theta"],
                partial_rotary_factor=entry["partial_rotary_factor"],
                fields=entry["fields"],
                nullable=frozenset(entry["nullable"]),
                aliases=entry["aliases"],
                known=frozenset((*entry["fields"], *entry["legacy"], *entry["aliases"])) | generation,
                generation=generation,
            )
            for name, entry in table["types"].items()
        }
    )


@dataclass(frozen=True)
class KeyUse:
    """One key of a config.json, its value, and how it was used, for ``inspect``."""

    key: str
    value: str
    use: str


class ConfigView:
    """One level of a config (the whole file, or its ``text_config``), which records the keys that are read.

    Args:
        values: The JSON object. Not changed.
        model_type: The model type whose class defines this level; a key of ``table``.
        table: Class defaults by model type (``load_defaults``).
        where: The name of this level in messages: ``config.json`` or ``config.json text_config``.

    Every reader raises ``UnsupportedModel`` naming key and value when the value has the wrong type or is out of range.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        model_type: str,
        table: Mapping[str, TypeDefaults],
        where: str = "config.json",
    ) -> None:
        self.values = values
        self.defaults = table[model_type]
        self.where = where
        self._table = table
        self._read: set[str] = set()
        self._warnings: list[str] = []
        self._nested: list[ConfigView] = []

    @property
    def model_type(self) -> str:
        return self.defaults.model_type

    def written(self, key: str) -> bool:
        """Whether the file contains ``key`` or an alias of it (even as null)."""
        return bool(self._given(key))

    def _names(self, key: str) -> list[str]:
        """The names of what ``key`` means, the class's field first."""
        name = self.defaults.aliases.get(key, key)
        names = [name, *(alias for alias, other in self.defaults.aliases.items() if other == name)]
        return sorted(names, key=lambda item: item not in self.defaults.fields)

    def _given(self, key: str) -> list[str]:
        return [name for name in self._names(key) if name in self.values]

    def raw(self, key: str) -> Any:
        """The value in the file, or the class default; marks the key and its aliases as read."""
        self._read.update(self._names(key))
        given = self._given(key)
        if not given:
            return self.defaults.fields.get(self._names(key)[0])
        for other in given[1:]:
            if self.values[other] != self.values[given[0]]:
                raise self.error(other, f"{given[0]} has the same meaning and differs.", self.values[other])
        return self.values[given[0]]

    def error(self, key: str, why: str, value: Any = None) -> UnsupportedModel:
        """The error about the value of ``key``, for callers that check a value themselves."""
        key = key if key in self.values else next(iter(self._given(key)), key)
        found = self.values.get(key) if value is None else value
        return UnsupportedModel(f"{self.where}: {key} is {shown(found)}; {why}", param=key, value=shown(found))

    def _value(self, key: str) -> Any:
        value = self.raw(key)
        field = self._names(key)[0]
        if (
            value is None
            and self.written(key)
            and field in self.defaults.fields
            and field not in self.defaults.nullable
        ):
            raise self.error(key, f"{self.defaults.class_name} does not allow null there.")
        return value

    def _required(self, key: str, value: T | None) -> T:
        if value is None:
            raise UnsupportedModel(f"{self.where}: {key} is missing and has no default.", param=key)
        return value

    def optional_integer(self, key: str, *, minimum: int = 1) -> int | None:
        value = self._value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, "expected an integer.", value)
        if not minimum <= value <= MOST:
            raise self.error(key, f"it must be at least {minimum} and at most {MOST}.", value)
        return value

    def integer(self, key: str, *, minimum: int = 1) -> int:
        return self._required(key, self.optional_integer(key, minimum=minimum))

    def optional_number(self, key: str, *, positive: bool = True) -> float | None:
        value = self._value(key)
        return None if value is None else self.number_value(key, value, positive=positive)

    def number(self, key: str, *, positive: bool = True) -> float:
        return self._required(key, self.optional_number(key, positive=positive))

    def number_value(self, key: str, value: Any, *, positive: bool = True) -> float:
        """``value`` (found under ``key``) as a finite float; above zero when ``positive``."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise self.error(key, "expected a finite number.", value)
        if positive and value <= 0:
            raise self.error(key, "it must be above zero.", value)
        return float(value)

    def flag(self, key: str) -> bool:
        """A JSON boolean; null counts as false where transformers allows it."""
        value = self._value(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(key, "expected true or false.", value)
        return value

    def choice(self, key: str, options: Mapping[str, T]) -> T:
        """The item of ``options`` that the string under ``key`` names."""
        value = self._value(key)
        if not isinstance(value, str) or value not in options:
            raise self.error(key, f"supported are {', '.join(sorted(options))}.", value)
        return options[value]

    def strings(self, key: str, length: int) -> tuple[str, ...] | None:
        """A list of ``length`` strings, or None."""
        value = self._list(key, length)
        if value is not None and not all(isinstance(item, str) for item in value):
            raise self.error(key, "expected a list of strings.", value)
        return None if value is None else tuple(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...] | None:
        """A list of ``length`` finite numbers, or None."""
        value = self._list(key, length)
        return None if value is None else tuple(self.number_value(key, item, positive=False) for item in value)

    def _list(self, key: str, length: int) -> list[Any] | None:
        value = self._value(key)
        if value is not None and not isinstance(value, list):
            raise self.error(key, "expected a list.", value)
        if value is not None and len(value) != length:
            raise self.error(key, f"it has {len(value)} entries where {length} are expected.", value)
        return value

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        """A JSON object, or None."""
        value = self.raw(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(key, "expected an object.", value)
        return value

    def nested(self, key: str, *model_types: str) -> ConfigView:
        """The object under ``key`` (or an empty one) as a nested view, which ``finish`` includes.

        Its type must be one of ``model_types``; the first is that of an object that states none.
        """
        values = self.mapping(key) or {}
        stated = values.get("model_type", model_types[0])
        if stated not in model_types:
            raise self.error(f"{key}.model_type", f"expected {' or '.join(model_types)}.", stated)
        view = ConfigView(values, stated, self._table, f"{self.where} {key}")
        self._nested.append(view)
        return view

    def must_be(self, key: str, allowed: Iterable[Any], why: str) -> None:
        """Raise ``UnsupportedModel`` unless the value of ``key`` is one of ``allowed``."""
        value = self._value(key)
        if not any(value is item or (value == item and type(value) is type(item)) for item in allowed):
            raise self.error(key, why, value)

    def skip(self, *keys: str) -> None:
        """Mark ``keys`` as read; they have no effect here."""
        self._read.update(keys)

    def warn(self, text: str) -> None:
        """Add a warning for the operator, which ``finish`` returns."""
        self._warnings.append(f"{self.where}: {text}")

    def finish(self) -> tuple[str, ...]:
        """All warnings, also of unknown keys. Raises ``UnsupportedModel`` for a key that was not read and has an
        effect.
        """
        unknown = []
        for key, value in self.values.items():
            use = self._use(key)
            if use == _UNKNOWN:
                unknown.append(key)
            elif use == _DEFAULT and value != self.defaults.fields[key]:
                why = f"only {shown(self.defaults.fields[key])} is supported for {self.model_type}."
                raise self.error(key, why, value)
            elif use == _BOOKKEEPING and key in self.defaults.known and value is not None:
                raise self.error(key, "it has an effect in transformers that is not supported here.", value)
        if unknown:
            names = ", ".join(sorted(unknown))
            self.warn(f"neither {self.defaults.class_name} of transformers nor truffula knows {names}; not used.")
        return (*self._warnings, *(text for view in self._nested for text in view.finish()))

    def key_uses(self) -> tuple[KeyUse, ...]:
        """The use of every key of the file, in its order; call it after ``finish``."""
        own = tuple(KeyUse(f"{self._path}{key}", shown(value), self._use(key)) for key, value in self.values.items())
        return (*own, *(use for view in self._nested for use in view.key_uses()))

    @property
    def _path(self) -> str:
        return "".join(f"{part}." for part in self.where.split()[1:])

    def _use(self, key: str) -> str:
        if key in self._read or key in READ_ELSEWHERE:
            return "used"
        if key in INERT or key in self.defaults.generation:
            return "without effect when serving"
        if key in self.defaults.fields:
            return _DEFAULT
        return _BOOKKEEPING if key in self.defaults.known or key in OLD_BOOKKEEPING else _UNKNOWN


def shown(value: Any) -> str:
    """A value as JSON, cut when it is long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 120 else text[:117] + "..."
