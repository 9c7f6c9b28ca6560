"""Pods and selectors: the EndpointSlices that a cluster's controller would write.

The rules are those of the EndpointSlice controller (kubernetes/endpointslice, ``reconciler.go``,
``utils.go`` and ``trafficdist.go``), for whoever has Pods but no cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TypeVar

from svcdp.kube.model import (
    SERVICE_NAME_LABEL,
    Endpoint,
    EndpointConditions,
    EndpointHints,
    EndpointPort,
    EndpointSlice,
    Hint,
    IPFamily,
    Node,
    ObjectKey,
    ObjectMeta,
    ObjectReference,
    Pod,
    PodSpec,
    Service,
    ServicePort,
    ServiceRef,
    family_of,
)

__all__ = ["Selection", "slices_of"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_NEAR = ("PreferClose", "PreferSameZone", "PreferSameNode")
_NOWHERE: Mapping[str, Node | None] = MappingProxyType({})
_Term = tuple[str, str, str]  # namespace, label, value


class Selection:
    """Which Services select which Pods.

    One look costs what the smallest group with a label of the selector costs, not all Pods. Not
    safe for several threads.
    """

    def __init__(self) -> None:
        self._pods: dict[_Term, dict[ObjectKey, Pod]] = {}
        self._services: dict[_Term, dict[ServiceRef, Service]] = {}  # by one term each

    def add(self, found: Pod | Service) -> None:
        """Take in an object that is not here yet."""
        if isinstance(found, Pod):
            for term in _labels(found):
                self._pods.setdefault(term, {})[found.key] = found
        elif terms := _selector(found):
            self._services.setdefault(min(terms), {})[found.ref] = found

    def remove(self, found: Pod | Service) -> None:
        """Forget an object as it was added."""
        if isinstance(found, Pod):
            for term in _labels(found):
                _drop(self._pods, term, found.key)
        elif terms := _selector(found):
            _drop(self._services, min(terms), found.ref)

    def services(self, pod: Pod) -> Iterator[ServiceRef]:
        """The Services that select a Pod."""
        labels = _labels(pod)
        for term in labels:
            for ref, service in self._services.get(term, {}).items():
                if _selector(service) <= labels:
                    yield ref

    def pods(self, service: Service) -> list[Pod]:
        """The Pods that a Service selects, by name; none for one without a selector."""
        terms = _selector(service)
        if not terms:
            return []
        groups = [self._pods.get(term, {}) for term in terms]
        chosen = min(groups, key=len)
        keys = [key for key in chosen if all(key in group for group in groups)]
        return [chosen[key] for key in sorted(keys)]


def slices_of(
    service: Service, pods: Iterable[Pod], nodes: Mapping[str, Node | None] = _NOWHERE
) -> list[EndpointSlice]:
    """The endpoints that ``pods`` are for a Service, grouped by IP family and port numbers.

    A Pod that has ended or has no address of a family is no endpoint of it. One without a Ready
    condition is ready: nobody probes it. ``nodes``, by name, are asked for zones before the Pods'
    own labels: both are hints for those who prefer what is near (KEP-3015).
    """
    groups: dict[tuple[IPFamily, tuple[EndpointPort, ...]], list[Endpoint]] = {}
    if service.spec.type == "ExternalName":
        return []
    families = _families(service)
    for pod in pods:
        if pod.has_ended:
            continue
        ports = tuple(_ports(service, pod))
        for address in pod.addresses:
            family = family_of(address)
            if family in families:
                endpoint = _endpoint(service, pod, address, nodes)
                groups.setdefault((family, ports), []).append(endpoint)
    return [
        EndpointSlice(
            metadata=ObjectMeta(
                name=f"{service.metadata.name}-{family.lower()}-{index}",
                namespace=service.metadata.namespace,
                # The controller copies labels, so a hidden Service has hidden slices.
                labels={**(service.metadata.labels or {}), SERVICE_NAME_LABEL: service.ref.name},
            ),
            address_type=family,
            endpoints=tuple(groups[family, ports]),
            ports=ports,
        )
        for index, (family, ports) in enumerate(sorted(groups, key=_order))
    ]


def _order(group: tuple[IPFamily, tuple[EndpointPort, ...]]) -> tuple[str, list[tuple[str, int]]]:
    family, ports = group
    return family, [(port.name or "", port.port or 0) for port in ports]


def _labels(pod: Pod) -> set[_Term]:
    namespace = pod.key.namespace
    return {(namespace, *label) for label in (pod.metadata.labels or {}).items()}


def _selector(service: Service) -> set[_Term]:
    """Empty: it selects nothing, as its endpoints are somebody else's to name."""
    namespace = service.ref.namespace
    return {(namespace, *label) for label in (service.spec.selector or {}).items()}


def _drop(groups: dict[_Term, dict[_Key, _Value]], term: _Term, key: _Key) -> None:
    group = groups[term]
    del group[key]
    if not group:
        del groups[term]


def _families(service: Service) -> frozenset[IPFamily]:
    spec = service.spec
    if spec.ip_families:
        return frozenset(spec.ip_families)
    cluster_ips = spec.cluster_ips or (spec.cluster_ip or "",)
    both: frozenset[IPFamily] = frozenset(("IPv4", "IPv6"))
    return frozenset(family_of(text) for text in cluster_ips if text and text != "None") or both


def _ports(service: Service, pod: Pod) -> Iterator[EndpointPort]:
    """The ports of a Service that a Pod has (controller's FindPort), each with its number."""
    for port in service.spec.ports or ():
        if number := _target(port, pod):
            yield EndpointPort(name=port.name or "", port=number, protocol=port.protocol or "TCP")


def _target(port: ServicePort, pod: Pod) -> int | None:
    target = port.target_port
    if not isinstance(target, str):
        return target or port.port
    protocol = port.protocol or "TCP"
    for container in pod.containers:
        for candidate in container.ports or ():
            if candidate.name == target and (candidate.protocol or "TCP") == protocol:
                return candidate.container_port
    return None


def _endpoint(
    service: Service, pod: Pod, address: str, nodes: Mapping[str, Node | None]
) -> Endpoint:
    serving = pod.is_ready
    terminating = pod.metadata.deletion_timestamp is not None
    # "ready" is never true of a Pod that terminates, unless the Service asks for all of them.
    ready = bool(service.spec.publish_not_ready_addresses) or (serving and not terminating)
    spec = pod.spec or PodSpec()
    return Endpoint(
        addresses=(address,),
        hostname=spec.hostname if spec.subdomain == service.ref.name else None,
        conditions=EndpointConditions(ready=ready, serving=serving, terminating=terminating),
        node_name=spec.node_name or None,
        hints=_hints(service, pod, nodes) if ready else None,
        target_ref=ObjectReference(name=pod.metadata.name),
    )


def _hints(service: Service, pod: Pod, nodes: Mapping[str, Node | None]) -> EndpointHints | None:
    wish = service.spec.traffic_distribution
    if wish not in _NEAR:
        return None
    name = (pod.spec and pod.spec.node_name) or ""
    node = nodes.get(name)
    zone = (node and node.metadata.zone) or pod.metadata.zone
    return EndpointHints(
        for_zones=(Hint(zone),) if zone else None,
        for_nodes=(Hint(name),) if name and wish == "PreferSameNode" else None,
    )
