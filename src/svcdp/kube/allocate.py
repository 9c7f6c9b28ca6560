"""Cluster IPs and node ports for Services that name none, as an API server hands them out.

The rules are those of ``pkg/registry/core/service/{ipallocator,portallocator}``, KEP-3070 (bands of
addresses) and KEP-3668 (bands of ports), but for one: where to look first is not random, it follows
from the Service's name, so that nodes with the same manifests agree. Pure.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import msgspec

from svcdp.errors import CapacityError, ConflictError, ManifestError, SvcdpError
from svcdp.kube.events import Event
from svcdp.kube.model import (
    IPFamily,
    ObjectKey,
    Service,
    ServicePort,
    ServiceRef,
    ServiceSpec,
    family_of,
    parse_address,
)

__all__ = [
    "FAMILIES",
    "HEALTH_CHECK",
    "NODE_PORTS",
    "Allocator",
    "Band",
    "Holdings",
    "Slot",
    "rank",
    "text_of",
]

NODE_PORTS = (30000, 32767)
HEALTH_CHECK = "healthCheck"

Slot = str
"""What a Service needs a number for: an IP family, a port (``80/TCP``), :data:`HEALTH_CHECK`."""

Holdings = Mapping[ServiceRef, Mapping[Slot, int]]
"""Who has what; addresses as numbers."""

FAMILIES: tuple[IPFamily, IPFamily] = ("IPv4", "IPv6")
_PROTOCOLS = ("TCP", "UDP", "SCTP")
_NEVER = "~"  # sorts behind every timestamp


class Band:
    """The numbers from ``first`` to ``last``, each for one holder.

    :meth:`pick` leaves the ``reserved`` lowest ones, which people like to ask for, until all
    others are taken.
    """

    def __init__(self, first: int, last: int, reserved: int = 0) -> None:
        self.first = first
        self.last = last
        self._middle = min(first + reserved, last + 1)
        self._holders: dict[int, str] = {}
        self._upper = 0  # how many holders have a number that is not reserved

    @classmethod
    def of_network(cls, cidr: str) -> Band:
        """The addresses of a network, without its own and an IPv4 one's broadcast address."""
        network = ipaddress.ip_network(cidr)
        size = network.num_addresses
        first = int(network.network_address)
        own = int(size > 2)  # one or two addresses are hosts' (RFC 3021, RFC 6164)
        broadcast = own if network.version == 4 else 0
        reserved = 0 if size < 16 else min(max(16, size // 16), 256)
        return cls(first + own, first + size - 1 - broadcast, reserved)

    @classmethod
    def of_ports(cls, first: int, last: int) -> Band:
        """Node ports."""
        size = last - first + 1
        return cls(first, last, 0 if size < 16 else min(max(16, size // 32), 128))

    def __contains__(self, number: int) -> bool:
        return self.first <= number <= self.last

    def take(self, number: int, holder: str) -> None:
        """Have just this one. ConflictError: somebody else does."""
        other = self._holders.get(number)
        if other is None:
            self._holders[number] = holder
            self._upper += number >= self._middle
        elif other != holder:
            raise ConflictError(f"already allocated to {other}")

    def pick(self, holder: str) -> int:
        """Have any. CapacityError: there is none."""
        lower = len(self._holders) - self._upper
        if self._upper < self.last + 1 - self._middle:
            number = self._free(self._middle, self.last + 1, holder)
        elif lower < self._middle - self.first:
            number = self._free(self.first, self._middle, holder)
        else:
            raise CapacityError("range is full")
        self.take(number, holder)
        return number

    def release(self, number: int) -> None:
        """From now on it is free."""
        if self._holders.pop(number, None) is not None:
            self._upper -= number >= self._middle

    def _free(self, start: int, end: int, holder: str) -> int:
        digest = hashlib.blake2b(holder.encode(), digest_size=16).digest()
        number = start + int.from_bytes(digest) % (end - start)
        while number in self._holders:
            number = number + 1 if number + 1 < end else start
        return number


class _Wish(NamedTuple):
    """``number``: the one that the manifest asks for; None: any."""

    slot: Slot
    field: str
    number: int | None


class Allocator:
    """Gives Services what they lack.

    A Service's manifest goes first, then what it had, then a free number. Whoever has a number
    keeps it; of those who ask for one at the same time the older Service gets it, then the first
    by namespace and name. What Services go without is in :attr:`problems`; they get another chance
    when something is released. Without networks of a family its addresses are not looked after.
    Networks may overlap.

    ``remembered`` is what :attr:`holdings` was; what is out of range now does not count.
    """

    def __init__(
        self,
        service_cidrs: Iterable[str] = (),
        node_ports: tuple[int, int] = NODE_PORTS,
        remembered: Holdings | None = None,
    ) -> None:
        self._bands: dict[IPFamily, list[Band]] = {}
        for cidr in service_cidrs:
            self._bands.setdefault(family_of(cidr), []).append(Band.of_network(cidr))
        self._ports = [Band.of_ports(*node_ports)]
        self._lacking: dict[ServiceRef, Service] = {}  # those with problems
        self._complete: dict[ServiceRef, Service] = {}
        self._held: dict[ServiceRef, dict[Slot, int]] = {}
        self._problems: dict[ServiceRef, list[tuple[str, ManifestError]]] = {}  # with reasons
        #: How often what is held was changed.
        self.revision = 0
        for ref, slots in (remembered or {}).items():
            for slot, number in slots.items():
                if _take(self._bands_of(slot), number, _holder(ref, slot)):
                    self._held.setdefault(ref, {})[slot] = number

    @property
    def holdings(self) -> Holdings:
        """Who has what: to be remembered."""
        return self._held

    @property
    def complete(self) -> Mapping[ServiceRef, Service]:
        """All Services, with what they have."""
        return self._complete

    @property
    def problems(self) -> list[ManifestError]:
        """What Services go without, and why."""
        return [problem for _, found in sorted(self._problems.items()) for _, problem in found]

    @property
    def events(self) -> list[Event]:
        """The same, for those who made the Services."""
        return [
            Event.of(ObjectKey("Service", *ref), reason, problem)
            for ref, found in self._problems.items()
            for reason, problem in found
        ]

    def update(
        self, services: Iterable[Service], gone: Collection[ServiceRef] = ()
    ) -> dict[ServiceRef, Service]:
        """Some Services are new or different, some are gone.

        Returns those that are different now, complete: what they have is in their fields, and
        what they asked for and did not get is not.
        """
        given = {service.ref: service for service in services}
        wishes = {ref: list(self._wishes(service)) for ref, service in given.items()}
        is_free = [self._keep(ref, ()) for ref in gone]
        is_free += [self._keep(ref, wishes[ref]) for ref in given]
        for ref in (*gone, *given):
            self._lacking.pop(ref, None)
            self._problems.pop(ref, None)
            if ref not in given:
                self._complete.pop(ref, None)
        if any(is_free):
            # It may be what others lack.
            given |= self._lacking
            wishes |= {ref: list(self._wishes(each)) for ref, each in self._lacking.items()}
            self._lacking = {}
            self._problems = {}
        chosen = sorted(given.values(), key=rank)
        for asked in (True, False):
            for service in chosen:
                for wish in wishes[service.ref]:
                    if (wish.number is not None) is asked:
                        self._grant(service, wish)
        changed = {}
        for service in chosen:
            complete = self._completed(service, wishes[service.ref])
            if self._complete.get(service.ref) != complete:
                self._complete[service.ref] = changed[service.ref] = complete
        return changed

    def _bands_of(self, slot: Slot) -> list[Band]:
        for family in FAMILIES:
            if slot == family:
                return self._bands.get(family, [])
        return self._ports

    def _release(self, ref: ServiceRef, slot: Slot) -> None:
        held = self._held[ref]
        number = held.pop(slot)
        self.revision += 1
        if number not in held.values():  # of a port's other protocol
            for band in self._bands_of(slot):
                if number in band:
                    band.release(number)
        if not held:
            del self._held[ref]

    def _keep(self, ref: ServiceRef, wishes: Iterable[_Wish]) -> bool:
        """Release what a Service has and does not want any more; whether there was any."""
        wanted = {wish.slot: wish.number for wish in wishes}
        released = [
            slot
            for slot, number in self._held.get(ref, {}).items()
            if slot not in wanted or wanted[slot] not in (None, number)
        ]
        for slot in released:
            self._release(ref, slot)
        return bool(released)

    def _grant(self, service: Service, wish: _Wish) -> None:
        held = self._held.get(service.ref, {})
        if wish.slot in held:
            return
        try:
            number = self._allocate(wish, _holder(service.ref, wish.slot), held)
        except SvcdpError as error:
            problem = service.problem(wish.field, str(error))
            self._problems.setdefault(service.ref, []).append((_reason(wish, error), problem))
            self._lacking[service.ref] = service
        else:
            self._held.setdefault(service.ref, {})[wish.slot] = number
            self.revision += 1

    def _allocate(self, wish: _Wish, holder: str, held: Mapping[Slot, int]) -> int:
        bands = self._bands_of(wish.slot)
        if wish.number is not None:
            text = text_of(wish.slot, wish.number)
            try:
                if _take(bands, wish.number, holder):
                    return wish.number
            except ConflictError as error:
                raise ConflictError(f"{text} is {error}") from None
            raise CapacityError(f"{text} is not in the range {self._range(wish.slot)}")
        port, _, protocol = wish.slot.partition("/")
        for other in _PROTOCOLS if protocol else ():
            # TCP and UDP of one port share a node port.
            if (number := held.get(f"{port}/{other}")) is not None:
                return number
        for band in bands:
            try:
                number = band.pick(holder)
            except CapacityError:
                continue
            _take(bands, number, holder)
            return number
        if not bands:
            raise CapacityError(f"there is no network for cluster IPs of {wish.slot}: add one")
        raise CapacityError(f"range is full: {self._range(wish.slot)}")

    def _range(self, slot: Slot) -> str:
        return ", ".join(
            f"{text_of(slot, band.first)}-{text_of(slot, band.last)}"
            for band in self._bands_of(slot)
        )

    def _wishes(self, service: Service) -> Iterator[_Wish]:
        spec = service.spec
        if spec.type == "ExternalName" or "None" in (spec.cluster_ip, *(spec.cluster_ips or ())):
            return
        given = _given(spec)
        for family in self._families_of(spec, given):
            # Where nobody knows the networks, what a manifest says is right.
            if family in self._bands or family not in given:
                number = int(ipaddress.ip_address(given[family])) if family in given else None
                yield _Wish(family, "spec.clusterIP", number)
        any_port = spec.type == "NodePort" or (
            spec.type == "LoadBalancer" and spec.allocate_load_balancer_node_ports is not False
        )
        for index, port in enumerate(spec.ports or ()):
            if any_port or port.node_port:
                yield _Wish(_slot(port), f"spec.ports[{index}].nodePort", port.node_port or None)
        if spec.type == "LoadBalancer" and spec.external_traffic_policy == "Local":
            yield _Wish(
                HEALTH_CHECK, "spec.healthCheckNodePort", spec.health_check_node_port or None
            )

    def _families_of(self, spec: ServiceSpec, given: Mapping[IPFamily, str]) -> list[IPFamily]:
        """In which it wants a cluster IP. The first network's family is the usual one.

        None for one that contradicts itself, which is served as far as it makes sense.
        """
        families: list[IPFamily] = []
        families.extend(spec.ip_families or given or islice(self._bands, 1))
        policy = spec.ip_family_policy
        if policy == "SingleStack":
            families = families[:1]
        elif families and policy is not None:
            other: IPFamily = "IPv6" if families[0] == "IPv4" else "IPv4"
            if policy == "RequireDualStack" or other in self._bands or other in given:
                families = [families[0], other]
        return families if given.keys() <= set(families) else []

    def _completed(self, service: Service, wishes: Iterable[_Wish]) -> Service:
        spec = service.spec
        held = self._held.get(service.ref, {})
        slots = [wish.slot for wish in wishes]
        changes: dict[str, object] = {}
        if any(slot in FAMILIES for slot in slots):
            given = _given(spec)
            addresses = {
                family: text_of(family, held[family]) if family in held else given[family]
                for family in self._families_of(spec, given)
                if family in held or (family in given and family not in self._bands)
            }
            changes["ip_families"] = tuple(addresses)
            changes["cluster_ips"] = tuple(addresses.values())
            changes["cluster_ip"] = next(iter(addresses.values()), None)
        changes["ports"] = spec.ports and tuple(
            msgspec.structs.replace(port, node_port=held.get(_slot(port)))
            if _slot(port) in slots
            else port
            for port in spec.ports
        )
        if HEALTH_CHECK in slots:
            changes["health_check_node_port"] = held.get(HEALTH_CHECK)
        return msgspec.structs.replace(service, spec=msgspec.structs.replace(spec, **changes))


def _take(bands: Iterable[Band], number: int, holder: str) -> bool:
    """Have a number, in each band that has it; whether one has. ConflictError."""
    found = [band for band in bands if number in band]
    for band in found:
        band.take(number, holder)
    return bool(found)


def _reason(wish: _Wish, error: SvcdpError) -> str:
    """As an API server's repair loops have it."""
    is_address = wish.slot in FAMILIES
    if wish.number is None:
        return "ServiceCIDRFull" if is_address else "PortRangeFull"
    what = "AlreadyAllocated" if isinstance(error, ConflictError) else "OutOfRange"
    return f"ClusterIP{what}" if is_address else f"Port{what}"


def rank(service: Service) -> tuple[str, ServiceRef]:
    """Who goes first: the older Service, then the first by namespace and name."""
    return service.metadata.creation_timestamp or _NEVER, service.ref


def _holder(ref: ServiceRef, slot: Slot) -> str:
    return f"Service {ref}" + (" (health check)" if slot == HEALTH_CHECK else "")


def _slot(port: ServicePort) -> Slot:
    return f"{port.port}/{port.protocol or 'TCP'}"


def _given(spec: ServiceSpec) -> dict[IPFamily, str]:
    """The cluster IPs that a manifest asks for."""
    texts = [parse_address(text) for text in spec.cluster_ips or (spec.cluster_ip,) if text]
    return {family_of(text): text for text in texts}


def text_of(slot: Slot, number: int) -> str:
    """How people write what a slot holds: an address, or the number."""
    if slot == "IPv6":
        return str(ipaddress.IPv6Address(number))
    return str(ipaddress.IPv4Address(number)) if slot == "IPv4" else str(number)
