"""lblc and lblcr: what they remember of addresses, for how long, and how much of it."""

from __future__ import annotations

import ipaddress
import threading

import pytest
import wire
from bench import CLIENT, SECOND, Bench

import svcdp

DAY = 24 * 3600 * SECOND
MARK = 3
#: More places there are not; above two thirds of it idle ones are given up.
PLACES = 24576


class Farm(Bench):
    """A service of all addresses that the mark is on; its servers are called by their ports."""

    def __init__(self, scheduler: str, *weights: int, **settings: int) -> None:
        super().__init__(1 << 17, settings=svcdp.Settings(**settings))  # type: ignore[arg-type]
        self.scheduler = scheduler
        self.port = 1000
        with self.dp.transaction() as tx:
            service = tx.service("0.0.0.0", MARK, "fwmark", scheduler=scheduler)
            for name, weight in enumerate(weights, 1):
                service.add("10.1.0.1", name, weight)

    def change(self, verb: str, name: int, **fields: int) -> None:
        with self.dp.transaction() as tx:
            getattr(tx.service("0.0.0.0", MARK, "fwmark"), verb)("10.1.0.1", name, **fields)

    def pick(self, virtual: str = "198.51.100.1", protocol: str = "udp") -> int | None:
        """The server of a new connection. UDP is never active."""
        self.port += 1
        packet = wire.packet(
            protocol,
            CLIENT[4],
            self.port % 50000 + 1,
            virtual,
            80,
            "S" if protocol == "tcp" else "",
        )
        result = self.dp.process(packet, mark=MARK)
        return None if result.destination is None else result.destination[1]

    def foreseen(self, virtual: str = "198.51.100.1") -> int | None:
        """The one that explain() says is next; AssertionError unless it is a possible one."""
        said = self.dp.explain(f"udp {CLIENT[4]}:60000 -> {virtual}:80", MARK)
        assert said.picked is None or said.picked in said.destinations
        assert (said.action == "forward") is (said.picked is not None)
        return None if said.picked is None else said.picked.port


def address(number: int) -> str:
    return str(ipaddress.IPv4Address(0x0B000000 + number))


@pytest.mark.parametrize("scheduler", ["lblc", "lblcr"])
def test_an_address_stays_with_its_server(scheduler: str) -> None:
    farm = Farm(scheduler, 1, 1, 1)
    first = [farm.pick(address(n)) for n in range(6)]
    assert first == [3, 2, 1, 3, 2, 1], "the least loaded, at first"
    for _ in range(3):
        assert [farm.pick(address(n)) for n in range(6)] == first
    farm.change("add", 4)
    farm.change("update", 1, weight=2)
    assert [farm.pick(address(n)) for n in range(6)] == first, "edits do not make it forget"


@pytest.mark.parametrize("scheduler", ["lblc", "lblcr"])
def test_a_quiesced_server_loses_its_addresses(scheduler: str) -> None:
    farm = Farm(scheduler, 1, 1)
    assert farm.pick() == 2
    farm.change("update", 2, weight=0)
    assert farm.pick() == 1
    farm.change("update", 2, weight=1)
    # lblcr remembers both, and takes the less loaded one, of equals the one that came last.
    assert [farm.pick() for _ in range(4)] == {"lblc": [1] * 4, "lblcr": [1, 2] * 2}[scheduler]


@pytest.mark.parametrize("scheduler", ["lblc", "lblcr"])
def test_a_server_that_comes_back_has_its_addresses(scheduler: str) -> None:
    """The kernel keeps it in the trash for as long as somebody refers to it."""
    farm = Farm(scheduler, 1, 1)
    assert farm.pick() == 2
    farm.now += 20 * 60 * SECOND
    farm.dp.sweep()
    farm.change("remove", 2)
    farm.change("add", 3)
    farm.change("add", 2)
    assert farm.pick() == 2
    # Somebody else at the same address is not taken for it.
    farm.now += 20 * 60 * SECOND
    farm.dp.sweep()
    farm.change("remove", 2)
    for name in range(10, 30):
        farm.change("add", name)
    assert farm.pick() == 29


def test_lblc_does_not_look_at_the_overload_of_a_cached_server() -> None:
    farm = Farm("lblc", 1, 1)
    farm.change("update", 2, upper=1)
    assert [farm.pick() for _ in range(3)] == [2, 2, 2]
    assert farm.pick(address(1)) == 1


