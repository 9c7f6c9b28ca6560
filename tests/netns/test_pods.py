"""Pods, selectors and addresses without a cluster: manifests as users write them, and traffic."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from traffic import PORTS, Start, Target, ask, write_objects

from svcdp.cli._demo.daemon import RunningDaemon
from svcdp.lab import Server, Topology, wait_until

pytestmark = pytest.mark.netns

TIMEOUT = 10.0  # seconds
PORT = 3000
SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "service-python"},
    "spec": {
        "type": "NodePort",
        "ipFamilyPolicy": "RequireDualStack",
        "selector": {"run": "pod-python"},
        "ports": [{"port": PORT, "targetPort": "http"}],
    },
}


def pod(name: str, server: Server, *, ready: bool = True) -> dict[str, Any]:
    port = {"name": "http", "containerPort": PORTS[0]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"run": "pod-python"}},
        "spec": {"containers": [{"name": "python", "ports": [port]}]},
        "status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "podIPs": [{"ip": server.ipv4}, {"ip": server.ipv6}],
        },
    }


def write(folder: Path, *objects: dict[str, Any]) -> None:
    write_objects(folder / "manifests", *objects, name="pods")


def in_force(daemon: RunningDaemon, servers: Iterable[Server]) -> None:
    """Wait until these serve, and nobody else."""
    wanted = {address for server in servers for address in (server.ipv4, server.ipv6)}

    def found() -> set[str]:
        return {
            item["address"]
            for item in daemon.get("endpoints")
            if item["service"].startswith("service-python")
        }

    wait_until(lambda: found() == wanted, TIMEOUT, f"{wanted} in force")


def targets(daemon: RunningDaemon, cluster: Topology) -> list[Target]:
    """Where the Service was given its addresses."""
    (service,) = [each for each in daemon.get("services") if each["name"] == "service-python"]
    (node_port,) = [port["nodePort"] for port in service["ports"]]
    assert len(service["clusterIPs"]) == 2
    return [
        *((address, PORT) for address in service["clusterIPs"]),
        *((address, node_port) for address in (cluster.node_ipv4, cluster.node_ipv6)),
    ]


def test_pods_come_go_and_move(cluster: Topology, folder: Path, start: Start) -> None:
    a, b, c = cluster.servers
    write(folder, SERVICE, pod("one", a), pod("two", b))
    with start() as daemon:
        given = targets(daemon, cluster)

        def served() -> list[set[str]]:
            return [{ask(cluster.client, each)["server"] for _ in range(4)} for each in given]

        assert served() == [{"a", "b"}] * 4
        assert [each["services"] for each in daemon.get("pods")] == [["service-python"]] * 2
        write(folder, SERVICE, pod("one", a, ready=False), pod("two", b))
        in_force(daemon, [b])
        assert served() == [{"b"}] * 4
        write(folder, SERVICE, pod("two", c))
        in_force(daemon, [c])
        assert served() == [{"c"}] * 4
        write(folder, SERVICE)
        in_force(daemon, [])
        for target in given:
            with pytest.raises(ConnectionRefusedError):
                ask(cluster.client, target)
        assert targets(daemon, cluster) == given


def test_addresses_outlive_a_restart(cluster: Topology, folder: Path, start: Start) -> None:
    """Also when a Service came meanwhile that would have got them."""
    write(folder, SERVICE, pod("one", cluster.servers[0]))
    file = ("--allocations-file", str(folder / "allocations.json"))
    with start(*file) as daemon:
        given = targets(daemon, cluster)
    metadata = {"name": "other", "creationTimestamp": "2020-01-01T00:00:00Z"}
    spec = {"ports": [{"port": 80}], "clusterIP": given[0][0]}
    write(
        folder,
        SERVICE,
        {**SERVICE, "metadata": metadata, "spec": spec},
        pod("one", cluster.servers[0]),
    )
    with start(*file) as daemon:
        assert targets(daemon, cluster) == given
        assert {ask(cluster.client, each)["server"] for each in given} == {"a"}


def test_a_load_balancer_address_of_a_pool(cluster: Topology, folder: Path, start: Start) -> None:
    address = "203.0.113.7"
    pool = {
        "apiVersion": "svcdp.io/v1alpha1",
        "kind": "LoadBalancerPool",
        "metadata": {"name": "outside"},
        "spec": {"addresses": [f"{address}-{address}"]},
    }
    spec = {**SERVICE["spec"], "type": "LoadBalancer", "ipFamilyPolicy": "SingleStack"}
    write(folder, {**SERVICE, "spec": spec}, pool, pod("one", cluster.servers[0]))
    cluster.client.ip(f"route replace {address} via {cluster.node_ipv4}")
    with start() as daemon:
        (service,) = [each for each in daemon.get("services") if each["type"] == "LoadBalancer"]
        assert service["loadBalancerIPs"] == [address]
        assert ask(cluster.client, (address, PORT))["server"] == "a"
