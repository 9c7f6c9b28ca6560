"""Rates from counters, as IPVS estimates them (ip_vs_est.c)."""

from __future__ import annotations

from collections.abc import Iterable

from svcdp.ipvs.counters import Counters, Id, counters_of
from svcdp.ipvs.listing import Rates
from svcdp.status import ServiceStatus

__all__ = ["INTERVAL", "Estimator"]

INTERVAL = 2.0  # seconds between two looks at the counters
WEIGHT = 0.25  # of what is new in an average


class Estimator:
    """Moving averages for each destination. What is new counts a quarter, after the first time;
    what was not there the last time has none yet.
    """

    def __init__(self) -> None:
        self._time = 0.0
        self._counters: dict[Id, Counters] = {}
        self._rates: dict[Id, Rates] = {}

    def feed(self, services: Iterable[ServiceStatus], now: float) -> None:
        """Look at the counters, ``now`` in seconds: about every `INTERVAL`."""
        seconds = now - self._time
        counters = {
            (status.spec.key, each.address, each.port): counters_of(each)
            for status in services
            for each in status.destinations
        }
        rates = {}
        for id, count in counters.items():
            before = self._counters.get(id)
            if before is None or seconds <= 0:
                continue
            new = Rates(*((n - b) / seconds for n, b in zip(count, before, strict=True)))
            if min(new) < 0:
                continue  # another destination of the same name
            old = self._rates.get(id, new)
            rates[id] = Rates(*(o + (n - o) * WEIGHT for n, o in zip(new, old, strict=True)))
        self._time, self._counters, self._rates = now, counters, rates

    def zero(self, services: Iterable[ServiceStatus]) -> None:
        """Begin averages anew."""
        for status in services:
            for each in status.destinations:
                self._rates.pop((status.spec.key, each.address, each.port), None)

    def rates(self, status: ServiceStatus) -> tuple[Rates, ...]:
        """Of a service's destinations, in their order."""
        key = status.spec.key
        return tuple(
            self._rates.get((key, each.address, each.port), Rates()) for each in status.destinations
        )
