"""``svcdp get services|endpoints|pods|pools|connections|queues``"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import click

from svcdp.cli.kinds import KINDS, Kind
from svcdp.cli.options import config_options, output_option
from svcdp.cli.printers import Column, Item, document, note, table
from svcdp.errors import NotFoundError
from svcdp.node.client import AdminClient
from svcdp.node.config import API_VERSION, load

__all__ = ["command"]

WATCH_INTERVAL = 1.0  # seconds


@click.command("get")
@click.argument("what", metavar="|".join(kind.plural for kind in KINDS))
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("-n", "--namespace", metavar="NS", help="Of one namespace [default: default].")
@click.option("-A", "--all-namespaces", is_flag=True, help="Of all namespaces.")
@output_option("wide", "json", "yaml", "name")
@click.option("-w", "--watch", is_flag=True, help="Then print what changes, until stopped.")
@config_options(("run_dir", "admin_socket"))
def command(
    what: str,
    names: tuple[str, ...],
    namespace: str | None,
    all_namespaces: bool,
    output: str | None,
    watch: bool,
    config_file: str | None,
    **flags: Any,
) -> None:
    """List what a running daemon serves, or the NAMEs of it, as kubectl would.

    Connections are those to all namespaces unless -n names one.
    """
    kind = _kind(what)
    if namespace and all_namespaces:
        raise click.UsageError("-n and -A exclude each other")
    if names and (all_namespaces or not kind.named):
        raise click.UsageError("names are those of one namespace")
    if not (namespace or all_namespaces) and kind.namespaced:
        namespace = "default"
    columns = kind.shown(namespaces=all_namespaces, wide=output == "wide")
    with AdminClient(load(config_file, flags=flags).config.admin_path) as client:
        items = _named(kind, client.get(kind.plural, namespace=namespace), names)
        missing = [name for name in names if not _named(kind, items, [name])]
        if items or output in ("json", "yaml"):
            _print_list(kind, columns, items, output)
        elif not names:
            note(f"No {kind.plural} found" + (f" in namespace {namespace}" if namespace else ""))
        if missing:
            where = f" in {namespace}" if namespace else ""
            raise NotFoundError(f"{kind.plural} {', '.join(missing)}: none{where}")
        known = set(map(kind.stable, items))
        while watch:
            time.sleep(WATCH_INTERVAL)
            items = _named(kind, client.get(kind.plural, namespace=namespace), names)
            changed = [item for item in items if kind.stable(item) not in known]
            _print_changes(kind, columns, changed, output)
            known = set(map(kind.stable, items))


def _kind(what: str) -> Kind:
    for kind in KINDS:
        if what in (kind.plural, kind.singular, kind.short):
            return kind
    names = ", ".join(kind.plural for kind in KINDS)
    raise click.UsageError(f"cannot get {what!r}: get one of {names}")


def _named(kind: Kind, items: Iterable[Item], names: Collection[str]) -> list[Item]:
    """Those of the names, if there are any. Endpoints go by their Service."""
    return [item for item in items if not names or kind.owner(item) in names]


def _print_list(
    kind: Kind, columns: Sequence[Column], items: Sequence[Item], output: str | None
) -> None:
    if output in ("json", "yaml"):
        whole = {"apiVersion": API_VERSION, "kind": "List", "items": items}
        click.echo(document(whole, output))
    elif output == "name":
        for item in items:
            click.echo(f"{kind.singular}/{kind.name(item)}")
    else:
        click.echo(table([column.header for column in columns], _rows(columns, items)))


def _print_changes(
    kind: Kind, columns: Sequence[Column], items: Sequence[Item], output: str | None
) -> None:
    if output in ("json", "yaml"):
        for item in items:
            click.echo(document(item, output))
    elif items and output == "name":
        _print_list(kind, columns, items, output)
    elif items:
        click.echo(table([], _rows(columns, items)))


def _rows(columns: Sequence[Column], items: Sequence[Item]) -> list[list[object]]:
    return [[column.cell(item) for column in columns] for item in items]
