"""Routes by which programs on the node itself reach service addresses.

``connect()`` needs a route before raw OUTPUT sees a packet, and takes the source address from
it; the rewritten packet is routed anew, by its real destination. The device only matters for
addresses that no service has: by the interface of the node's address such packets end with an
unanswered ARP request or neighbour solicitation. By ``lo`` each would pass the node 63 times.

An address that this host serves itself is made local by a route, too, not by giving it to an
interface: nobody takes it for one of the node's own, and it goes by the same ways.

Like all routes by an interface these go when it is taken down: apply the plan again. They are
recognised by their protocol number.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network

from svcdp.errors import RulesError
from svcdp.rules.plan import CapturePlan, family_of
from svcdp.rules.tools import decode, run, understanding

__all__ = ["add", "commands", "remove", "show"]

PROTOCOL = 112
"""Of 256 numbers (/etc/iproute2/rt_protos) one that nobody is known to use."""

METRIC = 4096
"""Whoever routes the same CIDR himself comes first: IPv6's default metric is 1024."""


def commands(plan: CapturePlan) -> list[list[str]]:
    """How :func:`add` calls ``ip``. Reads which interface has the source address."""
    found = []
    for cidr in plan.service_cidrs:
        source = plan.source_of(cidr)
        if source is None:
            message = f"no route to {cidr}: no address of this node is IPv{family_of(cidr)}"
            raise RulesError(f"{message}: set addresses")
        device = _device(source)
        argv = ["ip", f"-{family_of(cidr)}", "route", "replace", cidr, "dev", device]
        argv += ["src", source, "proto", str(PROTOCOL), "metric", str(METRIC)]
        found.append(argv)
    for address in dict(plan.hosted):
        argv = ["ip", f"-{family_of(address)}", "route", "replace", "local", address]
        found.append([*argv, "dev", "lo", "table", "local", "proto", str(PROTOCOL)])
    return found


def add(plan: CapturePlan) -> None:
    """Make the routes of a plan, and no others. What stays is there all the time."""
    for argv in commands(plan):
        run(argv)
    for family in ("-4", "-6"):
        for gone in _made(family, "main") - set(map(ip_network, plan.service_cidrs)):
            run(["ip", family, "route", "delete", str(gone), "proto", str(PROTOCOL)])
        for gone in _made(family, "local") - set(map(ip_network, dict(plan.hosted))):
            run(["ip", family, "route", "delete", "local", str(gone), "table", "local"])


def remove() -> None:
    """Remove all routes of ours, in all tables."""
    for family in ("-4", "-6"):
        if _list(family, "all"):
            run(["ip", family, "route", "flush", "table", "all", "proto", str(PROTOCOL)])


def show() -> str:
    """Our routes, a line each."""
    return _list("-4", "all") + _list("-6", "all")


def _made(family: str, table: str) -> set[IPv4Network | IPv6Network]:
    """Where our routes of a table lead."""
    printed = run(["ip", "-json", family, *_shown(table)])
    everywhere = "::/0" if family == "-6" else "0.0.0.0/0"
    with understanding("ip -json"):
        texts = [route["dst"] for route in decode(printed)]
        return {ip_network(everywhere if text == "default" else text) for text in texts}


def _list(family: str, table: str) -> str:
    return run(["ip", family, *_shown(table)])


def _shown(table: str) -> list[str]:
    return ["route", "show", "table", table, "proto", str(PROTOCOL)]


def _device(address: str) -> str:
    printed = run(["ip", "-json", "address", "show", "to", address])
    with understanding("ip -json"):
        for link in decode(printed):
            if "ifname" in link:
                return str(link["ifname"])
    raise RulesError(f"no interface has the address {address}: set addresses")
