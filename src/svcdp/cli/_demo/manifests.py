"""The manifests of the demo: a web server and a UDP echo server, dual stack, on node ports, and
the web server again without NAT.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["DR", "ECHO", "PORT", "TUNNEL", "WEB", "Backend", "Served", "write", "write_one"]

PORT = 8080  # where backends listen, TCP and UDP


@dataclass(frozen=True)
class Backend:
    """A server: its name and its address of each family."""

    name: str
    ipv4: str
    ipv6: str


@dataclass(frozen=True)
class Served:
    """A Service of the demo; ``node_port`` 0: none."""

    name: str
    protocol: str
    cluster_ips: tuple[str, str]
    port: int
    node_port: int = 0
    forwarding: str = "masq"


WEB = Served("web", "TCP", ("10.96.0.10", "fd00:10:96::a"), 80, 30080)
ECHO = Served("echo", "UDP", ("10.96.0.20", "fd00:10:96::14"), 7, 30007)
# Their port is the backends': nobody rewrites it.
TUNNEL = Served("tunnel", "TCP", ("10.96.0.30", "fd00:10:96::1e"), PORT, forwarding="tunnel")
DR = Served("dr", "TCP", ("10.96.0.40", "fd00:10:96::28"), PORT, forwarding="dr")


def write(
    folder: Path, backends: Iterable[Backend], weights: Mapping[Backend, int] | None = None
) -> None:
    """Write the two Services on node ports with these endpoints."""
    backends = tuple(backends)
    for served in (WEB, ECHO):
        write_one(folder, served, backends, weights)


def write_one(
    folder: Path,
    served: Served,
    backends: Iterable[Backend],
    weights: Mapping[Backend, int] | None = None,
) -> None:
    """Write a Service with these endpoints, as one file and in one step."""
    items = [_service(served, weights or {}), *_slices(served, tuple(backends))]
    hidden = folder / f".{served.name}.json"
    hidden.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    os.replace(hidden, folder / f"{served.name}.json")


def _service(served: Served, weights: Mapping[Backend, int]) -> dict[str, Any]:
    texts = [f"{a}={n}" for each, n in weights.items() for a in (each.ipv4, each.ipv6)]
    annotations = {"svcdp.io/weights": ", ".join(texts)} if texts else {}
    if served.forwarding != "masq":
        annotations["svcdp.io/forwarding"] = served.forwarding
    port: dict[str, Any] = {"name": "main", "protocol": served.protocol, "port": served.port}
    if served.node_port:
        port["nodePort"] = served.node_port
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": served.name, "annotations": annotations},
        "spec": {
            "type": "NodePort" if served.node_port else "ClusterIP",
            "ipFamilies": ["IPv4", "IPv6"],
            "clusterIP": served.cluster_ips[0],
            "clusterIPs": served.cluster_ips,
            "ports": [port],
        },
    }


def _slices(served: Served, backends: Iterable[Backend]) -> list[dict[str, Any]]:
    families = {"IPv4": [b.ipv4 for b in backends], "IPv6": [b.ipv6 for b in backends]}
    return [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{served.name}-{family.lower()}",
                "labels": {"kubernetes.io/service-name": served.name},
            },
            "addressType": family,
            "ports": [{"name": "main", "protocol": served.protocol, "port": PORT}],
            "endpoints": [{"addresses": [address]} for address in addresses],
        }
        for family, addresses in families.items()
    ]