@pytest.mark.parametrize("scheduler", ["lblc", "lblcr"])
def test_explain_tells_who_is_next(scheduler: str) -> None:
    """Whatever is known of the address, and without a trace: it is neither used nor moved."""
    farm = Farm(scheduler, 1, 1, 2)
    picks = [address(n % 4) for n in range(12)]
    for number, virtual in enumerate(picks):
        if number == 6:
            farm.change("update", 3, weight=0)
        if number == 9:
            farm.now += DAY
        for _ in range(2):
            foreseen = farm.foreseen(virtual)
        assert farm.pick(virtual) == foreseen
    farm.now += DAY - 1
    farm.foreseen(picks[0])
    farm.now += 1
    farm.change("update", 1, weight=100)
    assert farm.pick(picks[0]) == 1, "asking did not prolong what is known"


def test_explain_of_an_overloaded_server_that_has_the_address() -> None:
    farm = Farm("lblc", 1, 1)
    farm.change("update", 1, upper=1)
    farm.change("update", 2, upper=1)
    assert farm.pick() == 2
    assert farm.foreseen() == 2
    assert farm.pick() == 2
    assert farm.pick(address(1)) == 1
    assert farm.foreseen(address(2)) is None
    assert farm.pick(address(2)) is None
    farm.change("update", 2, weight=0)
    assert farm.foreseen() is None
    assert farm.pick() is None


def test_lblcr_does() -> None:
    farm = Farm("lblcr", 1, 1)
    farm.change("update", 2, upper=1)
    assert [farm.pick() for _ in range(3)] == [2, 1, 1]


@pytest.mark.parametrize("scheduler", ["lblc", "lblcr"])
def test_a_hot_server_gets_help(scheduler: str) -> None:
    """More active connections than its weight, while another has less than half of its own."""
    farm = Farm(scheduler, 1, 4)
    assert [farm.pick(protocol="tcp") for _ in range(5)] == [2] * 5
    assert farm.pick(protocol="tcp") == 1
    # Both are loaded now: lblc goes on where it is, lblcr takes the less loaded by weight.
    assert farm.pick(protocol="tcp") == {"lblc": 1, "lblcr": 1}[scheduler]


@pytest.mark.parametrize("scheduler", ["lblc", "lblcr"])
def test_an_address_is_forgotten_after_a_day_without_packets(scheduler: str) -> None:
    farm = Farm(scheduler, 1, 1)
    assert farm.pick() == 2
    assert farm.pick(address(1)) == 1
    # From now on whoever asks anew gets the heavy one.
    farm.change("update", 2, weight=100)
    farm.now += DAY - 1
    assert farm.pick(address(1)) == 1
    farm.now += DAY - 1
    assert farm.pick(address(1)) == 1
    farm.now += DAY
    assert farm.pick(address(1)) == 2


@pytest.mark.parametrize("scheduler", ["lblc", "lblcr"])
def test_it_is_a_setting_when_an_address_is_forgotten(scheduler: str) -> None:
    """Of each scheduler its own; and changed, it counts at once."""
    farm = Farm(scheduler, 1, 1, **{f"{scheduler}_expiration": 60})
    assert farm.pick() == 2
    assert farm.pick(address(1)) == 1
    farm.change("update", 2, weight=100)
    farm.now += 60 * SECOND - 1
    assert farm.pick(address(1)) == 1
    farm.now += 60 * SECOND
    farm.dp.configure(svcdp.Settings())
    assert farm.pick(address(1)) == 1
    farm.now += 60 * SECOND
    farm.dp.configure(svcdp.Settings(lblc_expiration=60, lblcr_expiration=60))
    assert farm.pick(address(1)) == 2


def test_it_is_a_setting_when_the_most_loaded_of_a_set_goes() -> None:
    farm = Farm("lblcr", 1, 1, lblcr_expiration=60, lblc_expiration=1)
    assert farm.pick() == 2
    farm.change("update", 2, weight=0)
    assert farm.pick() == 1
    farm.change("update", 2, weight=1)
    farm.now += 30 * SECOND
    assert {farm.pick() for _ in range(4)} == {1, 2}
    farm.now += 30 * SECOND + 1
    farm.pick()
    assert len({farm.pick() for _ in range(4)}) == 1


