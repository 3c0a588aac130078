"""AVX-512 tables on a machine without it: ``python scripts/emulate.py [pytest arguments]``; what ``make emulate`` runs.

Builds the module with TRUFFULA_EMULATE in build/emulate: the tables avx512, avx512vnni and avx512bf16 out of AVX2
instructions (tests/native/emulate_avx512.h), listed behind the others. Compares all tables bit for bit
(tests/native/table_driver.cpp), then runs the op tests on those. What this cannot show
is that a processor does what that header says; what it shows is that the kernels are right if it does.
"""

from __future__ import annotations

import os
import subprocess
import sys

from sanitize import ROOT, build, run_tests


def main() -> None:
    where = ROOT / "build" / "emulate"
    settings = ("-DCMAKE_BUILD_TYPE=Release", "-DTRUFFULA_EMULATE=ON", "-DTRUFFULA_TABLE_DRIVER=ON")
    source = str(build(where, *settings))
    subprocess.run(["cmake", "--build", where / "cmake", "--target", "table_driver"], check=True)
    subprocess.run([where / "cmake" / "table_driver"], check=True)
    run_tests(source, sys.argv[1:] or ["-k", "avx512"], dict(os.environ))


if __name__ == "__main__":
    main()
