"""Compiles, without a GPU, every kernel that a step of a large model launches: prints one line of JSON for each.

A process of its own, as triton must not be interpreting. What is compiled is what the executable launches: on a device
whose tensors have no memory, and which compiles instead of launching.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from truffula.kernels.backend import MemoryLimit
from truffula.kernels.inputs import Capacity
from truffula.kernels.reference.weights import DTYPES, Weight
from truffula.kernels.triton.backend import TritonBackend
from truffula.kernels.triton.executable import TritonExecutable
from truffula.kernels.triton.tiles import gpu_tiles
from truffula.testing.programs import Part, attach, decoder_program, fill_step, random_adapter

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class CompilingDevice:
    """Compiles each launch that differs from those before, for one capability."""

    torch_device = torch.device("meta")
    programs = 132
    tried = True

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.tensor_core_rows = 64 if capability >= 90 else 16
        self.launched: dict[str, tuple[Any, ...]] = {}

    def free_memory(self) -> MemoryLimit:
        return MemoryLimit(0, "of nothing")

    def staging(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def upload(self, to: torch.Tensor, source: torch.Tensor) -> None:
        to.copy_(source)

    def synchronize(self) -> None:
        """Nothing runs."""

    def launch(self, kernel: Any, *args: Any, **constants: Any) -> None:
        signature, attributes = {}, {}
        for at, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
            aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
            of = (
                TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
            )
            signature[name] = of
            if aligned:
                attributes[(at,)] = [["tt.divisibility", 16]]
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        key = repr((kernel.__name__, signature, sorted(attributes), sorted(constants.items(), key=str), options))
        if key not in self.launched:
            self.launched[key] = (kernel, signature, attributes, constants, options)

    def compile(self) -> None:
        for kernel, signature, attributes, constants, options in self.launched.values():
            every = {**signature, **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(
                fn=kernel, signature={name: every[name] for name in kernel.arg_names},
                constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
                attrs=attributes,
            )  # fmt: skip
            made = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
            print(json.dumps({"kernel": kernel.__name__, "capability": self.capability, **facts(made), **options,
                              "constants": dict(constants)}), flush=True)  # fmt: skip


def facts(made: Any) -> dict[str, Any]:
    """Registers, spills and matrix instructions of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        code = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found
    count = lambda name: len(re.findall(rf"\b{name}\b", code))
    return {
        "registers": int(found[1]), "stack": int(found[2]), "shared": made.metadata.shared, "spills": count("STL"),
        "hmma": count("HMMA"), "hgmma": count("HGMMA"),
    }  # fmt: skip


def main(capability: int, dtype: str, rows: list[int], config: dict[str, Any]) -> None:
    program = decoder_program(config)
    device, served = CompilingDevice(capability), DTYPES[dtype]
    capacity = Capacity(2048, 256, 256, 64, 512, 16, 512)
    weights = [
        Weight((torch.empty(
            decl.shape, device="meta",
            dtype=torch.float32 if decl.dtype == "float32" or decl.uses & {"vector", "conv"} else served,
        ),))
        for decl in program.weights
    ]  # fmt: skip
    layout = TritonBackend(device).adapter_layout(program)
    executable = TritonExecutable(program, layout, served, weights, capacity, device, gpu_tiles(dtype, device.programs))
    slot = attach(executable, random_adapter(program, rank=16, dtype=dtype))
    for count in rows:
        blocks = tuple(range(1, 1 + -(-(count + 2000) // 16)))
        fill_step(executable.inputs, [Part((1,) * count, 2000, blocks, slot)], 16)
        try:
            executable.run()
        except NotImplementedError:  # there are no logits to copy to the host
            continue
        raise AssertionError("the device has memory")
    device.compile()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4]))
