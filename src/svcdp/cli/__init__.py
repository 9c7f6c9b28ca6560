"""The ``svcdp`` command: one file a verb, each loaded only when it is asked for."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point. Exit status: 0 ok, 1 failed, 2 wrong usage or configuration."""
    try:
        from svcdp.cli.group import run
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.exit("error: the command line needs more packages: pip install 'svcdp[node]'")
    sys.exit(run())
