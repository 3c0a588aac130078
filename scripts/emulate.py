"""AVX-512 and AMX tables on a machine without them: ``python scripts/emulate.py [pytest arguments]``, ``make emulate``.

Builds the module with TRUFFULA_EMULATE in build/emulate: the tables avx512, avx512vnni, avx512bf16 and amx out of AVX2
instructions (tests/native/emulate_avx512.h), listed behind the others. Compares all tables bit for bit
(tests/native/table_driver.cpp), then runs the op tests on those. What this cannot show is that a processor does what
that header says; what it shows is that the kernels are right if it does. ``--brief`` leaves out the comparison, which
takes long to compile, and whole models in batches of every size, which take long to run: what the slow suite does.
"""

from __future__ import annotations

import os
import subprocess
import sys

from sanitize import ROOT, TESTS, build, run_tests, search_path

WHOLE_MODELS = "test_cpu_exact"


def main() -> None:
    brief = "--brief" in sys.argv[1:]
    chosen = [word for word in sys.argv[1:] if word != "--brief"]
    where = ROOT / "build" / "emulate"
    source = str(build(where, "-DCMAKE_BUILD_TYPE=Release", "-DTRUFFULA_EMULATE=ON", "-DTRUFFULA_TABLE_DRIVER=ON"))
    if not brief:
        env = os.environ | {"PATH": search_path()}
        subprocess.run(["cmake", "--build", where / "cmake", "--target", "table_driver"], check=True, env=env)
        subprocess.run([where / "cmake" / "table_driver"], check=True)
    names = tuple(name for name in TESTS if not (brief and name == WHOLE_MODELS))
    run_tests(source, chosen or ["-k", "avx512 or amx"], dict(os.environ), names)


if __name__ == "__main__":
    main()
