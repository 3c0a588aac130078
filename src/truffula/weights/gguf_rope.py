"""The rotary scaling of a GGUF file as ``rope_parameters`` of a config.json. Source: llama.cpp's loader.

In that loader, a file without ``rope.scaling.type`` is scaled linearly by ``rope.scaling.factor`` (or the older
``rope.scale_linear``), a factor of 0 means none, and type ``none`` disables scaling whatever the factor.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.weights.gguf_hparams import HParams

ROPE_FREQS = "rope_freqs.weight"
_OF_YARN = ("original_context_length", "yarn_beta_fast", "yarn_beta_slow")


def rope_parameters(
    hparams: HParams, theta: float | None, factors: Any, width: int, warnings: list[str]
) -> dict[str, Any]:
    """``rope_parameters`` for heads ``width`` wide. ``theta`` is the default base, None where the file must give it.

    ``factors`` are the values of ``rope_freqs.weight``, or None.

    Raises:
        UnsupportedModel: a type of scaling that is not supported, or two kinds at once.
        CheckpointError: a value of the wrong kind or range.
    """
    name, kind = hparams.name("rope.scaling.type"), hparams.get("rope.scaling.type", "linear")
    base: dict[str, Any] = {"rope_type": "default", "rope_theta": hparams.real("rope.freq_base", theta)}
    factor = _factor(hparams)
    yarn = {key: hparams.get(f"rope.scaling.{key}") for key in _OF_YARN}
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"{name} is {kind!r}; none, linear and yarn are supported.", param=name)
    if kind != "yarn":
        ignored = [hparams.name(f"rope.scaling.{key}") for key, value in yarn.items() if value is not None]
        if ignored:
            warnings.append(f"{', '.join(ignored)}: no effect, because {name} is {kind}.")
    if kind == "none":
        factor = 1.0
    if factors is not None:
        if kind == "yarn" or factor != 1.0:
            raise UnsupportedModel(
                f"both {ROPE_FREQS} and a rope scaling ({kind}, factor {factor}) are given; one is supported.",
                param=ROPE_FREQS,
            )
        return _from_table(factors, base["rope_theta"], width)
    if kind == "yarn":
        return {**base, "rope_type": "yarn", "factor": factor, **_yarn(hparams)}
    return base if factor == 1.0 else {**base, "rope_type": "linear", "factor": factor}


def _factor(hparams: HParams) -> float:
    """The scaling factor; the older key is used when the newer one is missing."""
    older = hparams.at_least("rope.scale_linear", 0.0, 0.0)
    return hparams.at_least("rope.scaling.factor", 0.0, older) or 1.0


def _yarn(hparams: HParams) -> dict[str, Any]:
    # 0 means the same as a missing key: the trained length.
    key = "rope.scaling.original_context_length"
    found: dict[str, Any] = {
        "original_max_position_embeddings": hparams.count(key if hparams.get(key) else "context_length")
    }
    for name in ("beta_fast", "beta_slow"):
        if hparams.get(f"rope.scaling.yarn_{name}") is not None:
            found[name] = hparams.real(f"rope.scaling.yarn_{name}")
    return found


def _from_table(factors: Any, theta: float, width: int) -> dict[str, Any]:
    """``rope_parameters`` with the table of factors, of which ``llama3`` scaling with its four numbers is a case."""
    factors = np.asarray(factors, np.float64).reshape(-1)
    if 2 * factors.size != width:
        raise CheckpointError(f"{ROPE_FREQS} holds {factors.size} factors for heads {width} wide.", param=ROPE_FREQS)
    if not np.isfinite(factors).all() or factors.min() <= 0:
        raise CheckpointError(f"{ROPE_FREQS} holds factors that are not positive numbers.", param=ROPE_FREQS)
    if np.all(factors == 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "factors", "rope_theta": theta, "factors": factors.tolist()}
