"""``svcdp rules show|apply|remove``"""

from __future__ import annotations

import dataclasses
from typing import Any

import click
import msgspec

from svcdp.cli.options import OFFLINE, config_options, manifests_option, node_option
from svcdp.node.config import NodeConfig, load

__all__ = ["command"]

_CAPTURE = ("rules", "netns", "run_dir")
_PLAN = (
    *("queues", "tunnel_queues", "bypass", "forward_mark", "pass_mark", "dr_marks"),
    *("gso", "fail_open", "dns", "dns_addresses"),
)


@click.group("rules")
def command() -> None:
    """Show, apply or remove the capture rules: what is in the kernel because of svcdp."""


def _load(config_file: str | None, flags: dict[str, Any]) -> NodeConfig:
    from svcdp.io import netns

    config = load(config_file, flags=flags).config
    if config.netns:
        netns.enter(config.netns)
    return config


@command.command("show")
@config_options(_CAPTURE)
def show(config_file: str | None, **flags: Any) -> None:
    """Print what is in the kernel because of svcdp."""
    from svcdp.node.capture import choose_backend

    click.echo(choose_backend(_load(config_file, flags)).show(), nl=False)


@command.command("apply")
@manifests_option(required=True)
@node_option
@click.option("--dry-run", is_flag=True, help="Print the rules instead.")
@config_options((*_CAPTURE, *_PLAN, *OFFLINE))
def apply(manifests: str, dry_run: bool, config_file: str | None, **flags: Any) -> None:
    """Install the rules that `svcdp run` would install for these manifests.

    While no daemon listens on the queues, packets pass.
    """
    from svcdp.cli.offline import offline_dataplane
    from svcdp.dataplane import captures_of
    from svcdp.modes.onward import Onward
    from svcdp.node.capture import capture_plan, choose_backend
    from svcdp.node.network import discover_addresses
    from svcdp.rules.plan import items_of

    config = _load(config_file, flags)
    addresses = config.addresses or discover_addresses()
    config = msgspec.structs.replace(config, addresses=addresses)
    backend = choose_backend(config)
    plan = capture_plan(config, addresses)
    specs = [status.spec for status in offline_dataplane(manifests, config).services()]
    captures = captures_of(Onward(backend, plan).complete(specs))
    plan = dataclasses.replace(plan, items=items_of(captures))
    if dry_run:
        click.echo(backend.render(plan), nl=False)
    else:
        backend.apply(plan)


@command.command("remove")
@click.option("--dry-run", is_flag=True, help="Print what would be removed instead.")
@config_options(_CAPTURE)
def remove(dry_run: bool, config_file: str | None, **flags: Any) -> None:
    """Remove everything that is in the kernel because of svcdp."""
    from svcdp.node.capture import choose_backend

    backend = choose_backend(_load(config_file, flags))
    if dry_run:
        click.echo(backend.show(), nl=False)
    else:
        backend.remove()
