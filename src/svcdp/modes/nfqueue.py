"""The NFQUEUE mode: services in the dataplane, and kernel rules that capture their packets."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Collection, Iterable

from svcdp.dataplane import Dataplane, captures_of
from svcdp.modes.onward import Onward
from svcdp.records import Key
from svcdp.rules import Backend, CapturePlan
from svcdp.rules.plan import Item, Mark, Network, items_of
from svcdp.types import ServiceSpec

__all__ = ["NfqueueMode"]

log = logging.getLogger(__name__)

_NOTHING: frozenset[Item] = frozenset()


class NfqueueMode:
    """Makes specs true in a :class:`svcdp.Dataplane`, and has their packets captured.

    ``plan`` says how to capture; what to capture follows the dataplane. What only this host
    knows of tunnels and of destinations by ``dr`` is filled in: see :class:`Onward`. Methods may
    be called by any thread.
    """

    def __init__(self, dataplane: Dataplane, rules: Backend, plan: CapturePlan) -> None:
        self._dataplane = dataplane
        self._rules = rules
        self._plan = self._given = plan
        self._onward = Onward(rules, plan)
        self._lock = threading.Lock()
        self._installed = False
        self._renumbered = False  # routes do not know of the node's addresses yet
        # What the kernel was told. None: not known, because a change failed.
        self._held: set[Item] | None = None
        # What is served, how many services need an item, and items that some do not need any more
        # since the last look. So a look costs what was changed, not what is served.
        self._served: dict[Key, ServiceSpec] = {}
        self._needs: Counter[Item] = Counter()
        self._left: set[Item] = set()
        self._count([status.spec for status in dataplane.services()], ())

    def install(self) -> None:
        """Install the rules for what is served now, in one transaction.

        Raises :class:`svcdp.RulesError`; then nothing is captured.
        """
        with self._lock:
            self._installed = True
            self._apply(self._wanted())

    def update(self, specs: Iterable[ServiceSpec], removed: Iterable[Key]) -> None:
        """Serve ``specs`` as they are now, and ``removed`` no more.

        Captures grow before the dataplane knows new endpoints: a reply that is not captured
        would reach the client untranslated. They shrink in :meth:`trim`. After an error
        nothing else is served than before, and the same update may come again.
        """
        specs, removed = tuple(specs), tuple(removed)
        with self._lock:
            self._serve(self._onward.complete(specs), removed)
            self._onward.keep(specs, removed)

    def renumber(self, addresses: Iterable[str]) -> None:
        """The node has these addresses now. What depends on them follows in :meth:`trim`."""
        with self._lock:
            plan = dataclasses.replace(self._given, addresses=tuple(addresses))
            # A family of which there is none now must not cost the other its rules.
            dialled = tuple(cidr for cidr in plan.service_cidrs if plan.source_of(cidr))
            if dialled != plan.service_cidrs and dialled != self._plan.service_cidrs:
                missing = ",".join(cidr for cidr in plan.service_cidrs if cidr not in dialled)
                log.warning("no address here to route from", extra={"cidrs": missing})
            self._plan = dataclasses.replace(plan, service_cidrs=dialled)
            self._onward.plan = self._plan
            self._renumbered = True

    def trim(self) -> None:
        """Follow the kernel's routes, and stop capturing for what was removed and has no
        connections left.

        Also mends what a failed change left, and what others removed. Raises
        :class:`svcdp.RulesError`; the next call tries again.
        """
        with self._lock:
            try:
                self._follow_routes()
            finally:
                self._mend()
                self._shrink()

    def close(self) -> None:
        """Remove what was installed: from here on packets take their way without svcdp."""
        with self._lock:
            if self._installed:
                self._installed = False
                self._rules.remove()

    def _serve(self, specs: tuple[ServiceSpec, ...], removed: tuple[Key, ...]) -> None:
        if self._installed:
            self._grow(items_of(captures_of(specs)))
        self._dataplane.update(specs, removed)
        self._count(specs, removed)

    def _count(self, specs: Collection[ServiceSpec], removed: Iterable[Key]) -> None:
        for key in (*removed, *(spec.key for spec in specs)):
            former = self._served.pop(key, None)
            if former is not None:
                items = items_of(captures_of([former]))
                self._needs.subtract(items)
                self._left |= items
        for spec in specs:
            self._served[spec.key] = spec
            self._needs.update(items_of(captures_of([spec])))

    def _wanted(self) -> frozenset[Item]:
        """All that must be captured now."""
        needed = (item for item, services in self._needs.items() if services)
        return items_of(self._dataplane.draining()).union(needed)

    def _follow_routes(self) -> None:
        if self._installed and self._renumbered:
            self._rules.reroute(self._plan)
            self._renumbered = False
        if changed := self._onward.refresh():
            self._serve(changed, ())
        hops = frozenset(self._onward.hops())
        if self._installed and hops:
            self._rules.refresh(dataclasses.replace(self._plan, items=hops))

    def _mend(self) -> None:
        if self._installed and (fault := self._rules.fault()):
            log.warning("installing the capture rules again", extra={"reason": fault})
            self._apply(self._wanted())

    def _shrink(self) -> None:
        if not (self._installed and self._left):
            return
        draining = items_of(self._dataplane.draining())
        unneeded = {item for item in self._left if not self._needs[item]}
        if self._held is None:
            self._apply(self._wanted())
        else:
            self._change(_NOTHING, (unneeded - draining) & self._held)
        for item in unneeded:
            self._needs.pop(item, None)
        hops = {hop for hop in self._onward.hops() if self._needs[hop]}
        self._onward.release(hops | draining)
        self._left = unneeded & draining

    def _grow(self, wanted: frozenset[Item]) -> None:
        self._left |= wanted  # the dataplane may refuse them
        if self._held is None:
            self._apply(self._wanted() | wanted)
        else:
            self._change(wanted - self._held, _NOTHING)

    def _apply(self, wanted: frozenset[Item]) -> None:
        self._held = None
        self._rules.apply(dataclasses.replace(self._plan, items=wanted))
        self._held = set(wanted)

    def _change(self, added: Iterable[Item], removed: Iterable[Item]) -> None:
        added, removed = set(added), set(removed)
        if not added and not removed:
            return
        assert self._held is not None
        if any(isinstance(item, Mark | Network) for item in added | removed):
            self._apply(frozenset((self._held | added) - removed))
            return
        held, self._held = self._held, None
        self._rules.update(self._plan, added, removed)
        held |= added
        held -= removed
        self._held = held
