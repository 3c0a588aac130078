"""Models that transformers computes, against transformers alone and peft, in every way an engine cuts a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from fallback_types import FAST, small_config, write_small
from parity import CHECKS, ParityModel, parity_model


@pytest.fixture(scope="module", params=FAST)
def model(request, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp(request.param) / "model"
    with parity_model(write_small(folder, small_config(request.param))) as model:
        assert model.plan.implementation.kind == FAST[request.param], model.plan.implementation.reason
        yield model


@pytest.mark.parametrize("check", [check for check in CHECKS if check != "greedy"])  # the logits say as much
def test_parity_with_transformers(model: ParityModel, check: str) -> None:
    CHECKS[check](model)
