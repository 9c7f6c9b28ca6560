"""The objects of all sources, and which Services a change touches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

from svcdp.errors import ConflictError
from svcdp.kube.model import (
    EndpointSlice,
    LoadBalancerPool,
    Node,
    Object,
    ObjectKey,
    Pod,
    Service,
    ServiceCIDR,
    ServiceRef,
)
from svcdp.kube.selector import Selection, slices_of

__all__ = ["Change", "Origin", "State"]

TRIGGER_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"

Origin = tuple[int, str, str]
"""Where an object is from: rank and name of the source, and the place in it (a file)."""


@dataclass(frozen=True, slots=True)
class Change:
    """Some objects are new or different, some are gone.

    ``origin`` is a place in the source, such as a file. With ``replace`` the objects are
    all that this place has, and whatever else it had is gone.
    """

    origin: str = ""
    objects: tuple[Object, ...] = ()
    deleted: tuple[ObjectKey, ...] = ()
    replace: bool = False


class State:
    """Services, EndpointSlices, Pods, Nodes, ServiceCIDRs and LoadBalancerPools, each from one or
    several origins.

    Where several have the same object the lowest origin's counts; the next one takes over
    when it goes. Pods are endpoints of the Services that select them. Not safe for several threads.
    """

    def __init__(self) -> None:
        self._held: dict[Origin, dict[ObjectKey, Object]] = {}
        self._origins: dict[ObjectKey, list[Origin]] = {}  # sorted
        self._shared: set[ObjectKey] = set()  # those with several origins
        #: How many objects of each kind came, went or became different.
        self.changed: Counter[str] = Counter()
        #: When changed slices say that what changed them was, for those who want to know how long
        #: it took. Theirs to empty.
        self.triggers: list[str] = []
        self._services: dict[ServiceRef, Service] = {}
        self._slices: dict[ServiceRef, dict[str, EndpointSlice]] = {}
        self._selection = Selection()
        self._selected: dict[ServiceRef, list[EndpointSlice]] = {}  # what Pods are for Services
        #: By name; None: it is gone.
        self.nodes: dict[str, Node | None] = {}
        self.service_cidrs: dict[str, ServiceCIDR] = {}
        self.pools: dict[str, LoadBalancerPool] = {}

    @property
    def services(self) -> Mapping[ServiceRef, Service]:
        """All Services that count, hidden ones too."""
        return MappingProxyType(self._services)

    def origin(self, key: ObjectKey) -> str:
        """In which place of its source the object is that counts; KeyError: there is none."""
        return self._origins[key][0][2]

    def slices(self, ref: ServiceRef) -> list[EndpointSlice]:
        """The EndpointSlices of a Service, hidden ones too: by name, then those of its Pods."""
        found = self._slices.get(ref, {})
        return [*(found[name] for name in sorted(found)), *self._selected.get(ref, ())]

    def pods(self) -> list[tuple[Pod, list[ServiceRef]]]:
        """All Pods, by namespace and name, and the Services that select them."""
        keys = sorted(key for key in self._origins if key.kind == "Pod")
        pods = (self._effective(key) for key in keys)
        return [
            (pod, sorted(self._selection.services(pod))) for pod in pods if isinstance(pod, Pod)
        ]

    def slice_count(self) -> int:
        """How many EndpointSlices belong to some Service name."""
        return sum(map(len, chain(self._slices.values(), self._selected.values())))

    def endpoint_count(self) -> int:
        """How many endpoints these slices have, copies too."""
        own = (found.values() for found in self._slices.values())
        return sum(
            len(each.endpoints or ())
            for found in chain(own, self._selected.values())
            for each in found
        )

    def conflicts(self) -> list[ConflictError]:
        """Objects that several origins have, and whose counts."""
        return [
            ConflictError(f"{key} is in {' and in '.join(places)}; the one in {places[0]} counts")
            for key in sorted(self._shared)
            if (places := [_place(origin) for origin in self._origins[key]])
        ]

    def apply(self, rank: int, source: str, change: Change) -> set[ServiceRef]:
        """Take a change in; returns the Services that it may matter to."""
        origin = (rank, source, change.origin)
        held = self._held.setdefault(origin, {})
        new = {found.key: found for found in change.objects}
        gone = set(change.deleted)
        if change.replace:
            gone |= held.keys()
        touched: set[ServiceRef] = set()
        for key in gone - new.keys():
            if key in held:
                before = self._effective(key)
                del held[key]
                self._origins[key].remove(origin)
                touched |= self._refresh(key, before)
        for key, found in new.items():
            if held.get(key) == found:
                continue
            before = self._effective(key)
            if key not in held:
                origins = self._origins.setdefault(key, [])
                origins.append(origin)
                origins.sort()
            held[key] = found
            touched |= self._refresh(key, before)
        if not held:
            del self._held[origin]
        for ref in touched:
            self._select(ref)
        return touched

    def _select(self, ref: ServiceRef) -> None:
        self._selected.pop(ref, None)
        if (service := self._services.get(ref)) and (pods := self._selection.pods(service)):
            self._selected[ref] = slices_of(service, pods, self.nodes)

    def _effective(self, key: ObjectKey) -> Object | None:
        origins = self._origins.get(key)
        return self._held[origins[0]][key] if origins else None

    def _refresh(self, key: ObjectKey, before: Object | None) -> set[ServiceRef]:
        """Bring the indexes up to date; returns the Services that the object matters to."""
        origins = self._origins[key]
        if len(origins) > 1:
            self._shared.add(key)
        else:
            self._shared.discard(key)
        after = self._effective(key)
        if not origins:
            del self._origins[key]
        if before == after:
            # Another copy may count now; who completes Services must know which.
            return {after.ref} if after is not None and after.ref is not None else set()
        self.changed[key.kind] += 1
        if key.kind == "Node":
            self.nodes[key.name] = after if isinstance(after, Node) else None
            zones = {each.metadata.zone if each is not None else "" for each in (before, after)}
            return self._served_by(key.name) if len(zones) == 2 else set()
        if key.kind == "LoadBalancerPool":
            self.pools.pop(key.name, None)
            if isinstance(after, LoadBalancerPool):
                self.pools[key.name] = after
            return set()
        if key.kind == "ServiceCIDR":
            self.service_cidrs.pop(key.name, None)
            if isinstance(after, ServiceCIDR):
                self.service_cidrs[key.name] = after
            return set()
        touched: set[ServiceRef] = set()
        if isinstance(before, Service | Pod):
            self._selection.remove(before)
        if isinstance(after, Service | Pod):
            self._selection.add(after)
        for pod in (before, after):
            if isinstance(pod, Pod):
                touched |= set(self._selection.services(pod))
        if before is not None and before.ref is not None:
            touched.add(before.ref)
            self._remove(before, before.ref)
        if after is not None and after.ref is not None:
            touched.add(after.ref)
            self._insert(after, after.ref)
        return touched

    def _served_by(self, node: str) -> set[ServiceRef]:
        """The Services that select Pods of a node."""
        return {
            ref
            for ref, found in self._selected.items()
            if any(each.node_name == node for one in found for each in one.endpoints or ())
        }

    def _insert(self, found: Object, ref: ServiceRef) -> None:
        if isinstance(found, Service):
            self._services[ref] = found
        elif isinstance(found, EndpointSlice):
            self._slices.setdefault(ref, {})[found.metadata.name] = found
            if trigger := (found.metadata.annotations or {}).get(TRIGGER_ANNOTATION):
                self.triggers.append(trigger)

    def _remove(self, found: Object, ref: ServiceRef) -> None:
        if isinstance(found, Service):
            del self._services[ref]
            return
        slices = self._slices[ref]
        del slices[found.metadata.name]
        if not slices:
            del self._slices[ref]


def _place(origin: Origin) -> str:
    return "/".join(part for part in origin[1:] if part) or "the objects given"
