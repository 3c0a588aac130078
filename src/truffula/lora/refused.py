"""The methods of PEFT that are not served, with the reason and what can be done instead."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from truffula.errors import AdapterError, did_you_mean, nearest
from truffula.lora.fields import MERGE

_CONVERT = f"convert it with PEFT's save_as_lora, which writes a LoRA adapter near to it, or {MERGE}"
_SPARSE = "changes single entries of the weight, which is no product of two small matrices"
_ROTATES = "rotates the weight"
_SHARED = "makes its change of the weight from a bank of vectors or random matrices that all layers share"

# Method → why it is not served, what to do.
REFUSED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "ADAMSS": ("changes parts of the weight's singular spaces", MERGE),
        "ADAPTION_PROMPT": ("adds attention over learned vectors, with a gate for each layer", "train LoRA"),
        "BEFT": ("trains biases only, which PEFT writes as vectors of its own", MERGE),
        "BOFT": (_ROTATES, MERGE),
        "C3A": ("changes the weight by a block-circulant matrix", _CONVERT),
        "CARTRIDGE": ("is a KV cache that was stored for each layer", "train LoRA, or prompt tuning"),
        "CPT": (
            "trains the embeddings of its own examples",
            "save model.get_prompt(1)[0] as prompt_embeddings of a PROMPT_TUNING adapter with as many virtual tokens",
        ),
        "DEFT": ("projects the weight onto a learned space", MERGE),
        "DELORA": ("scales the change of the weight by norms of the weight and of its own factors", _CONVERT),
        "FOURIERFT": ("changes the weight by a sum of waves", _CONVERT),
        "FROD": (_ROTATES, MERGE),
        "GLORA": ("multiplies and shifts weights and biases", MERGE),
        "GRALORA": ("divides the weight into blocks with a product each", _CONVERT),
        "HIRA": ("multiplies the weight by a product, entry by entry", _CONVERT),
        "HRA": ("reflects the weight", MERGE),
        "LILY": ("mixes products that layers share by weights that depend on the input", "train LoRA"),
        "MISS": ("sums blocks of the input before its matrix", _CONVERT),
        "MULTITASK_PROMPT_TUNING": (
            "makes its prompt from a task id, which a request does not have",
            "save the prompt of one task, model.get_prompt(1, task_ids)[0], as prompt_embeddings of a PROMPT_TUNING "
            "adapter",
        ),
        "OFT": (_ROTATES, MERGE),
        "OSF": ("replaces the weight by its trained singular parts", MERGE),
        "PEANUT": ("makes its change of the weight by a network with the weight as input", MERGE),
        "POLY": ("mixes several LoRA modules by a task id, which a request does not have", "train LoRA for each task"),
        "PSOFT": (_ROTATES, _CONVERT),
        "PVERA": (_SHARED, MERGE),
        "RANDLORA": (_SHARED, _CONVERT),
        "ROAD": (_ROTATES, MERGE),
        "SHADOW": ("runs a second network beside the base", "train LoRA"),
        "SHIRA": (_SPARSE, MERGE),
        "SUPERTUNING": (_SPARSE, MERGE),
        "TINYLORA": (_SHARED, _CONVERT),
        "UNILORA": (_SHARED, _CONVERT),
        "VBLORA": (_SHARED, _CONVERT),
        "WAVEFT": ("changes the weight by a sum of wavelets", _CONVERT),
        "XLORA": (
            "mixes several LoRA adapters by a classifier, for each token",
            "serve the LoRA adapters that it mixes, and name the one to use in each request",
        ),
    }
)


def refuse_method(name: str, served: Collection[str]) -> AdapterError:
    """The error for a ``peft_type`` that is not one of the ``served`` ones."""
    if name in REFUSED:
        why, advice = REFUSED[name]
        text = f"peft_type is {name!r}, which is not served: it {why}. To serve it, {advice}."
    else:
        near = did_you_mean(nearest(name.upper(), served))
        text = f"peft_type is {name!r}, which is no method that truffula knows.{near} Served: {', '.join(served)}."
    return AdapterError(text, param="peft_type", peft_type=name)
