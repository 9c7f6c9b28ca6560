"""Keeps the local network told of the addresses that this node has, and of no others."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Iterable, Mapping, Sequence, Set

from svcdp.announce.link import Counted, Interface, Link
from svcdp.announce.members import Members
from svcdp.announce.owner import Holder, by_address, candidates, holder_of, owner
from svcdp.kube.context import NodeContext
from svcdp.kube.events import Event, Recorder
from svcdp.kube.model import EndpointSlice, ObjectKey, Service, ServiceRef

__all__ = ["Announcer", "Holders"]

log = logging.getLogger(__name__)

TICK = 0.1  # seconds between two looks at who is alive
REPEATS = 3  # announcements of an address that this node got
PERIOD = 1.0  # seconds between them


class Holders:
    """The Services in force that have addresses of load balancers."""

    def __init__(self, node: NodeContext) -> None:
        self.node_name = node.name
        self._node = node
        self._holders: dict[ServiceRef, Holder] = {}
        #: Grows with each change.
        self.generation = 0

    def tell(
        self, changes: Iterable[tuple[ServiceRef, Service | None, Sequence[EndpointSlice]]]
    ) -> None:
        """For :meth:`svcdp.sync.Sync.subscribe`."""
        for ref, service, slices in changes:
            holder = service and holder_of(service, slices, self._node)
            if holder != self._holders.get(ref):
                self.generation += 1
                self._holders.pop(ref, None)
                if holder:
                    self._holders[ref] = holder

    def by_address(self) -> Mapping[str, Sequence[Holder]]:
        """The Services that share each address."""
        return by_address(self._holders.values())

    def routed_here(self) -> set[str]:
        """Addresses that routers may send to this node."""
        only = {self.node_name}
        return {each for each, found in self.by_address().items() if candidates(found, only)}


class Announcer:
    """Answers for the addresses of ``holders`` that this node has by ``members``, on all links.

    For the event loop's thread. ``record`` is told of each address that came here.
    """

    def __init__(self, holders: Holders, members: Members, record: Recorder) -> None:
        self._holders = holders
        self.members = members
        self._record = record
        self._links: dict[Interface, Link] = {}
        self._failed: dict[Interface, str] = {}
        self._is_mute = False
        self._seen: tuple[int, Set[str]] | None = None
        self._due: dict[str, tuple[float, int]] = {}  # when next, and how often yet
        #: Who has each address, as this node knows it; None: nobody.
        self.owners: dict[str, str | None] = {}
        self.owned: frozenset[str] = frozenset()
        self.counted = Counted()

    @property
    def interfaces(self) -> list[str]:
        """Where it answers."""
        return sorted(each.name for each in self._links)

    async def run(self) -> None:
        """Until cancelled; then nothing is answered any more."""
        try:
            while True:
                self.look()
                await asyncio.sleep(TICK)
        finally:
            self.close()

    def use(self, interfaces: Iterable[Interface]) -> None:
        """Answer on these, and no others. One that cannot be used is logged, once, and tried
        again by the next call.
        """
        wanted = set(interfaces)
        for gone in self._links.keys() - wanted:
            self._links.pop(gone).close()
            log.info("no longer announcing", extra={"interface": gone.name})
        failed: dict[Interface, str] = {}
        for interface in wanted - self._links.keys():
            try:
                link = Link(interface, self.counted, self._may_answer)
            except OSError as error:
                failed[interface] = error.strerror or str(error)
                if self._failed.get(interface) != failed[interface]:
                    extra = {"interface": interface.name, "error": failed[interface]}
                    log.warning("cannot announce", extra=extra)
                continue
            self._links[interface] = link
            link.own(map(_packed, self.owned))
            self._announce(self.owned)
            log.info("announcing", extra={"interface": interface.name})
        self._failed = failed
        if not self._links and not self._is_mute:
            log.warning("no interface to announce on: others get this node's addresses")
        self._is_mute = not self._links

    def look(self) -> None:
        """Find out who has which address now, and tell of what this node got."""
        alive = self.members.alive()
        seen = (self._holders.generation, alive)
        if seen != self._seen:
            self._seen = seen
            self._decide(alive)
        now = time.monotonic()
        for address, (at, left) in list(self._due.items()):
            if now < at:
                continue
            for link in self._links.values():
                link.announce(_packed(address))
            if left > 1:
                self._due[address] = (now + PERIOD, left - 1)
            else:
                del self._due[address]

    def close(self) -> None:
        """Answer no more. Idempotent."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        self.owned = frozenset()
        self._due.clear()

    def _decide(self, alive: Set[str]) -> None:
        node = self._holders.node_name
        holders = self._holders.by_address()
        self.owners = {
            address: owner(address, candidates(found, alive)) for address, found in holders.items()
        }
        before = self.owned
        self.owned = frozenset(each for each, its in self.owners.items() if its == node)
        for link in self._links.values():
            link.own(map(_packed, self.owned))
        for address in before - self.owned:
            self._due.pop(address, None)
            log.info("address left", extra={"address": address, "to": self.owners.get(address)})
        self._announce(self.owned - before)
        for address in sorted(self.owned - before):
            for holder in holders[address]:
                key = ObjectKey("Service", *holder.service)
                message = f"{address} is announced by node {node}"
                self._record(Event(key, "AddressAnnounced", message, "Normal"))

    def _announce(self, addresses: Iterable[str]) -> None:
        now = time.monotonic()
        self._due.update((address, (now, REPEATS)) for address in addresses)

    def _may_answer(self) -> bool:
        """After a time in which this program did not run others may have the addresses."""
        return self._holders.node_name in self.members.alive()


def _packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed
