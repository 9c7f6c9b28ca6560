"""externalTrafficPolicy Local where it matters: two nodes, a Pod behind each, a client outside."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from traffic import PORTS, ask, endpoint_slice, meets, write_objects

from svcdp.cli._demo.daemon import RunningDaemon, running_daemon
from svcdp.lab import Lab, Namespace, Server, wait_until

pytestmark = pytest.mark.netns

TIMEOUT = 10.0  # seconds
PORT, NODE_PORT, HEALTH_PORT = 80, 30080, 30081
CLUSTER_IPS = ("10.96.0.20", "fd00:10:96::14")
#: Prefix lengths of one host.
HOST = (32, 128)


@dataclass(frozen=True)
class Node:
    """A node with its one Pod. ``outer`` are its addresses for the client, whose own are
    ``client``; ``inner`` those for the other node.
    """

    number: int
    namespace: Namespace
    pod: Server
    outer: tuple[str, str]
    client: tuple[str, str]
    inner: tuple[str, str]

    @property
    def name(self) -> str:
        return f"node-{self.number}"

    @property
    def pod_addresses(self) -> tuple[str, str]:
        return self.pod.ipv4, self.pod.ipv6


@dataclass(frozen=True)
class Cluster:
    client: Namespace
    nodes: tuple[Node, Node]


@pytest.fixture
def cluster(lab: Lab) -> Cluster:
    client = lab.namespace("client")
    nodes = tuple(make_node(lab, client, number) for number in (1, 2))
    one, two = nodes
    lab.link(one.namespace, two.namespace)
    for node, other in ((one, two), (two, one)):
        v4, v6 = node.inner
        node.namespace.add_address(other.name, f"{v4}/24", f"{v6}/64")
    for node, other in ((one, two), (two, one)):
        for index, (hop, length) in enumerate(zip(other.inner, HOST, strict=True)):
            for address in (other.pod_addresses[index], other.outer[index]):
                node.namespace.ip(f"route add {address}/{length} via {hop}")
        node.pod.start(http=(PORTS[0],), udp=PORTS[1])
    return Cluster(client, (one, two))


def make_node(lab: Lab, client: Namespace, number: int) -> Node:
    node = Node(
        number,
        lab.namespace(f"node-{number}"),
        Server(
            f"p{number}", lab.namespace(f"pod-{number}"), f"10.1.{number}.11", f"fd00:1:{number}::b"
        ),
        outer=(f"192.0.{number + 1}.1", f"fd00:2:{number}::1"),
        client=(f"192.0.{number + 1}.10", f"fd00:2:{number}::a"),
        inner=(f"10.9.0.{number}", f"fd00:9::{number}"),
    )
    lab.link(client, node.namespace)
    client.add_address(node.name, *(f"{a}/{n}" for a, n in zip(node.client, (24, 64), strict=True)))
    inside, pod = node.namespace, node.pod.namespace
    inside.add_address("client", *(f"{a}/{n}" for a, n in zip(node.outer, (24, 64), strict=True)))
    lab.link(inside, pod)
    for address, gateway, length in zip(
        node.pod_addresses, ("10.1.0.1", "fd00:1::1"), HOST, strict=True
    ):
        pod.add_address(node.name, f"{address}/{length}")
        inside.add_address(pod.name, f"{gateway}/{length}")
        inside.ip(f"route add {address}/{length} dev {pod.name}")
        pod.ip(f"route add {gateway}/{length} dev {node.name}", f"route add default via {gateway}")
    for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        inside.sysctl(key, 1)
    return node


def write(folder: Path, nodes: list[Node]) -> None:
    """A Service whose endpoints are the Pods of these nodes."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {
            "type": "LoadBalancer",
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": HEALTH_PORT,
            "ipFamilies": ["IPv4", "IPv6"],
            "clusterIP": CLUSTER_IPS[0],
            "clusterIPs": CLUSTER_IPS,
            "ports": [{"name": "http", "port": PORT, "nodePort": NODE_PORT}],
        },
    }
    slices = [
        endpoint_slice(
            "web",
            family,
            [{"name": "http", "port": PORTS[0]}],
            [{"addresses": [node.pod_addresses[index]], "nodeName": node.name} for node in nodes],
        )
        for index, family in enumerate(("IPv4", "IPv6"))
    ]
    write_objects(folder, service, *slices)


