"""Services without an API server get addresses from an allocator; a file remembers which."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace

from svcdp.abc import Source
from svcdp.errors import SvcdpError
from svcdp.kube.allocate import NODE_PORTS, Allocator, Holdings
from svcdp.kube.allocationsfile import AllocationsFile
from svcdp.kube.events import Event
from svcdp.kube.model import Object, Service, ServiceCIDR, ServiceRef
from svcdp.kube.own import networks
from svcdp.kube.state import Change, State

__all__ = ["AllocatingSource", "allocated"]


def allocated(
    objects: Iterable[Object],
    service_cidrs: Iterable[str],
    node_ports: tuple[int, int] = NODE_PORTS,
    remembered: Holdings | None = None,
) -> tuple[list[Object], Sequence[SvcdpError]]:
    """All objects, Services completed, and what these go without. ServiceCIDRs among them say
    where cluster IPs are, too.
    """
    found = list(objects)
    services: dict[ServiceRef, Service] = {}
    for each in found:
        if isinstance(each, Service):
            services.setdefault(each.ref, each)
    cidrs = networks(service_cidrs, (each for each in found if isinstance(each, ServiceCIDR)))
    allocator = Allocator(cidrs, node_ports, remembered)
    gone = allocator.holdings.keys() - services.keys()
    complete = allocator.update(services.values(), gone)
    return [
        complete[each.ref] if isinstance(each, Service) and services[each.ref] is each else each
        for each in found
    ], allocator.problems


class AllocatingSource:
    """Another source, whose Services it completes. With a ``file`` they have the same addresses
    the next time: what is new is in it before anybody hears of it.

    Its ServiceCIDRs are where cluster IPs are, besides ``service_cidrs``. When they change,
    Services keep what is still in range.
    """

    def __init__(
        self,
        source: Source,
        service_cidrs: Iterable[str],
        node_ports: tuple[int, int],
        file: AllocationsFile | None = None,
    ) -> None:
        self._source = source
        self._service_cidrs = tuple(service_cidrs)
        self._node_ports = node_ports
        self._file = file or AllocationsFile()
        self._state = State()  # of Services and ServiceCIDRs alone
        self._networks: tuple[str, ...] | None = None  # None: nothing was listed yet
        self._allocator = Allocator()
        self._holdings = self._file.services
        self._saved: int | None = None  # the revision that is in the file

    @property
    def name(self) -> str:
        """That of the other source."""
        return self._source.name

    @property
    def errors(self) -> Sequence[SvcdpError]:
        """Those of the other source, and what Services go without."""
        own = [self._file.problem] if self._file.problem else []
        return [*self._source.errors, *self._allocator.problems, *own]

    @property
    def events(self) -> Sequence[Event]:
        """What Services go without, for those who made them."""
        return self._allocator.events

    async def changes(self) -> AsyncIterator[list[Change]]:
        """Those of the other source, and of Services that get or lose something by them."""
        async with aclosing(self._source.changes()) as batches:  # type: ignore[type-var]
            async for batch in batches:
                completed = self._completed(batch)
                await self._save()
                yield completed

    def _completed(self, batch: Sequence[Change]) -> list[Change]:
        touched: set[ServiceRef] = set()
        for change in batch:
            own = tuple(each for each in change.objects if isinstance(each, Service | ServiceCIDR))
            touched |= self._state.apply(0, "", replace(change, objects=own))
        services = self._state.services
        cidrs = networks(self._service_cidrs, self._state.service_cidrs.values())
        if cidrs != self._networks:
            touched |= services.keys() | self._holdings.keys()
            self._move(cidrs)
        present = [services[ref] for ref in touched if ref in services]
        changed = self._allocator.update(present, touched - services.keys())
        complete = self._allocator.complete
        # Of copies in several files another one may count now, which was told of as it is.
        changed |= {each.ref: complete[each.ref] for each in present}
        found = []
        for change in batch:
            objects = [self._complete(change.origin, each) for each in change.objects]
            found.append(replace(change, objects=tuple(objects)))
            for each in objects:
                if isinstance(each, Service) and changed.get(each.ref) is each:
                    del changed[each.ref]
        others = [Change(self._state.origin(each.key), (each,)) for each in changed.values()]
        return [*found, *others]

    def _move(self, cidrs: tuple[str, ...]) -> None:
        """Have cluster IPs in these networks from now on."""
        held = self._holdings
        self._allocator = Allocator(cidrs, self._node_ports, held)
        self._holdings = self._allocator.holdings
        # What is out of range now leaves the file, too.
        is_saved = self._networks is None and self._holdings == held
        self._saved = self._allocator.revision if is_saved else None
        self._networks = cidrs

    def _complete(self, origin: str, each: Object) -> Object:
        if isinstance(each, Service) and origin == self._state.origin(each.key):
            return self._allocator.complete[each.ref]
        return each

    async def _save(self) -> None:
        revision = self._allocator.revision
        if self._saved == revision:
            return
        self._file.services = self._allocator.holdings
        # Until it is done nobody asks for the next batch, so the holdings stay as they are.
        await self._file.save()
        if not self._file.problem:
            self._saved = revision
