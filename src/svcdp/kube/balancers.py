"""Services without a cloud get load-balancer addresses from pools beside them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from svcdp.abc import Source
from svcdp.errors import SvcdpError
from svcdp.kube.allocationsfile import AllocationsFile
from svcdp.kube.events import Event
from svcdp.kube.model import LoadBalancerPool, Object, Service, ServiceRef
from svcdp.kube.pools import Allocation, allocate, is_served, with_addresses
from svcdp.kube.state import Change, State

__all__ = ["BalancingSource", "balanced"]


def balanced(
    objects: Iterable[Object], remembered: Mapping[ServiceRef, tuple[str, ...]] | None = None
) -> tuple[list[Object], Sequence[SvcdpError]]:
    """All objects, Services with the addresses that the pools among them give, and what these go
    without.
    """
    found = list(objects)
    state = State()
    state.apply(0, "", Change(objects=tuple(_first(found))))
    allocation = _allocate(state, remembered or {})
    return [
        _complete(each, allocation) if isinstance(each, Service) else each for each in found
    ], allocation.problems if allocation else ()


class BalancingSource:
    """Another source, whose Services of type LoadBalancer have addresses of its
    LoadBalancerPools in their status; without any, they are as they were written. A Service keeps
    what it has as long as this lasts, and with a ``file`` the next time too: what is new is in it
    before anybody hears of it.
    """

    def __init__(self, source: Source, file: AllocationsFile | None = None) -> None:
        self._source = source
        self._file = file or AllocationsFile()
        self._remembered = self._file.load_balancers  # also of a time in which there are no pools
        self._state = State()  # of Services and pools alone
        self._allocation: Allocation | None = None  # None: there are no pools

    @property
    def name(self) -> str:
        """That of the other source."""
        return self._source.name

    @property
    def errors(self) -> Sequence[SvcdpError]:
        """Those of the other source, and what Services go without."""
        own = self._allocation.problems if self._allocation else ()
        found = [*self._source.errors, *own]
        if self._file.problem and self._file.problem not in found:  # its source may have the file
            found.append(self._file.problem)
        return found

    @property
    def events(self) -> Sequence[Event]:
        """Those of the other source, and what Services go without, for those who made them."""
        own = self._allocation.events if self._allocation else ()
        return [*getattr(self._source, "events", ()), *own]

    async def changes(self) -> AsyncIterator[list[Change]]:
        """Those of the other source, and of Services that get or lose addresses by them."""
        async with aclosing(self._source.changes()) as batches:  # type: ignore[type-var]
            async for batch in batches:
                completed = self._completed(batch)
                await self._save()
                yield completed

    def _completed(self, batch: Sequence[Change]) -> list[Change]:
        pools = self._state.changed["LoadBalancerPool"]
        touched: set[ServiceRef] = set()
        for change in batch:
            own = tuple(
                each for each in change.objects if isinstance(each, Service | LoadBalancerPool)
            )
            touched |= self._state.apply(0, "", replace(change, objects=own))
        former, services = self._allocation, self._state.services
        before = former.addresses if former else {}
        served = {ref for ref in touched if ref in services and is_served(services[ref])}
        if pools != self._state.changed["LoadBalancerPool"] or served or touched & before.keys():
            self._allocation = _allocate(self._state, self._remembered)
            if self._allocation:
                self._remembered = self._allocation.addresses
        if (former is None) != (self._allocation is None):
            served = {ref for ref, each in services.items() if is_served(each)}
        after = self._allocation.addresses if self._allocation else {}
        changed = {ref for ref in before | after if before.get(ref) != after.get(ref)} | served
        found = []
        for change in batch:
            objects = [self._told(change.origin, each) for each in change.objects]
            changed -= {each.ref for each in objects if self._counts(change.origin, each)}
            found.append(replace(change, objects=tuple(objects)))
        others = [services[ref] for ref in sorted(changed) if ref in services]
        return found + [
            Change(self._state.origin(each.key), (_complete(each, self._allocation),))
            for each in others
        ]

    async def _save(self) -> None:
        if self._remembered != self._file.load_balancers or self._file.problem:
            self._file.load_balancers = self._remembered
            await self._file.save()

    def _told(self, origin: str, each: Object) -> Object:
        if isinstance(each, Service) and self._counts(origin, each):
            return _complete(each, self._allocation)
        return each

    def _counts(self, origin: str, each: Object) -> bool:
        """Whether it is no copy of one that another file has, too."""
        return isinstance(each, Service) and origin == self._state.origin(each.key)


def _allocate(state: State, remembered: Mapping[ServiceRef, tuple[str, ...]]) -> Allocation | None:
    if not state.pools:
        return None
    return allocate(state.services.values(), state.pools.values(), remembered)


def _complete(service: Service, allocation: Allocation | None) -> Service:
    if allocation is None or not is_served(service):
        return service
    return with_addresses(service, allocation.addresses.get(service.ref, ()))


def _first(objects: Iterable[Object]) -> Iterable[Object]:
    """Of copies the first."""
    seen: dict[object, Object] = {}
    for each in objects:
        seen.setdefault(each.key, each)
    return seen.values()
