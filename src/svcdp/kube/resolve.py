"""The brain: from Services and EndpointSlices to what one node's dataplane has to do. Pure.

The semantics are kube-proxy's (its nftables mode where the modes differ): each port of a
Service becomes one spec per cluster IP, per external address, and per node address that serves
its node port.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from svcdp.errors import ConflictError, ManifestError, SvcdpError
from svcdp.kube.annotations import Annotations, annotation_problem, read_annotations
from svcdp.kube.claims import Claim, Claims
from svcdp.kube.context import NodeContext
from svcdp.kube.decode import decode_value
from svcdp.kube.endpoints import EndpointInfo, PortKey, endpoints_by_port
from svcdp.kube.external import external_addresses
from svcdp.kube.forwarding import forwarded, widened
from svcdp.kube.model import (
    EndpointSlice,
    IPFamily,
    Object,
    ObjectKey,
    Service,
    ServiceRef,
    family_of,
    parse_address,
)
from svcdp.kube.own import informed
from svcdp.kube.policy import (
    MASQUERADED,
    cluster_ip_rules,
    local_rules,
    other_ports,
    unallocated,
    within,
)
from svcdp.kube.state import Change, State
from svcdp.kube.topology import EndpointSets, endpoint_sets
from svcdp.types import DestinationSpec, ServiceSpec

__all__ = [
    "Resolution",
    "Resolved",
    "cluster_ips",
    "resolve",
    "resolve_all",
    "resolve_service",
]

_AFFINITY_SECONDS = 10800  # the API's default for ClientIP
NOBODY = ServiceRef("", "")
"""Whose claims are those of the node."""


@dataclass(slots=True)
class Resolution:
    """Specs for one node, and what is wrong with the objects they are from."""

    specs: list[ServiceSpec]
    problems: list[SvcdpError]


@dataclass(slots=True)
class Resolved:
    """What one Service wants, and what is wrong with it."""

    claims: list[Claim] = field(default_factory=list)
    problems: list[ManifestError] = field(default_factory=list)

    def add(self, service: Service, spec: ServiceSpec, *, node_port: bool = False) -> None:
        """One more claim of this Service."""
        created = service.metadata.creation_timestamp
        self.claims.append(Claim.of(service.ref, created, spec, node_port))


def resolve(objects: Iterable[Object | Mapping[str, Any]], node: NodeContext) -> list[ServiceSpec]:
    """What ``node`` has to do for these objects: manifests as dicts, or model records.

    The node's own Node and ServiceCIDRs say of it what ``node`` does not. Other kinds are ignored,
    a List stands for its items. Raises ManifestError for an object
    that is none.
    """
    return resolve_all(objects, node).specs


def resolve_all(objects: Iterable[Object | Mapping[str, Any]], node: NodeContext) -> Resolution:
    """Like :func:`resolve`, with what had to be left out."""
    found: dict[ObjectKey, Object] = {}
    problems: list[SvcdpError] = []
    for record in chain.from_iterable(map(_records, objects)):
        if record.key in found:
            problems.append(ConflictError(f"{record.key} is given twice; the first counts"))
        else:
            found[record.key] = record
    state = State()
    state.apply(0, "", Change(objects=tuple(found.values())))
    node = informed(node, state.nodes.get(node.name), state.service_cidrs.values())
    claims = Claims()
    for ref, service in sorted(state.services.items()):
        resolved = resolve_service(service, state.slices(ref), node)
        claims.replace(ref, resolved.claims)
        problems += resolved.problems
    claims.replace(NOBODY, resolve_node(node))
    return Resolution(list(claims), [*problems, *claims.conflicts()])


def _records(value: Object | Mapping[str, Any]) -> Sequence[Object]:
    return [value] if isinstance(value, Object) else decode_value(value)


def resolve_service(
    service: Service, slices: Sequence[EndpointSlice], node: NodeContext
) -> Resolved:
    """What one Service wants of ``node``; ``slices`` are those that carry its name."""
    spec = service.spec
    if service.metadata.hidden_from(node.service_proxy_name):
        return Resolved()
    if spec.type == "ExternalName" or spec.cluster_ip == "None":
        return Resolved()
    if not spec.cluster_ip:
        return Resolved(problems=[service.problem("spec.clusterIP", "missing; nothing is served")])
    annotations, problems = read_annotations(service, node)
    addresses = cluster_ips(service)
    if len(addresses) < len(spec.cluster_ips or ()):
        served = ", ".join(addresses.values()) or "none"
        problems.append(service.problem("spec.ipFamilies", f"of clusterIPs, it admits {served}"))
    groups = endpoints_by_port(slices, node)
    resolved = Resolved(problems=problems)
    external, bad = external_addresses(service, node)
    problems += bad
    for family, address in addresses.items():
        for port in spec.ports or ():
            key = PortKey(family, port.name or "", port.protocol or "TCP")
            endpoints = groups.get(key, ())
            sets = endpoint_sets(endpoints, node)
            alive = _alive(endpoints, key, annotations)
            plain = ServiceSpec(
                address=address,
                port=port.port,
                protocol=key.protocol.lower(),
                destinations=_destinations(sets.cluster, annotations),
                persistence=_persistence(service),
                persistence_timed=_persistence(service) is not None,
                # Affinity is a service port's, whichever of its addresses is dialled.
                persistence_group=_group(service, key),
                rules=cluster_ip_rules(node, family),
                masquerade_address=node.primary_address(family),
                name=f"{service.ref}:{key.name}" if key.name else str(service.ref),
                **annotations.fields(key, sticky=_persistence(service) is not None),
            )
            inner = plain
            if spec.internal_traffic_policy == "Local":
                inner = _inner(plain, sets, annotations)
            wanted, problem = forwarded(_keeping(inner, alive), annotations, node)
            if problem:
                message = f"{key.name or port.port}: {problem}; 'masq' stays in force"
                problems.append(annotation_problem(service, "forwarding", message))
            resolved.add(service, widened(wanted, annotations.ranges.get(key.name)))
            outside = _keeping(_outside(plain, service, sets, annotations, node), alive)
            for each in external[family]:
                rules = within(outside.rules, each.sources) if each.sources else outside.rules
                outer = replace(outside, address=each.address, rules=rules)
                outer, _ = forwarded(outer, annotations, node)  # a problem is told above
                resolved.add(service, widened(outer, annotations.ranges.get(key.name)))
            for node_address in node.node_port_addresses_of(family) if port.node_port else ():
                at_node = replace(outside, address=node_address, port=port.node_port or 0)
                resolved.add(service, at_node, node_port=True)
        if node.service_cidrs and spec.ports:
            resolved.add(service, other_ports(address, str(service.ref)))
    return resolved


def resolve_node(node: NodeContext) -> list[Claim]:
    """What a node owes whatever Services there are."""
    return [Claim.of(NOBODY, None, spec, node_port=False) for spec in unallocated(node)]


def cluster_ips(service: Service) -> dict[IPFamily, str]:
    """The cluster IP of each family (``GetClusterIPByFamily``)."""
    spec = service.spec
    first = parse_address(spec.cluster_ip or "")
    if not spec.ip_families:
        return {family_of(first): first}
    texts = spec.cluster_ips or (first,)
    pairs = zip(spec.ip_families, texts, strict=False)
    return {family: parse_address(text) for family, text in pairs}


def _destinations(
    endpoints: Sequence[EndpointInfo], annotations: Annotations
) -> tuple[DestinationSpec, ...]:
    weight, upper, lower = annotations.weight, annotations.upper, annotations.lower
    return tuple(
        [
            DestinationSpec(each.address, each.port, weight(each), "masq", upper, lower)
            for each in endpoints
        ]
    )


def _alive(
    endpoints: Sequence[EndpointInfo], port: PortKey, annotations: Annotations
) -> list[EndpointInfo]:
    """Whose connections go on where readiness, traffic policies or hints take new ones elsewhere.

    Of UDP that is who serves (kube-proxy's conntrack reconciler). Connections of other protocols go
    on by themselves, unless an annotation ends them: those of ready endpoints are not meant.
    """
    if port.protocol == "UDP":
        return [each for each in endpoints if each.serving]
    if annotations.removal.policy != "drain":
        return [each for each in endpoints if each.ready]
    return []


def _keeping(spec: ServiceSpec, alive: Sequence[EndpointInfo]) -> ServiceSpec:
    """The spec, with those of ``alive`` kept that are none of its destinations."""
    if not alive:
        return spec
    chosen = {(each.address, each.port) for each in spec.destinations}
    kept = tuple([(e.address, e.port) for e in alive if (e.address, e.port) not in chosen])
    return replace(spec, kept=kept) if kept else spec


def _inner(plain: ServiceSpec, sets: EndpointSets, annotations: Annotations) -> ServiceSpec:
    """A cluster IP whose traffic must stay on the node (KEP-2086). Silence where others serve."""
    rules = plain.rules
    if sets.has_any:
        rules = tuple(replace(rule, on_empty="drop") for rule in rules)
    return replace(plain, destinations=_destinations(sets.local, annotations), rules=rules)


def _outside(
    plain: ServiceSpec,
    service: Service,
    sets: EndpointSets,
    annotations: Annotations,
    node: NodeContext,
) -> ServiceSpec:
    """The service for those who come by an external address or a node port."""
    if not service.spec.keeps_external_traffic:
        return replace(plain, rules=MASQUERADED)
    everybody = sets.all
    return replace(
        plain,
        destinations=plain.destinations
        if len(everybody) == len(sets.cluster)
        else _destinations(everybody, annotations),
        rules=local_rules(node, family_of(plain.address), sets),
    )


def _persistence(service: Service) -> int | None:
    """Seconds of session affinity."""
    if service.spec.session_affinity != "ClientIP":
        return None
    config = service.spec.session_affinity_config
    client_ip = config.client_ip if config else None
    return (client_ip and client_ip.timeout_seconds) or _AFFINITY_SECONDS


def _group(service: Service, port: PortKey) -> str:
    if service.spec.session_affinity != "ClientIP":
        return ""
    return f"{service.ref}:{port.name}/{port.protocol.lower()}"
