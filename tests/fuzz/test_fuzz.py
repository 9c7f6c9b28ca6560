"""A short run of the fuzz driver; ``make asan`` does a long one."""

from __future__ import annotations

import driver
import pytest

from svcdp import Reason


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_packets_do_no_harm(seed: int) -> None:
    reasons = driver.run(32_000, seed)
    assert set(reasons) == set(Reason), "the corpus no longer reaches every part of the core"
