"""``svcdp validate``"""

from __future__ import annotations

import click

from svcdp.cli.options import manifests_option
from svcdp.cli.printers import note

__all__ = ["command"]


@click.command("validate")
@manifests_option(required=True)
def command(manifests: str) -> int:
    """Find all mistakes in a folder of manifests: a line each, exit status 1 if any."""
    from svcdp.kube import NodeContext, read_folder, resolve_all

    decoded = read_folder(manifests)
    problems = [*decoded.errors, *resolve_all(decoded.objects, NodeContext()).problems]
    for problem in problems:
        click.echo(problem)
    for kind, count in sorted(decoded.ignored.items()):
        note(f"ignored: {count} of {kind}")
    note(f"{len(decoded.objects)} objects, {len(problems)} problems")
    return 1 if problems else 0
