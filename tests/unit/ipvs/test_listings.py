"""Listings, letter for letter those of ipvsadm. golden/regenerate.py made what is compared."""

from __future__ import annotations

import ipvsadm
import pytest

from svcdp.ipvs.listing import connections, services
from svcdp.ipvs.names import NumericNames

VIEWS = {
    "list": "",
    "thresholds": "thresholds",
    "persistent-conn": "persistent-conn",
    "tun-info": "tun-info",
    "stats": "stats",
    "rate": "rate",
}


@pytest.mark.parametrize("name", VIEWS)
def test_services(name: str) -> None:
    listed = map(ipvsadm.idle, ipvsadm.specs())
    assert [*services(listed, NumericNames(), view=VIEWS[name])] == ipvsadm.listing(name)


@pytest.mark.parametrize("name", ["list", "stats"])
def test_names(name: str) -> None:
    listed = map(ipvsadm.idle, ipvsadm.specs())
    shown = services(listed, ipvsadm.GoldenNames(), view=VIEWS[name])
    assert [*shown] == ipvsadm.listing(f"{name}-names")


def by_service(lines: list[str]) -> dict[str, list[str]]:
    """Servers of each service. The kernel lists services as its hash table has them."""
    found: dict[str, list[str]] = {}
    servers: list[str] = []
    for line in lines[2:]:
        if line.startswith("  -> "):
            servers.append(line)
        else:
            servers = found[line] = []
    return found


@pytest.mark.parametrize("name", ["list-nosort", "restored"])
def test_newest_server_first(name: str) -> None:
    """As the kernel has them after the lines were run; and after they were saved, which sorts
    them, and restored.
    """
    rules = "services.rules" if name == "list-nosort" else "saved.rules"
    listed = map(ipvsadm.idle, ipvsadm.specs(rules))
    shown = by_service([*services(listed, NumericNames(), order=False)])
    assert shown == by_service(ipvsadm.listing(name))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("view", ["stats", "rate"])
def test_large_numbers(view: str, exact: bool) -> None:
    shown = services([ipvsadm.counted()], NumericNames(), view=view, exact=exact, order=False)
    assert [*shown] == ipvsadm.listing(f"numbers-{view}{'-exact' if exact else ''}")


@pytest.mark.parametrize("name", ["list", "persistent-conn"])
def test_numbers_of_connections(name: str) -> None:
    shown = services([ipvsadm.counted()], NumericNames(), view=VIEWS[name], order=False)
    assert [*shown] == ipvsadm.listing(f"numbers-{name}")


def test_servers_are_in_the_order_of_their_addresses() -> None:
    """ipvsadm's own is another where an address begins with a high bit: it subtracts them as
    signed numbers. Its manual says "ascending".
    """
    (spec,) = ipvsadm.parse_text(
        "-A -t 192.0.2.10:80\n"
        "-a -t 192.0.2.10:80 -r 192.0.2.77:80\n"
        "-a -t 192.0.2.10:80 -r [2001:db8::1]:80 -i\n"
        "-a -t 192.0.2.10:80 -r 9.0.0.1:81 -m\n"
        "-a -t 192.0.2.10:80 -r 9.0.0.1:80 -m\n"
        "-a -t 192.0.2.10:80 -r 10.0.0.1:80 -m\n"
    )
    lines = [*services([ipvsadm.idle(spec)], NumericNames())]
    assert [line.split()[1] for line in lines[3:]] == [
        "9.0.0.1:80",
        "9.0.0.1:81",
        "10.0.0.1:80",
        "192.0.2.77:80",
        "[2001:db8::1]:80",
    ]


def test_connections() -> None:
    shown = connections(ipvsadm.connections(), NumericNames())
    assert [*shown] == ipvsadm.golden("connections.txt").splitlines()


def test_names_in_connections() -> None:
    shown = connections(ipvsadm.connections(), ipvsadm.GoldenNames())
    assert [*shown] == ipvsadm.golden("connections-names.txt").splitlines()
