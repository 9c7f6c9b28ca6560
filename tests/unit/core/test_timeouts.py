"""How long connections live: of all, and of one service."""

from __future__ import annotations

from typing import Any

import pytest
from bench import SECOND, VIRTUAL, Bench

from svcdp import CapacityError, ConfigError, DestinationSpec, Reason, ServiceSpec
from svcdp.dataplane import TIMEOUTS

ONE, TWO = ("10.1.1.1", 8080), ("10.1.1.2", 8080)


def left(bench: Bench, flags: str = "S", **fields: Any) -> float:
    """Seconds that the connection has after a packet."""
    bench.send(flags, **fields)
    return bench.connection().expires_in


def test_a_service_has_its_own() -> None:
    bench = Bench()
    bench.serve(ONE, timeouts=(("syn_recv", 5), ("established", 0.5)))
    assert left(bench) == 5
    assert left(bench, "A") == 0.5
    assert left(bench, "FA") == TIMEOUTS["close_wait"]
    bench.serve(ONE, port=81)
    bench.dp.sweep(bench.now + 1000 * SECOND)
    assert left(bench, to=(VIRTUAL[4], 81)) == TIMEOUTS["syn_recv"]


def test_sets_of_timeouts_are_kept_apart() -> None:
    bench = Bench()
    for number in range(1, 20):
        bench.serve(ONE, port=number, protocol="udp", timeouts=(("udp", number),))
    for number in range(1, 20):
        bench.send(port=number, to=(VIRTUAL[4], number), protocol="udp")
    assert {c.virtual_port: c.expires_in for c in bench.connections()} == {
        number: number for number in range(1, 20)
    }


def test_a_connection_keeps_the_set_it_began_with() -> None:
    bench = Bench()
    bench.serve(ONE, protocol="udp", timeouts=(("udp", 5),))
    bench.send(port=1, protocol="udp")
    bench.serve(ONE, protocol="udp", timeouts=(("udp", 9),))
    bench.send(port=1, protocol="udp")
    bench.send(port=2, protocol="udp")
    assert {c.client_port: c.expires_in for c in bench.connections()} == {1: 5, 2: 9}


def test_timeouts_of_all_change_but_not_a_services_own() -> None:
    bench = Bench()
    bench.serve(ONE, protocol="udp")
    bench.serve(ONE, port=81, protocol="udp", timeouts=(("udp", 5),))
    bench.dp.configure_timeouts({"udp": 30, "established": 40, "syn_recv": 7})
    for port in (80, 81):
        bench.send(port=port, to=(VIRTUAL[4], port), protocol="udp")
    assert {c.virtual_port: c.expires_in for c in bench.connections()} == {80: 30, 81: 5}
    bench.dp.sweep(bench.now + 100 * SECOND)
    bench.serve(ONE, timeouts=(("syn_recv", 3),))
    assert left(bench) == 3
    assert left(bench, "A") == 40


def test_a_known_connection_takes_the_new_one_up_with_its_next_packet() -> None:
    bench = Bench()
    bench.serve(ONE, protocol="udp")
    assert left(bench, protocol="udp") == 300
    bench.dp.configure_timeouts({"udp": 5})
    assert bench.connection().expires_in == 300
    assert left(bench, protocol="udp") == 5
    bench.now += 5 * SECOND
    assert bench.send(protocol="udp").reason == Reason.NEW


def test_what_was_configured_before_stays() -> None:
    bench = Bench(timeouts={"udp": 11})
    bench.dp.configure_timeouts({"syn_recv": 12})
    bench.serve(ONE)
    bench.serve(ONE, protocol="udp")
    bench.send()
    bench.send(protocol="udp")
    assert {c.protocol: c.expires_in for c in bench.connections()} == {"udp": 11, "tcp": 12}


BAD: list[dict[str, Any]] = [
    {"forever": 1},
    {"udp": 0},
    {"udp": -1},
    {"udp": 9e-10},
    {"udp": float("nan")},
    {"udp": "5"},
    {"udp": None},
    {"udp": 1 << 31},
    {"udp": float("inf")},
    {"udp": 5, "ESTABLISHED": 5},
    {5: 5},
]


@pytest.mark.parametrize("timeouts", BAD, ids=str)
def test_bad_timeouts_change_nothing(timeouts: dict[str, Any]) -> None:
    bench = Bench()
    with pytest.raises(ConfigError, match="timeouts"):
        bench.dp.configure_timeouts(timeouts)
    with pytest.raises(ConfigError, match="timeouts"):
        bench.serve(ONE, protocol="udp", timeouts=tuple(timeouts.items()))
    assert not bench.dp.services()
    bench.serve(ONE, protocol="udp")
    assert left(bench, protocol="udp") == 300


def test_there_are_only_so_many_sets() -> None:
    bench = Bench()
    for number in range(1, 256):
        bench.serve(ONE, port=number, protocol="udp", timeouts=(("udp", number),))
    with pytest.raises(CapacityError):
        bench.serve(ONE, port=256, protocol="udp", timeouts=(("udp", 256),))
    assert len(bench.dp.services()) == 255
    bench.serve(ONE, port=256, protocol="udp", timeouts=(("udp", 7),))
    bench.dp.update([], [(VIRTUAL[4], 9, "udp")])
    bench.serve(ONE, port=257, protocol="udp", timeouts=(("udp", 257),))
    for port, seconds in ((256, 7), (257, 257), (255, 255)):
        assert left(bench, to=(VIRTUAL[4], port), protocol="udp") == seconds
        bench.dp.sweep(bench.now + 1000 * SECOND)


def test_sets_that_nobody_uses_are_given_again() -> None:
    """But not those of connections."""
    bench = Bench()
    for number in range(1, 1000):
        bench.serve(ONE, protocol="udp", timeouts=(("udp", number),))
        if number % 100 == 0:
            bench.send(port=number, protocol="udp")
    assert {c.client_port: c.expires_in for c in bench.connections()} == {
        number: number for number in range(100, 1000, 100)
    }
    for number in range(100, 1000, 100):
        bench.send(port=number, protocol="udp")
    assert {c.client_port: c.expires_in for c in bench.connections()} == {
        number: number for number in range(100, 1000, 100)
    }


def test_sets_of_one_change() -> None:
    """As many as there can be, in the place of as many others, and back when one is too many."""
    bench = Bench()

    def specs(first: int, count: int) -> list[ServiceSpec]:
        member = (DestinationSpec(*ONE),)
        return [
            ServiceSpec(VIRTUAL[4], port, "udp", member, timeouts=(("udp", first + port),))
            for port in range(1, count + 1)
        ]

    bench.dp.apply(specs(0, 255))
    bench.dp.apply([])
    bench.dp.apply(specs(1000, 255))
    bench.dp.apply([])
    with pytest.raises(CapacityError):
        bench.dp.apply(specs(2000, 256))
    bench.dp.apply(specs(3000, 255))
    for port in (1, 255):
        assert left(bench, to=(VIRTUAL[4], port), protocol="udp") == 3000 + port
        bench.dp.sweep(bench.now + 4000 * SECOND)
