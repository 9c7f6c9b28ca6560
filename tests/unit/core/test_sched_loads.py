"""Schedulers that look at loads and weights, case by case; what a running kernel showed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import ipvs_model
import pytest
import wire
from bench import SECOND, VIRTUAL, Bench

FIVE = (1, 3, 5, 2, 4)


class Farm(Bench):
    """A service whose servers are called by their ports. The newest has the highest."""

    def __init__(
        self, scheduler: str, weights: Iterable[int] = FIVE, protocol: str = "tcp", seed: int = 1
    ) -> None:
        super().__init__(1 << 14, seed)
        self.protocol = protocol
        self.port = 1000
        self.serve(protocol=protocol, scheduler=scheduler)
        for name, weight in enumerate(weights, 1):
            self.add(name, weight)

    def add(self, name: int, weight: int = 1, **fields: int) -> None:
        with self.dp.transaction() as tx:
            tx.service(VIRTUAL[4], 80, self.protocol).add("10.1.0.1", name, weight, **fields)

    def edit(self, name: int, **fields: int) -> None:
        with self.dp.transaction() as tx:
            tx.service(VIRTUAL[4], 80, self.protocol).update("10.1.0.1", name, **fields)

    def connect(self) -> int | None:
        """The server of a new connection, which a TCP client then uses."""
        self.port += 1
        result = self.send("S", port=self.port, protocol=self.protocol)
        if self.protocol == "tcp" and result.destination:
            self.send("A", port=self.port)
        return None if result.destination is None else result.destination[1]

    def picks(self, count: int) -> list[int | None]:
        return [self.connect() for _ in range(count)]

    def close(self, port: int) -> None:
        """The connection becomes inactive."""
        self.send("FA", port=port)


def test_lc_ignores_weights_and_prefers_the_newest() -> None:
    assert Farm("lc").picks(11) == [5, 4, 3, 2, 1] * 2 + [5]


@pytest.mark.parametrize("scheduler", ["lc", "wlc", "sed", "nq"])
def test_what_expired_is_no_load_once_it_was_swept(scheduler: str) -> None:
    """By a call, or by eight packets for each connection; and by none too early."""
    for by_packets in (False, True):
        farm = Farm(scheduler, (1,))
        farm.picks(100)
        farm.add(2)
        assert set(farm.picks(50)) == {2}
        farm.now += 899 * SECOND
        farm.dp.sweep()
        assert farm.connect() == 2, "still active"
        farm.now += 2 * SECOND
        if by_packets:
            for _ in range(19):
                # Of no connection, and they open none.
                farm.dp.process_batch(
                    [wire.packet("tcp", "192.0.2.9", 9, VIRTUAL[4], 80, "R") for _ in range(64)]
                )
        else:
            farm.dp.sweep()
        counts = [(d.active, d.inactive) for d in farm.dp.services()[0].destinations]
        assert counts == [(0, 0), (1, 0)]
        assert farm.picks(5) == [1, 2, 1, 2, 1]


def test_lc_takes_an_active_connection_for_257_others() -> None:
    """TCP counts as active until it closes; 256 closed ones are less than one that is not."""
    farm = Farm("lc", (1, 1))
    assert farm.picks(2) == [2, 1]
    for _ in range(256):
        farm.close(farm.port)
        assert farm.picks(1) == [1]
    farm.close(farm.port)
    assert farm.picks(1) == [2], "even, and the newest is first"


def test_wlc_follows_the_weights() -> None:
    farm = Farm("wlc")
    assert farm.picks(5) == [5, 4, 3, 2, 1]
    assert Counter(farm.picks(10)) == {5: 3, 4: 1, 3: 4, 2: 2}


@pytest.mark.parametrize(("scheduler", "server"), [("nq", 5), ("sed", 3)])
def test_udp_is_never_active(scheduler: str, server: int) -> None:
    """nq sends all of it to the newest server, sed to the heaviest."""
    assert set(Farm(scheduler, protocol="udp").picks(30)) == {server}


def test_sed_lets_the_heavy_wait_for_nobody() -> None:
    """(active + 1) / weight: the heaviest server gets some before the lightest gets any."""
    farm = Farm("sed")
    assert farm.picks(5) == [3, 5, 2, 3, 5]
    assert Counter(farm.picks(10)) == {1: 1, 2: 2, 3: 3, 4: 2, 5: 2}


def test_nq_fills_the_idle_first() -> None:
    farm = Farm("nq")
    assert farm.picks(5) == [5, 4, 3, 2, 1]
    assert farm.picks(1) == [3]


def test_fo_stays_with_the_heaviest() -> None:
    farm = Farm("fo")
    assert farm.picks(9) == [3] * 9
    farm.edit(3, weight=0)
    assert farm.picks(9) == [5] * 9
    farm.edit(2, weight=4)
    assert farm.picks(2) == [5, 5], "the newer of two that are alike"


def test_ovf_overflows_after_weight_and_one() -> None:
    farm = Farm("ovf")
    assert farm.picks(6) == [3] * 6
    assert farm.picks(5) == [5] * 5
    assert farm.picks(4 + 3 + 2) == [2] * 4 + [4] * 3 + [1] * 2
    assert farm.connect() is None
    farm.close(1001)
    assert farm.picks(2) == [3, None]


@pytest.mark.parametrize(
    "scheduler", ["rr", "wrr", "random", "lc", "wlc", "sed", "nq", "fo", "ovf", "twos"]
)
def test_overloaded_servers_are_passed_over(scheduler: str) -> None:
    farm = Farm(scheduler, ())
    farm.add(1, 1000, upper=3, lower=2)
    farm.add(2, 1000, upper=2)
    farm.add(3, 0)
    assert Counter(farm.picks(5)) == {1: 3, 2: 2}
    assert farm.connect() is None
    farm.edit(2, upper=0)
    assert farm.picks(2) == [2, 2]
    # Connections that closed count until they are forgotten: 3, then less than 2 of them.
    farm.edit(2, upper=1)
    for port in range(1001, 1006):
        farm.close(port)
    assert farm.connect() is None
    farm.now += 61 * SECOND
    farm.dp.sweep()
    assert farm.picks(1) == [1]


def test_wrr_goes_down_to_those_who_are_not_overloaded() -> None:
    farm = Farm("wrr", ())
    with farm.dp.transaction() as tx:
        service = tx.service(VIRTUAL[4], 80)
        service.add("10.1.0.1", 1, 2)
        service.add("10.1.0.1", 2, (1 << 31) - 2, upper=1)
        service.add("10.1.0.1", 3, 4)
    assert farm.picks(7) == [3, 2, 1, 3, 3, 1, 3], "and 2^30 levels take no time"


def test_twos_spreads_better_than_random() -> None:
    twos, random = (Counter(Farm(name, (1,) * 10).picks(3000)) for name in ("twos", "random"))
    assert max(twos.values()) - min(twos.values()) < 20
    assert max(random.values()) - min(random.values()) > 30


def test_great_loads_and_weights() -> None:
    """Products of both need more than 64 bits; they are compared without loss."""
    farm = Farm("wlc", ((1 << 31) - 1, (1 << 31) - 2))
    assert farm.picks(4) == [2, 1, 1, 2]
    assert farm.picks(2) == [1, 2]


def test_none_serves_nobody() -> None:
    assert Farm("none").connect() is None


def test_the_model_agrees_on_a_first_round() -> None:
    """The kernel's first round after weights 1, 3, 5, 2, 4 came one by one visits each once."""
    model = ipvs_model.Service("wrr")
    for name, weight in enumerate(FIVE, 1):
        model.add("10.1.0.1", name, weight)
    picks = [model.pick(ipvs_model.Client()) for _ in range(5)]
    assert [server.port for server in picks if server] == [5, 4, 3, 2, 1]
