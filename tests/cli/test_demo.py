"""The demo's refusals: before anything is downloaded or computed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


def test_a_taken_port_is_refused_first(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, str(DEMO), "--serve", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "HOME": str(tmp_path)},
        )
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith(f"error (config_invalid) Port {port} of 127.0.0.1 is in use") and "PORT=" in done.stderr
    )
    assert list(tmp_path.iterdir()) == []
