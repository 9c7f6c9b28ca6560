"""Requests without pause while the endpoints of a Service change, and the daemon with them."""

from __future__ import annotations

import re
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from traffic import (
    CLUSTER_IPS,
    UDP_PORT,
    Kept,
    Load,
    Start,
    Target,
    ask,
    firewall,
    targets,
    write_service,
)

from svcdp.cli._demo.daemon import RunningDaemon
from svcdp.lab import Server, Topology, wait_until

# With the firewall: what is forwarded here is what the daemon lets pass.
pytestmark = [pytest.mark.netns, firewall]

TIMEOUT = 20.0  # seconds
REQUESTS = 50  # a phase and target: 1,000 and more in all


def weights(daemon: RunningDaemon) -> dict[str, int]:
    """Those in force, by address."""
    found = daemon.get("endpoints")
    return {item["address"]: item["weight"] for item in found if item["service"] == "web:http"}


def direct(cluster: Topology) -> list[Target]:
    """The first server's HTTP port, past the Service."""
    server = cluster.servers[0]
    return [(address, cluster.direct_port) for address in (server.ipv4, server.ipv6)]


def test_requests_while_endpoints_change(cluster: Topology, folder: Path, start: Start) -> None:
    """None fails, none reaches an endpoint that is gone, and connections stay where they are."""
    a, b, c = cluster.servers
    steps: list[tuple[list[Server], dict[str, int], set[str]]] = [
        ([a, b, c], {}, {"a", "b", "c"}),
        ([a, b, c], {"a": 0}, {"b", "c"}),
        ([a, c], {"a": 0}, {"c"}),
        ([b], {}, {"b"}),
        ([a, b], {}, {"a", "b"}),
    ]
    with ExitStack() as stack:
        daemon = stack.enter_context(start())
        kept = [
            stack.enter_context(Kept(cluster.client, target))
            for target in targets(cluster)
            for _ in range(2)
        ]
        first = [connection.ask() for connection in kept]
        assert {answer["server"] for answer in first} == {"a", "b"}
        load = stack.enter_context(Load(cluster.client, targets(cluster)))
        assert load.servers(REQUESTS) == {"a", "b"}
        for servers, changed, expected in steps:
            write_service(folder / "manifests", servers, changed)
            wanted = {x: changed.get(s.name, 1) for s in servers for x in (s.ipv4, s.ipv6)}
            wait_until(lambda: weights(daemon) == wanted, TIMEOUT, f"{wanted} in force")  # noqa: B023
            assert load.servers(REQUESTS) == expected
            assert [connection.ask() for connection in kept] == first
        assert load.answered >= 1000


def test_a_killed_daemon_and_its_successor(cluster: Topology, start: Start) -> None:
    """Plain forwarding is never disturbed. Established connections are lost, and clients of TCP
    learn it at once; UDP goes on.
    """
    address, port = CLUSTER_IPS[0], UDP_PORT
    echo = cluster.client.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    with ExitStack() as stack:
        stack.enter_context(echo)
        echo.settimeout(TIMEOUT)
        echo.connect((address, port))
        load = stack.enter_context(Load(cluster.client, direct(cluster)))
        plain = [stack.enter_context(Kept(cluster.client, target)) for target in direct(cluster)]
        before = [connection.ask() for connection in plain]
        with start() as daemon:
            kept = [
                stack.enter_context(Kept(cluster.client, target)) for target in targets(cluster)
            ]
            assert {connection.ask()["server"] for connection in kept} <= {"a", "b"}
            echo.send(b"one")
            assert echo.recv(100) in (b"a one", b"b one")
            rules = capture_rules(cluster)
            daemon.process.kill()
            daemon.process.wait()
            assert load.servers(REQUESTS) == {"a"}
            assert [connection.ask() for connection in plain] == before
            assert capture_rules(cluster) == rules
        with start():
            assert capture_rules(cluster) == rules
            for target in targets(cluster):
                assert ask(cluster.client, target)["server"] in ("a", "b")
            for connection in kept:
                with pytest.raises(ConnectionResetError):
                    connection.ask()
            echo.send(b"two")
            assert echo.recv(100) in (b"a two", b"b two")
            assert load.servers(REQUESTS) == {"a"}
            assert [connection.ask() for connection in plain] == before
        assert load.servers(REQUESTS) == {"a"}
        assert [connection.ask() for connection in plain] == before


def capture_rules(cluster: Topology) -> str:
    """All rules of the node, without counters and comments."""
    text = "".join(
        cluster.node.run([f"{tool}-save", "-t", table]).stdout
        for tool in ("iptables", "ip6tables")
        for table in ("raw", "filter")
    )
    return re.sub(r"^#.*\n|\[\d+:\d+\]", "", text, flags=re.M)
