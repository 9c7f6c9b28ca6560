"""Packets that arrive in fragments, on their way through a dataplane: all methods, both ways."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL, Bench
from pieces import cut, join

import svcdp
from svcdp import DestinationSpec, Reason, SourceRule, TunnelSpec, Verdict

SERVER = {4: "10.1.1.1", 6: "fd01::1"}
OUTER = {4: "192.0.2.1", 6: "2001:db8::1"}
FAMILIES = pytest.mark.parametrize("family", [4, 6])


def member(family: int, method: str = "masq", port: int = 80, **fields: Any) -> DestinationSpec:
    tunnel = TunnelSpec(source=OUTER[family]) if method == "tunnel" else None
    return DestinationSpec(SERVER[family], port, method=method, tunnel=tunnel, **fields)


def bench_of(family: int, *members: DestinationSpec, **fields: Any) -> Bench:
    bench = Bench()
    bench.serve(*members, address=VIRTUAL[family], **{"protocol": "udp", **fields})
    return bench


def datagram(family: int, *, back: bool = False, port: int = 40000) -> bytes:
    payload = bytes(range(256)) * 8
    here, there = (CLIENT[family], port), (VIRTUAL[family], 80)
    if back:
        here, there = (SERVER[family], 80), here
    return bytes(wire.packet("udp", *here, *there, payload=payload))


def through(bench: Bench, pieces: list[bytes]) -> list[svcdp.Result]:
    return [bench.dp.process(bytearray(64) + piece, headroom=64) for piece in pieces]


@FAMILIES
@pytest.mark.parametrize("size", [8, 64, 1024])
def test_nat(family: int, size: int) -> None:
    """Put together again, it is the datagram that arrived, with other addresses."""
    bench = bench_of(family, member(family))
    results = through(bench, cut(datagram(family), size))
    assert [r.reason for r in results] == [Reason.NEW] + [Reason.ESTABLISHED] * (len(results) - 1)
    assert {r.destination for r in results} == {(SERVER[family], 80)}
    whole = join([bytes(r.packet) for r in results])
    assert wire.read(whole)[1:] == (CLIENT[family], 40000, SERVER[family], 80)
    assert wire.is_intact(whole)
    back = through(bench, cut(datagram(family, back=True), size))
    assert {r.reason for r in back} == {Reason.REPLY}
    whole = join([bytes(r.packet) for r in back])
    assert wire.read(whole)[1:] == (VIRTUAL[family], 80, CLIENT[family], 40000)
    assert wire.is_intact(whole)
    (status,) = bench.dp.services()[0].destinations
    counted = status.connections_total, status.packets_in, status.packets_out
    assert counted == (1, len(results), len(back))


@FAMILIES
@pytest.mark.parametrize("one_packet", [False, True])
def test_direct(family: int, one_packet: bool) -> None:
    bench = bench_of(family, member(family, "dr", mark=5), one_packet=one_packet)
    pieces = cut(datagram(family), 512)
    results = through(bench, pieces)
    assert [bytes(r.packet) for r in results] == pieces
    assert {(r.verdict, r.next_hop, r.mark) for r in results} == {
        (Verdict.FORWARD, SERVER[family], 5)
    }


@FAMILIES
def test_on_this_host(family: int) -> None:
    """No hop: with a TTL of 1 they arrive, and leave."""
    bench = bench_of(family, member(family, "local"))
    bench.dp.configure(svcdp.Settings(decrement_ttl=True))
    reply = wire.packet("udp", VIRTUAL[family], 80, CLIENT[family], 40000, payload=bytes(2048))
    for packet in (bytearray(datagram(family)), reply):
        if family == 6:
            packet[7] = 1
        else:
            packet[8], packet[10:12] = 1, bytes(2)
            packet[10:12] = wire.internet_checksum(bytes(packet[:20])).to_bytes(2, "big")
        pieces = cut(bytes(packet), 512)
        assert [bytes(r.packet) for r in through(bench, pieces)] == pieces


@FAMILIES
@pytest.mark.parametrize("one_packet", [False, True])
def test_tunnel(family: int, one_packet: bool) -> None:
    """Each fragment in a packet of its own."""
    bench = bench_of(family, member(family, "tunnel"), one_packet=one_packet)
    pieces = cut(datagram(family), 512)
    results = through(bench, pieces)
    assert {(r.verdict, r.next_hop) for r in results} == {(Verdict.FORWARD, SERVER[family])}
    header = 20 if family == 4 else 40
    inside = [bytes(r.packet)[header:] for r in results]
    if family == 4:  # a tunnel lowers the inner TTL
        pieces = [with_ttl(piece, 63) for piece in pieces]
    else:
        pieces = [piece[:7] + b"\x3f" + piece[8:] for piece in pieces]
    assert inside == pieces


def with_ttl(packet: bytes, ttl: int) -> bytes:
    head = packet[:8] + bytes([ttl]) + packet[9:10] + bytes(2) + packet[12:20]
    return head[:10] + wire.internet_checksum(head).to_bytes(2, "big") + head[12:] + packet[20:]


@FAMILIES
def test_one_packet_nat(family: int) -> None:
    """All fragments of a datagram go where its first one went."""
    other = replace(member(family), address=SERVER[family][:-1] + "2")
    bench = bench_of(family, member(family), other, one_packet=True)
    for _ in range(4):
        results = through(bench, cut(datagram(family), 512))
        assert len({r.destination for r in results}) == 1
        assert wire.is_intact(join([bytes(r.packet) for r in results]))


@FAMILIES
def test_masqueraded(family: int) -> None:
    bench = bench_of(
        family,
        member(family, port=8080),
        masquerade_address=OUTER[family],
        rules=(SourceRule(masquerade=True),),
    )
    results = through(bench, cut(datagram(family), 512))
    whole = join([bytes(r.packet) for r in results])
    assert wire.is_intact(whole)
    assert wire.read(whole).source == OUTER[family]
    assert wire.read(whole)[3:] == (SERVER[family], 8080)


@FAMILIES
def test_a_fragment_without_its_first(family: int) -> None:
    bench = bench_of(family, member(family))
    first, second, *_ = cut(datagram(family), 512)
    (result,) = through(bench, [second])
    assert (result.verdict, result.reason) == (Verdict.PASS, Reason.FRAGMENT)
    assert bytes(result.packet) == second
    assert [r.reason for r in through(bench, [first, second])] == [Reason.NEW, Reason.ESTABLISHED]
    # It is of no use after a while: RFC 791 lets a host wait so long, and ids come again.
    bench.now += 61 * SECOND
    assert through(bench, [second])[0].reason == Reason.FRAGMENT


@FAMILIES
def test_nobody_to_serve(family: int) -> None:
    """The first fragment is answered, and the others go nowhere that it did not."""
    bench = bench_of(family)
    first, second, *_ = cut(datagram(family), 512)
    result = bench.dp.process(bytearray(first))
    assert (result.verdict, result.reason) == (Verdict.REJECT, Reason.NO_DESTINATION)
    assert wire.is_intact(bytes(result.packet))
    assert bench.dp.process(bytearray(second)).verdict == Verdict.PASS


def test_of_no_service() -> None:
    bench = bench_of(4, member(4), port=81)
    for piece in cut(datagram(4), 512):
        result = bench.dp.process(bytearray(piece))
        assert result.verdict == Verdict.PASS
        assert bytes(result.packet) == piece


def test_the_destination_goes_between_fragments() -> None:
    bench = bench_of(4, member(4))
    pieces = cut(datagram(4), 512)
    through(bench, pieces[:1])
    bench.dp.apply([])
    bench.dp.sweep()
    results = through(bench, pieces[1:])
    assert {r.verdict for r in results} <= {Verdict.FORWARD, Verdict.PASS}


@pytest.mark.parametrize("method", ["masq", "dr"])
def test_what_comes_in_place_of_the_destination_gets_no_fragments_of_it(method: str) -> None:
    """Ids of destinations are given again."""
    bench = bench_of(4, member(4, method), one_packet=method == "dr")
    pieces = cut(datagram(4), 512)
    through(bench, pieces[:1])
    bench.dp.apply([])
    for port in (81, 82):  # the first one finds the id free
        bench.dp.sweep(bench.now + 400 * SECOND)
        bench.serve(replace(member(4, method), port=port, address="10.1.1.9"), port=port)
    assert bench.dp.draining() == svcdp.Captures()
    for result in through(bench, pieces[1:]):
        assert (result.verdict, result.destination) == (Verdict.PASS, None)
    for status in bench.dp.services():
        assert status.destinations[0].packets_in == 0


def test_bypass() -> None:
    bench = Bench(settings=svcdp.Settings(cache_bypass=True))
    bench.serve(member(4, weight=0), address="0.0.0.0", port=7, protocol="fwmark")
    pieces = cut(datagram(4), 512)
    for piece in pieces:
        result = bench.dp.process(bytearray(piece), mark=7)
        assert (result.verdict, result.next_hop) == (Verdict.FORWARD, VIRTUAL[4])
        assert bytes(result.packet) == piece
