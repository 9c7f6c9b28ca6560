"""Which nodes may have an address of load balancers, and which of them has it. Pure.

Rendezvous hashing (Thaler and Ravishankar, 1998): all who know the same nodes agree, without a
word, and a node that comes or goes moves only the addresses that it gets or had.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from svcdp.kube.context import NodeContext
from svcdp.kube.endpoints import endpoints_by_port, usable_endpoints
from svcdp.kube.model import EndpointSlice, Service, ServiceRef
from svcdp.kube.pools import held_addresses, is_served

__all__ = ["Holder", "by_address", "candidates", "holder_of", "owner"]


class Holder(NamedTuple):
    """A Service with its load balancer's addresses. ``nodes``: those alone have endpoints for
    clients from outside; None: every node does.
    """

    service: ServiceRef
    addresses: tuple[str, ...]
    nodes: frozenset[str] | None


def holder_of(
    service: Service, slices: Iterable[EndpointSlice], node: NodeContext
) -> Holder | None:
    """None where a Service has no address to announce, or belongs to another proxy than
    ``node``'s.

    By externalTrafficPolicy Local nodes count whose endpoints, of any port, are ready; where none
    are anywhere, those whose endpoints still serve while they terminate (KEP-1669).
    """
    spec = service.spec
    if service.metadata.hidden_from(node.service_proxy_name) or not is_served(service):
        return None
    if spec.cluster_ip in (None, "", "None"):
        return None
    addresses = held_addresses(service)  # resolve() says what is wrong with others
    if not addresses:
        return None
    nodes = None
    if spec.external_traffic_policy == "Local":
        nodes = _nodes(service, slices, node)
    return Holder(service.ref, addresses, nodes)


def candidates(holders: Collection[Holder], alive: Set[str]) -> Set[str]:
    """Those who may have an address that these Services share: who serves the most of them."""
    everywhere = sum(each.nodes is None for each in holders)
    served = Counter(node for each in holders for node in each.nodes or () if node in alive)
    most = max(served.values(), default=0)
    if most:
        return {node for node, count in served.items() if count == most}
    return alive if everywhere else frozenset()


def owner(address: str, nodes: Iterable[str]) -> str | None:
    """The one of ``nodes`` that has the address; None: there are none."""
    return max(nodes, key=lambda node: (_weight(address, node), node), default=None)


def by_address(holders: Iterable[Holder]) -> Mapping[str, Sequence[Holder]]:
    """The Services that share each address."""
    found: defaultdict[str, list[Holder]] = defaultdict(list)
    for holder in holders:
        for address in holder.addresses:
            found[address].append(holder)
    return found


def _weight(address: str, node: str) -> bytes:
    return hashlib.blake2b(f"{node}\0{address}".encode(), digest_size=8).digest()


def _nodes(service: Service, slices: Iterable[EndpointSlice], node: NodeContext) -> frozenset[str]:
    groups = endpoints_by_port(slices, node)
    ports = {(port.name or "", port.protocol or "TCP") for port in service.spec.ports or ()}
    return frozenset(
        endpoint.node
        for key, group in groups.items()
        if (key.name, key.protocol) in ports
        for endpoint in usable_endpoints(group)
        if endpoint.node
    )
