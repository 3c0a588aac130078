"""``read_scheme``: how a model's weights are quantised, from its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from truffula.errors import UnsupportedModel
from truffula.weights.quantised.auto_round import read_auto_round
from truffula.weights.quantised.awq import read_awq
from truffula.weights.quantised.bitsandbytes import is_bitsandbytes, read_bitsandbytes
from truffula.weights.quantised.compressed import read_compressed
from truffula.weights.quantised.floats import read_fbgemm, read_fp8
from truffula.weights.quantised.floats4 import read_modelopt, read_mxfp4
from truffula.weights.quantised.gptq import read_gptq
from truffula.weights.quantised.hqq import read_hqq
from truffula.weights.quantised.keys import Keys
from truffula.weights.quantised.logical import Scheme
from truffula.weights.text_files import read_json

CONFIG_KEYS = ("quantization_config", "compression_config")
NESTED = ("", "text_config")
SIDE_FILES = MappingProxyType(
    {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
)
_READERS: Mapping[str, Callable[[Keys], Scheme]] = MappingProxyType(
    {
        "auto-round": read_auto_round,
        "intel/auto-round": read_auto_round,
        "awq": read_awq,
        "bitsandbytes": read_bitsandbytes,
        "compressed-tensors": read_compressed,
        "fbgemm_fp8": read_fbgemm,
        "fp8": read_fp8,
        "gptq": read_gptq,
        "hqq": read_hqq,
        "modelopt": read_modelopt,
        "mxfp4": read_mxfp4,
        "mxfp8": read_fp8,
    }
)


def read_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme that a config.json or its ``text_config`` names; None for weights that are not quantised.

    Raises:
        UnsupportedModel: The method, a key or a value is not supported; named in the message.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for level in NESTED:
        values = config if not level else config.get(level)
        for key in CONFIG_KEYS:
            value = values.get(key) if isinstance(values, Mapping) else None
            if value is not None and value != {}:
                where = f"{level}.{key}" if level else key
                if not isinstance(value, Mapping):
                    raise UnsupportedModel(f"config.json: {where} is {value!r}; it must be an object.", param=where)
                found[where] = value
    if not found:
        return None
    where, values = next(iter(found.items()))
    for other, more in found.items():
        if more != values:
            raise UnsupportedModel(f"config.json: {where} and {other} differ; one of them must go.", param=other)
    return _read(Keys(values, f"config.json {where}"))


def with_side_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``config`` with the ``quantization_config`` that older tools write to a file of its own, if it has none."""
    if any(
        isinstance(level, Mapping) and level.get(key)
        for level in (config, config.get("text_config"))
        for key in CONFIG_KEYS
    ):
        return config
    for name, method in SIDE_FILES.items():
        if (folder / name).is_file():
            values = read_json(folder / name)
            inner = values.get("quantization")
            if method == "modelopt" and isinstance(inner, Mapping):
                values = {**{key: value for key, value in values.items() if key != "quantization"}, **inner}
            return {**config, "quantization_config": {"quant_method": method, **values}}
    return config


def _read(keys: Keys) -> Scheme:
    method = "bitsandbytes" if is_bitsandbytes(keys.values) else keys.raw("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise keys.error("quant_method", f"supported are {', '.join(_READERS)}.")
    scheme = _READERS[method](keys)
    keys.finish()
    return scheme
