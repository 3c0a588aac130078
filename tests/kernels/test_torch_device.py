"""The torch backend on another device than the CPU, as far as a machine without one can tell.

Torch's fake tensors have a device and a shape but no numbers, and refuse to mix devices. So a step that runs with fake
tensors of the device "meta", up to the copy of its result to the host, has made every tensor on its device.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llama_program import Shape, llama_program
from test_linear_adapters import CAPACITY
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from truffula.errors import ConfigError, MissingDependency
from truffula.kernels.adapters import layout_of
from truffula.kernels.reference import ReferenceBackend
from truffula.kernels.reference.executable import ReferenceExecutable
from truffula.kernels.reference.weights import DTYPES, load_weights
from truffula.kernels.select import select_backend
from truffula.testing.programs import Part, attach, fill_step, pull_from, random_adapter, random_weights

META = torch.device("meta")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [Shape(), Shape(window=5)], ids=["full", "window"])
def test_every_tensor_of_a_step_is_on_the_device(shape: Shape, dtype: str) -> None:
    program = llama_program(shape)
    with FakeTensorMode(allow_non_fake_inputs=True):
        served = DTYPES[dtype]
        weights = load_weights(program, served, pull_from(random_weights(program)), META)
        executable = ReferenceExecutable(program, layout_of(program, "float32"), served, weights, CAPACITY, META)
        slot = attach(executable, random_adapter(program, rank=3, seed=0))
        parts = [Part((1, 2, 3, 4, 5), 0, (1, 2), slot), Part((7, 8), 4, (4, 5), None)]
        fill_step(executable.inputs, parts, CAPACITY.block_size)
        with pytest.raises(RuntimeError, match=r"numpy\(\) is not supported"):
            executable.run()
        result = executable._buffers.get(program.result)
        assert isinstance(result, FakeTensor)
        assert result.device == META
        assert result.shape == (2, program.vocab_size)


def test_a_device_that_torch_lacks_is_refused_by_name() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"device is 'cuda', which torch .* cannot use here") as caught:
            select_backend("reference", "cuda")
        assert caught.value.param == "device"
    with pytest.raises(ConfigError, match="device is 'gpu'"):
        select_backend("reference", "gpu")
    with pytest.raises(ConfigError, match="holds no numbers"):
        select_backend("reference", "meta")


def test_the_cpu_backend_names_the_one_that_runs_elsewhere() -> None:
    with pytest.raises((ConfigError, MissingDependency), match=r"reference backend|is not available"):
        select_backend("cpu", "cuda:1")


def test_the_cpu_is_a_device_like_any_other() -> None:
    backend = select_backend("reference", "cpu:0")
    assert backend.device == "cpu:0"
    assert backend.free_memory().nbytes > 0
    program = llama_program()
    weights = random_weights(program)
    logits = []
    for made in (backend, ReferenceBackend()):
        executable = made.load(program, "float32", pull_from(weights), CAPACITY)
        fill_step(executable.inputs, [Part((1, 2, 3), 0, (1,))], CAPACITY.block_size)
        executable.run()
        logits.append(executable.logits())
    np.testing.assert_array_equal(*logits)
