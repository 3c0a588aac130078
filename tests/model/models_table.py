"""``docs/models.md``: each model type, from the parity matrix and from tiny models of it."""

from __future__ import annotations

import re

from parity_matrix import Row, rows

from truffula.kernels.program import Site
from truffula.model.architectures import ARCHITECTURES
from truffula.model.parts.moe import MoeSpec
from truffula.model.read import read_config
from truffula.model.spec import ModelSpec
from truffula.testing.programs import decoder_program
from truffula.testing.tiny import tiny_config
from truffula.weights.gguf.names import FAMILIES

# With those that llama.cpp writes as files of another type.
_GGUF = {family.model_type for family in FAMILIES.values()} | {
    "bamba", "deepseek_v2", "gemma4_unified_text", "glm4_moe_lite", "granitemoeshared", "kimi_k2", "mistral", "mixtral",
    "muse_glimmer_text", "olmo3", "youtu",
}  # fmt: skip


def page() -> str:
    """``docs/models.md``."""
    tested: dict[str, list[Row]] = {}
    for row in rows():
        tested.setdefault(row.model_type, []).append(row)
    natives = [name for name in tested if name in ARCHITECTURES]
    intro = _NATIVE.format(types=len(ARCHITECTURES), rows=sum(len(tested[name]) for name in natives))
    lines = [intro, *(_native(name, tested.get(name, [])) for name in sorted(ARCHITECTURES)), _OTHERS]
    for name in sorted(set(tested) - set(natives)):
        served = "whole batches" if tested[name][0].served == "fallback" else "one sequence at a time"
        lines.append(f"| `{name}` | {served} |")
    return "\n".join([*lines, ""])


def _native(model_type: str, tested: list[Row]) -> str:
    config = tiny_config(model_type)
    spec = read_config(config).spec
    kinds = dict.fromkeys(_COUNTS.sub("", part.kind) for layer in spec.layers for _, part, _, _ in layer.branches)
    program = decoder_program(config)
    linear = [site for site in program.sites if site.kind == "linear" and not _unreachable(spec, site)]
    modules = dict.fromkeys(site.module.rpartition(".")[2] for site in linear)
    stacked = dict.fromkeys(site.stacked.name.rpartition(".")[2] for site in linear if site.stacked is not None)
    where = " ".join(f"`{name}`" for name in modules) + "; stacked: " * bool(stacked)
    where += " ".join(f"`{name}`" for name in stacked)
    names = "; ".join(row.name for row in tested) or f"those of `{spec.model_type}`, in a multimodal checkpoint"
    gguf = "yes" if spec.model_type in _GGUF else ""
    return f"| `{model_type}` | {', '.join(kinds)} | {where} | {gguf} | {names} |"


def _unreachable(spec: ModelSpec, site: Site) -> bool:
    """Whether peft has no name for a site: it is of an expert whose matrices are rows of one parameter."""
    parts = (part for layer in spec.layers for _, part, _, _ in layer.branches if isinstance(part, MoeSpec))
    return site.stacked is not None and any(layout.flat for part in parts for layout in part.names.in_layouts)


_COUNTS = re.compile(r" of \d+ tokens|\d+ of \d+ ")
_NATIVE = """# Models

Written by `scripts/generate_model_pages.py` from the tables of the tests. `truffula inspect MODEL` prints the facts of
one model, also of a folder that holds only its config.json, or of that file: how it is served, parameters, memory by
part, KV cache and state, [tying](tying.md), quantisation, adapter sites, chat template.

- **native**: truffula's own implementation. The {types} types below; of a multimodal type, the text part.
- **fallback**: transformers' code, whole batches with paged attention. Needs torch and transformers.
- **serial**: transformers' code, one sequence at a time.
- Everything else, and a checkpoint whose answers need a field that is not served, is refused by name. Code from a
  model's repository is never run.

Every native type is read from safetensors in each [format](quantization.md#quantised-checkpoints): plain, GPTQ, AWQ,
AutoRound, compressed-tensors, fp8, bitsandbytes, MXFP4, MXFP8, NVFP4, HQQ. [GGUF files](formats.md#gguf) are read of
the types marked so, and of no others. The adapter sites are the linear modules named below, embedding and head;
`experts` are adapted one by one or as the stacked parameters that peft trains. [Which fields of an adapter are
served](adapters.md).

## Native

Each of the {rows} configurations in the last column is a tiny model with random weights that is compared with
transformers and peft: logits within 1e-4 in float32, 32 greedy tokens, a batch with two adapters and the base, a prompt
in chunks, a prefix from the cache, a preempted sequence (`make parity`). [Tying](tying.md) is tested with every type.

| model type | layers | adapter sites | GGUF | tested configurations |
|---|---|---|---|---|"""

_OTHERS = """
## Computed by transformers

Any other causal language model of transformers is tried, with adapters on its linear modules, input table and head.
These are tested as the native types are, each in its class's default form; a check at each start decides anew whether
sequences can share a batch ([how](architecture.md#models-that-transformers-computes)).

| model type | served |
|---|---|"""
