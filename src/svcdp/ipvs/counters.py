"""Counters that ``ipvsadm -Z`` sets to zero. Those of the dataplane go on: others read them too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from svcdp.records import Key
from svcdp.status import DestinationStatus, ServiceStatus

__all__ = ["Counters", "Id", "ZeroedCounters", "counters_of"]

Id = tuple[Key, str, int]
"""Of a destination of a service."""


class Counters(NamedTuple):
    """Connections, packets and bytes from clients and to them: of a destination, until now."""

    connections: int = 0
    packets_in: int = 0
    packets_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


def counters_of(status: DestinationStatus) -> Counters:
    """Those that a dataplane shows."""
    return Counters(
        status.connections_total,
        status.packets_in,
        status.packets_out,
        status.bytes_in,
        status.bytes_out,
    )


class ZeroedCounters:
    """What destinations have counted since somebody zeroed them."""

    def __init__(self) -> None:
        self._before: dict[Id, Counters] = {}

    def zero(self, services: Iterable[ServiceStatus], *, everything: bool) -> None:
        """From now on count anew; ``everything``: there are no other services."""
        if everything:
            self._before.clear()
        for status in services:
            for each in status.destinations:
                self._before[status.spec.key, each.address, each.port] = counters_of(each)

    def since(self, status: ServiceStatus) -> ServiceStatus:
        """The service with the counters of its destinations since then."""
        if not self._before:
            return status
        return replace(
            status,
            destinations=[self._since(status.spec.key, each) for each in status.destinations],
        )

    def _since(self, key: Key, status: DestinationStatus) -> DestinationStatus:
        id = (key, status.address, status.port)
        before = self._before.get(id, Counters())
        since = Counters(*(n - b for n, b in zip(counters_of(status), before, strict=True)))
        if min(since) < 0:  # another destination by the same name
            del self._before[id]
            return status
        return replace(
            status,
            connections_total=since.connections,
            packets_in=since.packets_in,
            packets_out=since.packets_out,
            bytes_in=since.bytes_in,
            bytes_out=since.bytes_out,
        )
