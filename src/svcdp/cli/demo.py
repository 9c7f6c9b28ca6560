"""``svcdp demo``"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from svcdp.cli.options import output_option
from svcdp.cli.printers import document, note
from svcdp.errors import MissingCapability

__all__ = ["command"]


@click.command("demo")
@output_option("json")
def command(output: str | None) -> int:
    """Real clients, real servers, real traffic, in network namespaces of their own.

    Takes half a minute at most, needs root, and leaves nothing behind. Exit status 0 if
    every request was answered by who should, and no connection was lost.
    """
    if os.geteuid() != 0:
        raise MissingCapability("the demo makes network namespaces: run it as root")
    from svcdp.cli._demo.play import play
    from svcdp.cli._demo.stage import open_stage

    with tempfile.TemporaryDirectory(prefix="svcdp-demo-") as folder, open_stage() as stage:
        report = play(stage, Path(folder), note)
    click.echo(document(report.plain(), output) if output else report.text())
    return 0 if report.ok else 1