@contextmanager
def serving(cluster: Cluster, folder: Path, nodes: list[Node]) -> Iterator[list[RunningDaemon]]:
    """A daemon on each node, all on the same manifests."""
    manifests = folder / "manifests"
    manifests.mkdir()
    write(manifests, nodes)
    with ExitStack() as stack:
        daemons = []
        for node in cluster.nodes:
            own = folder / node.name
            own.mkdir()
            (own / "manifests").symlink_to(manifests)
            settings = ["--node-name", node.name, "--pod-cidrs", "10.1.0.0/16,fd00:1::/32"]
            settings += ["--service-cidrs", "10.96.0.0/16,fd00:10:96::/112"]
            settings += ["--addresses", ",".join(node.outer)]
            daemons.append(
                stack.enter_context(running_daemon(node.namespace.popen, own, *settings))
            )
        yield daemons


def health(cluster: Cluster, target: str) -> int:
    """What a load balancer's health check of a node gets."""
    connection = http.client.HTTPConnection(target, HEALTH_PORT, timeout=TIMEOUT)
    try:
        cluster.client.call(connection.connect)
        connection.request("GET", "/")
        return connection.getresponse().status
    finally:
        connection.close()


def test_external_traffic_stays_local(cluster: Cluster, tmp_path: Path) -> None:
    """The node with a Pod serves the client, whom the Pod sees as who it is. The other one is
    silent, and its health check fails; its own Pods and itself reach the Pod of the first.
    """
    one, two = cluster.nodes
    with serving(cluster, tmp_path, [one]):
        for family in range(2):
            answer = ask(cluster.client, (one.outer[family], NODE_PORT))
            assert answer["server"] == "p1"
            assert answer["client"][0] == one.client[family]
            assert meets(cluster.client, (two.outer[family], NODE_PORT)) == "silence"
            assert health(cluster, one.outer[family]) == 200
            assert health(cluster, two.outer[family]) == 503
            for source in (two.pod.namespace, two.namespace):
                for target in ((CLUSTER_IPS[family], PORT), (two.outer[family], NODE_PORT)):
                    assert ask(source, target)["server"] == "p1"
            from_pod = ask(two.pod.namespace, (CLUSTER_IPS[family], PORT))
            assert from_pod["client"][0] == two.pod_addresses[family]

        write(tmp_path / "manifests", [one, two])
        wait_until(lambda: health(cluster, two.outer[0]) == 200, TIMEOUT, "a Pod on node-2")
        for family in range(2):
            for node in cluster.nodes:
                for _ in range(4):
                    answer = ask(cluster.client, (node.outer[family], NODE_PORT))
                    assert answer["server"] == node.pod.name
                    assert answer["client"][0] == node.client[family]
            reached = {
                ask(two.pod.namespace, (two.outer[family], NODE_PORT))["server"] for _ in range(4)
            }
            assert reached == {"p1", "p2"}

        write(tmp_path / "manifests", [two])
        wait_until(lambda: health(cluster, one.outer[0]) == 503, TIMEOUT, "no Pod on node-1")
        for family in range(2):
            assert meets(cluster.client, (one.outer[family], NODE_PORT)) == "silence"
            assert ask(cluster.client, (two.outer[family], NODE_PORT))["server"] == "p2"


def test_nobody_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """Without an endpoint anywhere both nodes refuse, to everybody."""
    with serving(cluster, tmp_path, []):
        for family in range(2):
            for node in cluster.nodes:
                for source in (cluster.client, node.namespace, node.pod.namespace):
                    with pytest.raises(ConnectionRefusedError):
                        ask(source, (node.outer[family], NODE_PORT))
                assert health(cluster, node.outer[family]) == 503
