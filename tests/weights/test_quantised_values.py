"""Dequantised values have the bits of the library that wrote the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from quantised_files import NAMES, Fixture, digest, write_folder

from truffula.testing.tiny import tiny_llama_config
from truffula.weights.open import open_checkpoint


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_librarys(name: str, tmp_path: Path) -> None:
    fixture = Fixture(name)
    config = tiny_llama_config(quantization_config=fixture.config)
    opened = open_checkpoint(write_folder(tmp_path / "m", config, fixture.tensors))
    ending = "" if name == "mxfp4-experts" else ".weight"
    assert set(opened.tensors) == {f"{module}{ending}" for module in fixture.expected}
    for module, (dtype, wanted) in fixture.expected.items():
        info = opened.info(f"{module}{ending}")
        values = opened.read(info.name)
        assert (values.dtype.name, values.shape) == (dtype, info.shape)
        assert digest(values) == wanted
        computed = opened.computed(info.name)
        assert computed is not None and info.nbytes == sum(part.nbytes for part in info.parts)
        pieces = [computed.read(lo, lo + 37) for lo in range(0, info.shape[0], 37)]
        assert digest(np.concatenate(pieces)) == wanted
    opened.close()
