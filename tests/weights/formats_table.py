"""``docs/formats.md``: each form of quantised weights, from the fixtures that the tests read, and GGUF's types."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from quantised_files import LINEAR, NAMES, Fixture, as_model, gpt_oss_model, write_folder

from truffula.kernels.cpu.formats import BLOCK_KINDS
from truffula.weights.checkpoint import Checkpoint
from truffula.weights.gguf.quants import FORMATS
from truffula.weights.open import open_checkpoint

# The package whose values a method's have the bits of.
_LIBRARIES = {
    "auto-round": "gptqmodel", "awq": "autoawq", "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors", "fbgemm_fp8": "transformers", "fp8": "transformers",
    "gptq": "gptqmodel", "hqq": "hqq", "modelopt": "nvidia-modelopt", "mxfp4": "transformers",
    "mxfp8": "transformers",
}  # fmt: skip


def page() -> str:
    """``docs/formats.md``."""
    return "\n".join([_INTRO, *_schemes(), _GGUF, *_gguf_types(), ""])


def _schemes() -> Iterator[str]:
    for name in NAMES:
        fixture = Fixture(name)
        method = fixture.config.get("quant_method") or "bitsandbytes"
        library = _LIBRARIES[method]
        linear = name in LINEAR
        config, tensors = as_model(fixture) if linear else gpt_oss_model()
        with tempfile.TemporaryDirectory() as folder:
            opened = open_checkpoint(write_folder(Path(folder), config, tensors))
            with closing(opened):
                form, values, kept = _held(opened)
        tested = "values, logits, LoRA" if linear else "values, logits"
        yield (
            f"| `{method}` | {name} | {form} | {values} | {library} {fixture.libraries[library]} | {kept} | {tested} |"
        )


def _held(opened: Checkpoint) -> tuple[str, str, str]:
    """The form of the quantised tensors, the dtype of their values, and what the native backend keeps."""
    infos = [info for info in opened.tensors.values() if info.parts]
    forms, kinds = {info.dtype for info in infos}, set()
    for info in infos:
        blocks = opened.blocks(info.name)
        kinds.add(blocks.kind if blocks is not None and blocks.kind in BLOCK_KINDS else "")
    values = {opened.read(info.name).dtype.name for info in infos}
    kept = [f"packed, {kind}" if kind else "values, or Q8_0 with `--quantize`" for kind in sorted(kinds)]
    return ", ".join(sorted(forms)), ", ".join(sorted(values)), "; ".join(kept)


def _gguf_types() -> Iterator[str]:
    for format in FORMATS.values():
        if format.dtype is not None:
            yield f"| {format.name} | values |"
        else:
            kept = "packed" if format.name in BLOCK_KINDS else "values, or Q8_0 with `--quantize`"
            yield f"| {format.name} | {kept} |"


_INTRO = """# Formats of weights

This page is generated from the fixtures of the tests (`python scripts/generate_model_pages.py`). Each fixture holds
modules that the library of the scheme has quantised, with a hash of the values that it computes from them
(`scripts/quantised_fixtures.py`). [quantization.md](quantization.md) explains the modes and measures their errors.

Plain safetensors (float16, bfloat16, float32, float64) are loaded as they are, in one file or in shards, and converted
to the compute dtype.

**Kept** is what the native backend holds of a linear layer by default. *Packed* weights are multiplied as they are;
with `--exact`, and on the reference backend, all weights are held by their values, in the compute dtype. **Tested**:

- *values*: the dequantised values have the bits of the library's, whole and in pieces of rows;
- *logits*: those of a model of such layers are those of its plain values (of packed ones: near them);
- *LoRA*: two adapters and the base in one batch give the logits of peft on the dequantised base.

## Quantised safetensors

| `quant_method` | fixture | form | values | bits as in | kept | tested |
|---|---|---|---|---|---|---|"""

_GGUF = """
## GGUF

Files of [these model types](models.md), in one file or split. The values have the bits of gguf-py's `dequantize`. The
`kv_b_proj` of latent attention, which llama.cpp's converter divides and transposes, is kept as values.

Some settings have no key in the format. They are taken from llama.cpp's code or from the published model: Llama 4's
chunks of 8,192 tokens, the factor of Trinity's embeddings, how Mistral 4's queries grow beyond the original length, and
the groups of experts of DeepSeek V2 and V3 in files of 2025 and before. A setting that has none and no such value is
refused by name: the factors of Phi-3.5-MoE's longrope, the layers that a scaled OLMo 3 scales. So are files of all
other architectures, such as `gemma3n` and `gptj`: serve these models from safetensors. Falcon-H1's files are served
without adapters, as its multipliers are in the weights.

| type | kept |
|---|---|"""
