"""What ``bench step`` is asked for."""

import pytest

from truffula.bench.step import StepBench, measure, slots_of
from truffula.errors import ConfigError
from truffula.kernels.select import Precision, select_backend
from truffula.testing.programs import decoder_program
from truffula.testing.tiny import tiny_config


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("context", 0), ("prefill", -1), ("steps", 0)])
def test_a_number_that_measures_nothing_is_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}") as caught:
        StepBench(**{name: value})
    assert caught.value.param == name


def test_more_adapters_than_rows_alone_are_refused() -> None:
    assert StepBench(rows=(1, 4), mixes=("none", "5")).mixes == ("none", "5")  # as with the command's defaults
    with pytest.raises(ConfigError, match="adapters is 5, more than the most rows") as caught:
        StepBench(rows=(1, 4), mixes=("5",))
    assert caught.value.param == "adapters"


@pytest.mark.parametrize("mix", ["0", "-1", "2.5", "few"])
def test_a_mix_that_is_none_is_refused(mix: str) -> None:
    with pytest.raises(ConfigError, match="adapters is") as caught:
        StepBench(mixes=(mix,))
    assert caught.value.param == "adapters"


def test_so_many_adapters_are_shared_by_neighbouring_rows_and_fewer_rows_leave_it_out() -> None:
    backend = select_backend("auto", "cpu", threads=1, precision=Precision("none"))
    bench = StepBench((1, 4), ("2",), rank=2, prefill=0, steps=1)
    lines = measure(backend, decoder_program(tiny_config()), "float32", bench, 1e9)
    assert [(line.rows, line.adapters) for line in lines] == [(4, "2")]
    assert slots_of("2", [10, 11, 12, 13, 14], 5) == [10, 10, 10, 11, 11]
    assert slots_of("shared", [10, 11], 2) == [10, 10] and slots_of("distinct", [10, 11], 2) == [10, 11]
    assert slots_of("none", [], 2) == [None, None]


def test_no_prefill_leaves_its_line_out() -> None:
    backend = select_backend("auto", "cpu", threads=1, precision=Precision("none"))
    lines = measure(
        backend, decoder_program(tiny_config()), "float32", StepBench((1,), ("none",), prefill=0, steps=1), 1e9
    )
    assert [line.what for line in lines] == ["decode"]
