"""``svcdp version``"""

from __future__ import annotations

import json
import platform

import click

from svcdp._version import __version__

__all__ = ["command"]


@click.command("version")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text")
def command(output: str) -> None:
    """Print the version."""
    if output == "text":
        click.echo(f"svcdp {__version__}")
        return
    versions = {
        "version": __version__,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
    }
    click.echo(json.dumps(versions, indent=2))
