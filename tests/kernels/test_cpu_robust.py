"""What the native backend is given wrong is an error of Python's, and what happens to its process it survives.

Nonsense, forks and exits are tried in processes of their own, where a crash is a failing test.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from cpu_steps import CAPACITY, IDS, load, run
from kernel_backends import ISAS, needs_native, on_every_table
from llama_program import Shape, llama_program

from truffula.errors import KernelError
from truffula.kernels.adapters import OFFSET, TENSORS, make_image
from truffula.kernels.cpu import CpuBackend, available
from truffula.kernels.inputs import Capacity, StepInputs
from truffula.testing.programs import Part, attach, pull_from, random_adapter, random_weights
from truffula.testing.self_check import difference

if available():
    from truffula.kernels.cpu import _native

pytestmark = needs_native
HERE = Path(__file__).parent


def in_a_process(*arguments: str, timeout: float = 250) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("part", ["steps", "programs", "calls"])
def test_nonsense_is_refused(part):
    assert in_a_process(str(HERE / "binding_fuzz.py"), part, "60") == "done\n"


@pytest.mark.slow
@on_every_table
@pytest.mark.parametrize("part", ["steps", "programs", "calls"])
def test_nonsense_at_length(part, isa):
    assert in_a_process(str(HERE / "binding_fuzz.py"), part, "4000", isa, timeout=1000) == "done\n"


SCRIPT = """
import os, sys
sys.path.insert(0, {here!r})
from cpu_steps import IDS, load, run
from truffula.errors import KernelError
from truffula.testing.programs import Part
executable = load(threads=2)
wanted = run(executable, [Part(IDS, 0, (1, 2, 3, 4, 5, 6), logits="all")])
"""
FORKS = """
for closes, loads in ((False, False), (True, False), (False, True)):
    child = os.fork()
    if child == 0:
        try:
            executable.run()
        except Exception as error:
            answer = str(error)
        if closes:
            executable.close()
        if loads:
            assert (run(load(threads=2), [Part(IDS, 0, (1, 2, 3, 4, 5, 6), logits="all")]) == wanted).all()
        print(answer, flush=True)
        {leaves}
    else:
        _, status = os.waitpid(child, 0)
        executable.run()
        assert (executable.logits() == wanted).all()
        print("child", os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.parametrize("leaves", ["os._exit(0)", "sys.exit(0)"])
def test_a_forked_child_cannot_run_and_the_parent_goes_on(leaves):
    """It may close what it has, load anew, and leave in either way."""
    told = in_a_process("-c", SCRIPT.format(here=str(HERE)) + FORKS.format(leaves=leaves), timeout=60).splitlines()
    assert len(told) == 6
    assert all("forked" in line for line in told[::2]) and told[1::2] == ["child 0"] * 3


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
    sound = np.delete(run(load(isa, weights=weights, dtype=dtype), beside), 60, axis=1)
    np.testing.assert_array_equal(got[23:25], sound[23:25])  # earlier rows of the same sequence see none of it


@on_every_table
def test_what_is_not_finite_ends_with_the_window(isa):
    """Two layers of a window of five: a row sees eight back, and the ninth is nothing to it."""
    shape = Shape(window=5)
    program = llama_program(shape)
    weights = random_weights(program)
    broken = {**weights, "embed": [np.array(weights["embed"][0])]}
    broken["embed"][0][60] = np.nan
    part = Part((60, *IDS), 0, (1, 2, 3, 4, 5, 6), logits="all")
    good, got = (
        run(CpuBackend(threads=2, isa=isa).load(program, "float32", pull_from(made), CAPACITY), [part])[:, :60]
        for made in (weights, broken)
    )
    assert not np.isfinite(got[:9]).any()
    np.testing.assert_array_equal(got[9:], good[9:])


ALIASES = [
    ("Embed", {"table": 2, "out": (0, 0, 16), "add": (0, 0, 16)}),
    ("Embed", {"table": 2, "out": (0, 0, 16), "add": (6, 0, 16)}),
    ("Norm", {"x": (1, 0, 16), "out": (1, 8, 16), "plus": None}),
    ("Norm", {"x": (0, 0, 16), "out": (1, 8, 16), "plus": (1, 0, 16)}),
    ("Linear", {"x": (1, 0, 16), "out": (1, 0, 16), "residual": None}),
    ("Linear", {"x": (1, 0, 16), "out": (1, 15, 16), "residual": None}),
    ("Linear", {"x": (0, 0, 16), "out": (6, 0, 16), "residual": None}),
    ("Linear", {"x": (0, 0, 16), "out": (1, 8, 16), "residual": (1, 0, 16)}),
    ("Pointwise", {"x": (0, 0, 16), "y": (1, 0, 16), "out": (0, 1, 16)}),
    ("Pointwise", {"x": (0, 0, 16), "y": (1, 0, 16), "out": (1, 1, 16)}),
    ("Rope", {"rows": (0, 24, 8)}),
    ("Attention", {"q": (2, 0, 16)}),
    ("Attention", {"out": (1, 0, 10)}),
    ("TakeRows", {"x": (0, 0, 16), "out": (7, 0, 16)}),
]


@pytest.mark.parametrize(("call", "changed"), ALIASES, ids=lambda value: value if isinstance(value, str) else "")
def test_an_op_that_would_read_what_it_writes_is_refused(call, changed):
    """Its chunks run in any order. Buffers 6 (a row per token) and 7 (of logits) lie half on buffer 0."""
    from binding_fuzz import GOOD, prepared

    native, _ = prepared("auto", False)
    native.add_buffer(offset=24 * 16, stride=32, logit_rows=False, rounded=False)
    native.add_buffer(offset=24 * 16, stride=32, logit_rows=True, rounded=False)
    good = next(arguments for name, arguments in GOOD if name == call)
    native.add(call, **good)
    with pytest.raises(ValueError, match=r"where .* written"):
        native.add(call, **{**good, **changed})


def test_an_op_may_work_in_place():
    from binding_fuzz import GOOD, prepared

    native, _ = prepared("auto", False)
    good = dict(GOOD)  # the last of each name
    native.add("Pointwise", **{**good["Pointwise"], "x": (0, 0, 16), "out": (0, 0, 16)})
    native.add("Norm", **{**good["Norm"], "x": (4, 0, 15), "out": (4, 0, 15), "plus": (4, 0, 15)})
    native.add("Linear", **{**good["Linear"], "x": (4, 16, 16), "out": (5, 16, 16), "residual": (5, 16, 16)})


def test_one_call_at_a_time():
    """A second thread is refused while a step runs, and what runs is not disturbed."""
    executable = load(threads=1)
    parts = [Part(IDS, 0, (1, 2, 3, 4, 5, 6), logits="all")]
    wanted = run(executable, parts)
    refused, over = threading.Event(), threading.Event()

    def steps():
        while not refused.is_set():
            with suppress(KernelError):  # the other one may be first
                executable.run()
        over.set()

    threading.Thread(target=steps).start()
    while not refused.is_set():
        try:
            executable.run()
        except KernelError as error:
            assert "another thread is in this executable" in error.message
            refused.set()
    over.wait()
    executable.run()
    np.testing.assert_array_equal(executable.logits(), wanted)


def test_a_step_of_more_pieces_than_a_team_counts():
    """33,000 sequences of one token and 32 kv heads: over 2^20 pieces. One that sees itself alone gets its values."""
    tokens, heads = 33_000, 32
    capacity = Capacity(
        max_tokens=tokens, max_seqs=tokens, max_logit_rows=1, max_segments=0, num_blocks=tokens, block_size=1,
        max_blocks_per_seq=1,
    )  # fmt: skip
    native = _native.Executable("auto", 2, capacity, "bfloat16", 1, True)
    for number, rows in enumerate((tokens, tokens, 1)):
        native.add_buffer(offset=number * tokens * heads, stride=heads, logit_rows=rows == 1, rounded=True)
    table = np.arange(5 * heads, dtype=np.float32).reshape(5, heads)
    native.fill(native.add_matrix(5, heads, format="float32", panels=False, half=0), table, 0)
    everything = (0, 0, heads)
    native.add("Embed", table=0, out=everything, add=None, source="token", offset=0, scale=1.0)
    native.add(
        "Attention", q=everything, k=everything, v=everything, out=(1, 0, heads), group=0, planes=[0, 1],
        heads=heads, kv_heads=heads, dim_k=1, dim_v=1, scale=1.0, window=0, softcap=0.0, sinks=None,
        alibi=[], alibi_rounded=False, chunked=False,
    )  # fmt: skip
    inputs = StepInputs.allocate(capacity, 1)
    native.seal(inputs, arena_floats=3 * tokens * heads, logits_buffer=2, vocab=1, planned_width=0)
    inputs.T = inputs.N = tokens
    inputs.token_ids[:] = np.arange(tokens) % 5
    inputs.slot_mapping[0] = np.arange(tokens)
    inputs.block_tables[0, :, 0] = np.arange(tokens)
    inputs.q_start[:] = np.arange(tokens + 1)
    inputs.kv_len[:] = 1
    native.run()
    np.testing.assert_array_equal(native.tap(1), table[inputs.token_ids])


@on_every_table
def test_every_table_passes_the_self_check_of_doctor(isa):
    assert difference(isa) == ""


def test_arrays_of_a_step_may_not_be_replaced():
    executable = load()
    run(executable, [Part(IDS, 0, (1, 2, 3, 4, 5, 6))])
    executable.inputs.token_ids = executable.inputs.token_ids.copy()
    with pytest.raises(KernelError, match="token_ids is another array"):
        executable.run()


def test_a_refused_adapter_leaves_its_slot_free():
    program, executable = llama_program(), load()
    good = random_adapter(program)
    slot = attach(executable, good)
    executable.drop_adapter(slot)
    image = make_image(executable.layout, good.sites, generation="g")
    image.table[-1, TENSORS + OFFSET] = image.data.size
    with pytest.raises(KernelError, match="outside its image"):
        executable.adapter(image)
    assert attach(executable, good) == slot


EXIT = """
import threading
def steps():
    try:
        while True:
            executable.run()
    except KernelError:  # the interpreter is ending: CPython 3.11 aborts where a daemon thread prints then
        pass
threading.Thread(target=steps, daemon=True).start()
executable_is_busy = False
while not executable_is_busy:
    try:
        executable.logits()
    except Exception:
        executable_is_busy = True
"""


def test_the_interpreter_ends_while_a_thread_is_in_a_step():
    in_a_process("-c", SCRIPT.format(here=str(HERE)) + EXIT, timeout=60)


EXIT_ALONE = """
import threading
import numpy as np
from truffula.kernels.cpu import _native
array = np.ones((4096, 4096), np.float32)
to = np.zeros(_native.matrix_bytes(4096, 4096, "float32"), np.uint8)
begun = threading.Event()
def calls():
    while True:
        begun.set()
        _native.pack_panels(array, to, format="float32", lane=0, form="whole")
threading.Thread(target=calls, daemon=True).start()
begun.wait()
"""


def test_the_interpreter_ends_while_a_thread_is_in_a_call_without_an_executable():
    in_a_process("-c", EXIT_ALONE, timeout=60)


SIGNALS = """
import signal
counted = []
signal.signal(signal.SIGALRM, lambda number, frame: counted.append(number))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
while len(counted) < 200:
    executable.run()
    assert (executable.logits() == wanted).all()
signal.setitimer(signal.ITIMER_REAL, 0)
"""


def test_signals_disturb_no_step():
    in_a_process("-c", SCRIPT.format(here=str(HERE)) + SIGNALS, timeout=120)


@pytest.mark.slow
def test_ten_thousand_loads_and_drops_leave_no_memory():
    """Of many ranks, one step each: the process grows by less than 64 bytes a load once it has seen them all."""
    program, executable = llama_program(), load(ISAS[0])
    images = [random_adapter(program, rank=rank, seed=rank) for rank in (1, 4, 40, 90, 300)]
    loads, sizes = [], []
    for number in range(5000):
        slots = [attach(executable, images[(number + more) % len(images)]) for more in range(2)]
        run(executable, [Part((1, 2, 3), 0, (1,), slots[0]), Part((4, 5), 0, (2,), slots[1])])
        for slot in slots:
            executable.drop_adapter(slot)
        if number >= 500 and number % 100 == 99:
            loads.append(2 * number)
            sizes.append(psutil.Process().memory_info().rss)
    slope = np.polyfit(loads, sizes, 1)[0]
    assert slope < 64, (slope, sizes)


def test_a_window_wider_than_positions_hides_nothing():
    parts = [Part(IDS, 0, (1, 2, 3, 4, 5, 6), logits="all")]
    program = llama_program(Shape(window=2**40))
    wide = CpuBackend(threads=1).load(program, "float32", pull_from(random_weights(program)), CAPACITY)
    np.testing.assert_array_equal(run(wide, parts), run(load(threads=1), parts))


def test_numbers_that_q8_0_cannot_hold_are_refused_by_the_weights_name():
    program = llama_program()
    weights = random_weights(program)
    weights["layers.1.o"][0][3, 4] = 1e30
    with pytest.raises(KernelError, match=r"layers\.1\.o: .*Q8_0") as caught:
        CpuBackend(threads=1, quantize="q8_0").load(program, "float32", pull_from(weights), CAPACITY)
    assert caught.value.param == "layers.1.o"
