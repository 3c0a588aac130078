"""What the native backend is given wrong is an error of Python's, and what happens to its process it survives.

Nonsense, forks and exits are tried in processes of their own, where a crash is a failing test.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from cpu_steps import IDS, load, run
from kernel_backends import ISAS, needs_native, on_every_table

from truffula.errors import KernelError
from truffula.kernels.backend import AdapterImage, SiteTensors
from truffula.testing.programs import Part, Shape, llama_program, random_adapter, random_weights

pytestmark = needs_native
HERE = Path(__file__).parent


def in_a_process(*arguments: str, timeout: float = 250) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("part", ["steps", "programs", "calls"])
def test_nonsense_is_refused(part):
    assert in_a_process(str(HERE / "binding_fuzz.py"), part, "150") == "done\n"


@pytest.mark.slow
@on_every_table
@pytest.mark.parametrize("part", ["steps", "programs", "calls"])
def test_nonsense_at_length(part, isa):
    assert in_a_process(str(HERE / "binding_fuzz.py"), part, "4000", isa, timeout=1000) == "done\n"


SCRIPT = """
import os, sys
sys.path.insert(0, {here!r})
from cpu_steps import IDS, load, run
from truffula.testing.programs import Part
executable = load(threads=2)
wanted = run(executable, [Part(IDS, 0, (1, 2, 3, 4, 5, 6), logits="all")])
"""
FORK = """
child = os.fork()
if child == 0:
    try:
        executable.run()
    except Exception as error:
        answer = str(error)
    if {closes}:
        executable.close()
    if {loads}:
        assert (run(load(threads=2), [Part(IDS, 0, (1, 2, 3, 4, 5, 6), logits="all")]) == wanted).all()
    print(answer, flush=True)
    {leaves}
else:
    _, status = os.waitpid(child, 0)
    executable.run()
    assert (executable.logits() == wanted).all()
    print("child", os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("leaves", ["os._exit(0)", "sys.exit(0)"])
@pytest.mark.parametrize(("closes", "loads"), [(False, False), (True, False), (False, True)])
def test_a_forked_child_cannot_run_and_the_parent_goes_on(leaves, closes, loads):
    """It may close what it has, load anew, and leave in either way."""
    script = SCRIPT.format(here=str(HERE)) + FORK.format(leaves=leaves, closes=closes, loads=loads)
    told, child = in_a_process("-c", script, timeout=60).splitlines()
    assert "forked" in told and child == "child 0"


def test_the_interpreter_ends_with_a_live_executable():
    script = SCRIPT.format(here=str(HERE)) + "import threading\nprint(threading.active_count())"
    assert in_a_process("-c", script, timeout=60) == "1\n"


def test_no_more_threads_to_be_had_is_an_error():
    script = f"""
import resource, sys
sys.path.insert(0, {str(HERE)!r})
from cpu_steps import load
resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
try:
    load(threads=1000)
except Exception as error:
    print(type(error).__name__)
"""
    assert in_a_process("-c", script, timeout=60).strip() in ("", "RuntimeError", "KernelError", "MemoryError")


@on_every_table
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_sequence(isa, dtype, value):
    """A token whose row of the table is broken breaks its own sequence, and no bit of another."""
    weights = random_weights(llama_program(Shape()))
    table = weights["embed"][0]
    wanted_from = [Part(IDS, 0, (1, 2, 3, 4, 5, 6), logits="all"), Part((5, 6, 7, 8), 0, (7,), logits="all")]
    wanted = run(load(isa, weights=weights, dtype=dtype), wanted_from)
    broken = {**weights, "embed": [np.array(table)]}
    broken["embed"][0][60] = value
    executable = load(isa, weights=broken, dtype=dtype)
    # The head is the table: id 60's logit is broken in every row.
    beside = [wanted_from[0], Part((1, 2, 60, 4), 0, (9, 10), logits="all"), wanted_from[1]]
    got = np.delete(run(executable, beside), 60, axis=1)
    wanted = np.delete(wanted, 60, axis=1)
    np.testing.assert_array_equal(got[:23], wanted[:23])
    np.testing.assert_array_equal(got[27:], wanted[23:])
    assert not np.isfinite(got[25:27]).any()


def test_arrays_of_a_step_may_not_be_replaced():
    executable = load()
    run(executable, [Part(IDS, 0, (1, 2, 3, 4, 5, 6))])
    executable.inputs.token_ids = executable.inputs.token_ids.copy()
    with pytest.raises(KernelError, match="token_ids is another array"):
        executable.run()


def test_a_refused_adapter_leaves_its_slot_free():
    program, executable = llama_program(), load()
    good = random_adapter(program)
    slot = executable.adapter(good)
    executable.drop_adapter(slot)
    zeros = np.zeros((4, 32), np.float64)
    with pytest.raises(KernelError):
        executable.adapter(AdapterImage("g", (*good.sites[1:], SiteTensors(0, zeros, zeros.T, 1.0)), 1, 4))
    assert executable.adapter(good) == slot


@pytest.mark.slow
def test_loads_and_drops_leave_no_memory():
    """2,000 adapters of many ranks; the process is no larger than it was after the first few hundred."""
    program, executable = llama_program(), load(ISAS[0])
    images = [random_adapter(program, rank=rank, seed=rank) for rank in (1, 4, 40, 90, 300)]
    sizes = []
    for number in range(2000):
        slots = [executable.adapter(images[(number + more) % len(images)]) for more in range(2)]
        run(executable, [Part((1, 2, 3), 0, (1,), slots[0]), Part((4, 5), 0, (2,), slots[1])])
        for slot in slots:
            executable.drop_adapter(slot)
        if number % 200 == 199:
            sizes.append(psutil.Process().memory_info().rss)
    assert max(sizes[2:]) - sizes[1] < 4 << 20, sizes
