"""``Life``: one engine process and the channel to it, and whether it is healthy. ``engine/process.py`` owns it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time

from truffula.config import EngineConfig, engine_environment
from truffula.engine import wire
from truffula.types import EngineStats

LOOK_S = 0.5
"""How often a silent engine is looked at."""
GRACE_S = 5.0
"""How long an engine may take to end by itself before it is killed."""


class Life:
    """One engine process and the channel to it."""

    def __init__(self, config: EngineConfig) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # -P: the folder we were started in must not shadow modules. stdout is the command's: logs go to stderr.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "truffula.engine.worker", "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=2, process_group=0,
                env=engine_environment(),
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._config = config
        self._unhealthy_since: float | None = None
        self._told: tuple[str, int, int | None] | None = None
        self._progress_at = self._heard_at = time.monotonic()
        self.ready = False
        self.stats: EngineStats | None = None
        self.step_since: float | None = None
        self.channel = wire.Channel(ours, wire.client_side())

    @property
    def pid(self) -> int:
        return self._process.pid

    def heard(self, now: float) -> None:
        self._heard_at = now

    def progressed(self, told: tuple[str, int, int | None]) -> bool:
        """Note a report of the start; False when it says nothing new."""
        if told == self._told:
            return False
        self._told = told
        self._progress_at = self._heard_at
        return True

    def patience(self, now: float) -> float:
        """Seconds to wait for a frame before looking again; 0 or less when a start hangs."""
        return LOOK_S if self.ready else self._progress_at + self._config.start_timeout_s - now

    def hang(self, now: float) -> str | None:
        """Why it is to be killed; None while it may live. Asked at least every ``LOOK_S`` once it is ready."""
        if not self.ready:
            limit = self._config.start_timeout_s
            return f"The engine's start made no progress for {limit:g} s." if self.patience(now) <= 0 else None
        if self.healthy(now):
            self._unhealthy_since = None
        elif self._unhealthy_since is None:
            # Counted from here, not from its last word: when both of us were frozen, it may speak yet.
            self._unhealthy_since = now
        elif now - self._unhealthy_since >= self._config.hang_timeout_s:
            what = "was unresponsive" if self._silent(now) else "was stuck in a step"
            since = self._heard_at if self._silent(now) or self.step_since is None else self.step_since
            return f"The engine {what} for {now - since:.0f} s and was killed."
        return None

    def healthy(self, now: float) -> bool:
        """Whether it was heard of lately and its step in progress is not stuck."""
        stuck = self.step_since is not None and now - self.step_since > self._config.step_timeout_s
        return not stuck and not self._silent(now)

    def _silent(self, now: float) -> bool:
        return now - self._heard_at > self._config.heartbeat_timeout_s

    def stop(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(wire.Disconnected):
            self.channel.post(wire.Stop())

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """Close the channel, which ends the process; kill it when it does not. Returns its status; no zombie stays."""
        self.channel.close()
        try:
            return self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()


def manner(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hints = {
        -signal.SIGKILL: " (kill -9, or the kernel when memory runs out: see dmesg)",
        -signal.SIGBUS: " (a mapped file, such as the model's, was truncated)",
    }
    return f"by {name}{hints.get(status, '')}"
