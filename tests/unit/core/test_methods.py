"""Forwarding methods that leave the packet as it is: dr and local, and their replies."""

from __future__ import annotations

from typing import Any

import pytest
import wire
from bench import CLIENT, VIRTUAL, Bench

import svcdp
from svcdp import DestinationSpec, Reason, Verdict

UNCHANGED = ["dr", "local"]
MARK4 = {"address": "0.0.0.0", "protocol": "fwmark"}


def there(flags: str = "S", port: int = 40000, protocol: str = "tcp", family: int = 4) -> bytes:
    return bytes(wire.packet(protocol, CLIENT[family], port, VIRTUAL[family], 80, flags))


def back(flags: str = "SA", port: int = 40000, protocol: str = "tcp", family: int = 4) -> bytes:
    return bytes(wire.packet(protocol, VIRTUAL[family], 80, CLIENT[family], port, flags))


def with_ttl(packet: bytes, ttl: int) -> bytearray:
    data = bytearray(packet)
    if data[0] >> 4 == 6:
        data[7] = ttl
    else:
        data[8], data[10:12] = ttl, bytes(2)
        data[10:12] = wire.internet_checksum(bytes(data[:20])).to_bytes(2, "big")
    return data


def server(method: str, family: int = 4, **fields: Any) -> DestinationSpec:
    return DestinationSpec("10.1.1.1" if family == 4 else "fd01::1", 80, method=method, **fields)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
@pytest.mark.parametrize("method", UNCHANGED)
def test_packets_stay_as_they_are(method: str, protocol: str, family: int) -> None:
    bench = Bench()
    bench.serve(server(method, family), address=VIRTUAL[family], protocol=protocol)
    packet = there(protocol=protocol, family=family)
    result = bench.dp.process(bytearray(packet))
    assert (result.verdict, result.reason) == (Verdict.FORWARD, Reason.NEW)
    assert bytes(result.packet) == packet
    hop = server(method, family).address if method == "dr" else VIRTUAL[family]
    assert result.next_hop == hop
    assert result.destination == (server(method, family).address, 80)
    # Replies are the client's, whose source is the service.
    answer = back(protocol=protocol, family=family)
    reply = bench.dp.process(bytearray(answer))
    assert (reply.verdict, reply.reason) == (Verdict.FORWARD, Reason.REPLY)
    assert bytes(reply.packet) == answer
    assert reply.next_hop == CLIENT[family]
    direct = wire.packet(protocol, server(method, family).address, 80, CLIENT[family], 40000)
    assert bench.dp.process(direct).verdict == Verdict.PASS


@pytest.mark.parametrize("method", UNCHANGED)
def test_in_a_batch(method: str) -> None:
    bench = Bench()
    bench.serve(server(method, mark=5))
    batch = svcdp.PacketBatch(2)
    batch.append(there(), mark=8)
    batch.append(back())
    assert [*bench.dp.process_batch(batch)] == [Verdict.FORWARD] * 2
    assert [bytes(batch[0]), bytes(batch[1])] == [there(), back()]
    assert [batch.mark(0), batch.mark(1)] == [13, 0]
    assert bench.dp.next_hop(batch, 0) == ("10.1.1.1" if method == "dr" else VIRTUAL[4])
    assert bench.dp.next_hop(batch, 1) == CLIENT[4]


@pytest.mark.parametrize("method", UNCHANGED)
def test_states_of_who_sees_one_direction(method: str) -> None:
    """ip_vs_proto_tcp.c: the IN-only column."""
    bench = Bench()
    bench.serve(server(method))
    states = []
    for flags in ("S", "A", "FA", "A"):
        bench.dp.process(bytearray(there(flags)))
        states.append(bench.connection().state)
    assert states == ["SYN_RECV", "ESTABLISHED", "FIN_WAIT", "FIN_WAIT"]


