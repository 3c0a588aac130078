"""``verify_serving`` compares what is served: the values in float32, then the arithmetic that the options give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kernel_backends import NATIVE
from perturbed import Parts, PerturbedBackend

from truffula.config import EngineConfig
from truffula.errors import ConfigError
from truffula.kernels.backend import QuantisedArray, as_array
from truffula.kernels.program import WeightDecl
from truffula.kernels.select import Precision, select_backend
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.oracle import Oracle
from truffula.testing.served import BFLOAT16, INT8, ServingReport, check_served, verify_serving
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint

PROMPTS = [[5, 17, 3, 99, 41, 8, 8, 60]]
native = pytest.mark.skipif(not NATIVE, reason="truffula was installed without its native kernels")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in bfloat16, its widths whole blocks."""
    config = tiny_config("llama", hidden_size=64, intermediate_size=96)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"), config, dtype="bfloat16")


def verify(model: Path, adapter: Path | None = None, **options: object) -> ServingReport:
    config = EngineConfig(model=str(model), **options)  # type: ignore[arg-type]
    return verify_serving(model, config, prompts=PROMPTS, adapter=adapter, new_tokens=4)


@pytest.mark.parametrize("backend", ["reference", *(["cpu"] if NATIVE else [])])
def test_bfloat16_is_served_and_judged_as_such(model: Path, backend: str, tmp_path: Path) -> None:
    adapter = write_tiny_adapter(tmp_path, model, rank=4)
    report = verify(model, adapter, backend=backend, dtype="bfloat16")
    assert report.ok
    assert report.values.dtype == "float32" and report.values.backend.startswith(backend)
    assert report.served is not None and report.served.backend.startswith(backend)
    assert (report.served.dtype, report.served.formats, report.served.limit) == ("bfloat16", (), BFLOAT16)
    assert report.served.tokens_compared == 4
    assert report.served.divergence.positions == 8 + 3
    assert report.served.divergence.kl_mean > 0  # bfloat16 it was


def test_float32_on_values_is_compared_once(model: Path) -> None:
    report = verify(model, dtype="float32")
    assert report.ok and report.served is None


@native
def test_whole_numbers_are_named_and_have_their_own_limit(model: Path) -> None:
    report = verify(model, backend="cpu", dtype="float32", quantize="q8_0")
    assert report.values.ok  # on the values: rounding is no mistake of the program
    assert report.served is not None
    assert (report.served.formats, report.served.limit) == (("q8_0",), INT8)
    assert report.served.ok and report.served.divergence.kl_mean > 0


@native
def test_a_mistake_that_only_the_served_arithmetic_makes_is_found(model: Path) -> None:
    def scramble(decl: WeightDecl, parts: Parts) -> Parts:
        if not decl.name.endswith("down_proj.weight"):
            return parts
        assert not any(isinstance(part, QuantisedArray) for part in parts)
        return [np.ascontiguousarray(as_array(part)[::-1]) for part in parts]

    backend = select_backend("cpu", "cpu", precision=Precision("q8_0"))
    given = {"prompts": PROMPTS, "adapter": None, "new_tokens": 4, "oracle": Oracle(model, tied=False)}
    assert check_served(model, backend, "bfloat16", ("q8_0",), **given).ok
    assert not check_served(model, PerturbedBackend(backend, weight=scramble), "bfloat16", ("q8_0",), **given).ok


def test_nan_is_no_agreement(model: Path) -> None:
    served = verify(model, dtype="bfloat16").served
    assert served is not None
    assert not replace(served, divergence=replace(served.divergence, kl_mean=float("nan"))).ok


def test_the_options_of_a_server_that_would_refuse_to_start_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="quantize"):
        verify(model, backend="reference", quantize="q8_0")
