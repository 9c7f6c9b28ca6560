"""States of connections that packets go through, and their timeouts, against `ipvs_states`."""

from __future__ import annotations

from collections import deque
from itertools import product

import ipvs_states as ipvs
import pytest
from bench import SECOND, Bench

REAL = ("10.1.1.7", 8080)
IN, OUT = "in", "out"
NAMES, TIMEOUTS, ACTIVE = (table[ipvs.TCP] for table in (ipvs.NAMES, ipvs.TIMEOUTS, ipvs.ACTIVE))

#: Flags of packets, and the event that they are: RST before SYN before FIN before ACK.
EVENTS = {
    "S": "S", "SA": "S", "SF": "S", "F": "F", "FA": "F", "A": "A", "PA": "A", "R": "R", "RA": "R",
    "RS": "R", "RF": "R", "P": "", "": "",
}  # fmt: skip


def ways() -> dict[str, list[tuple[str, str]]]:
    """For each state that can be reached after a client's SYN, events that lead there."""
    found: dict[str, list[tuple[str, str]]] = {"SR": []}
    queue = deque(["SR"])
    while queue:
        state = queue.popleft()
        for direction, event in product((IN, OUT), ipvs.TCP_EVENTS):
            if event == "S" and direction == IN and state in ("TW", "CL"):
                continue  # the client's port is used again: another connection
            after = ipvs.tcp_next(direction, state, event)
            if after not in found:
                found[after] = [*found[state], (direction, event)]
                queue.append(after)
    return found


WAYS = ways()


def step(bench: Bench, direction: str, flags: str) -> None:
    result = bench.send(flags) if direction == IN else bench.reply(flags, source=REAL)
    assert result.verdict.name == "FORWARD"


def test_most_states_are_reached() -> None:
    """No packet leads to LAST_ACK, LISTEN or NONE, and to SYNACK only with secure_tcp."""
    assert set(WAYS) == {"ES", "SS", "SR", "FW", "TW", "CL", "CW"}


@pytest.mark.parametrize("flags", EVENTS)
@pytest.mark.parametrize("direction", [IN, OUT])
@pytest.mark.parametrize("state", WAYS)
def test_transition(state: str, direction: str, flags: str) -> None:
    bench = Bench()
    bench.serve(REAL)
    bench.send()
    for way in WAYS[state]:
        step(bench, *way)
    assert bench.connection().state == NAMES[state]
    bench.now += SECOND
    if (direction, flags) == (IN, "RS") and state in ("TW", "CL"):
        return  # see test_any_syn_ends_a_closed_connection
    step(bench, direction, flags)
    after = ipvs.tcp_next(direction, state, EVENTS[flags])
    connection = bench.connection()
    assert connection.state == NAMES[after]
    assert connection.expires_in == TIMEOUTS[after]
    (destination,) = bench.dp.services()[0].destinations
    assert (destination.active, destination.inactive) == ((1, 0) if after in ACTIVE else (0, 1))


@pytest.mark.parametrize("state", WAYS)
def test_timeout(state: str) -> None:
    """Known until the last nanosecond of the state's timeout, and not after it."""
    for late, reason in ((0, "REPLY"), (1, "NO_SERVICE")):
        bench = Bench()
        bench.serve(REAL)
        bench.send()
        for way in WAYS[state]:
            step(bench, *way)
        bench.now += TIMEOUTS[state] * SECOND - 1 + late
        assert bench.reply("A", source=REAL).reason.name == reason
        assert bench.dp.stats().connections == 1 - late


@pytest.mark.parametrize("flags", ["S", "SA"])
def test_what_begins_a_connection(flags: str) -> None:
    bench = Bench()
    bench.serve(REAL)
    assert bench.send(flags).reason.name == "NEW"
    assert bench.connection().state == "SYN_RECV"


@pytest.mark.parametrize(
    ("flags", "verdict"),
    [("A", "REJECT"), ("FA", "REJECT"), ("", "REJECT"), ("R", "DROP"), ("RS", "DROP")],
)
def test_what_begins_none(flags: str, verdict: str) -> None:
    bench = Bench()
    bench.serve(REAL)
    result = bench.send(flags)
    assert (result.verdict.name, result.reason.name) == (verdict, "NO_CONNECTION")
    assert not bench.connections()


@pytest.mark.parametrize("ending", [[(IN, "R")], [(OUT, "F"), (IN, "F")], [(IN, "F"), (OUT, "F")]])
def test_a_port_used_again_begins_a_connection(ending: list[tuple[str, str]]) -> None:
    """RFC 9293 3.6.1: a SYN may meet TIME-WAIT; the new connection is scheduled anew."""
    bench = Bench()
    bench.serve(("10.1.1.9", 8080), REAL)
    bench.send()
    bench.reply("SA", source=REAL)
    bench.send("A")
    for way in ending:
        step(bench, *way)
    closed = bench.connection().state
    result = bench.send("S")
    if closed == "FIN_WAIT":
        assert result.reason.name == "ESTABLISHED"
        return
    assert closed in ("TIME_WAIT", "CLOSE")
    assert (result.reason.name, result.destination) == ("NEW", ("10.1.1.9", 8080))
    assert bench.connection().state == "SYN_RECV"
    assert bench.dp.stats().connections_created == 2


def test_a_reply_does_not_use_a_port_again() -> None:
    bench = Bench()
    bench.serve(REAL)
    bench.send()
    bench.send("A")
    bench.send("R")
    assert bench.connection().state == "CLOSE"
    assert bench.reply("S", source=REAL).reason.name == "REPLY"
    assert bench.dp.stats().connections_created == 1


@pytest.mark.parametrize(
    ("flags", "reason"), [("SA", "NEW"), ("SF", "NEW"), ("RS", "NO_CONNECTION")]
)
def test_any_syn_ends_a_closed_connection(flags: str, reason: str) -> None:
    """As in IPVS, which looks at this flag alone, and then does not schedule a reset."""
    bench = Bench()
    bench.serve(REAL)
    bench.send()
    bench.send("A")
    bench.send("R")
    assert bench.send(flags).reason.name == reason
    assert len(bench.connections()) == (reason == "NEW")


def test_timeouts_can_be_set() -> None:
    bench = Bench(timeouts={"established": 7, "udp": 0.5})
    bench.serve(REAL)
    bench.serve(REAL, protocol="udp")
    bench.send()
    bench.send("A")
    bench.send(protocol="udp")
    assert {c.protocol: c.expires_in for c in bench.dp.connections()} == {"tcp": 7, "udp": 0.5}


def test_udp_has_one_state() -> None:
    bench = Bench()
    bench.serve(REAL, protocol="udp")
    bench.send(protocol="udp")
    bench.now += 5 * SECOND
    for packet in (
        lambda: bench.reply(source=REAL, protocol="udp"),
        lambda: bench.send(protocol="udp"),
    ):
        assert packet().verdict.name == "FORWARD"
        assert (bench.connection().state, bench.connection().expires_in) == ("UDP", 300)
    (destination,) = bench.dp.services()[0].destinations
    assert (destination.active, destination.inactive) == (0, 1)
    bench.now += 300 * SECOND
    assert bench.send(protocol="udp").reason.name == "NEW"
