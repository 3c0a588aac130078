"""Writes ``tests/weights/quantised/*.safetensors``: modules quantised by the library of each scheme.

A file holds the stored tensors of the modules ``square`` [64, 64], ``tall`` [128, 64] and ``wide`` [64, 128], and as
metadata the ``quantization_config``, the versions of the libraries and, for each module, the dtype and the SHA-256 of
the values that the library dequantises. It runs in an environment of its own:

    pip install torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.1 bitsandbytes==0.50.2
    pip install --no-deps autoawq==0.2.9 hqq==0.2.8.post1 gptqmodel==7.7.0 nvidia-modelopt==0.47.0
    pip install ...  # what these import
    python scripts/quantised_fixtures.py tests/weights/quantised [NAME ...]
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHAPES = {"square": (64, 64), "tall": (128, 64), "wide": (64, 128)}
Module = tuple[dict[str, Tensor], Tensor]
"""The stored tensors of one module by suffix, and the library's values ``[outputs, inputs]``."""


def weights() -> Iterator[tuple[str, Tensor]]:
    for number, (name, shape) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(number)
        yield name, torch.randn(shape, generator=generator) * 1.5 / shape[1] ** 0.5


def random_words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def random_scales(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(shape) * 0.04 + 0.01).to(dtype)


# GPTQ


