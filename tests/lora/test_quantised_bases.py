"""LoRA on quantised bases, against peft on a base that holds the dequantised values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kernel_backends import on_the_best
from quantised_files import LINEAR, Fixture, as_model, write_folder
from served_base import Served

from truffula.kernels.backend import Backend
from truffula.testing.adapters import write_tiny_adapter
from truffula.weights.open import open_checkpoint

FAST = (("gptq-4-act-order", False), ("fp8-channel", True))
# Small floats are multiplied without rounding: the same answers from packed weights.
PACKED = (
    *("fp8-tensor", "fp8-channel", "fp8-ue8m0", "fp8-mxfp8", "modelopt-mxfp8", "ct-mxfp8", "bnb-nf4-block-256"),
    "modelopt-nvfp4",
)
CASES = [*((name, False) for name in LINEAR), *((name, True) for name in PACKED)]


@on_the_best
@pytest.mark.parametrize(
    ("name", "packed"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)  # the slow ones together take a minute
def test_lora_agrees_with_peft_on_the_dequantised_base(
    tmp_path: Path, name: str, packed: bool, backend: Backend
) -> None:
    config, tensors = as_model(Fixture(name))
    served = Served(write_folder(tmp_path / "quantised", config, tensors), backend, packed=packed)
    opened = open_checkpoint(served.path)
    values = {key: np.asarray(opened.read(key), np.float32) for key in opened.tensors}
    del config["quantization_config"]
    plain = write_folder(tmp_path / "plain", config, values)
    adapters = []
    for seed, targets in enumerate(("all-linear", ["q_proj", "down_proj"])):
        write_tiny_adapter(tmp_path / f"a{seed}", served.program.sites, seed=seed, rank=3 + seed, targets=targets)
        adapters.append((served.add(tmp_path / f"a{seed}"), tmp_path / f"a{seed}"))
    prompts = [served.prompt(seed) for seed in range(3)]
    rows = [(slot, prompts[number]) for number, (slot, _) in enumerate(adapters)]
    found = served.run([*rows, (None, prompts[2])])
    served.path = plain
    for logits, adapter, prompt in zip(found, [folder for _, folder in adapters] + [None], prompts, strict=True):
        np.testing.assert_allclose(logits, served.peft(adapter, prompt), atol=1e-4)
