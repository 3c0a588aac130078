"""What ``bench step`` is asked for."""

import pytest

from truffula.cli.bench_step import StepBench, measure
from truffula.errors import ConfigError
from truffula.kernels.select import Precision, select_backend
from truffula.testing.programs import TINY, llama_program


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("context", 0), ("prefill", -1), ("steps", 0)])
def test_a_number_that_measures_nothing_is_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}") as caught:
        StepBench(**{name: value})
    assert caught.value.param == name


def test_no_prefill_leaves_its_line_out() -> None:
    backend = select_backend("auto", "cpu", threads=1, precision=Precision("none"))
    lines = measure(backend, llama_program(TINY), "float32", StepBench((1,), ("none",), prefill=0, steps=1), 1e9)
    assert [line.what for line in lines] == ["decode"]
