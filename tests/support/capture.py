"""Services, clients and packets for the tests of the capture rules."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from svcdp import DestinationSpec, ServiceSpec, SourceRule
from svcdp.io.nfqueue import QueueWorkers
from svcdp.lab import Namespace, Topology
from svcdp.modes.nfqueue import NfqueueMode

TIMEOUT = 5.0  # seconds
LOST = 0.5  # seconds until a connection that must not be made is given up
CLIENT = "192.0.2.10"

PLAIN = ("10.96.0.10", "fd00:10:96::10")
MASQUERADED = ("10.96.0.11", "fd00:10:96::11")
HAIRPIN = ("10.96.0.12", "fd00:10:96::12")  # only the first server is behind it
NODE_PORT = 30080

FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])


Serve = Callable[..., AbstractContextManager[QueueWorkers]]
"""Apply what the dataplane wants, and read the queues meanwhile."""

Directing = Callable[..., AbstractContextManager[NfqueueMode]]
"""Serve these services and no others, as the daemon does, until the end of the block."""


def node_addresses(cluster: Topology) -> tuple[str, str]:
    return cluster.node_ipv4, cluster.node_ipv6


def server_addresses(cluster: Topology, number: int) -> tuple[str, str]:
    return cluster.servers[number].ipv4, cluster.servers[number].ipv6


def specs(cluster: Topology) -> Iterator[ServiceSpec]:
    """Plain, masqueraded, hairpin and node port services of both families."""
    masquerade = (SourceRule(masquerade=True),)
    for family, node in enumerate(node_addresses(cluster)):
        pods = [server_addresses(cluster, number)[family] for number in range(3)]
        real = tuple(DestinationSpec(pod, cluster.direct_port) for pod in pods)
        service = partial(ServiceSpec, port=80, destinations=real, masquerade_address=node)
        yield service(PLAIN[family])
        yield service(MASQUERADED[family], rules=masquerade)
        yield service(HAIRPIN[family], destinations=real[:1])
        yield service(node, port=NODE_PORT, rules=masquerade)
        closed = DestinationSpec(pods[0], 5354)
        yield service(PLAIN[family], protocol="udp", port=53, destinations=(closed,))


def connect(place: Namespace, address: str, port: int) -> socket.socket:
    return place.call(socket.create_connection, (address, port), TIMEOUT)


def ask(connection: socket.socket) -> str:
    """One request; the JSON answer. The connection stays."""
    connection.sendall(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(4096)
        assert part, f"closed after {answer!r}"
        answer += part
    return answer.decode()


def get(place: Namespace, address: str, port: int) -> str:
    with connect(place, address, port) as connection:
        return ask(connection)


def set_rp_filter(node: Namespace, everywhere: int, each: int | None = None) -> None:
    for path in node.call(lambda: list(Path("/proc/sys/net/ipv4/conf").iterdir())):
        value = everywhere if path.name == "all" or each is None else each
        node.sysctl(f"net/ipv4/conf/{path.name}/rp_filter", value)


def udp_packet(source: str, target: str, port: int, payload: bytes) -> bytes:
    """IPv4, from port 40000. No checksum (0): RFC 768 allows that."""
    length = 8 + len(payload)
    udp = b"".join(number.to_bytes(2, "big") for number in (40000, port, length, 0)) + payload
    head = bytes([0x45, 0, 0, 20 + length, 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0, 0])
    return head + socket.inet_aton(source) + socket.inet_aton(target) + udp


def send_raw(*packets: bytes) -> None:
    """Send IPv4 packets as they are. They leave in this order: by one CPU, which queues them."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # of this thread, a lab's own
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        for packet in packets:
            sock.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))
