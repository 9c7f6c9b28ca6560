"""Paths that take smaller packets than their ends: ICMP errors must find who sent too much."""

from __future__ import annotations

import hashlib
import http.client
import json
from pathlib import Path

import pytest
from traffic import PORTS, Start, Target, targets

from svcdp.cli._demo.manifests import PORT, TUNNEL, Backend, write_one
from svcdp.cli._demo.stage import take_virtual_addresses
from svcdp.lab import Lab, Server, Topology, wait_until
from svcdp.lab.servers import PATTERN

pytestmark = pytest.mark.netns

SMALL = 1300  # bytes; IPv6 has at least 1280
TIMEOUT = 10.0  # seconds


def there_and_back(target: Target) -> tuple[str, str]:
    """The digests of what came and of what arrived."""
    connection = http.client.HTTPConnection(*target, timeout=TIMEOUT)
    try:
        connection.request("GET", f"/bytes/{len(PATTERN)}")
        down = hashlib.sha256(connection.getresponse().read()).hexdigest()
        connection.request("POST", "/", PATTERN)
        return down, json.loads(connection.getresponse().read())["sha256"]
    finally:
        connection.close()


@pytest.mark.parametrize("setting", ["--gso", "--no-gso"])
@pytest.mark.parametrize("narrow", ["client", "pods"])
def test_both_ends_learn_the_path_mtu(
    cluster: Topology, start: Start, narrow: str, setting: str
) -> None:
    """Only the node's routes are narrow, so no handshake tells of it: the node's kernel
    sends ICMP errors about rewritten packets, and they must reach the client or the pod.

    (A narrow interface would drop what comes in from the wide end of its link, and say nothing.)
    """
    ends = {"client": [("client", cluster.client_ipv4, cluster.client_ipv6)]}
    ends["pods"] = [
        (f"server-{pod.name}", pod.ipv4, pod.ipv6) for pod in cluster.servers if pod.name in "ab"
    ]
    for interface, *addresses in ends[narrow]:
        for address in addresses:
            cluster.node.ip(f"route replace {address} dev {interface} mtu lock {SMALL}")
    digest = hashlib.sha256(PATTERN).hexdigest()
    with start(setting) as daemon:
        for target in targets(cluster):
            assert cluster.client.call(there_and_back, target) == (digest, digest), target
        (status,) = daemon.get("status")
    assert status["packets"]["FORWARD/RELATED"] > 0


def behind_a_router(lab: Lab, cluster: Topology, mtu: int) -> Server:
    """A server to which a router leads, by a link that takes less than the others."""
    router, end = lab.namespace("router"), lab.namespace("server-d")
    server = Server("d", end, "10.1.1.14", "fd00:10:1::14")
    lab.link(cluster.node, router)
    lab.link(router, end)
    router.ip(f"link set dev server-d mtu {mtu}")
    end.ip(f"link set dev router mtu {mtu}")
    cluster.node.add_address("router", "10.1.2.1/24", "fd00:10:2::1/64")
    router.add_address("node", "10.1.2.2/24", "fd00:10:2::2/64")
    router.add_address("server-d", "10.1.3.1/24", "fd00:10:3::1/64")
    end.add_address("router", "10.1.3.2/24", "fd00:10:3::2/64")
    end.add_address("lo", f"{server.ipv4}/32", f"{server.ipv6}/128")
    for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        router.sysctl(key, 1)
    for address, hop, further in (
        (server.ipv4, "10.1.2.2", "10.1.3.2"),
        (server.ipv6, "fd00:10:2::2", "fd00:10:3::2"),
    ):
        cluster.node.ip(f"route add {address} via {hop}")
        router.ip(f"route add {address} via {further}")
    router.ip("route add default via 10.1.2.1", "route add default via fd00:10:2::1")
    end.ip("route add default via 10.1.3.1", "route add default via fd00:10:3::1")
    return server


def learnt(cluster: Topology) -> list[int]:
    """The path MTUs to the tunnel's addresses that the client's kernel knows; 0: none."""
    routes = (["ip", "route", "get", address] for address in TUNNEL.cluster_ips)
    found = (cluster.client.run(route).stdout.split() for route in routes)
    return [int(words[words.index("mtu") + 1]) if "mtu" in words else 0 for words in found]


def test_a_client_learns_how_wide_the_way_beyond_the_tunnel_is(
    lab: Lab, cluster: Topology, start: Start, folder: Path
) -> None:
    """A router tells the node that what comes out of the tunnel's mouth is too big. The client
    hears of it, in terms of its own packets.
    """
    server = behind_a_router(lab, cluster, 1400)
    server.start(http=(PORT,), udp=PORTS[1])
    write_one(folder / "manifests", TUNNEL, [Backend("d", server.ipv4, server.ipv6)])
    take_virtual_addresses([server], [], TUNNEL.cluster_ips)
    digest = hashlib.sha256(PATTERN).hexdigest()
    with start():
        assert learnt(cluster) == [0, 0]
        for address in TUNNEL.cluster_ips:
            target = (address, TUNNEL.port)
            assert cluster.client.call(there_and_back, target) == (digest, digest), target
        wait_until(lambda: learnt(cluster) == [1400 - 20, 1400 - 40], TIMEOUT, "the path MTUs")
