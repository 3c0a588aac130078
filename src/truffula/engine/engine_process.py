"""``EngineProcess``: one engine process, the channel to it, and its health. ``process.py`` starts and supervises it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from truffula.config import EngineConfig
from truffula.engine import wire
from truffula.environment import engine_environment
from truffula.errors import TruffulaError
from truffula.frames import Disconnected
from truffula.types import EngineStats

EXIT_GRACE_S = 5.0
"""How long an engine process may take to exit before it is killed."""
HEALTH_CHECK_S = 0.5
"""How often a silent engine's health is checked."""


class EngineProcess:
    """An engine process from its start to its exit. The supervising thread owns it.

    ``reading`` is held while the frames of the channel are received and handled: an event loop may do both as well.
    """

    def __init__(self, config: EngineConfig) -> None:
        parent_end, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # -P: the current folder must not shadow modules. stdout is the command's: logs go to stderr.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "truffula.engine.worker", str(child_end.fileno())],
                pass_fds=(child_end.fileno(),), stdin=subprocess.DEVNULL, stdout=2, process_group=0,
                env=engine_environment(),
            )  # fmt: skip
        except BaseException:
            parent_end.close()
            raise
        finally:
            child_end.close()
        self._config = config
        self._unhealthy_since: float | None = None
        self._progress: wire.Starting | None = None
        self._progress_at = self._frame_at = time.monotonic()
        self.reading = threading.Lock()
        self.is_shared = False  # an event loop reads the channel
        self.is_over = False  # no frame follows
        self.end_reason: TruffulaError | None = None  # what its last frame says
        self.read_error: Exception | None = None  # why its frames cannot be read any more
        self.ready = False
        self.stats: EngineStats | None = None
        self.step_since: float | None = None
        self.channel = wire.client_channel(parent_end)

    @property
    def pid(self) -> int:
        return self._process.pid

    def on_frame(self, now: float) -> None:
        """A frame has arrived: the process is responsive."""
        self._frame_at = now

    def on_progress(self, frame: wire.Starting) -> bool:
        """Record a report of the start; False when it repeats the last one."""
        if frame == self._progress:
            return False
        self._progress = frame
        self._progress_at = self._frame_at
        return True

    def poll_timeout(self, now: float) -> float:
        """Seconds until ``kill_reason`` must be called again, even if no frame arrives."""
        if self.ready:
            return HEALTH_CHECK_S
        return max(0.0, self._progress_at + self._config.start_timeout_s - now)

    def kill_reason(self, now: float) -> str | None:
        """Why the process must be killed; None while it is healthy or may still recover."""
        if not self.ready:
            limit = self._config.start_timeout_s
            return f"The engine's start made no progress for {limit:g} s." if self.poll_timeout(now) <= 0 else None
        if self.healthy(now):
            self._unhealthy_since = None
        elif self._unhealthy_since is None:
            # Counted from here, not from its last frame: if both processes were frozen, a frame may be on its way.
            self._unhealthy_since = now
        elif now - self._unhealthy_since >= self._config.hang_timeout_s:
            what = "was unresponsive" if self._silent(now) else "was stuck in a step"
            since = self._frame_at if self._silent(now) or self.step_since is None else self.step_since
            return f"The engine {what} for {now - since:.0f} s and was killed."
        return None

    def healthy(self, now: float) -> bool:
        """Whether a frame has arrived recently and the step in progress is not stuck."""
        stuck = self.step_since is not None and now - self.step_since > self._config.step_timeout_s
        return not stuck and not self._silent(now)

    def _silent(self, now: float) -> bool:
        return now - self._frame_at > self._config.heartbeat_timeout_s

    def share(self) -> int | None:
        """A copy of the channel's descriptor, to be watched by an event loop; None when the process is over."""
        with self.reading:
            if self.is_over:
                return None
            self.is_shared = True
            return os.dup(self.channel.fileno())

    def stop(self) -> None:
        """Ask it to exit."""
        with contextlib.suppress(Disconnected):
            self.channel.post(wire.Stop())

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """Close the channel, which makes the process exit, or kill it; returns its exit status. No zombie remains."""
        with self.reading:
            self.is_over = True
            self.channel.close()
        try:
            return self._process.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hints = {
        -signal.SIGKILL: " (kill -9, or the kernel when memory runs out: see dmesg)",
        -signal.SIGBUS: " (a mapped file, such as the model's, was truncated)",
    }
    return f"by {name}{hints.get(status, '')}"
