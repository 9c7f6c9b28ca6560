"""One Service and what becomes of it while clients use it: its policies, its type, its endpoints.

All tests share one node and one daemon.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pytest
from traffic import (
    CLUSTER_IPS,
    NODE_PORT,
    PORT,
    PORTS,
    SILENCE,
    UDP_PORT,
    Kept,
    Target,
    all_meet,
    ask,
    endpoint_slice,
    meets,
    write_objects,
)

from svcdp.cli._demo.daemon import RunningDaemon, running_daemon
from svcdp.lab import Lab, Namespace, Server, Topology, wait_until

pytestmark = pytest.mark.netns

TIMEOUT = 10.0  # seconds
OTHER_NODE_PORT, UDP_NODE_PORT = 30081, 30053
#: Of a load balancer. The node has them, as some announce them, so that it refuses what it does
#: not serve.
BALANCER_IPS = ("203.0.113.7", "2001:db8:ff::7")
PROXY_NAME = "service.kubernetes.io/service-proxy-name"

READY = {"ready": True}
TERMINATING = {"ready": False, "serving": True, "terminating": True}
STOPPED = {"ready": False, "serving": False, "terminating": True}


@dataclass
class Scene:
    cluster: Topology
    daemon: RunningDaemon
    _steps: int = 0

    @property
    def clients(self) -> list[Namespace]:
        """From outside, from the node, and from a Pod that never serves."""
        return [self.cluster.client, self.cluster.node, self.cluster.servers[2].namespace]

    @property
    def virtual(self) -> list[Target]:
        return [(address, PORT) for address in CLUSTER_IPS]

    def node_ports(self, port: int = NODE_PORT) -> list[Target]:
        return [(address, port) for address in (self.cluster.node_ipv4, self.cluster.node_ipv6)]

    def have(self, *objects: Mapping[str, Any]) -> None:
        """Have these and nothing else, in force when it returns."""
        self._steps += 1
        write_objects(self.daemon.folder / "manifests", *objects, *step(self._steps))

        def reached() -> list[int]:
            return [e["port"] for e in self.daemon.get("endpoints") if e["service"] == "step"]

        wait_until(lambda: reached() == [self._steps], TIMEOUT, "the change in force")


def step(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A Service whose endpoint tells which of all changes is in force."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "step"},
        "spec": {"clusterIP": "10.96.0.99", "ports": [{"port": 1}]},
    }
    return service, endpoint_slice(
        "step", "IPv4", [{"name": "", "port": number}], [{"addresses": ["10.1.1.99"]}]
    )


@pytest.fixture(scope="module")
def module_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "manifests").mkdir()
    with Lab() as lab:
        # With the firewall the kernel tracks connections, as on nodes.
        cluster = Topology.build(lab, firewall=True)
        cluster.start_servers()
        cluster.node.add_address("lo", f"{BALANCER_IPS[0]}/32", f"{BALANCER_IPS[1]}/128")
        settings = ["--node-name", "node", "--pod-cidrs", ",".join(cluster.pod_cidrs)]
        settings += ["--addresses", f"{cluster.node_ipv4},{cluster.node_ipv6}"]
        settings += ["--service-cidrs", ",".join(cluster.service_cidrs)]
        with running_daemon(cluster.node.popen, folder, *settings) as daemon:
            yield Scene(cluster, daemon)


@pytest.fixture
def scene(module_scene: Scene) -> Iterator[Scene]:
    """The Service is not there at first."""
    yield module_scene
    module_scene.have()


def web(labels: Mapping[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    """The Service, unless ``spec`` says otherwise on two node ports."""
    fields = {
        "type": "NodePort",
        "ipFamilies": ["IPv4", "IPv6"],
        "clusterIP": CLUSTER_IPS[0],
        "clusterIPs": CLUSTER_IPS,
        "ports": ports(NODE_PORT, UDP_NODE_PORT),
        **spec,
    }
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "labels": labels or {}},
        "spec": fields,
    }


def ports(node_port: int | None = None, udp_node_port: int | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": "http", "protocol": "TCP", "port": PORT, "nodePort": node_port},
        {"name": "echo", "protocol": "UDP", "port": UDP_PORT, "nodePort": udp_node_port},
    ]
    return [{name: value for name, value in port.items() if value} for port in found]


def served_by(endpoints: Mapping[Server, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """EndpointSlices of both families, with the conditions of each server. Server b is said to
    be on another node.
    """
    found = [
        {"name": "http", "protocol": "TCP", "port": PORTS[0]},
        {"name": "echo", "protocol": "UDP", "port": PORTS[1]},
    ]
    return [
        endpoint_slice(
            "web",
            family,
            found,
            [
                {
                    "addresses": [getattr(server, family.lower())],
                    "nodeName": "other" if server.name == "b" else "node",
                    "conditions": conditions,
                }
                for server, conditions in endpoints.items()
            ],
        )
        for family in ("IPv4", "IPv6")
    ]


def test_internal_traffic_stays_on_the_node(scene: Scene) -> None:
    """Nobody on this node: silence for cluster IPs, while node ports lead to the other node.
    Nobody anywhere: a refusal.
    """
    a, b, c = scene.cluster.servers
    local = web(internalTrafficPolicy="Local")
    scene.have(local, *served_by({a: READY, b: READY}))
    for _ in range(2):
        assert all_meet([*scene.clients, a.namespace], scene.virtual) == {"a"}
    assert [ask(c.namespace, target)["client"][0] for target in scene.virtual] == [c.ipv4, c.ipv6]
    node = [scene.cluster.node_ipv4, scene.cluster.node_ipv6]
    for source in (scene.cluster.client, scene.cluster.node, a.namespace):
        assert [ask(source, target)["client"][0] for target in scene.virtual] == node
    for target in scene.node_ports():
        assert {meets(scene.cluster.client, target) for _ in range(4)} == {"a", "b"}

    scene.have(local, *served_by({b: READY}))
    assert all_meet(scene.clients, scene.virtual) == {"silence"}
    assert all_meet(scene.clients, scene.node_ports()) == {"b"}
    scene.have(local, *served_by({b: TERMINATING}))
    assert all_meet(scene.clients, scene.virtual) == {"silence"}
    scene.have(local)
    assert all_meet(scene.clients, [*scene.virtual, *scene.node_ports()]) == {"refused"}


def test_pings(scene: Scene) -> None:
    """A Service's cluster IP refuses them, as a closed port does; where no Service is, nobody
    answers. None leaves the node.
    """
    scene.have(web())
    for source in scene.clients:
        source.sysctl("net.ipv4.ping_group_range", "0 0")
        for address in CLUSTER_IPS:
            assert source.call(ping, address, TIMEOUT) == "refused"
    for address in ("10.96.0.77", "fd00:10:96::77"):
        assert scene.cluster.client.call(ping, address, SILENCE) == "silence"
    node = scene.cluster.node_ipv4, scene.cluster.node_ipv6
    assert {scene.cluster.client.call(ping, each, TIMEOUT) for each in node} == {"answered"}


def ping(address: str, timeout: float) -> str:
    """What an echo request meets."""
    is_six = ":" in address
    family = socket.AF_INET6 if is_six else socket.AF_INET
    protocol = socket.getprotobyname("ipv6-icmp" if is_six else "icmp")
    with socket.socket(family, socket.SOCK_DGRAM, protocol) as sock:
        sock.settimeout(timeout)
        sock.connect((address, 0))
        sock.send(struct.pack(">BBHHH", 128 if is_six else 8, 0, 0, 0, 1))
        try:
            sock.recv(100)
        except ConnectionRefusedError:
            return "refused"
        except TimeoutError:
            return "silence"
    return "answered"


def test_source_ranges(scene: Scene) -> None:
    """Who is not in them hears nothing from the load balancer's addresses, not even that nobody
    serves there. Cluster IPs and node ports know no ranges.
    """
    a, _, c = scene.cluster.servers
    status = {"loadBalancer": {"ingress": [{"ip": address} for address in BALANCER_IPS]}}
    ranges = [f"{scene.cluster.client_ipv4}/32", f"{scene.cluster.client_ipv6}/128"]
    balanced = {**web(type="LoadBalancer", loadBalancerSourceRanges=ranges), "status": status}
    targets = [(address, PORT) for address in BALANCER_IPS]
    scene.have(balanced, *served_by({a: READY}))
    assert all_meet([scene.cluster.client], targets) == {"a"}
    assert all_meet([c.namespace], targets) == {"silence"}
    assert all_meet(scene.clients, [*scene.virtual, *scene.node_ports()]) == {"a"}
    scene.have(balanced)
    assert all_meet([scene.cluster.client], targets) == {"refused"}
    assert all_meet([c.namespace], targets) == {"silence"}


def test_affinity(scene: Scene) -> None:
    """A client stays, on cluster IP and node port alike, until affinity is taken from the
    Service, its server leaves, or it does not come back in time.
    """
    a, b, c = scene.cluster.servers
    both = served_by({a: READY, b: READY})
    sticky = web(sessionAffinity="ClientIP")
    #: Of one family: there a client has one address.
    pairs = list(zip(scene.virtual, scene.node_ports(), strict=True))

    def served(targets: tuple[Target, ...]) -> set[str]:
        return {meets(scene.cluster.client, target) for target in targets * 3}

    scene.have(sticky, *both)
    for pair in pairs:
        assert len(served(pair)) == 1
    scene.have(web(), *both)
    for pair in pairs:
        assert served(pair) == {"a", "b"}
    scene.have(sticky, *both)
    for pair in pairs:
        (first,) = served(pair)
        left, other = (a, b) if first == "b" else (b, a)
        scene.have(sticky, *served_by({left: READY}))
        assert served(pair) == {left.name}
        scene.have(sticky, *served_by({left: READY, other: READY}))
        assert served(pair) == {left.name}

    short = {"clientIP": {"timeoutSeconds": 1}}
    scene.have(web(sessionAffinity="ClientIP", sessionAffinityConfig=short), *both)
    before = [meets(c.namespace, target) for target in scene.virtual]
    time.sleep(1.1)  # only to stay away ends it
    # Round robin, and nobody else asked.
    assert [{"a": "b", "b": "a"}[meets(c.namespace, target)] for target in scene.virtual] == before


#: Of the annotation svcdp.io/on-endpoint-removal: its value, and whether connections end.
REMOVALS = [(None, False), ("drain", False), ("drain=1s", True), ("reset", True), ("never", False)]


@pytest.mark.parametrize(("removal", "ends"), REMOVALS)
def test_connections_of_a_removed_endpoint(scene: Scene, removal: str | None, ends: bool) -> None:
    """They go on, or clients hear of their end when they next send."""
    a, b, _ = scene.cluster.servers
    asked = web()
    if removal:
        asked["metadata"]["annotations"] = {"svcdp.io/on-endpoint-removal": removal}
    scene.have(asked, *served_by({a: READY}))
    with ExitStack() as stack:
        kept = [
            stack.enter_context(Kept(source, target))
            for source in scene.clients
            for target in (*scene.virtual, *scene.node_ports())
        ]
        assert {each.ask()["server"] for each in kept} == {"a"}
        scene.have(asked, *served_by({b: READY}))
        assert all_meet(scene.clients, scene.virtual) == {"b"}
        if not ends:
            assert {each.ask()["server"] for each in kept} == {"a"}
            return
        for each in kept:
            wait_until(partial(is_reset, each), TIMEOUT, "the client hears of it")


def is_reset(connection: Kept) -> bool:
    """By the next request; until then it is answered by server a."""
    try:
        assert connection.ask()["server"] == "a"
    except ConnectionResetError:
        return True
    return False


def test_terminating_endpoints(scene: Scene) -> None:
    """Connections go on whatever becomes of their endpoint. New ones go to those that are ready,
    and where there is none, to those that still serve.
    """
    a, b, _ = scene.cluster.servers
    targets = [*scene.virtual, *scene.node_ports()]

    def served() -> set[str]:
        return {meets(source, target) for source in scene.clients for target in targets * 2}

    with ExitStack() as stack:
        scene.have(web(), *served_by({a: READY, b: READY}))
        kept = [
            stack.enter_context(Kept(source, target))
            for source, target in product(scene.clients, targets * 2)
        ]
        first = [connection.ask() for connection in kept]
        assert {answer["server"] for answer in first} == {"a", "b"}
        for conditions, expected in (
            ({a: TERMINATING, b: READY}, {"b"}),
            ({a: TERMINATING, b: TERMINATING}, {"a", "b"}),
            ({a: TERMINATING, b: STOPPED}, {"a"}),
            ({a: STOPPED, b: STOPPED}, {"refused"}),
            ({}, {"refused"}),
        ):
            scene.have(web(), *served_by(conditions))
            assert served() == expected
            assert [connection.ask() for connection in kept] == first


class Flow:
    """Datagrams of one socket."""

    def __init__(self, source: Namespace, target: Target) -> None:
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        self._socket = source.call(socket.socket, family, socket.SOCK_DGRAM)
        self._socket.connect(target)

    def meets(self, timeout: float = TIMEOUT) -> str:
        """The name of who answers the next datagram, or "refused" or "silence"."""
        self._socket.settimeout(timeout)
        try:
            self._socket.send(b"hello")
            return self._socket.recv(100).removesuffix(b" hello").decode()
        except ConnectionRefusedError:
            return "refused"
        except TimeoutError:
            return "silence"

    def close(self) -> None:
        self._socket.close()


def test_udp_follows_the_endpoints(scene: Scene) -> None:
    """Flows of one socket each leave with their endpoint, once it serves no longer, and find the
    next. They are older than the Service: the kernel tracks those to the node's own addresses.
    """
    a, b, _ = scene.cluster.servers
    virtual = [(address, UDP_PORT) for address in CLUSTER_IPS]
    with ExitStack() as stack:

        def flows(targets: list[Target]) -> list[Flow]:
            found = [Flow(source, target) for source in scene.clients for target in targets]
            for flow in found:
                stack.callback(flow.close)
            return found

        known, unknown = flows(scene.node_ports(UDP_NODE_PORT)), flows(virtual)

        def met(timeout: float = TIMEOUT) -> set[str]:
            return {flow.meets(timeout) for flow in (*known, *unknown)}

        without = {"refused", "silence"}  # nobody listens on the node; no Service has the address
        assert met(0.1) == without
        for endpoints, expected in (
            ({a: READY}, {"a"}),
            ({b: READY}, {"b"}),
            ({}, {"refused"}),
            ({a: READY}, {"a"}),
            ({a: TERMINATING, b: READY}, {"a"}),
            ({a: STOPPED, b: READY}, {"b"}),
            ({a: TERMINATING, b: STOPPED}, {"a"}),
        ):
            scene.have(web(), *served_by(endpoints))
            assert met() == expected
        scene.have()
        assert met(0.1) == without
        scene.have(web(), *served_by({a: READY}))
        assert met() == {"a"}


def test_the_type_changes(scene: Scene) -> None:
    """Each address is served as long as the Service has it, from the next connection on."""
    a = scene.cluster.servers[0]
    slices = served_by({a: READY})
    targets = {
        "cluster": scene.virtual,
        "port": scene.node_ports(),
        "other port": scene.node_ports(OTHER_NODE_PORT),
        "balancer": [(address, PORT) for address in BALANCER_IPS],
    }
    #: What clients outside meet where nothing is served.
    without = dict.fromkeys(targets, "refused") | {"cluster": "silence"}
    plain = web(type="ClusterIP", ports=ports())
    moved = web(ports=ports(OTHER_NODE_PORT))
    ingress = [{"ip": address} for address in BALANCER_IPS]
    balanced = {**web(type="LoadBalancer"), "status": {"loadBalancer": {"ingress": ingress}}}
    steps: list[tuple[dict[str, Any], set[str]]] = [
        (plain, {"cluster"}),
        (web(), {"cluster", "port"}),
        (moved, {"cluster", "other port"}),
        (balanced, {"cluster", "port", "balancer"}),
        (plain, {"cluster"}),
        (web(type="ExternalName", externalName="example.net"), set()),
        (balanced, {"cluster", "port", "balancer"}),
        (web(labels={PROXY_NAME: "other"}), set()),
        (web(), {"cluster", "port"}),
        (web(type="ClusterIP", clusterIP="None", clusterIPs=["None"], ports=ports()), set()),
        (plain, {"cluster"}),
    ]
    for service, served in steps:
        scene.have(service, *slices)
        found = {name: all_meet([scene.cluster.client], places) for name, places in targets.items()}
        assert found == {name: {"a" if name in served else without[name]} for name in targets}, (
            service["spec"]
        )
