"""What the command ``softtune`` runs. It stands beside the package, whose imports take seconds that Ctrl-C may end."""

from __future__ import annotations

import sys


def main() -> None:
    """Import the command line and run it."""
    try:
        from softtune.cli import main as run

        run()
    except KeyboardInterrupt:
        print("softtune: stopped", file=sys.stderr)
        sys.exit(130)
