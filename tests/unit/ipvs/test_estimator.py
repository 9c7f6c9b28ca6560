"""Rates: what the kernel's estimator makes of the same counters."""

from __future__ import annotations

import pytest

from svcdp.ipvs.estimator import Estimator
from svcdp.ipvs.listing import Rates
from svcdp.status import DestinationStatus, ServiceStatus
from svcdp.types import DestinationSpec, ServiceSpec

SPEC = ServiceSpec("192.0.2.10", 80, destinations=(DestinationSpec("10.0.0.1", 80),))


def counted(count: int, spec: ServiceSpec = SPEC) -> ServiceStatus:
    """A service whose destination has 1, 2, 3, 4 and 5 times as many of each."""
    total, packets_in, packets_out, bytes_in, bytes_out = (count * n for n in range(1, 6))
    counters = (total, packets_in, bytes_in, packets_out, bytes_out)
    return ServiceStatus(spec, [DestinationStatus("10.0.0.1", 80, 1, "masq", 0, 0, *counters)])


def rate(estimator: Estimator) -> float:
    (rates,) = estimator.rates(counted(0))
    assert rates == pytest.approx([rates.connections * n for n in range(1, 6)])
    return rates.connections


def test_a_quarter_of_what_is_new() -> None:
    estimator = Estimator()
    shown = []
    for number, count in enumerate([100, 120, 120, 120, 152]):
        estimator.feed([counted(count)], 10 + 2.0 * number)
        shown.append(rate(estimator))
    # avg += (new - avg) / 4, each 2 s; 10, 0, 0 and 16 a second are new.
    assert shown == [0, 10, 7.5, 5.625, 8.21875]


def test_of_the_time_that_passed() -> None:
    estimator = Estimator()
    estimator.feed([counted(0)], 0)
    estimator.feed([counted(100)], 5)
    assert rate(estimator) == 20
    estimator.feed([counted(200)], 5)  # no time, nothing known
    assert rate(estimator) == 0


def test_what_is_new_or_gone_has_none() -> None:
    estimator = Estimator()
    estimator.feed([], 0)
    estimator.feed([counted(1000)], 2)
    assert rate(estimator) == 0
    estimator.feed([counted(1010)], 4)
    assert rate(estimator) == 5
    estimator.feed([], 6)
    assert estimator.rates(counted(1010)) == (Rates(),)


def test_a_destination_that_was_made_anew() -> None:
    """Its counters are lower than those of its namesake: rates are never below zero."""
    estimator = Estimator()
    estimator.feed([counted(1000)], 0)
    estimator.feed([counted(10)], 2)
    assert rate(estimator) == 0
