"""The names of an adapter's tensors: which half of which module each is, and what the others would have meant.

    base_model.model. + module path + .lora_A.weight | .lora_B.weight

The prefix may be missing; an adapter's name may stand inside (``.lora_A.default.weight``) when it is the same in every
key. All other endings mean something that is not served yet, or another format: they are refused by what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from truffula.errors import AdapterError

PREFIX = "base_model.model."
MAX_KEYS = 200_000
MAX_KEY_CHARS = 4096
SHOWN = 10

_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<name>[^.]+))?\.weight\Z")
_TRAINING = re.compile(r".+\.lora_(velora_embed|monteclora_sampler\b.*)(\..+)?\Z")

# Ending → the field of adapter_config.json that writes it, and what it is.
_UNSERVED = (
    (r"\.lora_embedding_[AB](\..+)?$", "target_modules", "LoRA on an embedding table"),
    (r"\.lora_magnitude_vector(\..+)?$", "use_dora", "DoRA's magnitudes"),
    (r"\.lora_B(\.[^.]+)?\.bias$", "lora_bias", "a bias on B"),
    (r"\.lora_diag(\..+)?$", "kasa_config", "KaSA's diagonal"),
    (
        r"\.base_layer\.weight$",
        "save_embedding_layers",
        "a copy of a base table; save with save_embedding_layers=False",
    ),
    (r"\.(base_layer\.)?bias$", "bias", "a trained bias"),
    (r"\.token_adapter\.trainable_tokens_delta$", "trainable_token_indices", "replaced token rows"),
    (r"\.experts(\.base_layer)?\.lora_[AB](\.[^.]+)?\.weight$", "target_parameters", "LoRA on fused experts"),
    (r"\.modules_to_save\.", "modules_to_save", "a whole replaced module"),
)
_FOREIGN = (
    (r"(^|\.)lora_(unet|te\d?|transformer)_", "a kohya or diffusers adapter (of an image model)"),
    (r"\.lora_(down|up)\.weight$|\.alpha$", "a kohya-style adapter (lora_down, lora_up, alpha)"),
    (r"\.lora_[ab](\.weight)?$", "an adapter of another trainer (lora_a, lora_b), such as MLX"),
    (r"\.lora\.(down|up)\.weight$|\.processor\.", "a diffusers adapter (of an image model)"),
    (r"\.lora_E$|\.lora_[AB]$", "AdaLoRA"),
    (r"vera_(lambda|A|B)", "VeRA"),
    (r"\.hada_w\d", "LoHa"),
    (r"\.lokr_w\d", "LoKr"),
    (r"\.ia3_l", "IA3"),
    (r"\.(oft|boft)_", "OFT or BOFT"),
    (r"^prompt_embeddings", "prompt or prefix tuning"),
)
_TABLES = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight")


@dataclass
class KeyPlan:
    """Every key accounted for: ``a`` and ``b`` by module path, ``unused`` those without effect when generating."""

    a: dict[str, str] = field(default_factory=dict)
    b: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def listed(names: Iterable[str]) -> str:
    """Up to ten names, and how many more."""
    every = sorted(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(name if len(name) <= 160 else name[:157] + "..." for name in every[:SHOWN]) + more


def plan_keys(keys: Sequence[str]) -> KeyPlan:
    """Sort an adapter's keys; ``AdapterError`` (``param``: an offender) when one is anything but half of a pair."""
    if not keys:
        raise AdapterError("adapter_model.safetensors holds no tensors.", param="adapter_model.safetensors")
    if len(keys) > MAX_KEYS:
        raise AdapterError(f"adapter_model.safetensors holds {len(keys)} tensors; at most {MAX_KEYS} are read.")
    plan = KeyPlan()
    strange: list[str] = []
    infixes: dict[str | None, str] = {}
    for key in keys:
        if len(key) > MAX_KEY_CHARS:
            raise AdapterError(f"A tensor's name has {len(key)} characters: {key[:80]}...", param=key[:80])
        path = key.removeprefix(PREFIX)
        found = _HALF.match(path)
        if found is None or re.search(r"(^|\.)experts(\.base_layer)?\Z", found["module"]):
            (plan.unused if _TRAINING.match(path) else strange).append(key)
            continue
        infixes.setdefault(found["name"], key)
        half = plan.a if found["half"] == "A" else plan.b
        if found["module"] in half:
            other = half[found["module"]]
            raise AdapterError(f"{key} and {other} are the same half of one module.", param=key)
        half[found["module"]] = key
    if strange:
        raise _strange(strange, len(keys))
    if len(infixes) > 1:
        raise AdapterError(
            f"Keys of several adapters are in one file ({listed(infixes.values())}); save each by itself.",
            param=next(iter(infixes.values())),
        )
    alone = [plan.a[m] for m in plan.a.keys() - plan.b.keys()] + [plan.b[m] for m in plan.b.keys() - plan.a.keys()]
    if alone:
        raise AdapterError(f"Half of a pair: {listed(alone)} lacks its lora_A or lora_B.", param=min(alone))
    return plan


def _strange(keys: list[str], count: int) -> AdapterError:
    """Say what keys that are not halves of pairs would be."""
    for ending, name, what in _UNSERVED:
        hits = [key for key in keys if re.search(ending, key)]
        if hits:
            return AdapterError(f"{what} ({name}) is not served yet: {listed(hits)}.", param=name, key=hits[0])
    for ending, what in _FOREIGN:
        hits = [key for key in keys if re.search(ending, key)]
        if hits:
            return AdapterError(
                f"This looks like {what}, not a PEFT LoRA adapter: {listed(hits)}.", param=min(hits), recognised=what
            )
    tables = [key for key in keys if key.endswith(_TABLES)]
    if len(keys) == count and tables:
        return AdapterError(
            f"This looks like a full (merged) model in an adapter's folder: {listed(keys)}. Serve it as a model.",
            param=min(keys),
            recognised="full model",
        )
    if tables:
        return AdapterError(
            f"A copy of a base table (save_embedding_layers) is not served yet: {listed(tables)}. "
            "Save the adapter with save_embedding_layers=False.",
            param="save_embedding_layers",
            key=tables[0],
        )
    weights = [key for key in keys if key.endswith((".weight", ".bias"))]
    if weights and len(keys) < count:
        return AdapterError(
            f"Whole replaced modules (modules_to_save) are not served yet: {listed(weights)}.",
            param="modules_to_save",
            key=weights[0],
        )
    return AdapterError(f"Tensors that no LoRA adapter has: {listed(keys)}.", param=min(keys))
