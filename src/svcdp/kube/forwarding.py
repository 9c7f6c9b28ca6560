"""How packets to a Service's own addresses go on to endpoints that keep the one that was dialled.

By ``tunnel`` and ``dr`` an endpoint gets the client's packets as they are: it must have the
cluster IP, and each external IP and load balancer's address, itself (on its loopback device, or
where its tunnel ends), serve it at the port that clients dial, and keep quiet about it in ARP.
Node ports, which are at the node's own addresses, are masqueraded, as ever.
"""

from __future__ import annotations

from dataclasses import replace

from svcdp.kube.annotations import Annotations
from svcdp.kube.context import NodeContext
from svcdp.kube.model import family_of
from svcdp.types import DestinationSpec, ForwardMethod, ServiceSpec, SourceRule

__all__ = ["forwarded", "widened"]


def forwarded(
    spec: ServiceSpec, annotations: Annotations, node: NodeContext
) -> tuple[ServiceSpec, str]:
    """A service by masq with the method that is asked for; else as it is, and why."""
    if annotations.method == ForwardMethod.MASQ:
        return spec, ""
    if problem := _problem(spec, annotations, node):
        return spec, problem
    is_tunnel = annotations.method == ForwardMethod.TUNNEL
    destinations = []
    for each in spec.destinations:
        tunnel = None
        if is_tunnel:
            source = node.primary_address(family_of(each.address)) or ""
            tunnel = replace(annotations.tunnel, source=source)
        destinations.append(replace(each, method=annotations.method, tunnel=tunnel))
    clamp = is_tunnel if annotations.mss_clamp is None else annotations.mss_clamp
    return replace(spec, destinations=tuple(destinations), mss_clamp=clamp), ""


def _problem(spec: ServiceSpec, annotations: Annotations, node: NodeContext) -> str:
    if spec.helper:
        return f"helper {spec.helper} needs masq, not {annotations.method}"
    for each in spec.destinations:
        if each.port != spec.port:
            return (
                f"{annotations.method} leaves the port as it is, but endpoint {each.address}"
                f" serves {each.port}, not {spec.port}"
            )
        family = family_of(each.address)
        if annotations.method == ForwardMethod.TUNNEL and not node.primary_address(family):
            return f"this node has no {family} address for tunnels to come from"
    return ""


def widened(spec: ServiceSpec, ports: tuple[int, int] | None) -> ServiceSpec:
    """The service on a range of ports, if there is one. An endpoint that serves the first of
    them serves all; another serves what comes to any of them at its one port.
    """
    if ports is None:
        return spec

    def keeps(each: DestinationSpec) -> DestinationSpec:
        return replace(each, port=0) if each.port == ports[0] else each

    def with_ports(endpoints: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        return tuple((a, 0 if port == ports[0] else port) for a, port in endpoints)

    def keep_in(rule: SourceRule) -> SourceRule:
        if rule.endpoints is None:
            return rule
        return replace(rule, endpoints=with_ports(rule.endpoints))

    return replace(
        spec,
        last_port=ports[1],
        destinations=tuple(map(keeps, spec.destinations)),
        rules=tuple(map(keep_in, spec.rules)),
        kept=with_ports(spec.kept),
    )
