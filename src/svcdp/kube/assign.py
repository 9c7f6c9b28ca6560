"""What a cluster's Services of type LoadBalancer are to have in their status. Pure.

Who wrote a status is known by the API server's ``metadata.managedFields``
(https://kubernetes.io/docs/reference/using-api/server-side-apply/#field-management): what somebody
else wrote is somebody else's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Self

import msgspec

from svcdp.errors import ManifestError
from svcdp.kube.decode import decode_json
from svcdp.kube.events import Event
from svcdp.kube.model import (
    LoadBalancerIngress,
    LoadBalancerPool,
    LoadBalancerStatus,
    ObjectKey,
    ObjectMeta,
    Service,
    ServiceRef,
    ServiceSpec,
    ServiceStatus,
)
from svcdp.kube.pools import (
    POOL_CLASS,
    Span,
    allocate,
    held_addresses,
    is_clouds,
    is_served,
    numbers_of,
    parse_span,
    with_addresses,
)

__all__ = [
    "MANAGER",
    "Assignment",
    "Decision",
    "ObservedPool",
    "ObservedService",
    "decide",
    "decode_pool",
    "decode_service",
]

MANAGER = "svcdp-controller"
"""Whom the API server is told to note as the writer of a status."""


class _Balancer(msgspec.Struct, gc=False):
    ingress: object = msgspec.field(name="f:ingress", default=None)


class _Status(msgspec.Struct, gc=False):
    load_balancer: _Balancer | None = msgspec.field(name="f:loadBalancer", default=None)


class _Fields(msgspec.Struct, gc=False):
    status: _Status | None = msgspec.field(name="f:status", default=None)


class _Managed(msgspec.Struct, gc=False):
    manager: str = ""
    fields: _Fields | None = msgspec.field(name="fieldsV1", default=None)

    @property
    def has_ingress(self) -> bool:
        status = self.fields and self.fields.status
        balancer = status and status.load_balancer
        return bool(balancer and balancer.ingress is not None)


class _Meta(msgspec.Struct, rename="camel", gc=False):
    name: str
    namespace: str | None = None
    resource_version: str = ""
    uid: str = ""
    managed_fields: list[_Managed] | None = None


class _Place(msgspec.Struct, gc=False):
    ip: str | None = None


class _Places(msgspec.Struct, gc=False):
    ingress: list[_Place] | None = None


class _Had(msgspec.Struct, rename="camel", gc=False):
    load_balancer: _Places | None = None


class _Head(msgspec.Struct, gc=False):
    """What is read of an object that cannot be read as a whole."""

    metadata: _Meta
    status: _Had | None = None

    @property
    def ingress(self) -> tuple[LoadBalancerIngress, ...]:
        """Its addresses, whatever else there is of them."""
        balancer = self.status and self.status.load_balancer
        places = (balancer and balancer.ingress) or ()
        return tuple(LoadBalancerIngress(ip=each.ip) for each in places)


class ObservedService(NamedTuple):
    """A Service as the API server has it. ``is_own``: the addresses in its status were written by
    this controller. Where there is a ``problem`` nothing is known of it but its addresses.
    """

    service: Service
    version: str
    is_own: bool
    problem: ManifestError | None

    @property
    def matters(self) -> bool:
        """Whether it has, or could have, an address."""
        return self.is_own or self.service.spec.type == "LoadBalancer"


class ObservedPool(NamedTuple):
    """A LoadBalancerPool as the API server has it, or what is wrong with it."""

    key: ObjectKey
    uid: str
    pool: LoadBalancerPool | None
    problem: ManifestError | None


def decode_service(data: bytes) -> ObservedService:
    """ManifestError for what is none."""
    head = _head(data)
    meta = head.metadata
    problem = None
    try:
        service = decode_json(data, Service)
    except ManifestError as error:
        problem = error
        place = ObjectMeta(meta.name, meta.namespace)
        status = ServiceStatus(LoadBalancerStatus(head.ingress))
        service = Service(place, ServiceSpec(type="LoadBalancer"), status)
    writers = {each.manager for each in meta.managed_fields or () if each.has_ingress}
    return ObservedService(
        service,
        meta.resource_version,
        # Which the server notes also where it has emptied it since.
        is_own=MANAGER in writers and bool(_ingress(service)),
        problem=problem,
    )


def decode_pool(data: bytes) -> ObservedPool:
    """ManifestError for what is no object."""
    meta = _head(data).metadata
    key = ObjectKey("LoadBalancerPool", "", meta.name)
    try:
        return ObservedPool(key, meta.uid, decode_json(data, LoadBalancerPool), None)
    except ManifestError as error:
        return ObservedPool(key, meta.uid, None, error)


def _head(data: bytes) -> _Head:
    try:
        return msgspec.json.decode(data, type=_Head)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ManifestError(f"not an object of the API: {error}") from None


class Assignment(NamedTuple):
    """A Service of this version is to have the addresses ``after`` and no others."""

    service: Service
    version: str
    after: tuple[str, ...]

    @property
    def before(self) -> tuple[str, ...]:
        """What it has now."""
        return held_addresses(self.service)

    @property
    def changes_something(self) -> bool:
        """Whether its status is to be another one."""
        return _ingress(self.service) != _ingress(with_addresses(self.service, self.after))

    def without(self, leaving: Collection[str]) -> Self:
        """For now, with none of these that it does not have already."""
        before = self.before
        after = tuple(text for text in self.after if text in before or text not in leaving)
        return self._replace(after=after)

    @property
    def event(self) -> Event:
        """What those who made the Service are told of it."""
        if self.after:
            text, reason = f"its addresses are {', '.join(self.after)}", "LoadBalancerIPAllocated"
        else:
            text, reason = f"it has no more {', '.join(self.before)}", "LoadBalancerIPReleased"
        return Event(self.service.key, reason, text, "Normal")


@dataclass(frozen=True, slots=True)
class Decision:
    """``assignments`` are what is not yet so; they may be made true in any order, each by itself:
    who is to have what another Service still has waits for the next decision. ``events`` are what
    is wrong, each time that it is looked at. ``lacking``: Services that go without an address.
    """

    assignments: Sequence[Assignment]
    events: Sequence[Event]
    lacking: int


class _Whose(Enum):
    OWN = auto()
    STALE = auto()  # its addresses are from here, and it is no longer to have any
    OTHERS = auto()


def decide(
    services: Iterable[ObservedService],
    pools: Iterable[LoadBalancerPool],
    *,
    class_only: bool = False,
    is_partial: bool = False,
) -> Decision:
    """Give addresses to the Services that are this controller's, and leave the others alone.

    Those of class :data:`svcdp.kube.pools.POOL_CLASS` are, and those without a class (unless
    ``class_only``) for which there is a pool, as long as nobody else gives them addresses: a cloud
    that says so, or whoever wrote one into their status that is in no pool for them. A Service
    that is being deleted stays as it is. ``is_partial``: there may be pools that are not known, so
    what is in no known one stays, too.
    """
    known = _Pools(pools)
    own: dict[ServiceRef, ObservedService] = {}
    stale: list[ObservedService] = []
    others: list[Service] = []
    for each in services:
        whose = _whose(each, known, class_only, is_partial)
        if whose is _Whose.OWN:
            own[each.service.ref] = each
        elif whose is _Whose.STALE:
            stale.append(each)
        elif each.service.spec.type == "LoadBalancer":
            others.append(each.service)
    allocation = allocate(
        (each.service for each in own.values()),
        known.pools,
        {ref: held_addresses(each.service) for ref, each in own.items()},
        others=others,
    )
    events = allocation.events
    if not known.pools:
        text = "there is no LoadBalancerPool" + " that can be read" * is_partial
        events = [Event(each.service.key, "NoLoadBalancerPool", text) for each in own.values()]
    wanted = [
        Assignment(each.service, each.version, allocation.addresses.get(each.service.ref, ()))
        for each in (*stale, *own.values())
    ]
    leaving = {text for each in wanted for text in each.before if text not in each.after}
    assignments = [
        each for each in (each.without(leaving) for each in wanted) if each.changes_something
    ]
    return Decision(assignments, events, len(own.keys() - allocation.addresses.keys()))


class _Pools:
    def __init__(self, pools: Iterable[LoadBalancerPool]) -> None:
        self.pools = list(pools)
        self._spans = [[parse_span(text) for text in each.spec.addresses] for each in self.pools]

    def admit(self, service: Service) -> bool:
        """Whether there is one for it."""
        return any(pool.admits(service) for pool in self.pools)

    def hold(self, service: Service, addresses: Iterable[str]) -> bool:
        """Whether all these are in pools for it."""
        spans: list[Span] = []
        for pool, own in zip(self.pools, self._spans, strict=True):
            if pool.admits(service):
                spans += own
        return all(
            any(span.family == family and number in span for span in spans)
            for family, number in numbers_of(addresses)
        )


def _whose(each: ObservedService, known: _Pools, class_only: bool, is_partial: bool) -> _Whose:
    service = each.service
    if each.problem:
        return _Whose.OTHERS
    if not is_served(service, not class_only):
        return _Whose.STALE if each.is_own and not is_clouds(service) else _Whose.OTHERS
    if service.metadata.deletion_timestamp:
        return _Whose.OTHERS
    if is_partial and not known.hold(service, held_addresses(service)):
        return _Whose.OTHERS
    if service.spec.load_balancer_class == POOL_CLASS:
        return _Whose.OWN
    if each.is_own:
        return _Whose.OWN
    held = held_addresses(service)
    ingress = _ingress(service)
    is_pools = len(held) == len(ingress) and not any(each.hostname for each in ingress)
    is_pools = is_pools and known.hold(service, held)
    return _Whose.OWN if is_pools and known.admit(service) else _Whose.OTHERS


def _ingress(service: Service) -> list[LoadBalancerIngress]:
    """What is in its status; servers before 1.29 know no ``ipMode``."""
    balancer = service.status and service.status.load_balancer
    return [
        msgspec.structs.replace(each, ip_mode=each.ip_mode or "VIP") if each.ip else each
        for each in (balancer and balancer.ingress) or ()
    ]
