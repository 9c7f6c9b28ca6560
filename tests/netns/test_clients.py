"""Who asks, whom the server sees, and what is refused: from outside, from the node, from pods."""

from __future__ import annotations

from pathlib import Path

import pytest
from traffic import (
    CLUSTER_IPS,
    NODE_PORT,
    PORT,
    PORTS,
    UDP_PORT,
    Start,
    Target,
    ask,
    ask_udp,
    firewall,
    targets,
    write_service,
)

from svcdp.lab import Namespace, Topology

pytestmark = [pytest.mark.netns, firewall]

CLOSED_PORTS = (9001, 5354)  # of the pods


@pytest.fixture
def clients(cluster: Topology) -> dict[str, Namespace]:
    """The pods are the one that serves and another one."""
    serving, other = cluster.servers[:2]
    return {
        "outside": cluster.client,
        "node": cluster.node,
        "itself": serving.namespace,
        "pod": other.namespace,
    }


@pytest.fixture
def one_server(cluster: Topology, folder: Path) -> None:
    write_service(folder / "manifests", cluster.servers[:1])


def seen(source: Namespace, target: Target) -> str:
    """The address that the server sees."""
    return str(ask(source, target)["client"][0])


def test_whom_the_server_sees(
    one_server: None, cluster: Topology, clients: dict[str, Namespace], start: Start
) -> None:
    """kube-proxy masquerades node ports, to cluster IPs what does not come from pods, and a pod
    that reaches itself. A pod that asks another one by a cluster IP is seen as it is."""
    pod = cluster.servers[1]
    with start():
        for name, source in clients.items():
            for family, node, own in (
                (0, cluster.node_ipv4, pod.ipv4),
                (1, cluster.node_ipv6, pod.ipv6),
            ):
                expected = own if name == "pod" else node
                assert seen(source, (CLUSTER_IPS[family], PORT)) == expected, name
                assert seen(source, (node, NODE_PORT)) == node, name


def test_udp(
    one_server: None, cluster: Topology, clients: dict[str, Namespace], start: Start
) -> None:
    with start():
        for name, source in clients.items():
            for address in CLUSTER_IPS:
                assert ask_udp(source, (address, UDP_PORT)) == b"a hello", name


@pytest.mark.parametrize(
    ("count", "ports"), [(1, CLOSED_PORTS), (0, PORTS)], ids=["closed port", "no endpoints"]
)
def test_refusal_reaches_who_asked(
    cluster: Topology,
    folder: Path,
    clients: dict[str, Namespace],
    start: Start,
    count: int,
    ports: tuple[int, int],
) -> None:
    """The pod's own reset or ICMP error, and those that the dataplane makes."""
    write_service(folder / "manifests", cluster.servers[:count], ports=ports)
    with start():
        for source in clients.values():
            for target in targets(cluster):
                with pytest.raises(ConnectionRefusedError):
                    ask(source, target)
            for address in CLUSTER_IPS:
                with pytest.raises(ConnectionRefusedError):
                    ask_udp(source, (address, UDP_PORT))
