"""Node ports at loopback addresses: who is picked, and where is listened."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from svcdp import (
    ConfigError,
    Dataplane,
    DestinationSpec,
    Flow,
    PassiveHealth,
    ServiceSpec,
    SourceRule,
    Verdict,
)
from svcdp.dataplane import Explanation
from svcdp.kube.events import Event
from svcdp.kube.model import ObjectKey
from svcdp.node.localhost import SYN, LocalhostNodePorts, _segment
from svcdp.records import Key
from svcdp.schedulers import BUILTIN

PLACE = ("127.0.0.1", 30080)
ONE, TWO, THREE = ("10.1.0.1", 8080), ("10.1.0.2", 8080), ("10.1.0.3", 8080)


class Told:
    """A mode that notes what it is told."""

    def __init__(self) -> None:
        self.specs: list[ServiceSpec] = []
        self.removed: list[Key] = []
        self.fails = False

    def update(self, specs: Iterable[ServiceSpec], removed: Iterable[Key]) -> None:
        if self.fails:
            raise ConfigError("no")
        self.specs = list(specs)
        self.removed = list(removed)


class FakeRelay:
    """Opens all ports but those that are taken."""

    def __init__(self) -> None:
        self.places: set[tuple[str, int]] = set()
        self.taken: set[tuple[str, int]] = set()

    def listen(self, place: tuple[str, int]) -> None:
        if place in self.taken:
            raise OSError(98, "Address already in use")
        self.places.add(place)

    def leave(self, place: tuple[str, int]) -> None:
        self.places.remove(place)


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode, self.relay = Told(), FakeRelay()
        self.events: list[Event] = []
        monkeypatch.setattr("svcdp.node.localhost.TcpRelay", lambda *_, **__: self.relay)
        self.ports = LocalhostNodePorts(self.mode, self.events.append)

    def serve(self, *endpoints: Any, place: tuple[str, int] = PLACE, **fields: Any) -> None:
        destinations = tuple(DestinationSpec(*each) for each in endpoints)
        fields = {"name": "shop/web:http", **fields}
        self.ports.update([ServiceSpec(*place, destinations=destinations, **fields)], [])
        self.ports.listen()

    def pick(self, port: int, address: str = "127.0.0.1") -> list[tuple[str, int]]:
        with self.ports._pick((address, PLACE[1]), (address, port)) as found:
            return list(found)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_the_mode_gets_what_is_not_at_loopback(bench: Bench) -> None:
    served = (DestinationSpec(*ONE),)
    served6 = (DestinationSpec("fd00::1", 1),)
    here = [
        ServiceSpec("127.0.0.1", 1, "tcp", served),
        ServiceSpec("127.0.0.1", 1, "udp", served),
        ServiceSpec("::1", 1, "tcp", served6),
    ]
    there = [
        ServiceSpec("10.96.0.1", 80, "tcp", served),
        ServiceSpec("10.96.0.0/16", 0, "any"),
        ServiceSpec("0.0.0.0", 7, "fwmark", served),
    ]
    bench.ports.update([*here, *there], [])
    assert bench.mode.specs == there
    bench.ports.listen()
    assert bench.relay.places == {("127.0.0.1", 1), ("::1", 1)}
    bench.ports.update([], [each.key for each in (*here, *there)])
    assert bench.mode.removed == [each.key for each in there]
    bench.ports.listen()
    assert bench.relay.places == set()


def test_who_is_picked_and_who_is_next(bench: Bench) -> None:
    bench.serve(ONE, TWO, THREE)
    picks = [bench.pick(port) for port in range(1, 7)]
    assert Counter(each[0] for each in picks) == {ONE: 2, TWO: 2, THREE: 2}
    assert all(sorted(each) == [ONE, TWO, THREE] for each in picks)


def test_weights_and_affinity(bench: Bench) -> None:
    bench.serve((*ONE, 3), (*TWO, 1), (*THREE, 0), scheduler="wrr")
    picks = Counter(bench.pick(port)[0] for port in range(1, 9))
    assert picks == {ONE: 6, TWO: 2}
    bench.serve(ONE, TWO, persistence=100, persistence_timed=True)
    assert len({bench.pick(port)[0] for port in range(10, 19)}) == 1


def test_connections_count_while_they_last(bench: Bench) -> None:
    bench.serve(ONE, TWO, scheduler="lc")
    with bench.ports._pick(PLACE, ("127.0.0.1", 1)) as first:
        for port in (2, 3, 4):
            assert bench.pick(port)[0] not in list(first)[:1]
    (service,) = bench.ports._dataplane.services()
    assert [each.active for each in service.destinations] == [0, 0]


@pytest.mark.parametrize("fields", [{}, {"persistence": 100, "persistence_timed": True}])
def test_no_connection_is_turned_away_for_those_that_ended(
    bench: Bench, fields: dict[str, Any]
) -> None:
    bench.serve(ONE, timeouts=(("close", 60),), **fields)
    assert all(bench.pick(port) == [ONE] for port in range(1, 10_000))


def test_what_the_kernel_does_is_not_asked_for(bench: Bench) -> None:
    """Rules of masquerade have no source to give here, and nobody sees the servers' answers."""
    rules = (SourceRule(("127.0.0.0/8",), masquerade=True), SourceRule(on_empty="drop"))
    bench.serve(
        ONE, rules=rules, masquerade_address="192.0.2.1", passive_health=PassiveHealth(failures=1)
    )
    for _ in range(3):
        assert bench.pick(1) == [ONE]


