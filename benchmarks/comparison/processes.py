"""A child that answers lines."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Sequence
from typing import IO, Any

from truffula.bench.server import Child, child_error


class LineChild(Child):
    """A child that answers each JSON line on its standard input by one on its standard output."""

    def __init__(self, name: str, argv: Sequence[str]) -> None:
        super().__init__(name, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def read(self) -> dict[str, Any]:
        """Its next line. What is no JSON object is its libraries' chatter and passed over."""
        pipe = self._pipe(self._process.stdout)
        while line := pipe.readline():
            if line.startswith(b"{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        self._process.wait()
        raise child_error(f"{self.name} exited before it answered", self.output())

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        pipe = self._pipe(self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # it has ended: read() says how
            pipe.write(json.dumps(question).encode() + b"\n")
            pipe.flush()
        return self.read()

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                self._pipe(pipe).close()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None  # opened as a pipe above
        return pipe
