"""Addresses by which a Service is reached from outside: ``externalIPs`` and load balancers'."""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from svcdp.errors import ManifestError
from svcdp.kube.context import NodeContext
from svcdp.kube.model import IPFamily, Service, family_of, parse_address, parse_cidr

__all__ = ["ExternalAddress", "external_addresses"]


class ExternalAddress(NamedTuple):
    """``sources``: CIDRs of those who may use it; empty: everybody."""

    address: str
    sources: tuple[str, ...] = ()


def external_addresses(
    service: Service, node: NodeContext
) -> tuple[Mapping[IPFamily, tuple[ExternalAddress, ...]], list[ManifestError]]:
    """The addresses of each family, and what is wrong with the others, which do not count.

    A load balancer whose packets come with another address (KEP-1860, ipMode Proxy), or that has
    a name only, has none here. Source ranges bind the addresses of load balancers, in their own
    family: where a family has none, everybody may use it. Does a range hold the address that this
    node is known by, the load balancer's own are added: the node may send from them.
    """
    problems: list[ManifestError] = []

    def read(field: str, parse: Callable[[str], str], texts: Iterable[str]) -> list[str]:
        found = []
        for text in texts:
            try:
                found.append(parse(text))
            except ManifestError as error:
                problems.append(service.problem(field, f"{error.message}; it is left out"))
        return found

    spec = service.spec
    balancer = service.status and service.status.load_balancer
    ingress = (balancer and balancer.ingress) or ()
    public = read("spec.externalIPs", parse_address, spec.external_ips or ())
    virtual = read(
        "status.loadBalancer.ingress",
        parse_address,
        [each.ip for each in ingress if each.ip and each.ip_mode != "Proxy"],
    )
    ranges = read(
        "spec.loadBalancerSourceRanges", parse_cidr, spec.load_balancer_source_ranges or ()
    )
    found: defaultdict[IPFamily, dict[str, ExternalAddress]] = defaultdict(dict)
    for address in virtual:
        family = family_of(address)
        sources = tuple(each for each in ranges if family_of(each) == family)
        if _hold(sources, node.primary_address(family)):
            own = (str(ipaddress.ip_network(each)) for each in virtual if family_of(each) == family)
            sources += tuple(own)
        found[family].setdefault(address, ExternalAddress(address, sources))
    for address in public:
        found[family_of(address)].setdefault(address, ExternalAddress(address))
    every: dict[IPFamily, tuple[ExternalAddress, ...]] = {
        family: tuple(found[family].values()) for family in ("IPv4", "IPv6")
    }
    return every, problems


def _hold(ranges: Iterable[str], address: str | None) -> bool:
    if address is None:
        return False
    return any(ipaddress.ip_address(address) in ipaddress.ip_network(each) for each in ranges)
