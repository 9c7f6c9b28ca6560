"""A short run of the fuzz drivers; ``make asan`` does a long one."""

from __future__ import annotations

import driver
import forwarding
import payloads
import pytest

from svcdp import Reason

#: Each is reached by one of the drivers.
FORWARDING = {
    Reason.TIME_EXCEEDED,
    Reason.TOO_BIG,
    Reason.OVERLOAD,
    Reason.NO_CALL_ID,
    Reason.BYPASS,
    Reason.NO_HEADROOM,
}
PAYLOADS = {
    Reason.NEW,
    Reason.ESTABLISHED,
    Reason.REPLY,
    Reason.FRAGMENT,
    Reason.MALFORMED,
    Reason.NO_CALL_ID,
    Reason.NO_CONNECTION,
    Reason.NO_HEADROOM,
}


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_packets_do_no_harm(seed: int) -> None:
    reasons = driver.run(32_000, seed)
    assert set(reasons) == set(Reason) - FORWARDING, "the corpus no longer reaches everything"


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_packets_in_and_out_of_tunnels(seed: int) -> None:
    packets = iter(driver.Mutator(forwarding.corpus(), seed))
    reasons = forwarding.run(16_000, packets, seed)
    assert set(reasons) >= FORWARDING, "the corpus no longer reaches everything"


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_payloads_and_fragments(seed: int) -> None:
    packets = iter(driver.Mutator(payloads.corpus(), seed))
    reasons = payloads.run(16_000, packets, seed)
    assert set(reasons) >= PAYLOADS, "the corpus no longer reaches everything"
