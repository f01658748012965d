"""Where the program starts: Ctrl-C is answered from the first import on."""

from __future__ import annotations

import sys

from slope_compile_cli.interrupt import watch


def main() -> None:
    """Run the command line."""
    watch()
    try:
        from slope_compile_cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("error: Interrupted.\n")
        sys.exit(130)
