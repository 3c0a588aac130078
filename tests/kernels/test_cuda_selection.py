"""Which devices the CUDA backend takes, and the sentence for each that it refuses: from facts, as there is no GPU."""

from __future__ import annotations

import pytest
import torch

from truffula.errors import ConfigError, MissingDependency, TruffulaError
from truffula.kernels.select import choose_dtype, fallback_warning, gpu_device, select_backend
from truffula.kernels.triton.device import CudaFacts, Gpu, cuda_facts, why_unusable

H200, V100 = Gpu("NVIDIA H200", (9, 0), 150_000_000_000), Gpu("Tesla V100", (7, 0), 16_000_000_000)
FINE = CudaFacts("2.13.0+cu130", "13.0", "3.7.0", gpus=(H200, V100))


@pytest.mark.parametrize(
    ("facts", "device", "kind", "said"),
    [
        (CudaFacts("2.13.0+cpu", "", "3.7.0"), "cuda", MissingDependency, "built without CUDA: install its CUDA build"),
        (CudaFacts("2.13.0", "13.0", "3.7.0", "Found no NVIDIA driver on your system"), "cuda", ConfigError,
         "finds no GPU: Found no NVIDIA driver on your system. Or use --device cpu."),
        (CudaFacts("2.13.0", "13.0", "3.7.0"), "cuda", ConfigError, "finds no GPU: the system has none"),
        (CudaFacts("2.13.0", "13.0", "", gpus=(H200,)), "cuda", MissingDependency, "need triton, which is not"),
        (FINE, "cuda:2", ConfigError, "this machine has cuda:0 (NVIDIA H200), cuda:1 (Tesla V100)"),
        (FINE, "cuda:one", ConfigError, "this machine has cuda:0 (NVIDIA H200)"),
        (FINE, "cuda:1", ConfigError, "a Tesla V100 of compute capability 7.0; the kernels need 8.0 (Ampere) or newer"),
    ],
)  # fmt: skip
def test_a_device_that_cannot_be_used_is_refused_in_one_sentence(
    facts: CudaFacts, device: str, kind: type[TruffulaError], said: str
) -> None:
    error = why_unusable(facts, device)
    assert type(error) is kind and error.param == "device"
    assert repr(device) in error.message and said in error.message and "\n" not in error.message


def test_others_are_taken() -> None:
    assert why_unusable(FINE, "cuda") is None and why_unusable(FINE, "cuda:0") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error() -> None:
    assert gpu_device() == "cpu"
    assert select_backend("auto", "auto").device == "cpu"
    wanted = why_unusable(cuda_facts(), "cuda:1")
    assert wanted is not None
    with pytest.raises(type(wanted)) as caught:
        select_backend("auto", "cuda:1")
    assert caught.value.message == wanted.message


def test_the_triton_backend_names_what_it_does_not_take() -> None:
    with pytest.raises(ConfigError, match="--device cuda") as caught:
        select_backend("triton", "cpu")
    assert caught.value.param == "device"
    with pytest.raises(ConfigError, match="cpu_isa is 'avx2'"):
        select_backend("triton", "cuda", cpu_isa="avx2")


def test_a_backend_that_has_not_run_on_hardware_says_so_and_takes_float16_as_it_is() -> None:
    pytest.importorskip("triton")
    from kernel_backends import interpreted

    backend = interpreted()
    for asked in ("auto", "triton"):
        assert "it has not run on a GPU yet" in fallback_warning(asked, backend)
    assert [choose_dtype(backend, "auto", kind).dtype for kind in ("F16", "BF16", "F32")] == [
        "float16", "bfloat16", "float32"
    ]  # fmt: skip
