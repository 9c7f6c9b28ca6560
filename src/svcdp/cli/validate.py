"""``svcdp validate``"""

from __future__ import annotations

import click

from svcdp.cli.options import manifests_option
from svcdp.cli.printers import note

__all__ = ["command"]


# Nobody says here where cluster IPs are: any may be asked for, and some are to be had.
_NETWORKS = ("10.96.0.0/12", "fd00:96::/112", "0.0.0.0/0", "::/0")


@click.command("validate")
@manifests_option(required=True)
def command(manifests: str) -> int:
    """Find all mistakes in a folder of manifests: a line each, exit status 1 if any."""
    from svcdp.kube import NodeContext, read_folder, resolve_all
    from svcdp.kube.allocations import allocated
    from svcdp.kube.balancers import balanced

    decoded = read_folder(manifests)
    objects, lacking = allocated(decoded.objects, _NETWORKS)
    objects, unbalanced = balanced(objects)
    resolution = resolve_all(objects, NodeContext())
    problems = [*decoded.errors, *lacking, *unbalanced, *resolution.problems]
    for problem in problems:
        click.echo(problem)
    for kind, count in sorted(decoded.ignored.items()):
        note(f"ignored: {count} of {kind}")
    note(f"{len(decoded.objects)} objects, {len(problems)} problems")
    return 1 if problems else 0
