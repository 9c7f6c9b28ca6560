"""States of connections after every sequence of events, and their timeouts."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, groupby, product
from operator import itemgetter

import pytest
import wire
from scenario import Scenario
from topology import CLIENT, VIRTUAL, server

METHODS = {"nat": "-m", "route": "-g"}

#: TCP flags from the client ("c") and from the server ("s").
TCP = [f"{side}{flags}" for side in "cs" for flags in ("S", "FA", "A", "RA")]
ODD = ["c", "s", "cP", "sP", "cSA", "sSA", "cSF", "cSR", "sFR"]
FIRST = ("cA", "cFA", "c", "cSA", "cRA", "cSR")

CHUNKS = {
    "data": 0,
    "init": 1,
    "init-ack": 2,
    "heartbeat": 4,
    "abort": 6,
    "shutdown": 7,
    "shutdown-ack": 8,
    "error": 9,
    "cookie-echo": 10,
    "cookie-ack": 11,
    "shutdown-complete": 14,
}
SCTP = [f"{side}{chunk}" for side in "cs" for chunk in CHUNKS]
#: To every state of an association.
WAYS = {
    "established": ["cinit", "sinit-ack", "ccookie-echo", "scookie-ack"],
    "init1": ["cinit"],
    "init": ["cinit", "cinit"],
    "cookie-sent": ["cinit", "sinit-ack"],
    "cookie-replied": ["cinit", "sinit-ack", "ccookie-echo"],
    "cookie-wait": ["cinit", "sinit"],
    "cookie": ["cinit", "sinit", "cinit-ack"],
    "cookie-echoed": ["cinit", "scookie-echo"],
    "shutdown-sent": ["cinit", "scookie-ack", "sshutdown"],
    "shutdown-received": ["cinit", "scookie-ack", "cshutdown"],
    "shutdown-ack": ["cinit", "sshutdown-ack"],
    "rejected": ["cinit", "sabort"],
    "closed": ["cinit", "cabort"],
}


def tcp(event: str, port: int, nat: bool) -> tuple[str, bytes]:
    """A segment, and the side that it comes in from."""
    if event[0] == "c":
        return "c", bytes(wire.packet("tcp", CLIENT[4], port, VIRTUAL[4], 80, event[1:]))
    source = (server(1), 80) if nat else (VIRTUAL[4], 80)
    return "s1", bytes(wire.packet("tcp", *source, CLIENT[4], port, event[1:]))


def sctp(event: str, port: int, nat: bool) -> tuple[str, bytes]:
    kind = CHUNKS[event[1:]]
    chunk = struct.pack("!BBH", kind, 3 if kind == 0 else 0, 20) + bytes(16)
    if event[0] == "c":
        return "c", bytes(wire.packet("sctp", CLIENT[4], port, VIRTUAL[4], 80, payload=chunk))
    source = (server(1), 80) if nat else (VIRTUAL[4], 80)
    return "s1", bytes(wire.packet("sctp", *source, CLIENT[4], port, payload=chunk))


Histories = Iterable[Sequence[str]]


def after(name: str, method: str, protocol: str, *groups: Histories, **sysctls: int) -> Scenario:
    """A connection for each history, which is a sequence of events; what became of them, group by
    group: some states do not last for long.
    """
    scenario = Scenario(f"{protocol}-{method}-{name}")
    for key, value in sysctls.items():
        scenario.sysctl(key, value)
    word, build = {"tcp": ("-t", tcp), "sctp": ("--sctp-service", sctp)}[protocol]
    service = f"{word} {VIRTUAL[4]}:80"
    scenario.ipvs(f"-A {service} -s rr", f"-a {service} -r {server(1)}:80 {METHODS[method]}")
    ports = count(2000)
    for number, group in enumerate(groups):
        numbered = zip(group, ports, strict=False)
        events = (build(event, port, method == "nat") for way, port in numbered for event in way)
        for side, sent in groupby(events, itemgetter(0)):
            scenario.send(*(packet for _, packet in sent), side=side)
        scenario.connections()
        if number == 0:
            scenario.services()
    return scenario


def tcp_scenarios(method: str) -> Iterator[Scenario]:
    """All sequences of three events after a SYN; with flags that seldom meet; without a SYN."""
    three = [
        [["cS", first, *rest] for length in range(3) for rest in product(TCP, repeat=length)]
        for first in TCP
    ]
    odd = [["cS", *rest] for rest in product(ODD, repeat=2)]
    yield after("strict", method, "tcp", *three, odd, [[first, "sA"] for first in FIRST])
    two = [["cS", *rest] for length in range(3) for rest in product(TCP, repeat=length)]
    yield after("secure", method, "tcp", two, secure_tcp=3)
    picked_up = [[first, *rest] for first in FIRST for rest in ([], *([event] for event in TCP))]
    yield after("sloppy", method, "tcp", picked_up, sloppy_tcp=1)


def sctp_scenarios(method: str) -> Iterator[Scenario]:
    """Every event in every state; without an INIT."""
    groups = [[way, *([*way, event] for event in SCTP)] for way in WAYS.values()]
    picked_up = [["c" + chunk, *rest] for chunk in CHUNKS for rest in ([], ["sdata"])]
    yield after("strict", method, "sctp", *groups, picked_up)
    yield after("sloppy", method, "sctp", picked_up, sloppy_sctp=1)


SCENARIOS = [
    scenario
    for method in METHODS
    for scenarios in (tcp_scenarios, sctp_scenarios)
    for scenario in scenarios(method)
]


@pytest.mark.usefixtures("agree")
def test_states(scenario: Scenario) -> None:
    """Nothing more: `agree` compares."""
