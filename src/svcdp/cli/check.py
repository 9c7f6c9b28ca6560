"""``svcdp check``"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from svcdp.cli.options import config_options, manifests_option, output_option
from svcdp.cli.printers import document, note, table

__all__ = ["command"]


@click.command("check")
@manifests_option(required=False)
@output_option("json", "yaml")
@config_options()
def command(output: str | None, config_file: str | None, **flags: Any) -> int:
    """Say what this host can do, and the effective configuration.

    Each setting is shown with where its value came from. Exit status 1 if something that
    `svcdp run` needs is missing.
    """
    from svcdp.io import netns
    from svcdp.node.checks import run_checks
    from svcdp.node.config import load

    loaded = load(config_file, flags=flags)
    if loaded.config.netns:
        netns.enter(loaded.config.netns)
    checks = list(run_checks(loaded.config))
    rows = list(loaded.rows())
    for text in loaded.notes:
        note(text)
    if output:
        settings = [{"key": key, "value": value, "origin": origin} for key, value, origin in rows]
        found = {"checks": [asdict(check) for check in checks], "config": settings}
        click.echo(document(found, output))
    else:
        cells = [[check.status, check.name, check.detail, check.fix or "-"] for check in checks]
        click.echo(table(["STATUS", "CHECK", "DETAIL", "FIX"], cells))
        click.echo()
        click.echo(table(["SETTING", "VALUE", "ORIGIN"], [[k, v or "-", o] for k, v, o in rows]))
    return 1 if any(check.status == "fail" for check in checks) else 0
