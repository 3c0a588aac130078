"""The command line. ``main`` is the entry point; each command is a thin file of its own that imports what it needs
when it runs."""

from __future__ import annotations


def main() -> None:
    """Run ``truffula``; an expected error ends it with one paragraph and status 1."""
    import sys

    from truffula.cli.app import app
    from truffula.errors import TruffulaError

    try:
        app()
    except TruffulaError as error:
        from truffula.cli.output import fail  # its console takes a while to import, and a server has no use for it

        fail(error)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(141)
