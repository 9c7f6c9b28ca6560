"""Addresses for Services of type LoadBalancer, from pools, where no cloud has any. Pure.

Fields are those of the API: ``spec.loadBalancerIP``, ``spec.loadBalancerClass`` (KEP-1959) and
``status.loadBalancer`` (its ``ipMode``: KEP-1860).
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import msgspec

from svcdp.errors import CapacityError, ConflictError, ManifestError, SvcdpError
from svcdp.kube.allocate import Band, rank, text_of
from svcdp.kube.events import Event
from svcdp.kube.model import (
    IPFamily,
    LoadBalancerIngress,
    LoadBalancerPool,
    LoadBalancerStatus,
    Service,
    ServiceRef,
    ServiceStatus,
    family_of,
    parse_address,
    parse_cidr,
)

__all__ = [
    "ADDRESSES_ANNOTATION",
    "CLEANUP_FINALIZER",
    "POOL_CLASS",
    "SHARING_ANNOTATION",
    "Allocation",
    "Span",
    "Usage",
    "allocate",
    "held_addresses",
    "is_clouds",
    "is_served",
    "numbers_of",
    "parse_span",
    "usages",
    "with_addresses",
]

#: Which addresses a Service asks for, one of each IP family at most; before ``loadBalancerIP``.
ADDRESSES_ANNOTATION = "svcdp.io/load-balancer-ips"
#: Services with the same value here may share an address.
SHARING_ANNOTATION = "svcdp.io/load-balancer-sharing"
#: Of Services that a cloud looks after.
CLEANUP_FINALIZER = "service.kubernetes.io/load-balancer-cleanup"
#: What ``spec.loadBalancerClass`` is of those that want pools and nothing else.
POOL_CLASS = "svcdp.io/pool"

#: "This network", loopback, link-local, multicast and broadcast (RFC 6890); of
#: IPv6 none, and the IPv4-mapped ones.
_UNDELIVERED: dict[IPFamily, list[ipaddress.IPv4Network] | list[ipaddress.IPv6Network]] = {
    "IPv4": [
        ipaddress.IPv4Network(text)
        for text in (
            "0.0.0.0/8",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "224.0.0.0/4",
            "255.255.255.255/32",
        )
    ],
    "IPv6": [
        ipaddress.IPv6Network(text) for text in ("::/127", "::ffff:0:0/96", "fe80::/10", "ff00::/8")
    ],
}

_Addresses = Mapping[ServiceRef, tuple[str, ...]]


class Span(NamedTuple):
    """The addresses from ``first`` to ``last``, as numbers."""

    family: IPFamily
    first: int
    last: int

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self.first <= number <= self.last

    def free(self, holder: str, taken: Mapping[tuple[IPFamily, int], object]) -> int | None:
        """One that nobody has; None: there is none. Where to look first follows from the name, so
        that all who have the same objects agree, at a cost bounded by what is taken.
        """
        size = self.last - self.first + 1
        digest = hashlib.blake2b(holder.encode(), digest_size=16).digest()
        start = int.from_bytes(digest) % size
        for step in range(min(size, len(taken) + 1)):
            number = self.first + (start + step) % size
            if (self.family, number) not in taken:
                return number
        return None


def parse_span(text: str) -> Span:
    """A CIDR, whose network and broadcast addresses do not count, or ``FIRST-LAST``, in which all
    do. ManifestError.
    """
    if "/" in text:
        cidr = parse_cidr(text)
        band = Band.of_network(cidr)
        span = Span(family_of(cidr), band.first, band.last)
    else:
        ends = [parse_address(end.strip()) for end in text.split("-")]
        if len(ends) != 2 or family_of(ends[0]) != family_of(ends[1]):
            raise ManifestError(f"{text!r} is neither a CIDR nor a range FIRST-LAST")
        first, last = (int(ipaddress.ip_address(end)) for end in ends)
        if first > last:
            raise ManifestError(f"{text!r} ends before it starts")
        span = Span(family_of(ends[0]), first, last)
    for network in _UNDELIVERED[span.family]:
        if span.first <= int(network[-1]) and int(network[0]) <= span.last:
            raise ManifestError(
                f"{text!r} has addresses of {network}, which routers do not deliver"
            )
    return span


@dataclass(frozen=True, slots=True)
class Allocation:
    """Who has which addresses, in the order of their IP families, and what Services go without."""

    addresses: dict[ServiceRef, tuple[str, ...]] = field(default_factory=dict)
    problems: list[ManifestError] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


def is_served(service: Service, without_class: bool = True) -> bool:
    """Whether a Service's addresses come from pools; ``without_class``: those too that name no
    class, unless a cloud looks after them.
    """
    spec = service.spec
    if spec.type != "LoadBalancer":
        return False
    if spec.load_balancer_class:
        return spec.load_balancer_class == POOL_CLASS
    return without_class and not is_clouds(service)


def is_clouds(service: Service) -> bool:
    """Whether a cloud's controller says that it makes, or will take away, a load balancer for it
    (KEP-980).
    """
    return CLEANUP_FINALIZER in (service.metadata.finalizers or ())


def allocate(
    services: Iterable[Service],
    pools: Iterable[LoadBalancerPool],
    remembered: _Addresses | None = None,
    *,
    without_class: bool = True,
    others: Iterable[Service] = (),
) -> Allocation:
    """The addresses of all Services that :func:`is_served` tells.

    Whoever has an address by ``remembered`` keeps it, while a pool has it and the Service asks for
    no other; then come those who ask for one, then those who take any. Of several the older
    Service goes first. Who is not among ``services`` has none. ``others`` are given theirs by
    somebody else: what is in their status is taken.
    """
    chosen = sorted((each for each in services if is_served(each, without_class)), key=rank)
    allocating = _Allocating(sorted(pools, key=lambda each: each.key), remembered or {})
    for other in others:
        allocating.reserve(other)
    return allocating.run(chosen)


def held_addresses(service: Service, *, of_proxies: bool = False) -> tuple[str, ...]:
    """Those in the status of a Service to which packets come as they were sent; with
    ``of_proxies`` the others too.
    """
    balancer = service.status and service.status.load_balancer
    found: dict[str, None] = {}
    for each in (balancer and balancer.ingress) or ():
        if each.ip and (of_proxies or each.ip_mode != "Proxy"):
            with suppress(ManifestError):
                found[parse_address(each.ip)] = None
    return tuple(found)


def numbers_of(addresses: Iterable[str]) -> Iterator[tuple[IPFamily, int]]:
    """As spans have them."""
    return ((family_of(text), int(ipaddress.ip_address(text))) for text in addresses)


class Usage(NamedTuple):
    """How many addresses a pool has, and how many of these Services have."""

    pool: LoadBalancerPool
    addresses: int
    used: int


def usages(pools: Iterable[LoadBalancerPool], services: Iterable[Service]) -> list[Usage]:
    """Of each pool, by the status of all Services of type LoadBalancer. Where pools overlap an
    address counts in each.
    """
    held = {
        place
        for service in services
        if service.spec.type == "LoadBalancer"
        for place in numbers_of(held_addresses(service))
    }
    found = []
    for pool in pools:
        spans = _merged(map(parse_span, pool.spec.addresses))
        used = sum(
            any(span.family == family and number in span for span in spans)
            for family, number in held
        )
        found.append(Usage(pool, sum(span.last - span.first + 1 for span in spans), used))
    return found


def _merged(spans: Iterable[Span]) -> list[Span]:
    """The same addresses, each once."""
    found: list[Span] = []
    for span in sorted(spans):
        before = found[-1] if found else None
        if before and before.family == span.family and span.first <= before.last:
            found[-1] = before._replace(last=max(before.last, span.last))
        else:
            found.append(span)
    return found


def with_addresses(service: Service, addresses: Iterable[str]) -> Service:
    """The Service with these in its status, as addresses that packets keep."""
    ingress = tuple(LoadBalancerIngress(ip=text, ip_mode="VIP") for text in addresses)
    status = ServiceStatus(load_balancer=LoadBalancerStatus(ingress=ingress or None))
    return msgspec.structs.replace(service, status=status)


class _Wish(NamedTuple):
    """``number``: the one that the Service asks for; None: any."""

    service: Service
    family: IPFamily
    number: int | None


@dataclass(frozen=True, slots=True)
class _Holders:
    """The Services that share an address. All are alike but for their ports, unless it is closed:
    somebody else gave it to Services that are not.
    """

    first: Service
    ports: dict[tuple[int, str], Service] = field(default_factory=dict)
    is_closed: bool = False

    def obstacle(self, service: Service) -> str:
        """Why another cannot join; "": it can.

        An address is announced by one node. By the policy Local that one has endpoints, so then
        all must select the same Pods.
        """
        first = self.first
        if service is first:
            return ""
        if self.is_closed or not _sharing(service) or _sharing(service) != _sharing(first):
            return str(first.key)
        for port in _ports(service):
            if port in self.ports:
                return f"{self.ports[port].key}, which has port {port[0]}/{port[1]}, too"
        if _locality(service) != _locality(first):
            return f"{first.key}, of another externalTrafficPolicy or, by Local, of other Pods"
        return ""


class _Shared:
    """The addresses that Services share which are alike but for their ports. To find one costs a
    bit for each.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._bits: dict[int, int] = {}  # by number
        self._taken: dict[tuple[int, str], int] = {}  # the bits of the addresses, by port

    def add(self, number: int, ports: Iterable[tuple[int, str]]) -> None:
        """These ports of an address are taken."""
        if number not in self._bits:
            self._bits[number] = 1 << len(self._numbers)
            self._numbers.append(number)
        for port in ports:
            self._taken[port] = self._taken.get(port, 0) | self._bits[number]

    def free(self, ports: Iterable[tuple[int, str]]) -> Iterator[int]:
        """The addresses on which none of these ports is taken, from the first one on."""
        free = (1 << len(self._numbers)) - 1
        for port in ports:
            free &= ~self._taken.get(port, 0)
        while free:
            yield self._numbers[(free & -free).bit_length() - 1]
            free &= free - 1


