"""Node ports at the node's own loopback addresses."""

from __future__ import annotations

from pathlib import Path

import pytest
from traffic import CLUSTER_IPS, NODE_PORT, PORT, PORTS, Start, ask, endpoint_slice, write_objects

from svcdp.lab import Topology, wait_until

pytestmark = pytest.mark.netns

PLACES = [("127.0.0.1", NODE_PORT), ("::1", NODE_PORT)]
SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web"},
    "spec": {
        "type": "NodePort",
        "ipFamilies": ["IPv4", "IPv6"],
        "clusterIPs": CLUSTER_IPS,
        "clusterIP": CLUSTER_IPS[0],
        "ports": [{"name": "http", "port": PORT, "nodePort": NODE_PORT}],
    },
}


def test_node_ports_at_localhost(cluster: Topology, folder: Path, start: Start) -> None:
    """Of both families, past an endpoint where nobody listens."""
    a, b, c = cluster.servers
    ports = [{"name": "http", "port": PORTS[0]}]
    slices = []
    for family, addresses in (("IPv4", (a.ipv4, b.ipv4)), ("IPv6", (a.ipv6, b.ipv6))):
        endpoints = [{"addresses": [address]} for address in addresses]
        slices.append(endpoint_slice("web", family, ports, endpoints))
        gone = {"addresses": [c.ipv4 if family == "IPv4" else c.ipv6]}
        slices.append(endpoint_slice("web", family, [{"name": "http", "port": 9}], [gone]))
        slices[-1]["metadata"]["name"] += "-gone"
    write_objects(folder / "manifests", SERVICE, *slices)
    with start("--localhost-node-ports"):
        for place in PLACES:
            said = [ask(cluster.node, place) for _ in range(6)]
            assert {each["server"] for each in said} == {"a", "b"}
        write_objects(folder / "manifests", SERVICE)
        wait_until(lambda: is_refused(cluster), 10, "the port to be closed")


def is_refused(cluster: Topology) -> bool:
    try:
        ask(cluster.node, PLACES[0])
    except ConnectionError as error:  # a reset is that of one who came a moment before
        return isinstance(error, ConnectionRefusedError)
    return False