def test_the_most_loaded_of_a_set_goes_after_a_day_without_a_change() -> None:
    farm = Farm("lblcr", 1, 1, 1)
    assert farm.pick() == 3
    farm.change("update", 3, weight=0)
    assert farm.pick() == 2
    farm.change("update", 3, weight=1)
    assert [farm.pick() for _ in range(5)] == [2, 3, 2, 3, 2]
    for _ in range(2):
        farm.now += DAY // 2
        assert [farm.pick() for _ in range(4)] in ([2, 3] * 2, [3, 2] * 2)
    farm.change("update", 2, weight=10)
    farm.now += 1
    assert farm.pick() == 2
    farm.change("update", 2, weight=1)
    assert {farm.pick() for _ in range(9)} == {2}, "3 has left the set"
    farm.change("update", 2, weight=0)
    assert farm.pick() == 1, "the least loaded of all"


@pytest.mark.parametrize("scheduler", ["lblc", "lblcr"])
def test_places_are_bounded(scheduler: str) -> None:
    farm = Farm(scheduler, 1, 1)
    first = [farm.pick(address(n)) for n in range(PLACES + 100)]
    assert set(first) == {1, 2}
    # From now on whoever asks anew gets the newest.
    farm.change("add", 3, weight=1 << 30)
    assert [farm.pick(address(n)) for n in range(PLACES)] == first[:PLACES]
    assert {farm.pick(address(n)) for n in range(PLACES, PLACES + 100)} == {3}
    farm.change("update", 3, weight=0)
    # Where idle ones are given up, there is room again.
    farm.now += 6 * 60 * SECOND
    fresh = [farm.pick(address(n)) for n in range(PLACES, PLACES + 2000)]
    farm.change("update", 3, weight=1 << 30)
    assert [farm.pick(address(n)) for n in range(PLACES, PLACES + 2000)] == fresh
    kept = sum(farm.pick(address(n)) == first[n] for n in range(0, PLACES, 500))
    assert 20 < kept < 40, "two thirds of 50"


@pytest.mark.parametrize("scheduler", ["lblc", "lblcr"])
def test_no_server_is_kept_when_the_service_goes(scheduler: str) -> None:
    farm = Farm(scheduler, 1, 1)
    for n in range(40):
        farm.pick(address(n))
    farm.change("remove", 1)
    farm.now += 20 * 60 * SECOND
    farm.dp.sweep()
    assert farm.dp.draining_ids(), "addresses refer to it"
    with farm.dp.transaction() as tx:
        tx.remove_service("0.0.0.0", MARK, "fwmark")
    assert not farm.dp.draining_ids()


@pytest.mark.parametrize("scheduler", ["lblc", "lblcr"])
def test_another_scheduler_forgets(scheduler: str) -> None:
    farm = Farm(scheduler, 1, 1)
    assert farm.pick(address(1)) == 2
    for name in ("rr", scheduler):
        with farm.dp.transaction() as tx:
            tx.service("0.0.0.0", MARK, "fwmark", scheduler=name)
    assert farm.pick(address(1)) == 1


@pytest.mark.parametrize("scheduler", ["lblc", "lblcr"])
def test_threads_share_what_is_remembered(scheduler: str) -> None:
    """Packets of two threads while servers come and go: in the end nothing holds any server."""
    farm = Farm(scheduler, 1, 1)
    done = threading.Event()

    def work(first: int) -> None:
        batch = svcdp.PacketBatch(64)
        while not done.is_set():
            batch.clear()
            first += 1
            for n in range(64):
                virtual = address((first + 7 * n) % 3000)
                batch.append(
                    wire.packet("udp", CLIENT[4], 1000 + first % 30000 + n, virtual, 80), mark=MARK
                )
            farm.dp.process_batch(batch, farm.now)

    threads = [threading.Thread(target=work, args=(first,)) for first in (1000, 2000)]
    for thread in threads:
        thread.start()
    for name in range(3, 25):
        farm.change("add", name)
        farm.change("remove", name - 2)
        farm.now += 20 * SECOND
    done.set()
    for thread in threads:
        thread.join()
    with farm.dp.transaction() as tx:
        tx.remove_service("0.0.0.0", MARK, "fwmark")
    farm.now += DAY
    farm.dp.sweep()
    assert not farm.dp.draining_ids()
