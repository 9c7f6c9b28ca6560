"""How packets that keep their destination address go on from this host."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from svcdp.errors import CapacityError
from svcdp.rules import Backend, CapturePlan
from svcdp.rules.paths import Path
from svcdp.rules.plan import Hop, Item, family_of
from svcdp.types import DestinationSpec, ForwardMethod, ServiceSpec

__all__ = ["Onward"]

log = logging.getLogger(__name__)

_UNCHANGED = (ForwardMethod.TUNNEL, ForwardMethod.DR)


class Onward:
    """Fills in what specs leave open of destinations by ``tunnel`` and ``dr``.

    For a tunnel that is its source address and the path's MTU, as this host's routes have them.
    For ``dr`` it is a mark, for a policy route to the destination. A destination that is this
    host itself becomes ``local``, as with IPVS.

    To a virtual address that is this host's own the kernel delivers before it looks at marks:
    ``dr`` needs the address elsewhere, or the rule for local addresses after those for marks.
    That is logged.
    """

    def __init__(self, rules: Backend, plan: CapturePlan) -> None:
        self._rules = rules
        self.plan = plan  #: Whose addresses are the sources of tunnels.
        self._specs: dict[tuple[str, int, str], ServiceSpec] = {}  # as they were given
        self._paths: dict[str, Path | None] = {}
        self._marks: dict[str, int] = {}  # by address

    def complete(self, specs: Collection[ServiceSpec]) -> tuple[ServiceSpec, ...]:
        """The specs with what was open filled in. :class:`svcdp.CapacityError` without a mark
        for each destination; :class:`svcdp.RulesError`.
        """
        missing = set(_addresses(specs)) - self._paths.keys()
        if missing:
            found = self._rules.paths(missing)
            self._paths.update({address: found.get(address) for address in missing})
        return tuple(self._complete(spec) if _is_open(spec) else spec for spec in specs)

    def keep(self, specs: Iterable[ServiceSpec], removed: Iterable[tuple[str, int, str]]) -> None:
        """From now on these are served, and ``removed`` no more."""
        for key in removed:
            self._specs.pop(key, None)
        for spec in specs:
            if _is_open(spec):
                self._specs[spec.key] = spec
            else:
                self._specs.pop(spec.key, None)

    def refresh(self) -> tuple[ServiceSpec, ...]:
        """Ask for the routes again: the specs, completed, for which that makes a difference."""
        addresses = set(_addresses(self._specs.values()))
        found = self._rules.paths(addresses) if addresses else {}
        before, self._paths = self._paths, {address: found.get(address) for address in addresses}
        changed = {address for address in addresses if self._paths[address] != before.get(address)}
        return self.complete(
            [spec for spec in self._specs.values() if not changed.isdisjoint(_addresses([spec]))]
        )

    def hops(self) -> list[Hop]:
        """The policy routes that completed specs rely on."""
        return [Hop(mark, address) for address, mark in self._marks.items()]

    def release(self, wanted: Collection[Item]) -> None:
        """Give marks free whose next hop is not wanted."""
        self._marks = {a: mark for a, mark in self._marks.items() if Hop(mark, a) in wanted}

    def _complete(self, spec: ServiceSpec) -> ServiceSpec:
        path = self._paths.get(spec.address)
        if path is not None and path.is_local and _has(spec, ForwardMethod.DR):
            log.warning(
                "dr needs a virtual address that this host does not have, or looks for later:"
                " ip rule add priority 5000 lookup local; ip rule delete priority 0",
                extra={"service": spec, "address": spec.address},
            )
        completed = (self._destination(spec, each) for each in spec.destinations)
        return replace(spec, destinations=tuple(each for each in completed if each is not None))

    def _destination(self, spec: ServiceSpec, each: DestinationSpec) -> DestinationSpec | None:
        if each.method not in _UNCHANGED:
            return each
        path = self._paths[each.address]
        if path is not None and path.is_local:
            return replace(each, method=ForwardMethod.LOCAL, tunnel=None)
        if each.tunnel is None:
            return replace(each, mark=each.mark or self._mark(each.address))
        if each.tunnel.source:
            source: str | None = each.tunnel.source
        else:
            source = path.source if path else self.plan.source_of(each.address)
        if not source:
            log.warning(
                "no source address for a tunnel", extra={"service": spec, "to": each.address}
            )
            return None
        mtu = each.mtu or (path.mtu if path else 0)
        return replace(each, tunnel=replace(each.tunnel, source=source), mtu=mtu)

    def _mark(self, address: str) -> int:
        """The mark of a next hop: the first that no other of its IP version has."""
        if address not in self._marks:
            mask = self.plan.hop_marks
            family = family_of(address)
            taken = {mark for other, mark in self._marks.items() if family_of(other) == family}
            first = mask & -mask
            mark = next((m for m in range(first, mask + 1, first) if m not in taken), None)
            if mark is None:
                raise CapacityError(
                    f"no mark left for {address}: {len(taken)} destinations are reached by dr;"
                    " give dr_marks more bits"
                )
            self._marks[address] = mark
        return self._marks[address]


def _is_open(spec: ServiceSpec) -> bool:
    return _has(spec, *_UNCHANGED)


def _has(spec: ServiceSpec, *methods: str) -> bool:
    return any(each.method in methods for each in spec.destinations)


def _addresses(specs: Iterable[ServiceSpec]) -> Iterator[str]:
    """Those whose paths matter."""
    for spec in specs:
        if _has(spec, ForwardMethod.DR) and spec.protocol != "fwmark":
            yield spec.address
        for each in spec.destinations:
            if each.method in _UNCHANGED:
                yield each.address