class _Allocating:
    """One allocation, while it is made."""

    def __init__(self, pools: list[LoadBalancerPool], remembered: _Addresses) -> None:
        self._pools = [(pool, [parse_span(text) for text in pool.spec.addresses]) for pool in pools]
        self._remembered = remembered
        self._holders: dict[tuple[IPFamily, int], _Holders] = {}
        self._shared: defaultdict[tuple[Hashable, ...], _Shared] = defaultdict(_Shared)
        self._held: dict[ServiceRef, dict[IPFamily, int]] = {}
        self._full: set[Span] = set()  # all are taken, and stay so
        self._result = Allocation()

    def reserve(self, other: Service) -> None:
        """What it has is for nobody else, but for those who share it."""
        for place in numbers_of(held_addresses(other, of_proxies=True)):
            holders = self._holders.get(place)
            if holders and holders.obstacle(other):
                self._holders[place] = replace(holders, is_closed=True)
            else:
                self._note(other, *place)

    def run(self, services: list[Service]) -> Allocation:
        wishes = [wish for service in services for wish in self._wishes(service)]
        wishes = [wish for wish in wishes if not self._keep(wish)]
        for asked in (True, False):
            for wish in wishes:
                if (wish.number is not None) is asked:
                    self._grant(wish)
        for service in services:
            if held := self._held.get(service.ref):
                families = service.spec.ip_families or sorted(held)
                self._result.addresses[service.ref] = tuple(
                    text_of(family, held[family]) for family in families if family in held
                )
        return self._result

    def _wishes(self, service: Service) -> Iterator[_Wish]:
        try:
            asked = _asked(service)
        except ManifestError as error:
            self._refuse(service, "InvalidLoadBalancerIP", error)
            return
        families = service.spec.ip_families or tuple(asked) or ("IPv4",)
        for family, number in asked.items():
            if family not in families:
                text = text_of(family, number)
                problem = ManifestError(f"{text} is not of the Service's ipFamilies")
                self._refuse(service, "InvalidLoadBalancerIP", problem)
        offered = [each for each in families if any(self._spans(service, each, asking=True))]
        if not offered or service.spec.ip_family_policy == "RequireDualStack":
            offered = list(families)
        for family in families:
            if family in offered or family in asked:
                yield _Wish(service, family, asked.get(family))

    def _spans(self, service: Service, family: IPFamily, *, asking: bool) -> Iterator[Span]:
        """Where its addresses may be."""
        for pool, spans in self._pools:
            if pool.admits(service) and (asking or pool.spec.auto_assign is not False):
                yield from (span for span in spans if span.family == family)

    def _keep(self, wish: _Wish) -> bool:
        """Have what it had, where that is still right."""
        for text in self._remembered.get(wish.service.ref, ()):
            number = int(ipaddress.ip_address(text))
            if family_of(text) == wish.family and wish.number in (None, number):
                try:
                    self._take(wish.service, wish.family, number)
                except SvcdpError:
                    return False
                return True
        return False

    def _grant(self, wish: _Wish) -> None:
        service, family, number = wish
        try:
            self._take(service, family, self._any(service, family) if number is None else number)
        except ConflictError as error:
            self._refuse(service, "LoadBalancerIPAlreadyAllocated", error)
        except CapacityError as error:
            reason = "LoadBalancerPoolFull" if number is None else "LoadBalancerIPOutOfRange"
            self._refuse(service, reason, error)

    def _any(self, service: Service, family: IPFamily) -> int:
        spans = list(self._spans(service, family, asking=False))
        if _sharing(service):
            for number in self._shared_by(service, family).free(_ports(service)):
                is_closed = self._holders[family, number].is_closed
                if not is_closed and any(number in span for span in spans):
                    return number
        for span in spans:
            if span in self._full:
                continue
            if (found := span.free(str(service.ref), self._holders)) is not None:
                return found
            self._full.add(span)
        if not spans:
            raise CapacityError(f"no LoadBalancerPool has {family} addresses for it")
        raise CapacityError(f"no {family} address is left in the LoadBalancerPools for it")

    def _take(self, service: Service, family: IPFamily, number: int) -> None:
        """ConflictError, CapacityError."""
        text = text_of(family, number)
        if not any(number in span for span in self._spans(service, family, asking=True)):
            raise CapacityError(f"{text} is in no LoadBalancerPool for it")
        holders = self._holders.get((family, number)) or _Holders(service)
        if obstacle := holders.obstacle(service):
            raise ConflictError(f"{text} is already allocated to {obstacle}")
        self._note(service, family, number)
        self._held.setdefault(service.ref, {})[family] = number

    def _note(self, service: Service, family: IPFamily, number: int) -> None:
        """It is one of those who have the address."""
        holders = self._holders.setdefault((family, number), _Holders(service))
        holders.ports.update(dict.fromkeys(_ports(service), service))
        if _sharing(service):
            self._shared_by(service, family).add(number, _ports(service))

    def _shared_by(self, service: Service, family: IPFamily) -> _Shared:
        """The addresses of those that are like it."""
        return self._shared[family, _sharing(service), _locality(service)]

    def _refuse(self, service: Service, reason: str, error: SvcdpError) -> None:
        problem = service.problem("spec.loadBalancerIP", str(error))
        self._result.problems.append(problem)
        self._result.events.append(Event.of(service.key, reason, problem))


def _asked(service: Service) -> dict[IPFamily, int]:
    """The addresses that it asks for. ManifestError."""
    listed = (service.metadata.annotations or {}).get(ADDRESSES_ANNOTATION)
    texts = listed.split(",") if listed else filter(None, [service.spec.load_balancer_ip])
    asked: dict[IPFamily, int] = {}
    for text in texts:
        address = parse_address(text.strip())
        family = family_of(address)
        if family in asked:
            raise ManifestError(f"{address} is the second {family} address")
        asked[family] = int(ipaddress.ip_address(address))
    return asked


def _sharing(service: Service) -> str:
    return (service.metadata.annotations or {}).get(SHARING_ANNOTATION, "")


def _ports(service: Service) -> list[tuple[int, str]]:
    return [(port.port, port.protocol or "TCP") for port in service.spec.ports or ()]


def _locality(service: Service) -> Hashable:
    spec = service.spec
    if spec.external_traffic_policy != "Local":
        return None
    return service.ref.namespace, tuple(sorted((spec.selector or {}).items()))
