"""A cluster of any size, as its API server describes it: the objects that changes are made of."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from msgspec.structs import replace

from svcdp.kube import NodeContext
from svcdp.kube.model import (
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    IPFamily,
    Object,
    ObjectMeta,
    Service,
    ServicePort,
    ServiceSpec,
)

ENDPOINTS = 50
#: The first number of a Service that wants nothing special; each tenth after it is one, too.
PLAIN = 3
NODES = 250
NODE = NodeContext(
    name="node-0",
    addresses=["192.0.2.1", "2001:db8:1::1"],
    pod_cidrs=["10.128.0.0/9", "fd00:1::/64"],
    detect_local="ClusterCIDR",
    service_cidrs=["10.0.0.0/12", "fd00:96::/108"],
)
_PODS = {
    "IPv4": int(ipaddress.ip_address("10.128.0.1")),
    "IPv6": int(ipaddress.ip_address("fd00:1::1")),
}
_CLUSTER_IPS = {
    "IPv4": int(ipaddress.ip_address("10.0.0.1")),
    "IPv6": int(ipaddress.ip_address("fd00:96::1")),
}
_CREATED = "2026-01-01T00:00:00Z"


def cluster(services: int, endpoints: int = ENDPOINTS) -> Iterator[Object]:
    """Services with their slices. Each has two ports; of ten, one is of both IP families, one has
    node ports, one keeps clients at their endpoint; of twenty, one keeps traffic on the node.
    """
    for number in range(services):
        yield service(number)
        for family in families(number):
            yield endpoint_slice(number, family, endpoints)


def plain_cluster(services: int, endpoints: int = ENDPOINTS) -> Iterator[Object]:
    """Services of one port, one IP family and no other wishes, with their slices."""
    for number in range(PLAIN, 10 * services, 10):
        found = service(number)
        ports = (found.spec.ports or ())[:1]
        yield replace(found, spec=replace(found.spec, ports=ports))
        found_slice = endpoint_slice(number, endpoints=endpoints)
        yield replace(found_slice, ports=(found_slice.ports or ())[:1])


def families(number: int) -> tuple[IPFamily, ...]:
    return ("IPv4", "IPv6") if number % 10 == 1 else ("IPv4",)


def service(number: int) -> Service:
    faces_outside = number % 10 == 0
    addresses = tuple(_address(_CLUSTER_IPS[family] + number) for family in families(number))
    # Node ports are 2,768: above 13,840 Services some have none.
    port = 30000 + number // 10 * 2 if faces_outside and number < 13_840 else 0
    return Service(
        metadata=ObjectMeta(
            name=f"web-{number}",
            namespace=f"team-{number % 100}",
            labels={"app": f"web-{number}"},
            creation_timestamp=_CREATED,
        ),
        spec=ServiceSpec(
            type="NodePort" if faces_outside else "ClusterIP",
            cluster_ip=addresses[0],
            cluster_ips=addresses,
            ip_families=families(number),
            ports=(
                ServicePort(name="http", port=80, protocol="TCP", node_port=port or None),
                ServicePort(
                    name="metrics", port=9090, protocol="TCP", node_port=port + 1 if port else None
                ),
            ),
            session_affinity="ClientIP" if number % 10 == 2 else "None",
            external_traffic_policy="Local" if number % 20 == 0 else None,
            internal_traffic_policy="Cluster",
        ),
    )


def endpoint_slice(
    number: int, family: IPFamily = "IPv4", endpoints: int = ENDPOINTS, *, without: int = -1
) -> EndpointSlice:
    """That of a Service; the endpoint ``without`` is not ready."""
    first = _PODS[family] + number * endpoints
    return EndpointSlice(
        metadata=ObjectMeta(
            name=f"web-{number}-{family.lower()}",
            namespace=f"team-{number % 100}",
            labels={"kubernetes.io/service-name": f"web-{number}"},
        ),
        address_type=family,
        endpoints=tuple(
            Endpoint(
                addresses=(_address(first + i),),
                conditions=EndpointConditions(ready=i != without, serving=True, terminating=False),
                node_name=f"node-{(number + i) % NODES}",
            )
            for i in range(endpoints)
        ),
        ports=(
            EndpointPort(name="http", port=8080, protocol="TCP"),
            EndpointPort(name="metrics", port=9090, protocol="TCP"),
        ),
    )


def _address(number: int) -> str:
    return str(ipaddress.ip_address(number))