def test_ports_are_open_while_somebody_serves(bench: Bench) -> None:
    bench.serve()
    assert bench.relay.places == set()
    bench.serve(ONE)
    assert bench.relay.places == {PLACE}
    bench.serve((*ONE, 0))
    assert bench.relay.places == set()
    assert bench.pick(1) == []
    bench.serve(ONE, rules=(SourceRule(endpoints=()),))  # externalTrafficPolicy Local
    assert bench.relay.places == set()


@pytest.mark.parametrize("scheduler", sorted(BUILTIN))
@pytest.mark.parametrize(
    ("endpoints", "fields"),
    [
        ([ONE, TWO], {}),
        ([], {}),
        ([(*ONE, 0), TWO], {}),
        ([(*ONE, 0)], {}),
        ([(*ONE, 1, "masq", 5)], {}),
        ([ONE], {"rules": ()}),
        ([ONE], {"rules": (SourceRule(("192.0.2.0/24",)),)}),
        ([ONE], {"rules": (SourceRule(mark=1),)}),
        ([ONE], {"rules": (SourceRule(endpoints=()),)}),
        ([ONE], {"rules": (SourceRule(on_empty="drop"),)}),
    ],
)
def test_who_is_believed_to_serve_does(
    bench: Bench, scheduler: str, endpoints: list[Any], fields: dict[str, Any]
) -> None:
    bench.serve(*endpoints, scheduler=scheduler, **fields)
    packet = _segment(("127.0.0.1", 1), PLACE, SYN)
    is_served = bench.ports._dataplane.process(packet).verdict == Verdict.FORWARD
    assert bench.relay.places == ({PLACE} if is_served else set())


def test_nobody_is_asked_where_nobody_can_be_turned_away(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Flow] = []
    explain = Dataplane.explain

    def note(self: Dataplane, flow: Flow, mark: int = 0) -> Explanation:
        asked.append(flow)
        return explain(self, flow, mark)

    monkeypatch.setattr(Dataplane, "explain", note)
    for number in range(30000, 30100):
        bench.serve(ONE, TWO, place=(PLACE[0], number))
    assert not asked
    bench.serve((*ONE, 0), TWO)
    assert len(asked) == 1


def test_a_port_that_is_taken_is_an_event_once(bench: Bench) -> None:
    bench.relay.taken.add(PLACE)
    bench.serve(ONE)
    bench.ports.listen()
    (event,) = bench.events
    assert event.regarding == ObjectKey("Service", "shop", "web")
    assert "port 30080 of 127.0.0.1: Address already in use" in event.message
    bench.relay.taken.clear()
    bench.ports.listen()
    assert bench.relay.places == {PLACE}
    assert len(bench.events) == 1


def test_what_the_mode_refuses_changes_nothing(bench: Bench) -> None:
    bench.serve(ONE)
    bench.mode.fails = True
    with pytest.raises(ConfigError):
        bench.ports.update([], [(*PLACE, "tcp")])
    bench.ports.listen()
    assert bench.relay.places == {PLACE}


def test_a_whole_one_over_sockets() -> None:
    """To a server that echoes, past one that refuses."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(100))
        writer.close()

    async def test() -> None:
        server = await asyncio.start_server(serve, "127.0.0.2", 0)
        port = server.sockets[0].getsockname()[1]
        ports = LocalhostNodePorts(Told(), lambda event: None)
        with socket.create_server(("127.0.0.1", 0)) as sock:
            node_port = sock.getsockname()[1]
        served = tuple(DestinationSpec("127.0.0.2", each) for each in (1, port))
        ports.update([ServiceSpec("127.0.0.1", node_port, "tcp", served)], [])
        ports.listen()
        async with asyncio.timeout(20), server:
            for _ in range(3):
                reader, writer = await asyncio.open_connection("127.0.0.1", node_port)
                writer.write(b"hello")
                assert await reader.read(100) == b"hello"
                writer.close()
            await ports.close()

    asyncio.run(test())
