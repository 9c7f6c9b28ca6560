"""What load balancers, kubelets and Prometheus get from a daemon, over real networks."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from traffic import CLUSTER_IPS, PORT, Start, ask, endpoint_slice, write_objects

from svcdp.lab import Namespace, Topology, wait_until

pytestmark = pytest.mark.netns

TIMEOUT = 10.0  # seconds
HEALTH_PORT, TAKEN_PORT = 30500, 30501


@dataclass
class Answer:
    status: int
    body: str


def fetch(place: Namespace, address: str, port: int, path: str = "/") -> Answer:
    """A request of its own from there."""
    connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT)
    place.call(connection.connect)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return Answer(response.status, response.read().decode())
    finally:
        connection.close()


def balanced(name: str, cluster_ips: tuple[str, ...], port: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "type": "LoadBalancer",
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": port,
            "clusterIP": cluster_ips[0],
            "clusterIPs": cluster_ips,
            "ipFamilies": ["IPv6" if ":" in address else "IPv4" for address in cluster_ips],
            "ports": [{"name": "http", "port": PORT}],
        },
    }


def endpoints(family: str, **conditions: dict[str, bool]) -> dict[str, Any]:
    """One on this node for each address (with ``_`` for dots and colons), and one elsewhere."""
    elsewhere = "10.1.1.99" if family == "IPv4" else "fd00:10:1::99"
    found = [
        {"addresses": [address], "nodeName": "node", "conditions": states}
        for address, states in conditions.items()
    ]
    found.append({"addresses": [elsewhere], "nodeName": "other", "conditions": {"ready": False}})
    return endpoint_slice("web", family, [{"name": "http", "port": 9000}], found)


def write(folder: Path, *objects: dict[str, Any]) -> None:
    write_objects(folder / "manifests", *objects)


def test_probes_and_metrics(cluster: Topology, folder: Path, start: Start) -> None:
    server = cluster.servers[0]
    four, six = cluster.node_ipv4, cluster.node_ipv6
    web = balanced("web", CLUSTER_IPS, HEALTH_PORT)
    other = balanced("other", ("10.96.0.11",), TAKEN_PORT)
    ready, terminating = {"ready": True}, {"ready": False, "serving": True, "terminating": True}

    def heard(address: str) -> tuple[int, int]:
        answer = fetch(cluster.client, address, HEALTH_PORT, "/anything")
        said = json.loads(answer.body)
        assert said["service"] == {"namespace": "default", "name": "web"}
        assert said["serviceProxyHealthy"] is True
        return answer.status, said["localEndpoints"]

    def becomes(ipv4: tuple[int, int], ipv6: tuple[int, int]) -> None:
        wanted = [ipv4, ipv6]
        wait_until(lambda: [heard(four), heard(six)] == wanted, TIMEOUT, f"{wanted}")

    slices = [endpoints("IPv4", **{server.ipv4: ready}), endpoints("IPv6", **{server.ipv6: ready})]
    write(folder, web, other, *slices)
    taken = cluster.node.call(socket.create_server, (four, TAKEN_PORT))
    with taken, start() as daemon:
        becomes((200, 1), (200, 1))
        slices[0] = endpoints("IPv4", **{server.ipv4: terminating})
        write(folder, web, other, *slices)
        becomes((503, 0), (200, 1))
        answer = ask(cluster.client, (CLUSTER_IPS[0], PORT))
        assert answer["server"] == server.name, "those that terminate are served all the same"

        for path in ("/healthz", "/livez", "/readyz"):
            assert fetch(cluster.client, four, 10256, path).status == 200
        with pytest.raises(ConnectionRefusedError):
            fetch(cluster.client, four, 10249, "/metrics")
        assert fetch(cluster.node, "127.0.0.1", 10249, "/proxyMode") == Answer(200, "nfqueue")
        metrics = fetch(cluster.node, "127.0.0.1", 10249, "/metrics").body.splitlines()
        values = dict(line.rsplit(" ", 1) for line in metrics if not line.startswith("#"))
        assert float(values['svcdp_packets_total{reason="NEW",verdict="FORWARD"}']) == 1
        assert float(values["kubeproxy_sync_proxy_rules_duration_seconds_count"]) >= 2
        assert float(values["svcdp_services"]) == 2

        taint = {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node"}}
        write(folder, web, other, *slices, {**node, "spec": {"taints": [taint]}})

        def eligible() -> list[Any]:
            answer = fetch(cluster.client, four, 10256, "/healthz")
            return [answer.status, json.loads(answer.body)["nodeEligible"]]

        wait_until(lambda: eligible() == [503, False], TIMEOUT, "the node is drained")
        assert fetch(cluster.client, four, 10256, "/livez").status == 200
        assert heard(six) == (200, 1), "those that count on local endpoints see for themselves"
        write(folder, web, other, *slices, node)
        wait_until(lambda: eligible() == [200, True], TIMEOUT, "it is back")

        log = (daemon.folder / "log").read_text()
        assert log.count("FailedToStartServiceHealthcheck") == 1
        assert f"health-check node port {TAKEN_PORT} cannot be opened: {four}: " in log
