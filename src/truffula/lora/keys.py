"""Parses the names of an adapter's tensors: what each is of a module, or why it is refused.

    base_model.model. + module path + .lora_A.weight | .lora_B.weight | .lora_embedding_A | .lora_embedding_B
        | .lora_magnitude_vector | .lora_B.bias | .lora_diag | .token_adapter.trainable_tokens_delta
        | .weight | .bias | .base_layer.weight (of a table) | .base_layer.bias

The prefix may be missing; an adapter's name may stand inside (``.lora_A.default.weight``) when it is the same in every
key. Tensors of a multimodal model's image and audio parts are left out. Other endings belong to other formats.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from truffula.errors import AdapterError
from truffula.lora.foreign import MLX, refuse_wrapped
from truffula.lora.roots import other_part

PREFIX = "base_model.model."
MAX_KEY_CHARS = 4096
SHOWN = 10

_NAME = r"(?:\.(?P<name>(?!weight\Z)[^.]+))?"  # of the adapter
_TABLE_NAMES = "embed_tokens|lm_head|wte|embed_in|embeddings|word_embeddings"
# Field of KeyPlan → the pattern of its keys. The first that matches decides.
_OF_MODULES: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        field: re.compile(rf"(?P<module>.+){suffix}\Z")
        for field, suffix in {
            "a": rf"\.lora_A{_NAME}\.weight",
            "b": rf"\.lora_B{_NAME}\.weight",
            "table_a": rf"\.lora_embedding_A{_NAME}",
            "table_b": rf"\.lora_embedding_B{_NAME}",
            "magnitudes": rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?",
            "b_biases": rf"\.lora_B{_NAME}\.bias",
            "diagonals": rf"\.lora_diag{_NAME}",
            "tokens": rf"\.token_adapter\.trainable_tokens_delta{_NAME}",
        }.items()
    }
)
# Of training, and what a saved module replaces: PEFT does not compute with them.
_UNUSED = re.compile(r".+\.(lora_(velora_embed|monteclora_sampler\b.*)(\..+)?|original_module\.(weight|bias))\Z")
_TABLE_COPY = re.compile(rf"(?P<module>(.+\.)?({_TABLE_NAMES}))(\.token_adapter)?\.base_layer\.weight\Z")
_SAVED = re.compile(r"(?P<module>.+?)(?P<infix>\.modules_to_save(\.[^.]+)?)?\.(?P<what>weight|bias)\Z")
_OWN_BIAS = re.compile(r"(?P<module>.+)\.base_layer\.bias\Z")

# Pattern → what has such tensors, in other formats and methods.
_FOREIGN = {
    r"(^|\.)lora_(unet|te\d?|transformer)_": "a kohya or diffusers adapter (of an image model)",
    r"\.lora_(down|up)\.weight$|\.alpha$": "a kohya-style adapter (lora_down, lora_up, alpha)",
    r"\.lora_[ab](\.weight)?$": f"an adapter of another trainer, such as MLX or torchtune (lora_a, lora_b). {MLX}",
    r"\.lora\.(down|up)\.weight$|\.processor\.": "a diffusers adapter (of an image model)",
    r"\.lora_E$|\.lora_[AB]$": "AdaLoRA (peft_type ADALORA)",
    r"vera_(lambda|A|B)": "VeRA",
    r"\.hada_w\d": "LoHa",
    r"\.lokr_w\d": "LoKr",
    r"\.ia3_l": "IA3",
    r"\.(oft|boft)_": "OFT or BOFT",
    r"^prompt_embeddings": "prompt or prefix tuning",
}
_BASE_COPY = re.compile(r"(?P<module>[^.]+)\.base_layer\.weight$")


@dataclass
class KeyPlan:
    """Every key accounted for. By module path: ``a`` and ``b`` of pairs, ``magnitudes`` (DoRA), ``b_biases`` (of B),
    ``diagonals`` (KaSA), ``tokens`` (trained rows), and whole tensors that take the place of the base's: ``weights``
    and ``biases``, and ``copies`` of tables, which may be the base's own. ``embeddings``: the modules whose halves are
    of a table. ``unused`` have no effect when generating; ``left_out`` are, one by module, of image and audio parts,
    which text does not pass through."""

    a: dict[str, str] = field(default_factory=dict)
    b: dict[str, str] = field(default_factory=dict)
    magnitudes: dict[str, str] = field(default_factory=dict)
    b_biases: dict[str, str] = field(default_factory=dict)
    diagonals: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    unused: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def read(self) -> list[str]:
        """The keys whose values are read."""
        groups = (self.a, self.b, self.magnitudes, self.b_biases, self.diagonals, self.tokens, self.weights,
                  self.biases, self.copies)  # fmt: skip
        return [key for group in groups for key in group.values()]

    def rename(self, names: Mapping[str, str]) -> None:
        """Replace module paths. Raises ``AdapterError`` for two that become one."""
        groups = (self.a, self.b, self.magnitudes, self.b_biases, self.diagonals, self.tokens, self.weights,
                  self.biases, self.copies)  # fmt: skip
        for group in groups:
            before = dict(group)
            group.clear()
            for module, key in before.items():
                _add(group, names.get(module, module), key)

    def modules(self) -> list[str]:
        """Every module that has a tensor, once."""
        groups = (self.a, self.b, self.tokens, self.weights, self.biases, self.copies)
        return list(dict.fromkeys(module for group in groups for module in group))


def listed(names: Iterable[str]) -> str:
    """Up to ten names, and how many more."""
    every = sorted(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(name if len(name) <= 160 else name[:157] + "..." for name in every[:SHOWN]) + more


def _module_of(key: str) -> str:
    """The module path of any adapter key."""
    return re.split(r"\.(?:lora_|base_layer\.|token_adapter\.|weight$|bias$)", key.removeprefix(PREFIX), maxsplit=1)[0]


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
    for key in sorted(keys, key=lambda key: (".modules_to_save." in key, key)):  # these may be there a second time
        path = key.removeprefix(PREFIX)
        if other_part(path) is not None:
            plan.left_out[_module_of(key)] = key
        elif _UNUSED.match(path):
            plan.unused.append(key)
        elif not _add_part(plan, path, key, infixes) and not _add_whole(plan, path, key):
            unexpected.append(key)
    if unexpected:
        raise _unexpected(unexpected)
    _check_pairs(plan, infixes)
    _refuse_model(plan)
    return plan


def _add_part(plan: KeyPlan, path: str, key: str, infixes: dict[str | None, str]) -> bool:
    """Add a tensor of a method to ``plan``; False when it is none."""
    for name, pattern in _OF_MODULES.items():
        if (found := pattern.match(path)) is None:
            continue
        infixes.setdefault(found["name"], key)
        module = found["module"]
        if name.startswith("table_"):
            plan.embeddings.add(module)
        _add(getattr(plan, name.removeprefix("table_")), module, key)
        return True
    return False


def _add_whole(plan: KeyPlan, path: str, key: str) -> bool:
    """Add a tensor that takes the place of one of the base's."""
    if (copy := _TABLE_COPY.match(path)) is not None:
        _add(plan.copies, copy["module"], key)
    elif (bias := _OWN_BIAS.match(path)) is not None:
        _add(plan.biases, bias["module"], key)
    elif (saved := _SAVED.match(path)) is not None and not _BASE_COPY.search(path) and not _is_foreign(path):
        group = plan.weights if saved["what"] == "weight" else plan.biases
        # bias="all" writes those of saved modules twice, and save_embedding_layers saved tables.
        if saved["infix"] and saved["module"] in group:
            plan.unused.append(key)
            return True
        _add(group, saved["module"], key)
    else:
        return False
    return True


