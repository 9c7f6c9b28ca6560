"""What the kernel drops by its source without svcdp is dropped with it, and nothing else."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
from capture import CLIENT, PLAIN, TIMEOUT, Serve, send_raw, set_rp_filter, udp_packet

from svcdp import Dataplane, DestinationSpec, ServiceSpec
from svcdp.lab import Topology
from svcdp.rules import CapturePlan
from svcdp.rules.plan import items_of

pytestmark = pytest.mark.netns

PORT = 5355
SOURCES = {
    "client": CLIENT,
    "the node's address there": "192.0.2.1",
    "the node's address elsewhere": "10.1.1.1",
    "loopback": "127.0.0.1",
    "broadcast": "192.0.2.255",
    "a pod": "10.1.1.12",
    "no route back": "203.0.113.9",
}


def arrivals(cluster: Topology, sock: socket.socket, target: str, port: int) -> set[str]:
    """Which SOURCES a packet sent by the client may pretend to have and still reach a server."""
    packets = [udp_packet(SOURCES[name], target, port, name.encode()) for name in SOURCES]
    cluster.client.call(send_raw, *packets, udp_packet(CLIENT, target, port, b"end"))
    arrived = set(iter(lambda: sock.recv(100).decode(), "end"))
    assert arrived <= set(SOURCES)
    return arrived


@pytest.fixture
def server(cluster: Topology) -> Iterator[socket.socket]:
    """A socket of the first server that receives on PORT."""
    pod = cluster.servers[0]
    with pod.namespace.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.bind((pod.ipv4, PORT))
        yield sock


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
    server: socket.socket,
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
    expected = arrivals(cluster, server, pod, PORT)
    if any(name.endswith("/rp_filter") and value == 1 for name, value in sysctls.items()):
        expected -= {"no route back", "broadcast"}
    dataplane.update(
        [ServiceSpec(PLAIN[0], 54, "udp", destinations=(DestinationSpec(pod, PORT),))], []
    )
    items = items_of(dataplane.captures())
    # One queue keeps their order.
    with serve(replace(plan, queues=(100, 100), items=items)):
        assert arrivals(cluster, server, pod, PORT) == expected
        assert arrivals(cluster, server, PLAIN[0], 54) == expected
