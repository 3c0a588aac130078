"""What is fuzzed: the valid cases to begin with, and what must hold of whatever a file says.

A file opens, and then every tensor's bytes lie inside it and can be read, and a model that can be planned can be packed
and run; or it raises one of the project's own errors, which names the file and what in it is wrong.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from fuzz_formats import Gguf, Obj, Safetensors, as_tree
from fuzz_mutations import Case

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "weights"))
from gguf_dense_cases import CASES as DENSE_CASES
from gguf_expert_cases import CASES as EXPERTS
from gguf_hybrid_cases import CASES as HYBRID_CASES
from gguf_pairs import write_pair
from quantised_files import Fixture, as_model, gpt_oss_model

from truffula.errors import CheckpointError, TruffulaError
from truffula.kernels.adapters import LowRank
from truffula.kernels.cpu import CpuBackend, available
from truffula.kernels.inputs import Capacity
from truffula.kernels.mapped import release_pages
from truffula.lora.image import ImageWriter
from truffula.lora.peft import BaseFacts, inspect_adapter, validate_adapter
from truffula.model.load import WeightReader, plan_model
from truffula.testing.adapters import tiny_config as adapter_config
from truffula.testing.adapters import tiny_tensors as adapter_tensors
from truffula.testing.programs import Part, decoder_program, fill_step
from truffula.testing.tiny import tiny_config, tiny_tensors
from truffula.text.tokenizer import load_tokenizer
from truffula.weights.finite import first_non_finite
from truffula.weights.gguf.quants import FORMATS
from truffula.weights.open import open_checkpoint
from truffula.weights.safetensors import DTYPES, SafetensorsFile
from truffula.weights.texts import read_texts

LARGEST_RUN = 1 << 20
"""Bytes of a model that is packed and run; others are only read."""
CAPACITY = Capacity(
    max_tokens=8, max_seqs=2, max_logit_rows=8, max_segments=1, num_blocks=4, block_size=4, max_blocks_per_seq=2,
    num_states=4,
)  # fmt: skip
SITES = decoder_program(tiny_config()).sites


class Unnamed(Exception):
    """An error of ours that does not say which file, or what in it."""


def _named(error: TruffulaError, *, file: bool) -> None:
    """The message names a file where ``file`` is asked, and the error the field."""
    words = ("safetensors", ".gguf", ".json", "folder")
    if file and not any(word in error.message for word in words):
        raise Unnamed(f"names no file: {type(error).__name__}: {error.message[:300]}") from error
    if (error.param is None and not error.data) or len(error.message) > 20_000:
        raise Unnamed(f"names no field, or too many words: {type(error).__name__}: {error.message[:300]}") from error


def _inside(info: Any) -> None:
    assert info.offset >= 0 and info.nbytes >= 0 and info.offset + info.nbytes <= info.file.stat().st_size, info


# --- what each target does with a folder of files


def safetensors(folder: Path) -> None:
    try:
        file = SafetensorsFile(folder / "x.safetensors")
    except TruffulaError as error:
        return _named(error, file=True)
    for name, info in file.tensors.items():
        _inside(info)
        array = file.read(name)
        assert (array.nbytes, file.raw(name).nbytes, array.shape) == (info.nbytes, info.nbytes, info.shape)
        first_non_finite(array)
        release_pages(file.raw(name))
    file.close()


def checkpoint(path: Path) -> None:
    try:
        opened = open_checkpoint(path)
    except TruffulaError as error:
        return _named(error, file=True)
    for name, info in opened.tensors.items():
        for part in info.parts or (info,):
            _inside(part)
        assert sum(opened.bytes_of(part).nbytes for part in info.parts or (info,)) == info.nbytes
        try:
            array = opened.read(name)
        except TruffulaError as error:
            _named(error, file=False)
            continue
        assert array.shape == info.shape
        first_non_finite(array)
        blocks = opened.blocks(name)
        swapped = (*info.shape[:-2], *info.shape[:-3:-1])  # blocks of stacked experts run along their inputs
        assert blocks is None or blocks.shape in (info.shape, swapped)
    try:
        load_tokenizer(read_texts(opened.path).tokenizer)
    except CheckpointError as error:
        _named(error, file=True)
    try:
        plan = plan_model(opened, "native")
    except TruffulaError as error:
        return _named(error, file=False)
    if available() and plan.stored_bytes < LARGEST_RUN and plan.program.vocab_size:
        packed(opened, plan)
    opened.close()


def packed(opened: Any, plan: Any) -> None:
    """Packed, as whole numbers and as values, and one step: three ids at most."""
    for exact in (False, True):
        backend = CpuBackend(threads=2, exact=exact, quantize="none" if exact else "q8_0")
        try:
            executable = backend.load(
                plan.program, "float32", WeightReader(opened, plan, block_kinds=backend.block_kinds), CAPACITY
            )
        except TruffulaError as error:
            return _named(error, file=False)
        fill_step(
            executable.inputs, [Part(tuple(range(min(3, plan.program.vocab_size))), 0, (1,))], CAPACITY.block_size
        )
        executable.run()
        assert executable.logits().shape == (1, plan.program.vocab_size)
        executable.close()


def folder_checkpoint(folder: Path) -> None:
    checkpoint(folder)


def gguf_checkpoint(folder: Path) -> None:
    checkpoint(folder / "x.gguf")


def adapter(folder: Path) -> None:
    base = BaseFacts(model="tiny")
    for inspect in (lambda: inspect_adapter(folder), lambda: inspect_adapter(folder, SITES, base)):
        try:
            inspect()
        except TruffulaError as error:
            _named(error, file=False)
    try:
        adapter = validate_adapter(folder, SITES, base=base, max_bytes=1 << 26, max_file_bytes=1 << 26)
    except TruffulaError as error:
        return _named(error, file=False)
    for part in (part for tensors in adapter.sites for part in tensors.parts):
        assert isinstance(part, LowRank)
        assert first_non_finite(part.a) is None and first_non_finite(part.b) is None
        assert part.a.shape[0] == part.b.shape[1] and np.isfinite(part.scale)
    ImageWriter(adapter.generation, adapter.rank, adapter.sites).write(folder / "image")


# --- what they begin with


def _stored(tensors: Mapping[str, Any]) -> Safetensors:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, data = Obj([["__metadata__", Obj([["format", "pt"]])]]), b""
    for name, array in tensors.items():
        raw = array.tobytes()
        entry = [
            ["dtype", names[array.dtype]],
            ["shape", list(array.shape)],
            ["data_offsets", [len(data), len(data) + len(raw)]],
        ]
        header.append([name, Obj(entry)])
        data += raw
    return Safetensors(header=header, data=data)


def _safetensors_seeds() -> list[Case]:
    some = {
        "model.embed": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.ones(3, ml_dtypes.bfloat16),
        "e": np.ones((0, 4), np.int64),
    }
    return [Case({"x.safetensors": _stored(some)})]


_SMALL = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}  # fmt: skip


def _folder_seeds() -> list[Case]:
    seeds = []
    for kind, dtype, more in (
        ("llama", "bfloat16", {"tie_word_embeddings": True}),
        ("qwen2", "float16", {"tie_word_embeddings": False}),
        ("gemma3_text", "float32", {"num_hidden_layers": 1}),
    ):
        config = tiny_config(kind, **{**_SMALL, **more})
        tensors = list(tiny_tensors(config, dtype=dtype).items())
        shards = {"model-00001-of-00002.safetensors": tensors[:4], "model-00002-of-00002.safetensors": tensors[4:]}
        index = {
            "metadata": {"total_size": 1},
            "weight_map": {name: shard for shard, some in shards.items() for name, _ in some},
        }
        files: dict[str, Any] = {"config.json": as_tree(config), "model.safetensors.index.json": as_tree(index)}
        files |= {shard: _stored(dict(some)) for shard, some in shards.items()}
        files["generation_config.json"] = as_tree({"eos_token_id": [2]})
        seeds.append(Case(files))
    return seeds


# One of each layout, and of each form of scales and zeros.
_LAYOUTS = (
    *("gptq-4-act-order", "gptq-3", "gptq-8", "auto-round-v2", "awq-gemm", "awq-gemv", "hqq-3-axis-0", "hqq-4"),
    *("ct-int4-asymmetric", "ct-int4-channel", "ct-int8-asymmetric", "ct-fp8-block", "ct-mxfp4", "ct-nvfp4"),
    *("fp8-block", "fp8-ue8m0", "modelopt-mxfp8", "modelopt-nvfp4", "bnb-nf4-double", "bnb-int8"),
)


def _quantised_seeds() -> list[Case]:
    """Models whose linear modules, and one whose experts, are those of a fixture."""
    models = [as_model(Fixture(name), num_hidden_layers=1) for name in _LAYOUTS]
    models.append(gpt_oss_model(num_hidden_layers=1))
    return [Case({"config.json": as_tree(config), "model.safetensors": _stored(tensors)}) for config, tensors in models]


_TOKENS = ["<a>", "<b>", "<c>", "\u2581", "a", "b", "ab", "\u2581a", "<0x41>"]


def _gguf_pairs(architecture: str, model: str) -> list[Any]:
    numbers = {"context_length": 64, "embedding_length": 32, "feed_forward_length": 32, "block_count": 1,
               "attention.head_count": 2, "attention.head_count_kv": 1,
               "attention.key_length": 16, "attention.value_length": 16}  # fmt: skip
    if architecture.startswith("gemma"):
        numbers["attention.sliding_window"] = 8
    pairs: list[Any] = [[b"general.architecture", 8, architecture.encode()], [b"general.alignment", 4, 32]]
    pairs += [[f"{architecture}.{key}".encode(), 4, value] for key, value in numbers.items()]
    pairs += [
        [f"{architecture}.attention.layer_norm_rms_epsilon".encode(), 6, 1e-6],
        [f"{architecture}.rope.freq_base".encode(), 6, 5e4],
    ]
    pairs += [
        [b"tokenizer.ggml.model", 8, model.encode()],
        [b"tokenizer.ggml.pre", 8, b"gpt-2"],
        [b"tokenizer.ggml.tokens", 9, [8, [token.encode() for token in _TOKENS]]],
        [b"tokenizer.ggml.token_type", 9, [5, [2, 3, 3, 1, 1, 1, 1, 1, 6]]],
        [b"tokenizer.ggml.scores", 9, [6, [float(-i) for i in range(9)]]],
        [b"tokenizer.ggml.merges", 9, [8, [b"a b"]]],
        [b"tokenizer.ggml.bos_token_id", 4, 1],
        [b"tokenizer.ggml.eos_token_id", 4, 2],
        [b"tokenizer.ggml.add_bos_token", 7, 1],
        [b"tokenizer.chat_template", 8, b"{{ messages }}"],
    ]
    return pairs


def _gguf_seed(architecture: str, model: str, types: tuple[int, ...]) -> Case:
    names = {"token_embd.weight": (9, 32), "output_norm.weight": (32,), "blk.0.attn_norm.weight": (32,),
             "blk.0.ffn_norm.weight": (32,),
             "blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (16, 32), "blk.0.attn_v.weight": (16, 32),
             "blk.0.attn_output.weight": (32, 32), "blk.0.ffn_gate.weight": (32, 32), "blk.0.ffn_up.weight": (32, 32),
             "blk.0.ffn_down.weight": (32, 32), "rope_freqs.weight": (8,)}  # fmt: skip
    if architecture != "llama":
        del names["rope_freqs.weight"]
    if architecture.startswith(("qwen3", "gemma3")):
        names |= {"blk.0.attn_q_norm.weight": (16,), "blk.0.attn_k_norm.weight": (16,)}
    if architecture.startswith("gemma"):
        names |= {"blk.0.post_attention_norm.weight": (32,), "blk.0.post_ffw_norm.weight": (32,)}
    rng, data, tensors = np.random.default_rng(0), b"", []
    for number, (name, shape) in enumerate(names.items()):
        kind = 0 if len(shape) == 1 else types[number % len(types)]
        format = FORMATS[kind]
        if format.unpack is None:
            raw = np.ones(shape, format.dtype).tobytes()
        else:
            blocks = rng.integers(0, 256, (int(np.prod(shape)) // format.size, format.nbytes), np.uint8)
            blocks[:, 1 : 2 * format.scales : 2] &= 0x3B  # scales that are numbers
            raw = blocks.tobytes()
        tensors.append([name.encode(), list(reversed(shape)), kind, len(data)])
        data += raw + bytes(-len(raw) % 32)
    return Case(
        {"x.gguf": Gguf(version=3, pairs=_gguf_pairs(architecture, model), tensors=tensors, align=32, data=data)}
    )


def _family_seeds() -> list[Case]:
    """One file of each family with changes, tables or metadata of a kind of its own."""
    seeds = []
    names = ("gemma4", "phi3", "gptneox", "stablelm", "apertus", "falcon", "gpt2", "qwen35", "qwen3next",
             "granitehybrid", "jamba", "nemotron_h_moe", "kimi-linear", "lfm2moe")  # fmt: skip
    every = [*DENSE_CASES, *HYBRID_CASES]
    cases = [max((c for c in every if c.architecture == name), key=lambda c: len(c.metadata)) for name in names]
    for case in [*cases, *(EXPERTS[name] for name in ("DeepSeek V3", "GLM-5", "K-EXAONE", "Laguna XS"))]:
        with tempfile.TemporaryDirectory() as folder:
            reader = gguf.GGUFReader(write_pair(Path(folder), case, blocks=True)[1])
            pairs: list[Any] = []
            for key, item in reader.fields.items():
                value = item.contents()
                if not key.startswith("GGUF."):
                    value = value.encode() if isinstance(value, str) else value
                    items = (
                        [text.encode() if isinstance(text, str) else text for text in value or []]
                        if isinstance(value, list)
                        else []
                    )
                    whole = [int(item.types[-1]), items] if item.types[0] == 9 else value
                    pairs.append([key.encode(), int(item.types[0]), whole])
            tensors, data = [], b""
            for tensor in reader.tensors:
                raw = tensor.data.tobytes()
                sizes = [int(size) for size in tensor.shape]
                tensors.append([tensor.name.encode(), sizes, int(tensor.tensor_type), len(data)])
                data += raw + bytes(-len(raw) % 32)
        seeds.append(Case({"x.gguf": Gguf(version=3, pairs=pairs, tensors=tensors, align=32, data=data)}))
    return seeds


def _large_block_seeds() -> list[Case]:
    """Types whose blocks are of 256: tables, which open and cannot be planned."""
    kinds = [kind for kind, format in FORMATS.items() if format.size == 256]
    leaves = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = [b"token_embd.weight", b"output.weight", *(f"blk.0.{leaf}.weight".encode() for leaf in leaves)]
    seeds = []
    for first in range(0, len(kinds), len(names)):
        tensors, data = [], b""
        for name, kind in zip(names, kinds[first:], strict=False):
            raw = (bytes(range(256)) * 3)[: FORMATS[kind].nbytes * 2]
            tensors.append([name, [256, 2], kind, len(data)])
            data += raw + bytes(-len(raw) % 32)
        pairs = _gguf_pairs("qwen2", "gpt2")
        seeds.append(Case({"x.gguf": Gguf(version=2, pairs=pairs, tensors=tensors, align=32, data=data)}))
    return seeds


def _gguf_seeds() -> list[Case]:
    return [
        _gguf_seed("llama", "llama", (8, 2, 3, 6)),
        _gguf_seed("qwen2", "gpt2", (0, 1, 30, 7)),
        _gguf_seed("qwen3", "gpt2", (6,)),
        _gguf_seed("gemma2", "llama", (3, 8)),
        _gguf_seed("gemma3", "llama", (2,)),
        _gguf_seed("qwen2", "gpt2", (20, 39)),
        *_large_block_seeds(),
        *_family_seeds(),
    ]


def _adapter_seeds() -> list[Case]:
    seeds = []
    for targets, dtype, more in (
        (["q_proj", "v_proj"], "float32", {}),
        ("all-linear", "bfloat16", {"use_rslora": True}),
        (
            r".*layers\.0\..*(q|o|up)_proj",
            "float16",
            {"rank_pattern": {"o_proj": 3}, "alpha_pattern": {".*up_proj": 9.5}},
        ),
    ):
        config = adapter_config(rank=2, alpha=4, targets=targets, **more)
        files = {
            "adapter_config.json": as_tree(config),
            "adapter_model.safetensors": _stored(adapter_tensors(SITES, config, dtype=dtype)),
        }
        files["added_tokens.json"] = as_tree({"<x>": 3})
        files["tokenizer_config.json"] = as_tree(
            {"added_tokens_decoder": {"3": {"content": "<x>"}}, "chat_template": "{{ x }}"}
        )
        seeds.append(Case(files))
    return seeds


TARGETS: Mapping[str, tuple[Callable[[Path], None], Callable[[], list[Case]]]] = {
    "safetensors": (safetensors, _safetensors_seeds),
    "folder": (folder_checkpoint, _folder_seeds),
    "quantised": (folder_checkpoint, _quantised_seeds),
    "gguf": (gguf_checkpoint, _gguf_seeds),
    "adapter": (adapter, _adapter_seeds),
}
