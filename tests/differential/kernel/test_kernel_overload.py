"""What goes when there is too much. drop_entry draws: judged by what goes and how fast."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest
import wire
from replay import Replay
from scenario import Packet, Result, Scenario, assert_same
from topology import CLIENT, VIRTUAL, server

TCP, UDP, SCTP, BOUND, LIVE, SINGLE = (
    f"{word} {VIRTUAL[4]}:{port}"
    for word, port in (
        ("-t", 80),
        ("-u", 80),
        ("--sctp-service", 80),
        ("-u", 81),
        ("-t", 82),
        ("-u", 83),
    )
)
#: Each second one part in so many of the table is looked at: of its buckets, at random.
SHARE = 32
SECONDS = 8
DEVIATIONS = 5

HALF_OPEN = {"SYN_RECV", "SYNACK", "INIT1", "INIT"}
#: Connections by the state that they are left in: how many, what the client sent and the server.
CROWD = {
    "SYN_RECV": (1000, "tcp", ("S",), ()),
    "ESTABLISHED": (100, "tcp", ("S", "A"), ()),
    "SYN_SENT": (50, "tcp", ("S", "A", "FA"), ("S",)),
    "CLOSE_WAIT": (50, "tcp", ("S", "A", "FA"), ()),
    "FIN_WAIT": (50, "tcp", ("S", "A"), ("FA",)),
    "UDP": (100, "udp", ("", "", ""), ()),
    "INIT": (100, "sctp", ("", ""), ()),
}


def packet(protocol: str, flags: str, port: int, *, back: bool = False) -> bytearray:
    client, service = (CLIENT[4], port), (VIRTUAL[4], 80)
    ends = (server(1), 80, *client) if back else (*client, *service)
    return wire.packet(protocol, *ends, flags, b"x" * (protocol == "udp"))


def crowded() -> Scenario:
    """Connections in every kind of state, in any order."""
    scenario = Scenario("crowded")
    for service in (TCP, UDP, SCTP):
        scenario.ipvs(f"-A {service} -s rr", f"-a {service} -r {server(1)}:80 -m")
    crowd = [past for count, *past in CROWD.values() for _ in range(count)]
    random.Random(1).shuffle(crowd)
    sent: list[Packet] = []
    answers: list[Packet] = []
    for port, (protocol, requests, replies) in enumerate(crowd, 1024):
        sent += [packet(protocol, flags, port) for flags in requests]
        answers += [packet(protocol, flags, port, back=True) for flags in replies]
    return observed(scenario.send(*sent).send(*answers, side="s1"))


def bound() -> Scenario:
    """Persistence: clients whose connections are gone, were answered, go on, or never had any."""
    scenario = Scenario("bound")
    for service in (BOUND, LIVE, SINGLE):
        option = "-o" if service == SINGLE else ""
        scenario.ipvs(f"-A {service} -s rr -p 100 {option}", f"-a {service} -r {server(1)}:80 -m")
    clients = [f"198.51.{100 + n // 250}.{1 + n % 250}" for n in range(700)]
    live, single, answered, silent = clients[:70], clients[70:140], clients[140:280], clients[280:]

    def datagrams(whose: list[str], port: int) -> list[Packet]:
        return [wire.packet("udp", who, 7, VIRTUAL[4], port, payload=b"x") for who in whose]

    sent = datagrams(single, 83) + datagrams(answered + silent, 81)
    random.Random(2).shuffle(sent)
    scenario.send(*sent)
    opened = (wire.packet("tcp", who, 7, VIRTUAL[4], 82, flags) for who in live for flags in "SA")
    scenario.send(*opened)
    replies = (wire.packet("udp", server(1), 80, who, 7, payload=b"x") for who in answered)
    scenario.send(*replies, side="s1").ipvs("--set 0 0 1")
    return observed(scenario.send(*datagrams(answered + silent, 81)).wait(2.2))


def observed(scenario: Scenario) -> Scenario:
    return scenario.connections().sysctl("drop_entry", 3).wait(SECONDS).connections()


def spared() -> Scenario:
    """The automatic modes do nothing while there is room."""
    scenario = Scenario("room").ipvs(f"-A {TCP} -s rr", f"-a {TCP} -r {server(1)}:80 -m")
    ports = itertools.count(1024)
    for mode in (1, 2):
        scenario.sysctl("drop_entry", mode).sysctl("drop_packet", mode)
        scenario.send(*(packet("tcp", "S", next(ports)) for _ in range(100)))
        scenario.wait(2.2).send(*(packet("tcp", "S", next(ports)) for _ in range(20)))
    return scenario.connections()


class Seconds(Replay):
    """Of a dataplane that looks at its load when a packet comes by: now one does, each second."""

    def _wait(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self._now += 10**9
            self.dp.process(wire.packet("udp", CLIENT[4], 1, "192.0.2.254", 9))


CROWDED, BOUND_CLIENTS, SPARED = SCENARIOS = [crowded(), bound(), spared()]


def lost(result: Result) -> tuple[Counter[str], Counter[str]]:
    """How many there were and how many of these are gone, by state. svcdp remembers the way back
    of single packets, the kernel does not.
    """
    before, after = (
        [row for row in rows if row[4] != 83 or row[2] == 0]
        for _, rows in result
        if isinstance(rows, list) and is_rows(rows)
    )
    left = {tuple(row[:7]) for row in after}
    gone = Counter(kind(row) for row in before if tuple(row[:7]) not in left)
    return Counter(map(kind, before)), gone


def is_rows(rows: list[Any]) -> bool:
    return bool(rows) and rows[0][0] in ("TCP", "UDP", "SCTP")


def kind(row: list[Any]) -> str:
    """Its state; what binds the clients of single packets is told apart."""
    return "SINGLE" if row[4] == 83 else str(row[7])


def assert_share(count: int, gone: int, result: Result) -> None:
    """Of so many, as many are gone as are drawn between the last steps, give or take chance."""
    seconds = result[-1][0] - result[-3][0]
    few, many = (count * (1 - (1 - 1 / SHARE) ** looks) for looks in (SECONDS - 1, seconds + 2))
    margin = DEVIATIONS * math.sqrt(many)
    assert few - margin <= gone <= many + margin


def replayed(scenario: Scenario, verdicts: dict[str, Result]) -> Result:
    return Seconds(scenario).run(verdicts[scenario.name])


@pytest.mark.parametrize("who", ["kernel", "svcdp"])
def test_who_is_half_open_goes(who: str, verdicts: dict[str, Result]) -> None:
    result = verdicts["crowded"] if who == "kernel" else replayed(CROWDED, verdicts)
    count, gone = lost(result)
    assert count == {state: number for state, (number, *_) in CROWD.items()}
    assert set(gone) <= HALF_OPEN
    assert_share(sum(count[state] for state in HALF_OPEN), gone.total(), result)


@pytest.mark.parametrize("who", ["kernel", "svcdp"])
def test_bindings_go_that_nobody_answered_to(who: str, verdicts: dict[str, Result]) -> None:
    """And on which no connection hangs. The kernel spares those of one-packet scheduling for a
    minute of silence; a datagram that nobody answered to says as little there as elsewhere.
    """
    result = verdicts["bound"] if who == "kernel" else replayed(BOUND_CLIENTS, verdicts)
    count, gone = lost(result)
    assert count == {"NONE": 420, "ASSURED": 210, "ESTABLISHED": 70, "SINGLE": 70}
    assert set(gone) == ({"NONE"} if who == "kernel" else {"NONE", "SINGLE"})
    assert_share(420, gone["NONE"], result)


def test_nothing_goes_while_there_is_room(verdicts: dict[str, Result]) -> None:
    assert_same(SPARED, verdicts["room"], replayed(SPARED, verdicts))
