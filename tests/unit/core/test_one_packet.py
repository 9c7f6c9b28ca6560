"""One-packet scheduling: each datagram goes where the scheduler says, whatever came before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL, Bench

import svcdp
from svcdp import DestinationSpec, Reason, SourceRule, Verdict

ONE, TWO = ("10.1.1.1", 5353), ("10.1.1.2", 5353)
NODE = "198.51.100.1"
MARK4 = {"address": "0.0.0.0", "protocol": "fwmark"}
SIP = b"INVITE sip:a@example.org SIP/2.0\r\nFrom: x\r\nCall-ID: %s\r\nContent-Length: 0\r\n\r\n"


def served(**fields: Any) -> Bench:
    bench = Bench()
    bench.serve(ONE, TWO, **{"protocol": "udp", "one_packet": True, **fields})
    return bench


def test_each_datagram_is_scheduled() -> None:
    bench = served()
    results = [bench.send(protocol="udp") for _ in range(6)]
    assert {r.reason for r in results} == {Reason.NEW}
    assert [r.destination for r in results] == [TWO, ONE] * 3
    for result in results:
        assert wire.read(result.packet)[3:] == result.destination
        assert wire.is_intact(result.packet)


@pytest.mark.parametrize("family", [4, 6])
def test_replies_come_from_the_service(family: int) -> None:
    """Better than the kernel, which lets them pass as they are."""
    bench = Bench()
    servers = [("10.1.1.1", 5353), ("10.1.1.2", 5353)]
    if family == 6:
        servers = [("fd01::1", 5353), ("fd01::2", 5353)]
    address, client = VIRTUAL[family], CLIENT[family]
    bench.serve(*servers, address=address, protocol="udp", one_packet=True)
    for _ in range(4):
        bench.send(protocol="udp", client=client, to=(address, 80))
    for server in servers:
        reply = bench.reply(source=server, client=client, protocol="udp")
        assert reply.reason == Reason.REPLY
        assert wire.read(reply.packet)[1:] == (address, 80, client, 40000)
        assert wire.is_intact(reply.packet)
    nobody = bench.reply(source=servers[0], client=client, port=9, protocol="udp")
    assert nobody.verdict == Verdict.PASS


def test_what_is_counted() -> None:
    """Each datagram is a connection, and none is load."""
    bench = served()
    for _ in range(6):
        bench.send(protocol="udp")
    bench.reply(source=ONE, protocol="udp")
    for status in bench.dp.services()[0].destinations:
        counted = status.connections_total, status.packets_in, status.packets_out
        assert counted == (3, 3, status.address == ONE[0])
        assert (status.active, status.inactive) == (0, 0)
    # One record a client and destination, for the replies.
    assert bench.dp.stats().connections == 2
    bench.now += 301 * SECOND
    bench.dp.sweep()
    assert bench.dp.stats().connections == 0
    assert bench.reply(source=ONE, protocol="udp").verdict == Verdict.PASS


def test_records_of_replies_do_not_overload() -> None:
    bench = Bench()
    bench.serve(DestinationSpec(*ONE, upper=2), protocol="udp", one_packet=True)
    assert {bench.send(port=p, protocol="udp").reason for p in range(1, 9)} == {Reason.NEW}


@pytest.mark.parametrize("method", ["dr", "local"])
def test_direct_methods_leave_nothing_in_the_table(method: str) -> None:
    bench = Bench()
    members = [DestinationSpec(f"10.1.1.{n}", 80, method=method) for n in (1, 2)]
    bench.serve(*members, protocol="udp", one_packet=True)
    results = [bench.send(protocol="udp") for _ in range(4)]
    assert [r.destination for r in results] == [("10.1.1.2", 80), ("10.1.1.1", 80)] * 2
    assert {wire.read(r.packet).destination for r in results} == {VIRTUAL[4]}
    stats = bench.dp.stats()
    assert (stats.connections, stats.connections_created, stats.connections_expired) == (0, 4, 4)
    for status in bench.dp.services()[0].destinations:
        counted = status.connections_total, status.packets_in, status.active, status.inactive
        assert counted == (2, 2, 0, 0)
    assert bench.dp.draining() == svcdp.Captures()
    # And so nothing drains.
    bench.dp.apply([])
    assert bench.dp.captures().virtual == frozenset()


def test_a_template_decides() -> None:
    bench = served(persistence=100)
    first = bench.send(protocol="udp").destination
    assert {bench.send(protocol="udp", port=p).destination for p in (40000, 1, 2)} == {first}
    assert bench.dp.stats().persistence_templates == 1
    bench.now += 302 * SECOND
    bench.dp.sweep()
    assert bench.dp.stats().connections == 0
    assert bench.dp.stats().persistence_templates == 0, "nothing hangs on it"


def test_masqueraded_ones_are_connections() -> None:
    """A source port must stay somebody's while replies may come."""
    bench = served(masquerade_address=NODE, rules=(SourceRule(masquerade=True),))
    results = [bench.send(protocol="udp") for _ in range(2)]
    assert [r.reason for r in results] == [Reason.NEW, Reason.ESTABLISHED]
    connection = bench.connection()
    source = (connection.source, connection.source_port)
    reply = bench.reply(
        source=results[0].destination, client=source[0], port=source[1], protocol="udp"
    )
    assert wire.read(reply.packet)[1:] == (VIRTUAL[4], 80, CLIENT[4], 40000)


def test_tcp_of_a_mark_is_as_ever() -> None:
    bench = served(port=7, **MARK4)
    assert bench.send(mark=7).reason == Reason.NEW
    assert bench.send("A", mark=7).reason == Reason.ESTABLISHED
    assert [bench.send(protocol="udp", mark=7).reason for _ in range(2)] == [Reason.NEW] * 2


