"""Addresses of the node that come and go while its daemon runs."""

from __future__ import annotations

import json

import pytest
from traffic import CLUSTER_IPS, NODE_PORT, PORT, Start, ask

from svcdp.cli._demo.daemon import RunningDaemon
from svcdp.lab import Topology, wait_until
from svcdp.node.network import discover_addresses

pytestmark = pytest.mark.netns

TIMEOUT = 15.0  # seconds
#: On no interface at first; the client's default routes lead to the node.
LATER = ("203.0.113.7", "2001:db8:ff::7")


def specs(daemon: RunningDaemon) -> int:
    """How many are in force: two node ports for each address, and others."""
    [status] = daemon.get("status")
    return int(status["counts"]["specs"])


def sources(cluster: Topology) -> list[str]:
    """Of the routes to service addresses, by IP family."""
    found = []
    for family in ("-4", "-6"):
        shown = cluster.node.run(["ip", "-json", family, "route", "show", "proto", "112"]).stdout
        found += [route.get("prefsrc", "") for route in json.loads(shown or "[]")]
    return found


def test_node_ports_follow_addresses(cluster: Topology, start: Start) -> None:
    node = cluster.node
    with start("--node-port-addresses", "0.0.0.0/0,::/0") as daemon:
        before = specs(daemon)
        node.add_address("lo", f"{LATER[0]}/32", f"{LATER[1]}/128")
        wait_until(lambda: specs(daemon) == before + 4, TIMEOUT, "node ports at new addresses")
        for address in LATER:
            assert ask(cluster.client, (address, NODE_PORT))["server"] in {"a", "b"}
        node.ip(f"address delete {LATER[0]}/32 dev lo", f"address delete {LATER[1]}/128 dev lo")
        wait_until(lambda: specs(daemon) == before, TIMEOUT, "no node ports at old addresses")
        for address in (cluster.node_ipv4, cluster.node_ipv6):
            assert ask(cluster.client, (address, NODE_PORT))["server"] in {"a", "b"}


def device_of(cluster: Topology, address: str) -> str:
    shown = cluster.node.run(["ip", "-json", "address", "show", "to", address]).stdout
    [link] = [each for each in json.loads(shown) if each]
    return str(link["ifname"])


def test_addresses_that_may_be_another_hosts(cluster: Topology, start: Start) -> None:
    """They are no route's source, and one that could not be made cost others theirs."""
    node, taken, free = cluster.node, "2001:db8:1::10", "2001:db8:1::99"
    device = device_of(cluster, cluster.node_ipv6)
    node.sysctl(f"net.ipv6.conf.{device}.accept_dad", 1)
    addresses = node.call(discover_addresses)
    with start("--node-port-addresses", "0.0.0.0/0,::/0") as daemon:
        before = specs(daemon)
        node.ip(f"address add {taken}/64 dev {device}")
        assert node.call(discover_addresses) == addresses
        shown = ["ip", "-6", "address", "show", "dadfailed"]
        wait_until(lambda: taken in node.run(shown).stdout, TIMEOUT, "an answer of its owner")
        assert node.call(discover_addresses) == addresses
        node.ip(f"address add {free}/64 dev {device}")
        wait_until(lambda: specs(daemon) == before + 2, TIMEOUT, "node ports when it is sure")
        assert set(node.call(discover_addresses)) == {*addresses, free}


def test_routes_follow_addresses(cluster: Topology, start: Start) -> None:
    """With the address that is a route's source the kernel deletes the route, or its source."""
    node = cluster.node
    old = [cluster.node_ipv4, cluster.node_ipv6]
    with start() as daemon:
        assert sources(cluster) == old
        device = device_of(cluster, old[0])
        node.ip(f"address delete {old[0]}/24 dev {device}")
        node.add_address(device, f"{old[0]}/24")
        wait_until(lambda: sources(cluster) == old, TIMEOUT, "the routes")
        assert {ask(node, (each, PORT))["server"] for each in CLUSTER_IPS} <= {"a", "b"}

        node.ip(f"address delete {old[1]}/64 dev {device}")
        others = [old[0], "fd00:10:1::1"]
        wait_until(lambda: sources(cluster) == others, TIMEOUT, "another source")
        assert {ask(node, (each, PORT))["server"] for each in CLUSTER_IPS} <= {"a", "b"}
        [status] = daemon.get("status")
        assert status["problems"] == []
        node.add_address(device, f"{old[1]}/64")
        wait_until(lambda: sources(cluster) == old, TIMEOUT, "the old source")
        assert ask(node, (CLUSTER_IPS[1], PORT))["server"] in {"a", "b"}
