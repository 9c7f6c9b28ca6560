"""``svcdp ipvs list|stats|rate|connections|restore|save``"""

from __future__ import annotations

from typing import Any, TextIO

import click
import msgspec

from svcdp._version import __version__
from svcdp.cli.options import config_options, output_option
from svcdp.cli.printers import document, note
from svcdp.ipvs import listing
from svcdp.ipvs.listing import ListedService
from svcdp.ipvs.names import Names, NumericNames, SystemNames
from svcdp.ipvs.restore import STATES, parse
from svcdp.ipvs.save import save as saved
from svcdp.ipvs.save import unsaved
from svcdp.node.client import AdminClient
from svcdp.node.config import API_VERSION, load
from svcdp.status import ConnectionState
from svcdp.types import ServiceSpec

__all__ = ["command"]


_daemon = config_options(("run_dir", "admin_socket"))
_numeric = click.option("-n", "--numeric", is_flag=True, help="Addresses and ports, no names.")
_exact = click.option("--exact", is_flag=True, help="All digits, no K, M, G, T.")
_sort = click.option(
    "--sort/--nosort", default=True, help="By address; or servers as schedulers look at them."
)


@click.group("ipvs")
def command() -> None:
    """List services as ipvsadm does; take its rules over."""


def _client(config_file: str | None, flags: dict[str, Any]) -> AdminClient:
    return AdminClient(load(config_file, flags=flags).config.admin_path)


def _names(numeric: bool) -> Names:
    return NumericNames() if numeric else SystemNames()


def _print_services(
    client: AdminClient, output: str | None, numeric: bool, view: str, **how: Any
) -> None:
    wanted = {"rates": view == "rate", "persistent": view == "persistent-conn"}
    items = list(client.get("ipvs", **wanted))
    if output:
        click.echo(_list(items, output))
        return
    (info,) = client.get("ipvs-info")
    click.echo(f"svcdp version {__version__} (size={info['size']})")
    services = [msgspec.convert(item, ListedService) for item in items]
    for line in listing.services(services, _names(numeric), view=view, **how):
        click.echo(line)


def _list(items: list[dict[str, Any]], output: str) -> str:
    return document({"apiVersion": API_VERSION, "kind": "List", "items": items}, output)


@command.command("list")
@_numeric
@_sort
@click.option("--thresholds", "view", flag_value="thresholds", help="Thresholds of servers.")
@click.option("--persistent-conn", "view", flag_value="persistent-conn", help="Bound clients.")
@click.option("--tun-info", "view", flag_value="tun-info", help="Tunnels to servers.")
@click.option("--timeout", "timeouts", is_flag=True, help="Timeouts (tcp tcpfin udp) instead.")
@output_option("json", "yaml")
@_daemon
def list_(
    numeric: bool,
    sort: bool,
    view: str | None,
    timeouts: bool,
    output: str | None,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Print what ipvsadm -L prints: services and their servers."""
    with _client(config_file, flags) as client:
        if timeouts:
            (info,) = client.get("ipvs-info")
            seconds = " ".join(f"{info['timeouts'][state]:g}" for state in STATES)
            click.echo(f"Timeout (tcp tcpfin udp): {seconds}")
        else:
            _print_services(client, output, numeric, view or "", order=sort)


@command.command("stats")
@_numeric
@_exact
@_sort
@output_option("json", "yaml")
@_daemon
def stats(
    numeric: bool,
    exact: bool,
    sort: bool,
    output: str | None,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Print what ipvsadm -L --stats prints: connections, packets and bytes."""
    with _client(config_file, flags) as client:
        _print_services(client, output, numeric, "stats", exact=exact, order=sort)


@command.command("rate")
@_numeric
@_exact
@_sort
@output_option("json", "yaml")
@_daemon
def rate(
    numeric: bool,
    exact: bool,
    sort: bool,
    output: str | None,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Print what ipvsadm -L --rate prints: connections, packets and bytes a second.

    The daemon estimates them from the first question on, so that the first answer takes 2 s.
    """
    with _client(config_file, flags) as client:
        _print_services(client, output, numeric, "rate", exact=exact, order=sort)


@command.command("connections")
@_numeric
@output_option("json", "yaml")
@_daemon
def connections(numeric: bool, output: str | None, config_file: str | None, **flags: Any) -> None:
    """Print what ipvsadm -L -c prints: connections and persistence templates."""
    with _client(config_file, flags) as client:
        items = client.get("ipvs-connections")
        if output:
            click.echo(_list(list(items), output))
            return
        states = (msgspec.convert(item, ConnectionState) for item in items)
        for line in listing.connections(states, _names(numeric)):
            click.echo(line)


@command.command("restore")
@click.argument("file", type=click.File("r", encoding="utf-8"), default="-")
@click.option("--check", is_flag=True, help="Only say whether all lines are right. No daemon.")
@click.option("--edit", is_flag=True, help="Run the lines on what is served, as ipvsadm -R does.")
@click.option("-n", "--numeric", is_flag=True, help="With --check: do not look names up.")
@output_option("json", "yaml")
@_daemon
def restore(
    file: TextIO,
    check: bool,
    edit: bool,
    numeric: bool,
    output: str | None,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Serve what ipvsadm-save printed (FILE or -), and nothing else.

    For a daemon that was started with --ipvs. All lines are done, or none. Connections to servers
    that stay go on.
    """
    text = file.read()
    if check or output:
        if edit:
            raise click.UsageError("--edit needs a daemon: it excludes --check and --output")
        specs = parse(text, _names(numeric))
        if output:
            click.echo(_list([msgspec.to_builtins(spec) for spec in specs], output))
        else:
            servers = sum(len(spec.destinations) for spec in specs)
            note(f"{len(specs)} services, {servers} servers")
        return
    with _client(config_file, flags) as client:
        list(client.get("ipvs-restore", text=text, edit=edit))


@command.command("save")
@_daemon
def save(config_file: str | None, **flags: Any) -> None:
    """Print what a daemon serves as ipvsadm-save would, for `svcdp ipvs restore`."""
    with _client(config_file, flags) as client:
        specs = [msgspec.convert(item, ServiceSpec) for item in client.get("ipvs-specs")]
    for line in saved(specs):
        click.echo(line)
    for line in unsaved(specs):
        note(f"warning: not saved: {line}")