def test_states_of_who_comes_to_see_both() -> None:
    bench = Bench()
    bench.serve(server("dr"))
    steps = [(there, "S"), (back, "SA"), (there, "A"), (there, "FA"), (back, "FA")]
    states = []
    for way, flags in steps:
        bench.dp.process(bytearray(way(flags)))
        states.append(bench.connection().state)
    # A client's FIN makes FIN_WAIT for who sees IN only, CLOSE_WAIT for who has seen a reply.
    assert states == ["SYN_RECV", "SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "TIME_WAIT"]


@pytest.mark.parametrize("method", UNCHANGED)
def test_what_is_counted(method: str) -> None:
    bench = Bench()
    bench.serve(server(method))
    for packet in (there(), there("A"), back()):
        bench.dp.process(bytearray(packet))
    (destination,) = bench.dp.services()[0].destinations
    assert destination.method == method
    assert (destination.active, destination.inactive) == (1, 0)
    counted = destination.connections_total, destination.packets_in, destination.packets_out
    assert counted == (1, 2, 1)
    assert destination.bytes_in == 2 * len(there())
    assert bench.connection().method == method
    assert bench.connection().destination == "10.1.1.1"


def test_two_services_of_one_server_do_not_get_in_each_others_way() -> None:
    """Their replies have different sources, unlike those of NAT."""
    bench = Bench()
    for address in (VIRTUAL[4], "10.96.0.11"):
        bench.serve(server("dr"), address=address)
        assert bench.send(to=(address, 80)).reason == Reason.NEW


def test_a_mark_service_sends_directly() -> None:
    """Each address that clients dial is the source of its replies."""
    bench = Bench()
    bench.serve(DestinationSpec("10.1.1.1", 0, method="dr"), port=7, **MARK4)
    for address in (VIRTUAL[4], "203.0.113.9"):
        result = bench.send(to=(address, 443), mark=7)
        assert (result.reason, result.next_hop) == (Reason.NEW, "10.1.1.1")
        assert bench.reply(source=(address, 443)).reason == Reason.REPLY


def test_a_range_sends_directly() -> None:
    bench = Bench()
    bench.serve(DestinationSpec("10.1.1.1", 0, method="dr"), port=1000, last_port=2000)
    packet = bench.send(to=(VIRTUAL[4], 1234)).packet
    assert wire.read(packet)[3:] == (VIRTUAL[4], 1234)
    assert bench.reply(source=(VIRTUAL[4], 1234)).reason == Reason.REPLY
    assert bench.connection().destination_port == 1234


def test_nobody_is_masqueraded() -> None:
    """The server answers the client itself."""
    bench = Bench()
    rules = (svcdp.SourceRule(masquerade=True),)
    bench.serve(server("dr"), masquerade_address="198.51.100.1", rules=rules)
    assert bytes(bench.dp.process(bytearray(there())).packet) == there()
    bench.serve(server("dr"), rules=rules)
    assert bench.send(port=2).verdict == Verdict.FORWARD


def test_methods_side_by_side() -> None:
    bench = Bench()
    masq = DestinationSpec("10.1.1.3", 8080)
    bench.serve(server("dr"), DestinationSpec("10.1.1.2", 80, method="local"), masq)
    hops = {bench.send(port=port).next_hop for port in (1, 2, 3)}
    assert hops == {"10.1.1.1", VIRTUAL[4], "10.1.1.3"}


@pytest.mark.parametrize("method", UNCHANGED)
def test_icmp_errors_of_clients_go_the_same_way(method: str) -> None:
    bench = Bench()
    bench.serve(server(method))
    bench.dp.process(bytearray(there()))
    error = bytes(wire.icmp_error(back(), CLIENT[4]))
    result = bench.dp.process(bytearray(error))
    assert (result.verdict, result.reason) == (Verdict.FORWARD, Reason.RELATED)
    assert bytes(result.packet) == error
    assert result.next_hop == ("10.1.1.1" if method == "dr" else VIRTUAL[4])
    # And one about what the client sent goes to the client.
    error = bytes(wire.icmp_error(there(), "10.1.1.1"))
    result = bench.dp.process(bytearray(error))
    assert (result.verdict, result.next_hop) == (Verdict.FORWARD, CLIENT[4])
    assert bytes(result.packet) == error


@pytest.mark.parametrize("family", [4, 6])
def test_a_path_that_is_too_small(family: int) -> None:
    bench = Bench()
    bench.serve(server("dr", family, mtu=1400), address=VIRTUAL[family], protocol="udp")
    small = wire.packet("udp", CLIENT[family], 5, VIRTUAL[family], 80, payload=bytes(1300))
    assert bench.dp.process(small).verdict == Verdict.FORWARD
    big = wire.packet("udp", CLIENT[family], 5, VIRTUAL[family], 80, payload=bytes(1400))
    if family == 4:
        assert bench.dp.process(bytearray(big)).verdict == Verdict.FORWARD, "without DF"
        big[6] |= 0x40
        big[10:12] = bytes(2)
        big[10:12] = wire.internet_checksum(bytes(big[:20])).to_bytes(2, "big")
    before = bytes(big)
    result = bench.dp.process(big)
    assert (result.verdict, result.reason) == (Verdict.REJECT, Reason.TOO_BIG)
    answer = bytes(result.packet)
    at = wire.transport_at(answer)
    assert wire.is_intact(answer)
    assert (answer[at], answer[at + 1]) == ((3, 4) if family == 4 else (2, 0))
    assert int.from_bytes(answer[at + 4 : at + 8], "big") == 1400
    assert wire.read(answer)[1] == VIRTUAL[family]
    quoted = answer[at + 8 :]
    assert quoted == before[: len(quoted)]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("method", ["dr", "masq"])
def test_a_router_lowers_the_ttl(method: str, family: int) -> None:
    bench = Bench(settings=svcdp.Settings(decrement_ttl=True))
    bench.serve(server(method, family), address=VIRTUAL[family])
    at = 8 if family == 4 else 7
    packet = bytearray(there(family=family))
    result = bench.dp.process(packet)
    assert bytes(result.packet)[at] == 63
    assert wire.is_intact(result.packet)
    result = bench.dp.process(with_ttl(there("A", family=family), 1))
    assert (result.verdict, result.reason) == (Verdict.REJECT, Reason.TIME_EXCEEDED)
    answer = bytes(result.packet)
    assert wire.read(answer)[1:4:2] == (VIRTUAL[family], CLIENT[family])
    assert answer[wire.transport_at(answer)] == (11 if family == 4 else 3)
    assert wire.is_intact(answer)


@pytest.mark.parametrize("family", [4, 6])
def test_a_server_on_this_host_is_no_hop(family: int) -> None:
    """And no path has an MTU to it."""
    bench = Bench(settings=svcdp.Settings(decrement_ttl=True))
    bench.serve(server("local", family, mtu=40), address=VIRTUAL[family])
    packets = [there(family=family), back(family=family), there("A", family=family)]
    errors = [wire.icmp_error(packet, CLIENT[family]) for packet in packets[:2]]
    for packet in map(bytes, [*packets, *errors]):
        for ttl in (64, 1):
            data = with_ttl(packet, ttl)
            result = bench.dp.process(bytearray(data))
            assert result.verdict == Verdict.FORWARD
            assert bytes(result.packet) == bytes(data)
