"""``svcdp top``"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import click

from svcdp.cli.options import config_options
from svcdp.cli.printers import Item, endpoint, table
from svcdp.node.client import AdminClient
from svcdp.node.config import load

__all__ = ["command"]

#: To the first line and column; what was below is erased.
HOME, ERASE = "\x1b[H", "\x1b[J"

NARROWEST = 4  # characters to which names are cut on a narrow terminal

Key = tuple[str, ...]


class Load(NamedTuple):
    """Of a Service or an endpoint, now; rates are per second."""

    namespace: str
    service: str
    endpoint: str
    active: int
    inactive: int
    connections: float
    packets: float
    bytes: float


@click.command("top")
@click.option("-n", "--namespace", metavar="NS", help="Of one namespace [default: of all].")
@click.option("--endpoints", is_flag=True, help="A line for each endpoint.")
@click.option(
    "--sort",
    type=click.Choice(("active", "connections", "packets", "bytes", "name")),
    default="packets",
    show_default=True,
    help="What comes first: who has most.",
)
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="One table of one interval, for scripts.")
@click.option("-o", "--output", type=click.Choice(("json",)), help="One line each interval.")
@config_options(("run_dir", "admin_socket"))
def command(
    namespace: str | None,
    endpoints: bool,
    sort: str,
    interval: float,
    once: bool,
    output: str | None,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Show what each Service does now: connections, packets and bytes a second.

    On a terminal the table is refreshed in place, until stopped.
    """
    with AdminClient(load(config_file, flags=flags).config.admin_path) as client:
        before, then = _look(client, namespace), time.monotonic()
        while True:
            time.sleep(interval)
            after, now = _look(client, namespace), time.monotonic()
            loads = _sorted(_loads(before, after, now - then, endpoints), sort)
            before, then = after, now
            if output:
                click.echo(json.dumps([each._asdict() for each in loads]))
            else:
                _show(loads, endpoints, in_place=sys.stdout.isatty() and not once)
            if once:
                return


def _look(client: AdminClient, namespace: str | None) -> dict[Key, Item]:
    return {
        (
            item["namespace"],
            item["service"],
            item["virtual"],
            str(item["virtualPort"]),
            item["protocol"],
            endpoint(item["address"], item["port"]),
        ): item
        for item in client.get("endpoints", namespace=namespace)
    }


def _loads(
    before: Mapping[Key, Item], after: Mapping[Key, Item], seconds: float, by_endpoint: bool
) -> list[Load]:
    """Of all addresses of a Service together. Counters that fell are those of another endpoint at
    the same place: they began at 0.
    """
    sums: dict[Key, Load] = {}
    for key, item in after.items():
        former = before.get(key, {})
        if former and former["packetsIn"] > item["packetsIn"]:
            former = {}

        def rate(*names: str, item: Item = item, former: Item = former) -> float:
            return float(sum(item[name] - former.get(name, 0) for name in names)) / seconds

        name = (item["namespace"], item["service"], key[-1] if by_endpoint else "")
        so_far = sums.get(name, Load(*name, 0, 0, 0.0, 0.0, 0.0))
        sums[name] = so_far._replace(
            active=so_far.active + item["active"],
            inactive=so_far.inactive + item["inactive"],
            connections=so_far.connections + rate("connections"),
            packets=so_far.packets + rate("packetsIn", "packetsOut"),
            bytes=so_far.bytes + rate("bytesIn", "bytesOut"),
        )
    return list(sums.values())


def _sorted(loads: Iterable[Load], sort: str) -> list[Load]:
    by_name = sorted(loads, key=lambda each: each[:3])
    if sort == "name":
        return by_name
    return sorted(by_name, key=lambda each: getattr(each, sort), reverse=True)


def _show(loads: Sequence[Load], by_endpoint: bool, *, in_place: bool) -> None:
    headers = ["NAMESPACE", "SERVICE", "ENDPOINT", "ACTIVE", "INACTIVE", "CONN/S", "PACKETS/S"]
    rows: list[list[object]] = [
        [*each[:5], _short(each.connections), _short(each.packets), _short(each.bytes)]
        for each in loads
    ]
    lines: list[list[object]] = [[*headers, "BYTES/S"], *rows]
    if not by_endpoint:
        lines = [[*line[:2], *line[3:]] for line in lines]
    size = shutil.get_terminal_size()
    if not in_place:
        click.echo(table([], lines))
        return
    lines = lines[: max(size.lines - 1, 2)]
    text = table([], _fitted(lines, size.columns))
    text = "\n".join(line[: size.columns] for line in text.splitlines())
    click.echo(f"{HOME}{ERASE}{text}")


def _fitted(lines: list[list[object]], width: int) -> list[list[object]]:
    """The lines in a ``width``, if the names can give it: they are the first two columns, and
    numbers are what one looks for.
    """
    cells = [[str(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    over = len(table([], [["x" * each for each in widths]])) - width
    while over > 0 and (longest := max(widths[:2])) > NARROWEST:
        widths[widths.index(longest)] -= 1
        over -= 1
    return [[cell[:limit] for cell, limit in zip(line, widths, strict=True)] for line in cells]


def _short(number: float) -> str:
    """In four characters or so: ``12``, ``3.4k``, ``120M``."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.1f}{unit}" if unit and number < 9.95 else f"{number:.0f}{unit}"
        number /= 1000
    return f"{number:.0f}T"
