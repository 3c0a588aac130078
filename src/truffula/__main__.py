"""``python -m truffula``."""

from truffula.cli import main

main()
