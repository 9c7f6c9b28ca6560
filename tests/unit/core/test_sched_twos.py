"""Two random choices. IPVS has it since 6.7 and the kernel that judges the others is older: the
judge is what chance allows, reckoned from the algorithm (Mitzenmacher 2001; ip_vs_twos.c).
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
from bench import VIRTUAL, Bench

DRAWS = 5_000
DEVIATIONS = 5


class Pool(Bench):
    """Servers with loads that stay: each datagram is scheduled by itself."""

    def __init__(self, weights: tuple[int, ...], loads: tuple[int, ...], **upper: int) -> None:
        super().__init__(1 << 14, seed=3)
        self.port = 1000
        self.serve(protocol="udp", scheduler="twos")
        for number in range(len(weights)):
            self.change(number, 0, new=True)
        for number, load in enumerate(loads):
            self.change(number, 1)
            assert self.picks(load) == Counter({number: load} if load else {})
            self.change(number, 0)
        for number, weight in enumerate(weights):
            self.change(number, weight, upper=upper.get(f"of_{number}", 0))
        with self.dp.transaction() as tx:
            tx.service(VIRTUAL[4], 80, "udp", one_packet=True)

    def change(self, number: int, weight: int, *, new: bool = False, upper: int = 0) -> None:
        with self.dp.transaction() as tx:
            service = tx.service(VIRTUAL[4], 80, "udp")
            do = service.add if new else service.update
            do(f"10.1.0.{number}", 80, weight=weight, method="dr", upper=upper)

    def picks(self, count: int) -> Counter[int | None]:
        picked: Counter[int | None] = Counter()
        for _ in range(count):
            self.port += 1
            result = self.send(port=self.port, protocol="udp")
            name = result.destination and int(result.destination[0].rpartition(".")[2])
            picked[name] += 1
        return picked


def chances(weights: tuple[int, ...], loads: tuple[int, ...]) -> dict[int, float]:
    """How likely each server is. Nobody draws those without weight."""
    order = [number for number in reversed(range(len(weights))) if weights[number]]
    whole = sum(weights) + 1  # 0 is drawn too, and falls on the first
    drawn = {number: (weights[number] + (number == order[0])) / whole for number in order}
    likely = dict.fromkeys(order, 0.0)
    for one in order:
        for two in order:
            better = weights[two] * loads[one] > weights[one] * loads[two]
            likely[two if better else one] += drawn[one] * drawn[two]
    return likely


@pytest.mark.parametrize(
    ("weights", "loads"),
    [
        ((1, 1, 1, 1), (0, 0, 0, 0)),
        ((1, 3, 5, 2, 4), (0, 0, 0, 0, 0)),
        ((1, 1, 1, 1), (1, 2, 3, 4)),
        ((1, 3, 5, 2, 4), (10, 9, 50, 2, 1)),
        ((1, 0, 5, 0, 4), (10, 0, 5, 0, 6)),
        ((2, 1), (4, 2)),
        ((7,), (3,)),
    ],
)
def test_the_less_loaded_of_two(weights: tuple[int, ...], loads: tuple[int, ...]) -> None:
    picked = Pool(weights, loads).picks(DRAWS)
    likely = chances(weights, loads)
    assert set(picked) <= set(likely)
    for number, chance in likely.items():
        spread = math.sqrt(DRAWS * chance * (1 - chance))
        assert abs(picked[number] - DRAWS * chance) <= DEVIATIONS * spread, likely


def test_who_is_overloaded_is_not_drawn() -> None:
    """As if it had no weight."""
    picked = Pool((1, 100, 3), (4, 2, 8), of_1=2).picks(DRAWS)
    likely = chances((1, 0, 3), (4, 2, 8))
    assert set(picked) == set(likely) == {0, 2}
    for number, chance in likely.items():
        spread = math.sqrt(DRAWS * chance * (1 - chance))
        assert abs(picked[number] - DRAWS * chance) <= DEVIATIONS * spread


def test_nobody_is_left() -> None:
    assert Pool((0, 5), (1, 2), of_1=2).picks(3) == Counter({None: 3})
