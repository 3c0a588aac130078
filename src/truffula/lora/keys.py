"""Parses the names of an adapter's tensors: half A or B of a module, or something that is refused by what it is.

    base_model.model. + module path + .lora_A.weight | .lora_B.weight | .lora_embedding_A | .lora_embedding_B

The prefix may be missing; an adapter's name may stand inside (``.lora_A.default.weight``) when it is the same in every
key. Tensors of a multimodal model's image and audio parts are left out. Other endings belong to features that are not
served yet, or to other formats.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from truffula.errors import AdapterError
from truffula.lora.fields import FIELDS
from truffula.lora.foreign import MLX, refuse_wrapped
from truffula.lora.roots import other_part

PREFIX = "base_model.model."
MAX_KEY_CHARS = 4096
SHOWN = 10

_HALF = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<half>[AB])(?:\.(?P<name>[^.]+))?\.weight"
    r"|embedding_(?P<table_half>[AB])(?:\.(?P<table_name>[^.]+))?)\Z"
)
_TRAINING = re.compile(r".+\.lora_(velora_embed|monteclora_sampler\b.*)(\..+)?\Z")
_TABLE_COPY = re.compile(
    r"(?P<module>(.+\.)?(embed_tokens|lm_head|wte|embed_in|embeddings|word_embeddings))\.base_layer\.weight\Z"
)

# Pattern → the field of adapter_config.json that writes such tensors.
_UNSERVED = {
    r"\.lora_magnitude_vector(\..+)?$": "use_dora",
    r"\.lora_B(\.[^.]+)?\.bias$": "lora_bias",
    r"\.lora_diag(\..+)?$": "kasa_config",
    r"\.(base_layer\.)?bias$": "bias",
    r"\.token_adapter\.trainable_tokens_delta$": "trainable_token_indices",
    r"\.modules_to_save\.": "modules_to_save",
}
# Pattern → what has such tensors, in other formats and methods.
_FOREIGN = {
    r"(^|\.)lora_(unet|te\d?|transformer)_": "a kohya or diffusers adapter (of an image model)",
    r"\.lora_(down|up)\.weight$|\.alpha$": "a kohya-style adapter (lora_down, lora_up, alpha)",
    r"\.lora_[ab](\.weight)?$": f"an adapter of another trainer, such as MLX or torchtune (lora_a, lora_b). {MLX}",
    r"\.lora\.(down|up)\.weight$|\.processor\.": "a diffusers adapter (of an image model)",
    r"\.lora_E$|\.lora_[AB]$": "AdaLoRA",
    r"vera_(lambda|A|B)": "VeRA",
    r"\.hada_w\d": "LoHa",
    r"\.lokr_w\d": "LoKr",
    r"\.ia3_l": "IA3",
    r"\.(oft|boft)_": "OFT or BOFT",
    r"^prompt_embeddings": "prompt or prefix tuning",
}
_BASE_COPY = re.compile(r"(?P<module>[^.]+)\.base_layer\.weight$")
_TABLES = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass
class KeyPlan:
    """Every key accounted for: ``a`` and ``b`` by module path, ``embeddings`` the modules whose halves are of a table,
    ``copies`` of base tables by module path, ``unused`` those without effect when generating, ``left_out`` one by
    module of image and audio parts, which text does not pass through."""

    a: dict[str, str] = field(default_factory=dict)
    b: dict[str, str] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    copies: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def listed(names: Iterable[str]) -> str:
    """Up to ten names, and how many more."""
    every = sorted(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(name if len(name) <= 160 else name[:157] + "..." for name in every[:SHOWN]) + more


def _module_of(key: str) -> str:
    """The module path of any adapter key."""
    return re.split(r"\.(?:lora_|base_layer\.|weight$|bias$)", key.removeprefix(PREFIX), maxsplit=1)[0]


def left_out_words(plan: KeyPlan) -> str:
    """The parts that ``left_out`` keys belong to, with their numbers of modules: ``54 modules of vision_tower``."""
    parts = Counter(other_part(f"{module}.") for module in plan.left_out)
    return ", ".join(f"{count} module{'s' * (count != 1)} of {part}" for part, count in sorted(parts.items(), key=str))


def plan_keys(keys: Sequence[str]) -> KeyPlan:
    """An adapter's keys by their meaning; ``AdapterError`` (``param``: a key) for one that is not served."""
    if not keys:
        raise AdapterError(
            "adapter_model.safetensors contains no tensors: the adapter was saved without its weights. Save it again.",
            param="adapter_model.safetensors",
        )
    if long := next((key for key in keys if len(key) > MAX_KEY_CHARS), None):
        raise AdapterError(f"A tensor's name has {len(long)} characters: {long[:80]}...", param=long[:80])
    refuse_wrapped(keys)
    plan = KeyPlan()
    unexpected: list[str] = []
    infixes: dict[str | None, str] = {}
    for key in keys:
        path = key.removeprefix(PREFIX)
        if other_part(path) is not None:
            plan.left_out[_module_of(key)] = key
            continue
        found = _HALF.match(path)
        if found is None:
            if (copy := _TABLE_COPY.match(path)) is not None:
                plan.copies[copy["module"]] = key
            else:
                (plan.unused if _TRAINING.match(path) else unexpected).append(key)
            continue
        infixes.setdefault(found["name"] or found["table_name"], key)
        half = plan.a if "A" in (found["half"], found["table_half"]) else plan.b
        if found["table_half"]:
            plan.embeddings.add(found["module"])
        if found["module"] in half:
            other = half[found["module"]]
            raise AdapterError(f"{key} and {other} are the same half of one module.", param=key)
        half[found["module"]] = key
    if unexpected:
        raise _unexpected(unexpected, len(keys))
    _check_pairs(plan, infixes)
    if alone := plan.copies.keys() - plan.a.keys():
        key = plan.copies[min(alone)]
        raise AdapterError(
            f"The file contains a copy of a base table (save_embedding_layers) that it has no LoRA for: {key}. Save "
            "the adapter with save_embedding_layers=False.",
            param="save_embedding_layers",
            key=key,
        )
    return plan


