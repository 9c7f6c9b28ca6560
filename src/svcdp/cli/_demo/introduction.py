"""The Services of a typical introduction to Kubernetes, as it writes them
(``examples/introduction``), and a pool for its load balancer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dns.message
import dns.query

from svcdp.cli._demo.report import NameResult
from svcdp.lab import Namespace

__all__ = ["MANIFESTS", "TARGET_PORT", "Place", "look_up", "places", "write"]

NAME, PORT, TARGET_PORT, NODE_PORT = "service-python", 3000, 443, 30080
EXTERNAL_NAME = "remote.server.url.com"
ZONE = "default.svc.cluster.local"
TIMEOUT = 5.0  # seconds

Place = tuple[str, str, str, int]
"""What it is, protocol, address and port."""


def _service(name: str, kind: str, **port: int) -> dict[str, Any]:
    ports = [{"port": PORT, "protocol": "TCP", "targetPort": TARGET_PORT, **port}]
    spec = {"type": kind, "ports": ports, "selector": {"run": "pod-python"}}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


MANIFESTS: tuple[Mapping[str, Any], ...] = (
    _service(NAME, "ClusterIP"),
    _service(f"{NAME}-node-port", "NodePort", nodePort=NODE_PORT),
    _service(f"{NAME}-load-balancer", "LoadBalancer"),
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{NAME}-external"},
        "spec": {"type": "ExternalName", "externalName": EXTERNAL_NAME},
    },
    {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod-python", "labels": {"run": "pod-python"}},
        "spec": {
            "containers": [
                {
                    "name": "python",
                    "image": "python",
                    "ports": [{"containerPort": TARGET_PORT}],
                }
            ]
        },
        "status": {"phase": "Running", "podIP": "10.1.1.11"},
    },
)
POOL = {
    "apiVersion": "svcdp.io/v1alpha1",
    "kind": "LoadBalancerPool",
    "metadata": {"name": "demo"},
    "spec": {"addresses": ["203.0.113.0/28"]},
}


def write(folder: Path) -> None:
    """Write them, with the pool, as one file."""
    items = {"apiVersion": "v1", "kind": "List", "items": [*MANIFESTS, POOL]}
    (folder / "introduction.json").write_text(json.dumps(items))


def places(services: Mapping[str, Mapping[str, Any]], node_address: str) -> list[Place]:
    """Where Pods are reached. ``services`` are the daemon's, by name."""
    return [
        (f"ClusterIP {NAME}", "TCP", services[NAME]["clusterIPs"][0], PORT),
        (f"NodePort {NAME}-node-port", "TCP", node_address, NODE_PORT),
        *(
            (f"LoadBalancer {NAME}-load-balancer", "TCP", address, PORT)
            for address in services[f"{NAME}-load-balancer"]["loadBalancerIPs"]
        ),
    ]


def look_up(
    source: Namespace, server: str, services: Mapping[str, Mapping[str, Any]]
) -> list[NameResult]:
    """What the DNS server says of their names."""
    expected = [
        (name, "A", services[name]["clusterIPs"][0])
        for name in (NAME, f"{NAME}-node-port", f"{NAME}-load-balancer")
    ]
    expected.append((f"{NAME}-external", "CNAME", f"{EXTERNAL_NAME}."))
    found = []
    for name, kind, text in expected:
        query = dns.message.make_query(f"{name}.{ZONE}", kind)
        reply = source.call(dns.query.udp, query, server, TIMEOUT)
        texts = [record.to_text() for rrset in reply.answer for record in rrset]
        found.append(NameResult(f"{name}.{ZONE}", kind, texts, text))
    return found
