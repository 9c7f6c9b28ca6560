"""``svcdp ipvs list|stats|rate|connections|zero|restore|save``"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import click
import msgspec

from svcdp._version import __version__
from svcdp.cli.options import config_options, output_option
from svcdp.cli.printers import document, note
from svcdp.ipvs import listing
from svcdp.ipvs.keys import read_key
from svcdp.ipvs.listing import ListedService
from svcdp.ipvs.names import Names, NumericNames, SystemNames
from svcdp.ipvs.restore import STATES, parse
from svcdp.ipvs.save import save as saved
from svcdp.ipvs.save import unsaved
from svcdp.ipvs.words import SERVICES
from svcdp.node.client import AdminClient
from svcdp.node.config import API_VERSION, load
from svcdp.status import ConnectionState
from svcdp.types import ServiceSpec

__all__ = ["command"]

Function = Callable[..., None]

_daemon = config_options(("run_dir", "admin_socket"))
_numeric = click.option("-n", "--numeric", is_flag=True, help="Addresses and ports, no names.")
_exact = click.option("--exact", is_flag=True, help="All digits, no K, M, G, T.")
_SERVICE = (
    click.option("-t", "--tcp-service", metavar="HOST[:PORT]", help="This service alone."),
    click.option("-u", "--udp-service", metavar="HOST[:PORT]"),
    click.option("--sctp-service", metavar="HOST[:PORT]"),
    click.option("-f", "--fwmark-service", metavar="MARK"),
    click.option("-6", "--ipv6", is_flag=True, help="With -f: of IPv6."),
)
_sort = click.option(
    "--sort/--nosort", default=True, help="By address; or servers as schedulers look at them."
)


def _service(function: Function) -> Function:
    """The options that name one service; as ``service`` the command gets what its request says."""

    @functools.wraps(function)
    def call(**given: Any) -> None:
        words = {name: given.pop(name.replace("-", "_")) for name in (*SERVICES, "ipv6")}
        function(**given, service=_wanted({name: word for name, word in words.items() if word}))

    for option in reversed(_SERVICE):
        call = option(call)
    return call


@click.group("ipvs")
def command() -> None:
    """List services as ipvsadm does; take its rules over."""


def _client(config_file: str | None, flags: dict[str, Any]) -> AdminClient:
    return AdminClient(load(config_file, flags=flags).config.admin_path)


def _names(numeric: bool) -> Names:
    return NumericNames() if numeric else SystemNames()


def _wanted(service: Mapping[str, str]) -> dict[str, Any]:
    """What a request says of the service that the options name."""
    if len(service.keys() - {"ipv6"}) > 1:
        raise click.UsageError("-t, -u, --sctp-service and -f exclude each other")
    return {"service": read_key(service, SystemNames())} if service else {}


def _print_services(
    client: AdminClient,
    output: str | None,
    numeric: bool,
    view: str,
    service: dict[str, Any],
    **how: Any,
) -> None:
    wanted = {"rates": view == "rate", "persistent": view == "persistent-conn"}
    items = list(client.get("ipvs", **wanted, **service))
    if output:
        click.echo(_list(items, output))
        return
    (info,) = client.get("ipvs-info")
    click.echo(f"svcdp version {__version__} (size={info['size']})")
    services = [msgspec.convert(item, ListedService) for item in items]
    for line in listing.services(services, _names(numeric), view=view, **how):
        click.echo(line)


def _list(items: list[dict[str, Any]], output: str, **fields: Any) -> str:
    return document({"apiVersion": API_VERSION, "kind": "List", **fields, "items": items}, output)


@command.command("list")
@_numeric
@_sort
@click.option("--thresholds", "view", flag_value="thresholds", help="Thresholds of servers.")
@click.option("--persistent-conn", "view", flag_value="persistent-conn", help="Bound clients.")
@click.option("--tun-info", "view", flag_value="tun-info", help="Tunnels to servers.")
@click.option("--timeout", "timeouts", is_flag=True, help="Timeouts (tcp tcpfin udp) instead.")
@_service
@output_option("json", "yaml")
@_daemon
def list_(
    numeric: bool,
    sort: bool,
    view: str | None,
    timeouts: bool,
    service: dict[str, Any],
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
            _print_services(client, output, numeric, view or "", service, order=sort)


@command.command("stats")
@_numeric
@_exact
@_sort
@_service
@output_option("json", "yaml")
@_daemon
def stats(
    numeric: bool,
    exact: bool,
    sort: bool,
    service: dict[str, Any],
    output: str | None,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Print what ipvsadm -L --stats prints: connections, packets and bytes.

    Since destinations were added, or since `svcdp ipvs zero`.
    """
    with _client(config_file, flags) as client:
        _print_services(client, output, numeric, "stats", service, exact=exact, order=sort)


@command.command("rate")
@_numeric
@_exact
@_sort
@_service
@output_option("json", "yaml")
@_daemon
def rate(
    numeric: bool,
    exact: bool,
    sort: bool,
    service: dict[str, Any],
    output: str | None,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Print what ipvsadm -L --rate prints: connections, packets and bytes a second.

    The daemon estimates them every 2 s from the first question on, which takes so long, until
    nobody has asked for 60 s.
    """
    with _client(config_file, flags) as client:
        _print_services(client, output, numeric, "rate", service, exact=exact, order=sort)


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


@command.command("zero")
@_service
@_daemon
def zero(service: dict[str, Any], config_file: str | None, **flags: Any) -> None:
    """Do what ipvsadm -Z does: count anew what `svcdp ipvs stats` shows.

    The counters of `svcdp get` and of metrics go on.
    """
    with _client(config_file, flags) as client:
        list(client.get("ipvs-zero", **service))


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
        specs, timeouts, _ = parse(text, _names(numeric))
        if output:
            items = [msgspec.to_builtins(spec) for spec in specs]
            click.echo(_list(items, output, **({"timeouts": timeouts} if timeouts else {})))
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
        (info,) = client.get("ipvs-info")
        specs = [msgspec.convert(item, ServiceSpec) for item in client.get("ipvs-specs")]
    for line in saved(specs, info["timeouts"]):
        click.echo(line)
    for line in unsaved(specs):
        note(f"warning: not saved: {line}")
