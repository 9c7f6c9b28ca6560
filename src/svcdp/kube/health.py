"""What a load balancer and the metrics are told of a node's own endpoints. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from svcdp.kube.context import NodeContext
from svcdp.kube.endpoints import EndpointInfo, PortKey, endpoints_by_port
from svcdp.kube.model import EndpointSlice, IPFamily, Node, Service, ServiceRef
from svcdp.kube.resolve import cluster_ips
from svcdp.kube.topology import endpoint_sets

__all__ = ["HealthCheck", "LocalEndpoints", "is_eligible", "is_excluded", "local_endpoints"]

EXCLUDING_LABEL = "node.kubernetes.io/exclude-from-external-load-balancers"
DRAINING_TAINT = "ToBeDeletedByClusterAutoscaler"


class HealthCheck(NamedTuple):
    """What a Service's ``healthCheckNodePort`` says, to load balancers of one IP family.

    ``endpoints``: how many Pods on this node are ready, whatever their number of ports. Those
    that terminate do not count, though they may still be served.
    """

    service: ServiceRef
    family: IPFamily
    port: int
    endpoints: int


class LocalEndpoints(NamedTuple):
    """What of a Service is on this node.

    ``lacks_internal`` and ``lacks_external``: traffic that must stay on the node by that policy
    finds nobody here, for some port, though there are endpoints elsewhere.
    """

    checks: tuple[HealthCheck, ...] = ()
    lacks_internal: bool = False
    lacks_external: bool = False


_NOTHING = LocalEndpoints()


def local_endpoints(
    service: Service, slices: Sequence[EndpointSlice], node: NodeContext
) -> LocalEndpoints:
    """``slices`` are those that carry the Service's name."""
    spec = service.spec
    internal = spec.internal_traffic_policy == "Local"
    external = spec.keeps_external_traffic
    if not (internal or external) or not _is_proxied(service, node):
        return _NOTHING
    groups = endpoints_by_port(slices, node)
    lacking = any(
        sets.has_any and not sets.local
        for sets in (endpoint_sets(groups.get(key, ()), node) for key in _ports(service))
    )
    checks: tuple[HealthCheck, ...] = ()
    if external and spec.type == "LoadBalancer" and spec.health_check_node_port:
        checks = tuple(
            HealthCheck(
                service.ref, family, spec.health_check_node_port, _ready(service, groups, family)
            )
            for family in cluster_ips(service)
        )
    return LocalEndpoints(checks, internal and lacking, external and lacking)


def is_eligible(node: Node | None) -> bool:
    """Whether load balancers may send to a node (KEP-3836). None: it is no longer there."""
    if node is None or node.metadata.deletion_timestamp:
        return False
    taints = (node.spec and node.spec.taints) or ()
    return not any(taint.key == DRAINING_TAINT for taint in taints)


def is_excluded(node: Node | None) -> bool:
    """Whether its label, of whatever value, keeps load balancers from sending to a node, as
    kubeadm has it for control planes (KEP-1143).
    """
    return node is not None and EXCLUDING_LABEL in (node.metadata.labels or {})


def _is_proxied(service: Service, node: NodeContext) -> bool:
    spec = service.spec
    return (
        not service.metadata.hidden_from(node.service_proxy_name)
        and spec.type != "ExternalName"
        and spec.cluster_ip not in (None, "", "None")
    )


def _ports(service: Service) -> list[PortKey]:
    return [
        PortKey(family, port.name or "", port.protocol or "TCP")
        for family in cluster_ips(service)
        for port in service.spec.ports or ()
    ]


def _ready(service: Service, groups: dict[PortKey, list[EndpointInfo]], family: IPFamily) -> int:
    return len(
        {
            endpoint.address
            for key in _ports(service)
            if key.family == family
            for endpoint in groups.get(key, ())
            if endpoint.local and endpoint.ready
        }
    )
