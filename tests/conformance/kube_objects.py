"""Kubernetes objects as the API server serves them, in a few words."""

from __future__ import annotations

from typing import Any

import pytest

from svcdp.types import ServiceSpec

Manifest = dict[str, Any]


def port(
    number: int = 80, name: str | None = "http", protocol: str = "TCP", **more: Any
) -> Manifest:
    """A port of a Service."""
    named = {} if name is None else {"name": name}
    return {"port": number, "protocol": protocol, **named, **more}


def service(name: str = "web", *cluster_ips: str, namespace: str = "shop", **more: Any) -> Manifest:
    """A Service; ``labels``, ``annotations`` and ``created`` go into the metadata."""
    cluster_ips = cluster_ips or ("10.96.0.10",)
    metadata = {"name": name, "namespace": namespace, "resourceVersion": "7"}
    for key in ("labels", "annotations"):
        if key in more:
            metadata[key] = more.pop(key)
    if "created" in more:
        metadata["creationTimestamp"] = more.pop("created")
    spec = {
        "type": "ClusterIP",
        "clusterIP": cluster_ips[0],
        "clusterIPs": list(cluster_ips),
        "ipFamilies": ["IPv6" if ":" in address else "IPv4" for address in cluster_ips],
        "ports": [port()],
        "selector": {"app": name},
        **more,
    }
    spec = {key: value for key, value in spec.items() if value is not None}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": {}}


def endpoint(address: str, *conditions: str, node: str | None = None, pod: str = "") -> Manifest:
    """An endpoint; conditions such as ``ready``, ``-serving``; those not named are missing."""
    found: Manifest = {"addresses": [address]}
    found["conditions"] = {word.lstrip("-"): not word.startswith("-") for word in conditions}
    if node:
        found["nodeName"] = node
    if pod:
        found["targetRef"] = {"kind": "Pod", "name": pod}
    return found


def endpoints(
    *each: str | Manifest, of: str = "web", name: str = "", namespace: str = "shop", **more: Any
) -> Manifest:
    """An EndpointSlice of a Service. An address alone is a ready endpoint."""
    found = [endpoint(one, "ready") if isinstance(one, str) else one for one in each]
    addresses = [address for one in found for address in one["addresses"]]
    labels = {"kubernetes.io/service-name": of, **more.pop("labels", {})}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name or f"{of}-1", "namespace": namespace, "labels": labels},
        "addressType": "IPv6" if addresses and ":" in addresses[0] else "IPv4",
        "endpoints": found,
        "ports": [port(8080)],
        **more,
    }


def summary(specs: list[ServiceSpec]) -> dict[str, list[str]]:
    """``{"tcp 10.96.0.10:80": ["10.1.0.7:8080"]}``, destinations in their order; without those that
    only turn clients away.
    """
    specs = [spec for spec in specs if spec.protocol != "any"]

    def text(address: str, number: int) -> str:
        return f"[{address}]:{number}" if ":" in address else f"{address}:{number}"

    found = {
        f"{spec.protocol} {text(spec.address, spec.port)}": [
            text(destination.address, destination.port) for destination in spec.destinations
        ]
        for spec in specs
    }
    assert len(found) == len(specs), "one key twice"
    return found


def case(name: str, *values: Any) -> Any:
    """One row of a table."""
    return pytest.param(*values, id=name)