def gptq(
    bits: int, *, group: int = 32, v2: bool = False, act_order: bool = False, dtype: torch.dtype = torch.float16
) -> Any:
    from gptqmodel.nn_modules.qlinear import PackableQuantLinear
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    modules = {}
    for name, (outputs, inputs) in SHAPES.items():
        size = inputs if group == -1 else group
        groups = inputs // size
        layer = TorchLinear(
            bits=bits, group_size=group, sym=False, desc_act=act_order, in_features=inputs, out_features=outputs,
            bias=False, pack_dtype=torch.int32, register_buffers=True,
        )  # fmt: skip
        index = torch.arange(inputs, dtype=torch.int32) // size
        stored = {
            ".qweight": random_words(inputs * bits // 32, outputs),
            ".qzeros": random_words(groups, outputs * bits // 32),
            ".scales": random_scales(groups, outputs, dtype=dtype),
            ".g_idx": index[torch.randperm(inputs)] if act_order else index,
        }
        for key, value in stored.items():
            setattr(layer, key[1:], value.clone())
        if not v2:
            convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        layer.eval()
        if hasattr(layer, "_init_wf_unsqueeze_buffers"):
            layer._init_wf_unsqueeze_buffers()
        values = PackableQuantLinear.dequantize_weight(layer)
        modules[name] = (stored, values.T)
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": False,
        "checkpoint_format": "gptq_v2" if v2 else "gptq", "lm_head": False, "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }  # fmt: skip
    return config, modules


def auto_round(packing: str) -> Any:
    config, modules = gptq(4, v2="gptq" not in packing.replace("gptqmodel", ""))
    kept = {"bits": 4, "group_size": 32, "sym": False, "data_type": "int", "iters": 200, "low_gpu_mem_usage": False}
    config = {"quant_method": "auto-round", "packing_format": packing, "autoround_version": "0.16.1", **kept}
    return config, modules


# AWQ


def _awq_module(path: str) -> Any:
    """A module of AutoAWQ by its file: importing the package needs data sets and kernels."""
    file = distribution("autoawq").locate_file(path)
    spec = importlib.util.spec_from_file_location(Path(path).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def awq_gemm(dtype: torch.dtype = torch.float16) -> Any:
    packing = _awq_module("awq/utils/packing_utils.py")
    modules = {}
    for name, (outputs, inputs) in SHAPES.items():
        stored = {
            ".qweight": random_words(inputs, outputs // 8),
            ".qzeros": random_words(inputs // 32, outputs // 8),
            ".scales": random_scales(inputs // 32, outputs, dtype=dtype),
        }
        values = packing.dequantize_gemm(stored[".qweight"], stored[".qzeros"], stored[".scales"], 4, 32)
        modules[name] = stored, values.T
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, modules


def awq_gemv() -> Any:
    """Packed by the library; it has no CPU code to unpack, so the values are those that were packed."""
    source = Path(distribution("autoawq").locate_file("awq/modules/linear/gemv.py")).read_text()
    scope: dict[str, Any] = {}
    exec(source.replace("from awq.utils.module import try_import", "try_import = lambda name: (None, '')"), scope)
    modules = {}
    for name, (outputs, inputs) in SHAPES.items():
        quants = torch.randint(0, 16, (outputs, inputs))
        zeros = torch.randint(0, 16, (outputs, inputs // 32))
        scales = random_scales(outputs, inputs // 32)
        exact = (quants - zeros.repeat_interleave(32, 1)).float() * scales.float().repeat_interleave(32, 1)
        linear = torch.nn.Linear(inputs, outputs, bias=False)
        linear.weight.data = exact
        packed = scope["WQLinear_GEMV"].from_linear(linear, 4, 32, scales=scales, zeros=zeros)
        stored = {f".{key}": getattr(packed, key) for key in ("qweight", "qzeros", "scales")}
        modules[name] = stored, exact.half()
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemv"}, modules


# compressed-tensors


def compressed(form: str, dtype: torch.dtype = torch.bfloat16, **args: Any) -> Any:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(form)
    modules = {}
    for name, weight in weights():
        weight = weight.to(dtype)
        low, high, extra = _ranges(weight, arguments)
        if form == "nvfp4-pack-quantized":
            extra["weight_global_scale"] = (448 * 6 / weight.abs().max()).float().reshape(1)
            scale = (high.abs().maximum(low.abs()) / 6 * extra["weight_global_scale"]).to(torch.float8_e4m3fn).to(dtype)
            zero = torch.zeros_like(scale)
        elif form.startswith("mx"):
            largest = 6.0 if arguments.num_bits == 4 else 448.0
            scale = torch.exp2(torch.ceil(torch.log2(high.abs().maximum(low.abs()).float() / largest))).to(dtype)
            zero = torch.zeros_like(scale)
        else:
            scale, zero = calculate_qparams(low, high, arguments)
            scale = scale.to(dtype)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero, **extra}
        if arguments.symmetric:
            state.pop("weight_zero_point")
        state = compressor.compress(state, scheme)
        values = compressor.decompress(dict(state), scheme)["weight"]
        modules[name] = {f".{key}": value for key, value in state.items()}, values
    group = {"targets": ["Linear"], "weights": json.loads(arguments.model_dump_json()), "input_activations": None}
    group |= {"output_activations": None, "format": form}
    config = {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed",
        "global_compression_ratio": None,
        "sparsity_config": {}, "transform_config": {}, "version": "0.20.1",
    }  # fmt: skip
    return config, modules


def _ranges(weight: Tensor, args: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    if args.strategy in ("group", "tensor_group"):
        grouped = weight.unflatten(1, (-1, args.group_size))
        return grouped.amin(-1), grouped.amax(-1), {}
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), {}
    if args.strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % width, 0, -weight.shape[0] % height))
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        return blocks.amin((1, 3)), blocks.amax((1, 3)), {}
    return weight.amin().reshape(1), weight.amax().reshape(1), {}


# Floats of 8 bits as transformers has them


def fp8(kind: str) -> Any:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    blocks = {"block": (32, 16), "tensor": None, "channel": None, "ue8m0": (32, 32), "mxfp8": (1, 32)}[kind]
    modules = {}
    for name, weight in weights():
        outputs, inputs = weight.shape
        height, width = blocks or ((outputs, inputs) if kind == "tensor" else (1, inputs))
        largest = weight.abs().unflatten(1, (-1, width)).unflatten(0, (-1, height)).amax((1, 3))
        scale = (largest / 448).float()
        if kind in ("ue8m0", "mxfp8"):
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        spread = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)
        quants = (weight / spread).to(torch.float8_e4m3fn)
        stored_scale = scale
        if kind == "ue8m0":
            stored_scale = scale.to(torch.float8_e8m0fnu)
        elif kind == "mxfp8":
            stored_scale = (torch.log2(scale) + 127).to(torch.uint8)
        values = Fp8Dequantize(None)._dequantize_one(quants, stored_scale, output_dtype=torch.float32)
        if kind == "tensor":
            stored_scale = stored_scale.reshape(())
        modules[name] = {".weight": quants, ".weight_scale_inv": stored_scale}, values
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    config["weight_block_size"] = list(blocks) if blocks else None
    if kind in ("ue8m0", "mxfp8"):
        config["scale_fmt"] = "ue8m0"
    return config, modules


# bitsandbytes, HQQ, floats of 4 bits


def bitsandbytes(kind: str, dtype: torch.dtype = torch.bfloat16, *, nested: bool = False, block: int = 64) -> Any:
    from bitsandbytes import functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    modules = {}
    for name, weight in weights():
        weight = weight.to(dtype)
        if kind == "int8":
            quants, stats, _ = functional.int8_vectorwise_quant(weight.half())
            values = functional.int8_vectorwise_dequant(quants, stats)
            stored = {".weight": quants, ".SCB": stats, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
        else:
            quants, state = functional.quantize_4bit(weight, None, None, block, nested, kind)
            values = functional.dequantize_4bit(quants, state)
            if (
                weight.shape[1] % block
            ):  # the library's CPU kernel takes blocks for parts of rows; its definition does not
                values = _dequantize_4bit_compute(
                    quants.reshape(-1), state.absmax, state.code, block, tuple(weight.shape), dtype
                )
            stored = {".weight": quants, **{f".weight.{key}": item for key, item in state.as_dict(packed=True).items()}}
        modules[name] = stored, values
    config = {"quant_method": "bitsandbytes", "load_in_8bit": kind == "int8", "load_in_4bit": kind != "int8"}
    config |= {"_load_in_8bit": kind == "int8", "_load_in_4bit": kind != "int8", "llm_int8_threshold": 6.0}
    config |= {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested, "llm_int8_skip_modules": None}
    return config, modules


def hqq(bits: int, axis: int, dtype: torch.dtype, *, view_as_float: bool = False) -> Any:
    from hqq.core.quantize import Quantizer
    from hqq.core.utils import encode_safetensor_type

    modules = {}
    for name, weight in weights():
        quants, meta = Quantizer.quantize(
            weight, nbits=bits, group_size=16, axis=axis, optimize=False, compute_dtype=dtype, device="cpu",
            view_as_float=view_as_float,
        )  # fmt: skip
        meta["compute_dtype"] = dtype
        quants, meta = Quantizer.to_inplace(quants, meta, "cpu")
        stored = {".W_q": quants, **{f".{key}": encode_safetensor_type(value) for key, value in meta.items()}}
        stored |= {".encoded_state_dict": encode_safetensor_type(True), ".offload_meta": encode_safetensor_type(False)}
        modules[name] = stored, Quantizer.dequantize(quants, meta)
    quant_config = {"weight_quant_params": {"nbits": bits, "group_size": 16, "axis": axis}}
    return {"quant_method": "hqq", "quant_config": quant_config, "skip_modules": ["lm_head"]}, modules


def mxfp4() -> Any:
    """Stacked experts; the modules' names are those of the tensors."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    modules = {}
    for name, (outputs, inputs) in SHAPES.items():
        blocks = torch.randint(0, 256, (3, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (3, outputs, inputs // 32), dtype=torch.uint8)
        modules[name] = {"_blocks": blocks, "_scales": scales}, convert_moe_packed_tensors(blocks, scales)
    return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}, modules


def modelopt(kind: str) -> Any:
    from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    modules = {}
    for name, weight in weights():
        if kind == "NVFP4":
            packed, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
            values = packed.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
            stored = {".weight_scale_2": scale_2.reshape(())}
        else:
            packed, scale = MXFP8QTensor.quantize(weight)
            values, stored = packed.dequantize(torch.float32, scale=scale), {}
        stored |= {".weight": packed._quantized_data, ".weight_scale": scale, ".input_scale": torch.tensor(0.5)}
        modules[name] = stored, values
    config = {"quant_method": "modelopt", "quant_algo": kind, "ignore": ["lm_head"], "kv_cache_scheme": None}
    return config | {"producer": {"name": "modelopt", "version": "0.47.0"}}, modules


CASES: dict[str, Callable[[], Any]] = {
    **{f"gptq-{bits}": lambda bits=bits: gptq(bits) for bits in (2, 3, 4, 8)},
    "gptq-4-act-order": lambda: gptq(4, act_order=True),
    "gptq-4-v2": lambda: gptq(4, v2=True),
    "gptq-3-v2": lambda: gptq(3, v2=True),
    "gptq-4-bfloat16-one-group": lambda: gptq(4, group=-1, dtype=torch.bfloat16),
    "auto-round": lambda: auto_round("auto_round:auto_gptq"),
    "auto-round-v2": lambda: auto_round("auto_round:gptqmodel"),
    "awq-gemm": awq_gemm,
    "awq-gemv": awq_gemv,
    "ct-int4-group": lambda: compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
    "ct-int4-group-float16": lambda: compressed(
        "pack-quantized", torch.float16, num_bits=4, strategy="group", group_size=32
    ),
    "ct-int4-asymmetric": lambda: compressed(
        "pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False
    ),
    "ct-int4-channel": lambda: compressed("pack-quantized", num_bits=4, strategy="channel"),
    "ct-int3": lambda: compressed("pack-quantized", num_bits=3, strategy="group", group_size=32),
    "ct-int8-packed": lambda: compressed("pack-quantized", num_bits=8, strategy="channel"),
    "ct-int8": lambda: compressed("int-quantized", num_bits=8, strategy="channel"),
    "ct-int8-asymmetric": lambda: compressed("int-quantized", num_bits=8, strategy="tensor", symmetric=False),
    "ct-naive": lambda: compressed("naive-quantized", num_bits=8, strategy="group", group_size=32),
    "ct-fp8-tensor": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "ct-fp8-channel": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "ct-fp8-block": lambda: compressed(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[48, 40]
    ),
    "ct-nvfp4": lambda: compressed(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    ),
    "ct-mxfp4": lambda: compressed(
        "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    ),
    "ct-mxfp8": lambda: compressed(
        "mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    ),
    "bnb-nf4": lambda: bitsandbytes("nf4"),
    "bnb-nf4-double": lambda: bitsandbytes("nf4", torch.float16, nested=True),
    "bnb-nf4-block-256": lambda: bitsandbytes("nf4", torch.float32, block=256),
    "bnb-fp4": lambda: bitsandbytes("fp4"),
    "bnb-int8": lambda: bitsandbytes("int8"),
    **{f"hqq-{bits}": lambda bits=bits: hqq(bits, 1, torch.float16) for bits in (1, 2, 3, 4, 8)},
    "hqq-4-axis-0": lambda: hqq(4, 0, torch.bfloat16),
    "hqq-3-axis-0": lambda: hqq(3, 0, torch.bfloat16),
    "hqq-4-as-float": lambda: hqq(4, 1, torch.bfloat16, view_as_float=True),
    "mxfp4-experts": mxfp4,
    "modelopt-nvfp4": lambda: modelopt("NVFP4"),
    "modelopt-mxfp8": lambda: modelopt("MXFP8"),
    **{f"fp8-{kind}": lambda kind=kind: fp8(kind) for kind in ("block", "tensor", "channel", "ue8m0", "mxfp8")},
}  # fmt: skip


def digest(values: Tensor) -> str:
    data = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def write(folder: Path, name: str) -> None:
    torch.manual_seed(len(name))
    config, modules = CASES[name]()
    tensors = {
        f"{module}{key}": value.contiguous() for module, (stored, _) in modules.items() for key, value in stored.items()
    }
    expected = {
        module: [str(values.dtype).removeprefix("torch."), digest(values)] for module, (_, values) in modules.items()
    }
    libraries = (
        "torch",
        "transformers",
        "compressed-tensors",
        "bitsandbytes",
        "autoawq",
        "hqq",
        "gptqmodel",
        "nvidia-modelopt",
    )
    metadata = {"config": config, "expected": expected, "libraries": {item: version(item) for item in libraries}}
    metadata = {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    save_file(tensors, folder / f"{name}.safetensors", metadata)
    print(name, sum(value.nbytes for value in tensors.values()), "bytes")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for case in sys.argv[2:] or CASES:
        write(target, case)