def test_a_service_becomes_one_packet_and_back() -> None:
    """Known flows stay what they are until they end."""
    bench = served(one_packet=False)
    first = bench.send(port=1, protocol="udp").destination
    bench.serve(ONE, TWO, protocol="udp", one_packet=True)
    assert {bench.send(port=1, protocol="udp").destination for _ in range(4)} == {first}
    assert {bench.send(port=2, protocol="udp").destination for _ in range(4)} == {ONE, TWO}
    bench.serve(ONE, TWO, protocol="udp")
    stays = {bench.send(port=2, protocol="udp").destination for _ in range(4)}
    assert len(stays) == 1


def test_a_removed_destination_gets_nothing_more() -> None:
    bench = served()
    for _ in range(4):
        bench.send(protocol="udp")
    bench.serve(TWO, protocol="udp", one_packet=True)
    assert {bench.send(protocol="udp").destination for _ in range(4)} == {TWO}
    bench.dp.sweep()
    assert bench.dp.draining().real == frozenset()


def test_weights_and_thresholds_of_changes() -> None:
    bench = served()
    bench.serve(replace(DestinationSpec(*ONE), weight=0), TWO, protocol="udp", one_packet=True)
    assert {bench.send(protocol="udp").destination for _ in range(4)} == {TWO}


def test_the_newer_of_two_services_has_the_replies() -> None:
    """One server, one socket of the client: which of both a reply is of, it does not say."""
    bench = Bench()
    for address in (VIRTUAL[4], "10.96.0.11", "10.96.0.12"):
        one_packet = address != "10.96.0.12"
        bench.serve(ONE, address=address, protocol="udp", one_packet=one_packet)
    for address in (VIRTUAL[4], "10.96.0.11", VIRTUAL[4], "10.96.0.12"):
        for _ in range(2):
            assert bench.send(protocol="udp", to=(address, 80)).verdict == Verdict.FORWARD
        reply = bench.reply(source=ONE, protocol="udp")
        assert wire.read(reply.packet).source == address
        assert bench.dp.stats().connections == 1
    # What is more than a datagram stays.
    refused = bench.send(protocol="udp")
    assert (refused.verdict, refused.reason) == (Verdict.DROP, Reason.NO_PORT)


# -- calls -----------------------------------------------------------------------------------------


def call(
    bench: Bench, name: bytes, port: int, client: str = CLIENT[4], **fields: bytes
) -> svcdp.Result:
    payload = fields.get("payload", SIP % name)
    packet = wire.packet("udp", client, port, VIRTUAL[4], 5060, payload=payload)
    return bench.dp.process(packet)


@pytest.mark.parametrize("one_packet", [False, True])
def test_a_call_stays_with_its_destination(one_packet: bool) -> None:
    bench = Bench()
    bench.serve(
        ("10.1.1.1", 5060), ("10.1.1.2", 5060), port=5060, protocol="udp",
        persistence=60, persistence_engine="sip", one_packet=one_packet,
    )  # fmt: skip
    calls = {}
    for number in range(6):
        calls[b"c%d" % number] = call(bench, b"c%d" % number, 1000 + number).destination
    assert len(set(calls.values())) == 2
    for name, destination in calls.items():
        for client, port in ((CLIENT[4], 2000), ("192.0.2.77", 2001)):
            result = call(bench, name, port + int(name[1:]), client)
            assert result.destination == destination
    assert bench.dp.stats().persistence_templates == 6


def test_a_datagram_of_no_call_is_dropped() -> None:
    bench = Bench()
    bench.serve(
        ("10.1.1.1", 5060), port=5060, protocol="udp", persistence=60, persistence_engine="sip"
    )
    result = call(bench, b"", 1, payload=b"OPTIONS sip:a SIP/2.0\r\nFrom: x\r\n\r\n")
    assert (result.verdict, result.reason) == (Verdict.DROP, Reason.NO_CALL_ID)
    assert call(bench, b"x" * 255, 2).verdict == Verdict.FORWARD
    assert call(bench, b"x" * 256, 3).reason == Reason.NO_CALL_ID


def test_one_flow_of_several_calls() -> None:
    """A known connection is not asked for its call, unless each datagram is scheduled."""
    for one_packet, count in ((False, 1), (True, 2)):
        bench = Bench()
        bench.serve(
            ("10.1.1.1", 5060), ("10.1.1.2", 5060), port=5060, protocol="udp",
            persistence=60, persistence_engine="sip", one_packet=one_packet,
        )  # fmt: skip
        went = [call(bench, b"call-%d" % n, 1000).destination for n in range(6)]
        assert len(set(went)) == count
        again = [call(bench, b"call-%d" % n, 1000).destination for n in range(6)]
        assert again == went


@pytest.mark.parametrize("family", [4, 6])
def test_calls_of_both_families(family: int) -> None:
    bench = Bench()
    servers = [("10.1.1.1", 5060), ("10.1.1.2", 5060)]
    if family == 6:
        servers = [("fd01::1", 5060), ("fd01::2", 5060)]
    bench.serve(
        *servers, address=VIRTUAL[family], port=5060, protocol="udp", persistence=60,
        persistence_engine="sip",
    )  # fmt: skip

    def send(name: bytes, port: int) -> tuple[str, int] | None:
        packet = wire.packet("udp", CLIENT[family], port, VIRTUAL[family], 5060, payload=SIP % name)
        return bench.dp.process(packet).destination

    first = [send(b"%d@x" % n, 100 + n) for n in range(8)]
    assert [send(b"%d@x" % n, 200 + n) for n in range(8)] == first
    assert bench.dp.stats().persistence_templates == 8
