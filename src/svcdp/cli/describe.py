"""``svcdp describe service NAME``"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from svcdp.cli.options import config_options, output_option
from svcdp.cli.printers import Item, age, document, endpoint, shown, table
from svcdp.errors import NotFoundError
from svcdp.node.client import AdminClient
from svcdp.node.config import load

__all__ = ["command"]

ENDPOINTS_SHOWN = 3  # of a port, as kubectl does
ANNOTATION_WIDTH = 140  # as well
WIDTH = 26  # of the left column
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
NONE = "<none>"


@click.command("describe")
@click.argument("kind", metavar="service", type=click.Choice(("service", "svc", "services")))
@click.argument("name")
@click.option("-n", "--namespace", metavar="NS", default="default", help="[default: default]")
@output_option("json", "yaml")
@config_options(("run_dir", "admin_socket"))
def command(
    kind: str,
    name: str,
    namespace: str,
    output: str | None,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Say all that a running daemon knows of a Service, as kubectl would.

    Below, each endpoint at each of the Service's addresses: what it gets, and when it last left a
    client without an answer.
    """
    with AdminClient(load(config_file, flags=flags).config.admin_path) as client:
        found = list(client.get("description", namespace=namespace, name=name))
    if not found:
        raise NotFoundError(f"Service {namespace}/{name}: the daemon knows none")
    (item,) = found
    if output:
        click.echo(document(item, output))
        return
    for label, value in _lines(item):
        click.echo(f"{label + ':' if label else '':{WIDTH}}{shown(value)}".rstrip())
    if item["destinations"]:
        click.echo()
        click.echo(_destinations(item))


def _lines(item: Item) -> Iterator[tuple[str, str]]:
    """In kubectl's order (describe.go, describeService)."""
    yield "Name", item["name"]
    yield "Namespace", item["namespace"]
    yield from _lines_of("Labels", (f"{k}={v}" for k, v in sorted(item["labels"].items())))
    yield from _lines_of("Annotations", _annotations(item["annotations"]))
    yield "Selector", ",".join(f"{k}={v}" for k, v in sorted(item["selector"].items())) or NONE
    yield "Type", item["type"]
    if item["ipFamilyPolicy"]:
        yield "IP Family Policy", item["ipFamilyPolicy"]
    yield "IP Families", ",".join(item["ipFamilies"]) or NONE
    yield "IP", next(iter(item["clusterIPs"]), "")
    yield "IPs", ",".join(item["clusterIPs"]) or NONE
    if item["externalIPs"]:
        yield "External IPs", ",".join(item["externalIPs"])
    if item["loadBalancerIP"]:
        yield "Desired LoadBalancer IP", item["loadBalancerIP"]
    if item["externalName"]:
        yield "External Name", item["externalName"]
    if item["loadBalancerIngress"]:
        yield "LoadBalancer Ingress", ", ".join(item["loadBalancerIngress"])
    if item["announcedBy"]:
        found = item["announcedBy"].items()
        yield "Announced By", ", ".join(f"{node} ({address})" for address, node in found)
    for port in item["ports"]:
        name = port["name"] or "<unset>"
        yield "Port", f"{name}  {port['port']}/{port['protocol']}"
        yield "TargetPort", f"{port['targetPort']}/{port['protocol']}"
        if port["appProtocol"]:
            yield "AppProtocol", port["appProtocol"]
        if port["nodePort"]:
            yield "NodePort", f"{name}  {port['nodePort']}/{port['protocol']}"
        yield "Endpoints", _some(port["endpoints"])
    yield "Session Affinity", item["sessionAffinity"]
    for label, key in (
        ("External Traffic Policy", "externalTrafficPolicy"),
        ("Internal Traffic Policy", "internalTrafficPolicy"),
        ("HealthCheck NodePort", "healthCheckNodePort"),
    ):
        if item[key]:
            yield label, str(item[key])
    if item["loadBalancerSourceRanges"]:
        yield "LoadBalancer Source Ranges", ",".join(item["loadBalancerSourceRanges"])
    if item["trafficDistribution"]:
        yield "Traffic Distribution", item["trafficDistribution"]
    yield "Scheduler", ",".join(item["schedulers"]) or NONE
    yield from _lines_of("Problems", item["problems"])


def _lines_of(label: str, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    first, *rest = [*texts] or [NONE]
    yield label, first
    yield from (("", text) for text in rest)


def _annotations(found: Mapping[str, str]) -> Iterator[str]:
    """A line each. Long ones and those of several lines are below their key, and cut."""
    for key, value in sorted(found.items()):
        lines = value.removesuffix("\n").split("\n")
        if key == LAST_APPLIED:
            continue
        if len(lines) == 1 and len(f"{key}: {lines[0]}") <= ANNOTATION_WIDTH:
            yield f"{key}: {lines[0]}"
            continue
        yield f"{key}:"
        for line in lines:
            cut = line[: ANNOTATION_WIDTH - 2]
            yield f"  {cut}" + ("..." if cut != line else "")


def _some(endpoints: list[str]) -> str:
    more = len(endpoints) - ENDPOINTS_SHOWN
    shown = ",".join(endpoints[:ENDPOINTS_SHOWN]) or NONE
    return f"{shown} + {more} more..." if more > 0 else shown


def _destinations(item: Item) -> str:
    headers = ["VIRTUAL", "PROTO", "ENDPOINT", "METHOD", "WEIGHT", "ACTIVE", "INACTIVE"]
    headers += ["CONNECTIONS", "PACKETS", "FAILURES", "LAST-FAILURE"]
    rows: list[list[object]] = [
        [
            endpoint(each["virtual"], each["virtualPort"]),
            each["protocol"],
            endpoint(each["address"], each["port"]),
            each["method"],
            each["weight"],
            each["active"],
            each["inactive"],
            each["connections"],
            each["packetsIn"] + each["packetsOut"],
            each["failures"],
            _failure(each),
        ]
        for each in item["destinations"]
    ]
    return table(headers, rows)


def _failure(destination: Item) -> str:
    if destination["lastFailure"] is None:
        return NONE
    since = f"{age(destination['lastFailure'])} ago"
    return f"{since} (ejected)" if destination["ejected"] else since
