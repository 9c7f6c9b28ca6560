"""Who may reach a Service by which of its addresses, who serves it, and as whom: kube-proxy's
traffic policies and masquerading, as source rules.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product

from svcdp.kube.context import NodeContext
from svcdp.kube.endpoints import EndpointInfo
from svcdp.kube.model import IPFamily, family_of
from svcdp.kube.topology import EndpointSets
from svcdp.types import ServiceSpec, SourceRule

__all__ = [
    "MASQUERADED",
    "cluster_ip_rules",
    "local_rules",
    "other_ports",
    "unallocated",
    "within",
]

MASQUERADED = (SourceRule(masquerade=True),)
_NOT_MASQUERADED = (SourceRule(),)
_SILENT = (SourceRule(on_empty="drop"),)


@lru_cache(maxsize=8)
def cluster_ip_rules(node: NodeContext, family: IPFamily) -> tuple[SourceRule, ...]:
    """Who is masqueraded on the way to a cluster IP: all but Pods, if it is known who is one."""
    if node.masquerade_all:
        return MASQUERADED
    pods = _pods(node, family)
    return (*pods, *MASQUERADED) if pods else _NOT_MASQUERADED


def local_rules(node: NodeContext, family: IPFamily, sets: EndpointSets) -> tuple[SourceRule, ...]:
    """``externalTrafficPolicy: Local`` (KEP-1669): clients from outside keep their address, and are
    served by this node's endpoints only.

    What comes from within, from Pods and from the node, goes anywhere, as if it left the cluster
    and came back by a load balancer.
    """
    cluster = _endpoints(sets.cluster)
    return (
        *(replace(pods, endpoints=cluster) for pods in _pods(node, family)),
        SourceRule(node.own_networks_of(family), masquerade=True, endpoints=cluster),
        SourceRule(endpoints=_endpoints(sets.local), on_empty="drop" if sets.has_any else "reject"),
    )


def within(rules: tuple[SourceRule, ...], ranges: tuple[str, ...]) -> tuple[SourceRule, ...]:
    """The rules for clients in these CIDRs; others are admitted by none."""
    narrowed = ((rule, _overlap(rule.sources, ranges)) for rule in rules)
    return tuple(replace(rule, sources=sources) for rule, sources in narrowed if sources)


def other_ports(address: str, name: str) -> ServiceSpec:
    """What no Service serves at a cluster IP: refused, as at any host (kube-proxy's nftables mode).
    ``name`` is that of the Service that has the address.
    """
    return ServiceSpec(address, 0, "any", name=f"{name} (other ports)")


def unallocated(node: NodeContext) -> list[ServiceSpec]:
    """What no Service has of the networks of cluster IPs: nobody is there, so silence. Beside
    another proxy it is not known what is there.
    """
    if node.service_proxy_name:
        return []
    return [
        ServiceSpec(cidr, 0, "any", name=f"{cidr} (unallocated)", rules=_SILENT)
        for cidr in node.service_cidrs
    ]


def _pods(node: NodeContext, family: IPFamily) -> tuple[SourceRule, ...]:
    """A rule for what Pods send; none if it is not known who is one."""
    if node.marks_pods:
        return (SourceRule(mark=node.pod_mark),)
    cidrs = node.pod_cidrs_of(family)
    return (SourceRule(cidrs),) if cidrs else ()


def _endpoints(infos: Sequence[EndpointInfo]) -> tuple[tuple[str, int], ...]:
    return tuple((each.address, each.port) for each in infos)


@lru_cache(maxsize=1024)
def _overlap(sources: tuple[str, ...], ranges: tuple[str, ...]) -> tuple[str, ...]:
    """What two lists of CIDRs have in common; no sources are any. Of two CIDRs that meet, one is in
    the other.
    """
    if not sources:
        return ranges
    found = []
    for one, other in product(sources, ranges):
        if family_of(one) == family_of(other):
            networks = sorted(map(ipaddress.ip_network, (one, other)), key=lambda n: n.prefixlen)
            if networks[0].overlaps(networks[1]):
                found.append(str(networks[1]))
    return tuple(dict.fromkeys(found))