def _add(group: dict[str, str], module: str, key: str) -> None:
    if module in group:
        raise AdapterError(f"{key} and {group[module]} are the same tensor of one module.", param=key)
    group[module] = key


def _is_foreign(path: str) -> bool:
    return any(re.search(pattern, path) for pattern in _FOREIGN)


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
    for what, group in (("lora_magnitude_vector", plan.magnitudes), ("bias of lora_B", plan.b_biases),
                        ("lora_diag", plan.diagonals)):  # fmt: skip
        if stray := group.keys() - plan.a.keys():
            key = group[min(stray)]
            raise AdapterError(f"{key} is a {what} of a module without lora_A and lora_B.", param=key)
    if not plan.modules() and plan.left_out:
        raise AdapterError(
            f"The adapter adapts only {left_out_words(plan)}. Text does not pass through these, and this server takes "
            "text only, so the adapter would change nothing. Train with the language model's layers in target_modules.",
            param=min(plan.left_out.values()),
        )


def _unexpected(keys: list[str]) -> AdapterError:
    """The error for keys that are of no PEFT LoRA adapter, with what they seem to be."""
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
    return AdapterError(
        f"The file contains tensors that no PEFT LoRA adapter has: {listed(keys)}. Save it with PEFT's "
        "save_pretrained.",
        param=min(keys),
    )


def _refuse_model(plan: KeyPlan) -> None:
    """Raise ``AdapterError`` for a file of whole weights alone, of tables and of layers: a model."""
    tables = [key for module, key in plan.weights.items() if module.rpartition(".")[2] in _TABLE_NAMES.split("|")]
    if plan.a or plan.tokens or not tables or len(tables) == len(plan.weights):
        return
    raise AdapterError(
        f"This looks like a full (merged) model in an adapter's folder: {listed(plan.weights.values())}. Serve it as a "
        "model: rename the file to model.safetensors, put the model's config.json and tokenizer beside it, and run "
        "truffula serve FOLDER.",
        param=min(plan.weights.values()),
    )
