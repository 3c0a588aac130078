"""The parity table of adapters, which ``make parity-adapters`` prints: a spread in each run, all in the slow suite."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity_adapters import EACH, FAMILIES, KINDS, results, served_kinds, write_base, write_quantised

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, about ties and embeddings


SPREAD = ("DoRA, tables", "bias all", "saved embedding", "all at once", "PiSSA", "IA3", "prompt tuning")


def expect_parity(
    folder: Path, base: Path, checks: list[str], oracle: Path | None = None, only: tuple[str, ...] = ()
) -> None:
    kinds = [kind for kind in KINDS if kind.applies(oracle or base) and (not only or kind.name in only)]
    with served_kinds(folder, base, kinds, oracle) as model:
        failed = [f"{kind}: {check}: {why}" for kind, check, why in results(model, kinds, checks) if why]
    assert not failed, "\n".join(failed)


def test_a_spread_of_kinds_alone_and_in_one_batch(tmp_path: Path) -> None:
    expect_parity(tmp_path, write_base(tmp_path / "model", "llama", tied=False), ["alone"], only=SPREAD)


@pytest.mark.slow  # 10 minutes
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_on_every_family(tmp_path: Path, family: str, tied: bool) -> None:
    expect_parity(tmp_path, write_base(tmp_path / "model", family, tied=tied), list(EACH))


@pytest.mark.slow
def test_every_kind_on_a_quantised_base(tmp_path: Path) -> None:
    """Norms, singular values and differences of biases are of the dequantised weights."""
    quantised, plain = write_quantised(tmp_path)
    expect_parity(tmp_path, quantised, list(EACH), plain)
