"""The environment of this process and of its children. No other module reads it; values are passed down."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from truffula.errors import ConfigError

log = logging.getLogger(__name__)

PREFIX = "TRUFFULA_"
"""The start of the names of all variables that truffula reads."""
# Variables that Kubernetes sets in containers for each Service; those of a Service named truffula look like options.
_SERVICE_NAME = re.compile(r".*_SERVICE_(HOST|PORT(_.+)?)|.*_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://.*", re.IGNORECASE)


def variables(env: Mapping[str, str] | None = None) -> Mapping[str, str]:
    """``env``, by default the environment, without what Kubernetes sets for Services that are named truffula."""
    env = os.environ if env is None else env
    services = {
        name
        for name, value in env.items()
        if name.startswith(PREFIX)
        and (_SERVICE_NAME.fullmatch(name) or (name.endswith("_PORT") and _SERVICE_URL.fullmatch(value)))
    }
    if not services:
        return env
    log.warning(
        "ignoring %s: Kubernetes sets these for a Service; set enableServiceLinks: false in the pod to avoid them",
        ", ".join(sorted(services)),
    )
    return {name: value for name, value in env.items() if name not in services}


def expanded(text: str | Path) -> Path:
    """``text`` as a path, with a leading ``~`` or ``~user`` replaced by the home folder.

    It is unchanged when the user does not exist, so that the error is that of a path that does not exist.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def home_folder(instead: str) -> Path:
    """The user's home folder. Raises ``ConfigError`` when there is none; ``instead`` is the option to set instead."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise ConfigError(
            f"This user has no home folder: HOME is not set, and the system does not list the user. Set HOME or "
            f"{instead}."
        ) from error


def state_folder() -> Path:
    """The folder for state that is neither configuration nor cache, such as the history of ``chat``."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state.startswith("/") else home_folder("XDG_STATE_HOME") / ".local" / "state") / "truffula"


def prepare_compute() -> None:
    """Make torch's idle compute threads sleep instead of spin. Must be called before torch is imported.

    When another process (such as the API process) is busy on a core, spinning threads wait for one that does not run: a
    product of 8 rows took 466 ms instead of 18 on two cores. Without other load there is no difference.
    OMP_WAIT_POLICY in the environment has priority.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def engine_environment() -> dict[str, str]:
    """The environment of the engine's process: this process's, with one OpenBLAS thread, because others would only
    spin.

    OPENBLAS_NUM_THREADS in the environment has priority.
    """
    return {"OPENBLAS_NUM_THREADS": "1", **os.environ}


def text_worker_environment() -> dict[str, str]:
    """The environment of a text worker: this one's, with the tokenizers library computing in one thread."""
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false"}


def installed_environment() -> dict[str, str]:
    """The environment of a child process that is measured as installed: with a cache of compiled Python files, and no
    options but those of its command line.
    """
    left_out = ("PYTHONDONTWRITEBYTECODE", PREFIX)
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
