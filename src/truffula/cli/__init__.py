"""The command line. ``main`` is the entry point; each command imports its implementation when it runs."""

from __future__ import annotations

USAGE_STATUS, INTERRUPTED_STATUS, BROKEN_PIPE_STATUS = 2, 130, 141


def main() -> None:
    """Run ``truffula``. A ``TruffulaError`` is printed as one paragraph on stderr.

    The exit status is 1 for an error, 2 for a wrong command line, 130 after Ctrl-C at any time.
    """
    import sys

    try:
        status = _run()
    except KeyboardInterrupt:
        status = INTERRUPTED_STATUS
    except BrokenPipeError:
        status = BROKEN_PIPE_STATUS
    sys.exit(status)


def _run() -> int:
    from truffula.cli.app import app
    from truffula.cli.help import ClickException, usage_message
    from truffula.errors import TruffulaError

    try:
        returned = app(prog_name="truffula", standalone_mode=False)
    except (ClickException, TruffulaError) as error:
        from truffula.cli import output  # slow to import, and not needed by a server

        if isinstance(error, TruffulaError):
            output.fail(error)
            return 1
        output.print_error("usage", usage_message(error))
        return USAGE_STATUS
    return returned if isinstance(returned, int) else 0
