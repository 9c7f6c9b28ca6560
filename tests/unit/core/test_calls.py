"""SIP: a call is one server's, whoever begins it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL, Bench
from pieces import cut, join

import svcdp
from svcdp import DestinationSpec, Reason, SourceRule, Verdict

SERVERS = {4: ["10.1.1.1", "10.1.1.2", "10.1.1.3"], 6: ["fd01::1", "fd01::2", "fd01::3"]}
FAMILIES = pytest.mark.parametrize("family", [4, 6])


def message(call: str, size: int = 0) -> bytes:
    lines = ["INVITE sip:a@x SIP/2.0", f"Call-ID: {call}", "X: " + "x" * size, "", ""]
    return "\r\n".join(lines).encode()


class Calls(Bench):
    def __init__(self, family: int = 4, **fields: Any) -> None:
        super().__init__()
        self.family = family
        self.pbx(*SERVERS[family], **fields)

    def pbx(self, *servers: str, method: str = "masq", port: int = 5070, **fields: Any) -> None:
        members = [DestinationSpec(server, port, method=method) for server in servers]
        self.serve(
            *members,
            address=VIRTUAL[self.family],
            **{
                "port": 5060,
                "protocol": "udp",
                "persistence": 60,
                "persistence_engine": "sip",
                **fields,
            },
        )

    def from_client(self, call: str, port: int = 40000) -> str | None:
        """The server that gets the client's message."""
        here, there = (CLIENT[self.family], port), (VIRTUAL[self.family], 5060)
        result = self.dp.process(wire.packet("udp", *here, *there, payload=message(call)))
        return result.destination[0] if result.destination else None

    def from_server(
        self, server: str, call: str = "", port: int = 40000, own: int = 5070
    ) -> svcdp.Result:
        payload = message(call) if call else b"no call"
        there = (CLIENT[self.family], port)
        return self.dp.process(wire.packet("udp", server, own, *there, payload=payload))

    def assert_passes(self, *call: Any, **fields: Any) -> None:
        result = self.from_server(*call, **fields)
        assert (result.verdict, result.reason) == (Verdict.PASS, Reason.NO_SERVICE)
        assert not self.connections()
        assert self.dp.stats().persistence_templates == 0


@FAMILIES
@pytest.mark.parametrize("one_packet", [False, True])
def test_a_server_calls(family: int, one_packet: bool) -> None:
    bench = Calls(family, one_packet=one_packet)
    caller = SERVERS[family][1]
    for _ in range(3):
        result = bench.from_server(caller, "a")
        assert (result.verdict, result.reason) == (Verdict.FORWARD, Reason.REPLY)
        assert result.destination == (caller, 5070)
        assert wire.is_intact(bytes(result.packet))
        there = wire.read(bytes(result.packet))
        assert there[1:] == (VIRTUAL[family], 5060, CLIENT[family], 40000)
    # The call is this server's, from any port; others are not.
    assert {bench.from_client("a", port) for port in (40000, 40001, 40002)} == {caller}
    assert {bench.from_client(call, 40010 + ord(call)) for call in "bcd"} == {*SERVERS[family]}
    stats = bench.dp.stats()
    assert stats.persistence_templates == 4
    status = next(s for s in bench.dp.services()[0].destinations if s.address == caller)
    assert status.packets_out == 3


def test_nothing_is_left_of_it() -> None:
    bench = Calls()
    bench.from_server(SERVERS[4][0], "a")
    bench.from_client("a", 1)
    assert len(bench.connections()) == 2
    for _ in range(3):
        bench.now += 400 * SECOND
        bench.dp.sweep()
    stats = bench.dp.stats()
    assert (stats.connections, stats.persistence_templates) == (0, 0)
    assert stats.connections_created == stats.connections_expired == 2
    assert all((s.active, s.inactive) == (0, 0) for s in bench.dp.services()[0].destinations)
    bench.dp.apply([])
    assert bench.dp.draining() == svcdp.Captures()


def test_a_call_that_another_server_goes_on_with() -> None:
    bench = Calls()
    first = bench.from_client("a")
    other = next(server for server in SERVERS[4] if server != first)
    bench.from_server(other, "a", port=40001)
    assert bench.from_client("a", 40002) == other


def test_the_clients_port_belongs_to_who_called_last() -> None:
    """As with IPVS, where the newest of two connections with one client side is found first."""
    bench = Calls()
    one, two, _ = SERVERS[4]
    assert bench.from_server(one, "a").destination == (one, 5070)
    assert bench.from_server(two, "b").destination == (two, 5070)
    assert bench.from_client("x") == two
    assert bench.from_client("a", 40001) == one
    assert len(bench.connections()) == 2
    stats = bench.dp.stats()
    assert stats.connections_created - stats.connections_expired == stats.connections == 2


def test_a_client_that_was_masqueraded() -> None:
    """The server names the client itself: that is another connection."""
    bench = Calls(masquerade_address="198.51.100.1", rules=(SourceRule(masquerade=True),))
    first = bench.from_client("a")
    result = bench.from_server(first or "", "a")
    assert wire.is_intact(bytes(result.packet))
    assert wire.read(bytes(result.packet))[1:] == (VIRTUAL[4], 5060, CLIENT[4], 40000)
    assert bench.from_client("a") == first


def test_in_fragments() -> None:
    bench = Calls()
    here, there = (SERVERS[4][0], 5070), (CLIENT[4], 40000)
    whole = bytes(wire.packet("udp", *here, *there, payload=message("a", 2000)))
    results = [bench.dp.process(bytearray(piece)) for piece in cut(whole, 512)]
    assert {r.reason for r in results} == {Reason.REPLY}
    whole = join([bytes(r.packet) for r in results])
    assert wire.is_intact(whole)
    assert wire.read(whole)[1:3] == (VIRTUAL[4], 5060)


def test_what_is_no_call() -> None:
    server = SERVERS[4][0]
    Calls().assert_passes(server)
    Calls().assert_passes(server, "a", own=5060)
    Calls().assert_passes("10.1.1.9", "a")
    Calls(method="dr", port=5060).assert_passes(server, "a", own=5060)
    Calls(persistence_engine="").assert_passes(server, "a")
    Calls(last_port=5069).assert_passes(server, "a")
    Calls(rules=(SourceRule(sources=("10.9.0.0/16",)),)).assert_passes(server, "a")


def test_servers_come_and_go() -> None:
    bench = Calls()
    one, two, three = SERVERS[4]
    spec = bench.dp.services()[0].spec
    # Enough of them to have the table grow.
    others = [replace(spec, address="10.96.1.1", port=port) for port in range(1, 300)]
    bench.dp.update(others, [spec.key])
    assert wire.read(bytes(bench.from_server(one, "a").packet)).source == "10.96.1.1"
    bench.dp.update([], [other.key for other in others])
    bench.now += 400 * SECOND
    for _ in range(3):
        bench.now += 100 * SECOND
        bench.dp.sweep()
    bench.assert_passes(one, "a")
    bench.pbx(two)
    bench.pbx(three)
    bench.assert_passes(two, "a")
    bench.pbx(three, port=5060, method="dr")
    bench.assert_passes(three, "a", own=5060)
    bench.pbx(three)
    assert bench.from_server(three, "a").destination == (three, 5070)