def _check_pairs(plan: KeyPlan, infixes: dict[str | None, str]) -> None:
    if len(infixes) > 1:
        raise AdapterError(
            f"Keys of several adapters are in one file ({listed(infixes.values())}); save each in its own file.",
            param=next(iter(infixes.values())),
        )
    alone = [plan.a[m] for m in plan.a.keys() - plan.b.keys()] + [plan.b[m] for m in plan.b.keys() - plan.a.keys()]
    if alone:
        raise AdapterError(
            f"Incomplete pair: {listed(alone)} has no matching lora_A or lora_B. The file is incomplete; save it "
            "again.",
            param=min(alone),
        )
    if not plan.a and plan.left_out:
        raise AdapterError(
            f"The adapter adapts only {left_out_words(plan)}. Text does not pass through these, and this server takes "
            "text only, so the adapter would change nothing. Train with the language model's layers in target_modules.",
            param=min(plan.left_out.values()),
        )


def _unexpected(keys: list[str], count: int) -> AdapterError:
    """The error for keys that are not halves of pairs, with what they seem to be."""
    if len(keys) == 1 and keys[0].endswith("lm_head.base_layer.bias"):
        return AdapterError(
            f"{keys[0]} is a copy of the bias of the base's head (save_embedding_layers), which is not read. Save the "
            "adapter with save_embedding_layers=False, which leaves the copy out.",
            param="save_embedding_layers",
            key=keys[0],
        )
    for pattern, name in _UNSERVED.items():
        if hits := [key for key in keys if re.search(pattern, key)]:
            return _unserved(name, hits)
    if copies := [key for key in keys if _BASE_COPY.search(key)]:
        leaves = {found["module"] for key in copies if (found := _BASE_COPY.search(key))}
        return AdapterError(
            f"The file contains the base_layer copy of {listed(leaves)}: the base model's own weights, unmerged, "
            f"beside the adapter ({listed(copies)}). It was written from model.state_dict(). Save the adapter with the "
            "PEFT model's save_pretrained, which leaves them out.",
            param=min(copies),
        )
    for pattern, what in _FOREIGN.items():
        if hits := [key for key in keys if re.search(pattern, key)]:
            return AdapterError(
                f"The tensors {listed(hits)} are not of a PEFT LoRA adapter. They look like {what.rstrip('.')}.",
                param=min(hits),
            )
    return _whole_weights(keys, count)


def _unserved(field: str, keys: list[str]) -> AdapterError:
    """The error for tensors of a field that is not served."""
    note = FIELDS[field].note
    return AdapterError(
        f"The file contains tensors of {field} ({listed(keys)}). {note[0].upper()}{note[1:]}.", param=field, key=keys[0]
    )


def _whole_weights(keys: list[str], count: int) -> AdapterError:
    """Keys that end like a model's own weights."""
    tables = [key for key in keys if key.endswith(_TABLES)]
    if len(keys) == count and tables:
        return AdapterError(
            f"This looks like a full (merged) model in an adapter's folder: {listed(keys)}. Serve it as a model: "
            "rename the file to model.safetensors, put the model's config.json and tokenizer beside it, and run "
            "truffula serve FOLDER.",
            param=min(keys),
        )
    if tables:
        return AdapterError(
            f"The file contains a copy of a base table (save_embedding_layers), which is not served yet: "
            f"{listed(tables)}. Save the adapter with save_embedding_layers=False.",
            param="save_embedding_layers",
            key=tables[0],
        )
    weights = [key for key in keys if key.endswith((".weight", ".bias"))]
    if weights and len(keys) < count:
        return _unserved("modules_to_save", weights)
    return AdapterError(
        f"The file contains tensors that no PEFT LoRA adapter has: {listed(keys)}. Save it with PEFT's "
        "save_pretrained.",
        param=min(keys),
    )
