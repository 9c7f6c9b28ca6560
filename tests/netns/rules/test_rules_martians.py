"""What the kernel drops by its source without svcdp is dropped with it, and nothing else."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
from capture import CLIENT, PLAIN, TIMEOUT, Serve, set_rp_filter, udp_packet

from svcdp import Dataplane, DestinationSpec, ServiceSpec
from svcdp.lab import Topology, wait_until
from svcdp.rules import CapturePlan

pytestmark = pytest.mark.netns

SOURCES = {
    "client": CLIENT,
    "the node's address there": "192.0.2.1",
    "the node's address elsewhere": "10.1.1.1",
    "loopback": "127.0.0.1",
    "broadcast": "192.0.2.255",
    "a pod": "10.1.1.12",
    "no route back": "203.0.113.9",
}


def arrivals(cluster: Topology, target: str, port: int) -> set[str]:
    """Which SOURCES a packet sent by the client may pretend to have and still reach a server."""
    server = cluster.servers[0].namespace

    def send(source: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            sock.sendto(udp_packet(source, target, port), (target, port))

    def received() -> int:
        lines = server.run(["cat", "/proc/net/snmp"]).stdout.splitlines()
        names, values = (line.split() for line in lines if line.startswith("Udp:"))
        return int(values[names.index("InDatagrams")])

    arrived = set()
    for name, source in SOURCES.items():
        before = received()
        cluster.client.call(send, source)
        cluster.client.call(send, CLIENT)  # the one that surely arrives, and later
        wait_until(lambda before=before: received() > before, TIMEOUT, "the second one")
        last = wait_until(lambda: stable(received), TIMEOUT, "both")
        if last - before == 2:
            arrived.add(name)
    return arrived


def stable(number: Callable[[], int]) -> int:
    """The number once it is the same twice; else 0."""
    first = number()
    return first if number() == first else 0


@pytest.mark.parametrize(
    "sysctls",
    [
        {},
        {"all/rp_filter": 1},
        {"client/rp_filter": 1},
        {"all/rp_filter": 2},
        {"server-b/rp_filter": 1},
        {"all/accept_local": 1},
        {"client/accept_local": 1},
        {"client/accept_local": 1, "all/rp_filter": 1},
        {"default/rp_filter": 1, "server-a/rp_filter": 1},
    ],
    ids=str,
)
def test_martians(
    cluster: Topology,
    serve: Serve,
    plan: CapturePlan,
    dataplane: Dataplane,
    sysctls: dict[str, int],
) -> None:
    """Exactly the packets that the kernel drops without svcdp are dropped with it.

    But where one interface is strict, all become loose, also those that had no check at all: a
    source to which no route leads is dropped there too.
    """
    node = cluster.node
    set_rp_filter(node, 0)
    for name, value in sysctls.items():
        node.sysctl(f"net/ipv4/conf/{name}", value)
    pod = cluster.servers[0].ipv4
    expected = arrivals(cluster, pod, 5353)
    if any(name.endswith("/rp_filter") and value == 1 for name, value in sysctls.items()):
        expected -= {"no route back", "broadcast"}
    dataplane.update(
        [ServiceSpec(PLAIN[0], 54, "udp", destinations=(DestinationSpec(pod, 5353),))], []
    )
    captures = dataplane.captures()
    with serve(replace(plan, queues=(100, 100), virtual=captures.virtual, real=captures.real)):
        assert arrivals(cluster, pod, 5353) == expected
        assert arrivals(cluster, PLAIN[0], 54) == expected
