"""Which service a packet is for: one port, ranges, every port, FTP's data, firewall marks."""

from __future__ import annotations

import struct
from itertools import count
from typing import Any

import pytest
import wire
from bench import CLIENT, VIRTUAL, Bench

import svcdp
from svcdp import ConflictError, DestinationSpec, Reason, ServiceSpec, Verdict, fwmark_key

ANY = DestinationSpec("10.1.1.1", 0)
#: Of clients: each is a new connection.
PORTS = count(1000)
ONE, TWO, THREE = ("10.1.1.1", 8080), ("10.1.1.2", 8080), ("10.1.1.3", 8080)


def served(bench: Bench, to_port: int, **fields: Any) -> tuple[str, int] | None:
    """Where the first packet to a port goes: by its header."""
    result = bench.send(port=next(PORTS), to=(VIRTUAL[4], to_port), **fields)
    if result.verdict != Verdict.FORWARD:
        return None
    packet = wire.read(result.packet)
    return packet.destination, packet.destination_port


# -- ranges ----------------------------------------------------------------------------------------

RANGES = [
    (1, 1),
    (1, 65535),
    (1000, 1999),
    (1024, 2047),
    (32767, 32768),
    (65535, 65535),
    (40000, 65535),
    (80, 80),
    (3, 60001),
]


@pytest.mark.parametrize("ports", RANGES, ids=str)
def test_a_range_is_all_its_ports_and_no_other(ports: tuple[int, int]) -> None:
    first, last = ports
    bench = Bench()
    bench.serve(ANY, port=first, last_port=last)
    for port in {1, first - 1, first, (first + last) // 2, last, last + 1, 65535} - {0, 65536}:
        assert served(bench, port) == ((ANY.address, port) if first <= port <= last else None)
    assert bench.send(to=(VIRTUAL[4], first), protocol="udp").reason == Reason.NO_SERVICE
    assert bench.send(to=("10.96.0.11", first)).reason == Reason.NO_SERVICE


def test_each_port_of_a_small_range() -> None:
    """Against the definition, for every way in which a range is cut into blocks."""
    for first in range(100, 117):
        for last in range(first, 133):
            dp = svcdp.Dataplane(64, 1, clock=lambda: 0)
            dp.apply([ServiceSpec("10.0.0.1", first, "udp", (ANY,), last_port=last)])
            batch = svcdp.PacketBatch(60)
            for port in range(90, 140):
                batch.append(wire.packet("udp", CLIENT[4], 5, "10.0.0.1", port))
            verdicts = list(dp.process_batch(batch))
            expected = [first <= port <= last for port in range(90, 140)]
            assert [v == Verdict.FORWARD for v in verdicts] == expected, (first, last)


def test_a_destination_with_a_port_gets_the_whole_range() -> None:
    bench = Bench()
    bench.serve(ONE, port=1000, last_port=1009)
    result = bench.send(to=(VIRTUAL[4], 1005))
    assert wire.read(result.packet)[3:] == ONE
    answer = bench.reply(source=ONE)
    assert wire.read(answer.packet)[1:3] == (VIRTUAL[4], 1005)
    # Its replies could not be told apart, if the same client port asked for another port.
    assert bench.send(to=(VIRTUAL[4], 1006)).reason == Reason.NO_PORT


def test_replies_of_a_range_come_from_the_port_that_was_asked() -> None:
    bench = Bench()
    bench.serve(ANY, port=1000, last_port=1009)
    for port in (1000, 1005, 1009):
        assert bench.send(to=(VIRTUAL[4], port)).reason == Reason.NEW
        answer = bench.reply(source=(ANY.address, port))
        assert wire.read(answer.packet)[1:3] == (VIRTUAL[4], port)
        assert wire.is_intact(answer.packet)


def test_a_range_grows_shrinks_and_goes() -> None:
    bench = Bench()
    for last in (1009, 1500, 1000, 4000, 1001):
        bench.serve(ANY, port=1000, last_port=last)
        for port in (999, 1000, 1001, 1009, 1010, 1500, 4000, 4001):
            inside = 1000 <= port <= last
            assert served(bench, port) == ((ANY.address, port) if inside else None), last
    bench.serve(ONE, port=1000)
    assert [served(bench, port) for port in (1000, 1001)] == [ONE, None]
    bench.dp.apply([])
    assert served(bench, 1000) is None


def test_known_connections_do_not_ask_for_the_service() -> None:
    bench = Bench()
    bench.serve(ANY, port=1000, last_port=2000)
    bench.send(to=(VIRTUAL[4], 1800))
    bench.serve(ANY, port=1000, last_port=1500)
    assert bench.send("A", to=(VIRTUAL[4], 1800)).reason == Reason.ESTABLISHED
    assert bench.send("S", to=(VIRTUAL[4], 1801)).reason == Reason.NO_SERVICE


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1000, 2000), (1500, 0)),
        ((1000, 2000), (2000, 3000)),
        ((1000, 2000), (500, 1000)),
        ((1, 65535), (80, 0)),
        ((1000, 2000), (1200, 1300)),
    ],
    ids=str,
)
def test_ranges_must_not_overlap(one: tuple[int, int], other: tuple[int, int]) -> None:
    def spec(ports: tuple[int, int], **fields: str) -> ServiceSpec:
        return ServiceSpec(
            fields.get("address", VIRTUAL[4]),
            ports[0],
            fields.get("protocol", "tcp"),
            (ANY if ports[1] else DestinationSpec(*ONE),),
            last_port=ports[1],
        )

    for first, second in ((one, other), (other, one)):
        dp = Bench().dp
        with pytest.raises(ConflictError):
            dp.apply([spec(first), spec(second)])
        assert not dp.services()
        dp.apply([spec(first)])
        with pytest.raises(ConflictError):
            dp.update([spec(second)])
        assert [service.spec for service in dp.services()] == [spec(first)]
        # Elsewhere it is no conflict, nor when the first one leaves.
        dp.update([spec(second, address="10.96.0.99"), spec(second, protocol="udp")])
        dp.apply([spec(second)])
        with pytest.raises(ConflictError):
            dp.update([spec(first)])
        dp.update([spec(first)], [(VIRTUAL[4], second[0], "tcp")])
        assert [service.spec for service in dp.services()] == [spec(first)]


def test_a_range_that_grows_into_another_service() -> None:
    bench = Bench()
    bench.serve(ANY, port=1000, last_port=1010)
    bench.serve(ONE, port=1020)
    with pytest.raises(ConflictError):
        bench.serve(ANY, port=1000, last_port=1020)
    assert served(bench, 1015) is None
    bench.serve(ANY, port=1000, last_port=1019)
    assert served(bench, 1015) == (ANY.address, 1015)
    assert served(bench, 1020) == ONE


# -- every port ------------------------------------------------------------------------------------


def test_the_most_special_service_gets_the_packet() -> None:
    bench = Bench()
    bench.serve(("10.1.1.9", 0), port=0)
    bench.serve(("10.1.1.8", 0), port=1000, last_port=2000)
    bench.serve(ONE, port=80)
    assert served(bench, 80) == ONE
    assert served(bench, 1500) == ("10.1.1.8", 1500)
    assert served(bench, 81) == ("10.1.1.9", 81)
    assert served(bench, 2001) == ("10.1.1.9", 2001)
    bench.dp.update([], [(VIRTUAL[4], 80, "tcp")])
    assert served(bench, 80) == ("10.1.1.9", 80)
    bench.dp.update([], [(VIRTUAL[4], 1000, "tcp")])
    assert served(bench, 1500) == ("10.1.1.9", 1500)
    bench.dp.update([], [(VIRTUAL[4], 0, "tcp")])
    assert served(bench, 1500) is None


def test_every_port_of_ipv6() -> None:
    bench = Bench()
    bench.serve(("fd01::1", 0), address=VIRTUAL[6], port=0, protocol="udp")
    for port in (1, 53, 65535):
        packet = bench.send(client=CLIENT[6], to=(VIRTUAL[6], port), protocol="udp").packet
        assert wire.read(packet)[3:] == ("fd01::1", port)
        assert wire.is_intact(packet)


def test_a_service_of_every_port_can_be_edited() -> None:
    bench = Bench()
    bench.serve(("10.1.1.1", 0), port=0)
    bench.serve(("10.1.1.2", 0), port=0, scheduler="wlc")
    assert served(bench, 7) == ("10.1.1.2", 7)
    with bench.dp.transaction() as tx:
        tx.service(VIRTUAL[4], 0).add("10.1.1.3", 0, 5)
    assert len(bench.dp.services()) == 1
    assert served(bench, 8) == ("10.1.1.3", 8)


# -- FTP's data ------------------------------------------------------------------------------------


def test_ftp_without_persistence_serves_its_own_port_only() -> None:
    """ip_vs_schedule returns nobody, and ip_vs_leave accepts what is not for port 21."""
    bench = Bench()
    bench.serve(("10.1.1.1", 21), port=21)
    assert served(bench, 21) == ("10.1.1.1", 21)
    for port in (20, 22, 1023, 1024, 40000):
        assert bench.send(to=(VIRTUAL[4], port)).verdict == Verdict.PASS


def test_persistent_ftp_serves_data_ports_by_the_same_destination() -> None:
    bench = Bench()
    bench.serve(("10.1.1.1", 21), ("10.1.1.2", 21), port=21, persistence=300)
    for number in range(4):
        client = f"192.0.2.{number}"
        first = wire.read(bench.send(client=client, to=(VIRTUAL[4], 21)).packet).destination
        for port in (20, 1024, 65535):
            packet = bench.send(client=client, to=(VIRTUAL[4], port)).packet
            assert wire.read(packet)[3:] == (first, port)
        for port in (19, 22, 1023):
            result = bench.send(client=client, to=(VIRTUAL[4], port))
            assert result.reason == Reason.NO_SERVICE
    udp = bench.send(to=(VIRTUAL[4], 40000), protocol="udp")
    assert udp.reason == Reason.NO_SERVICE


def test_ftp_gives_way_to_real_services_and_goes_before_every_port() -> None:
    bench = Bench()
    bench.serve(("10.1.1.1", 21), port=21, persistence=300)
    bench.serve(TWO, port=5000)
    bench.serve(("10.1.1.3", 0), port=6000, last_port=6999)
    bench.serve(("10.1.1.4", 0), port=0)
    assert served(bench, 5000) == TWO
    assert served(bench, 6500) == ("10.1.1.3", 6500)
    assert served(bench, 7000) == ("10.1.1.1", 7000)
    assert served(bench, 22) == ("10.1.1.4", 22)


def test_nobody_to_serve_ftp() -> None:
    bench = Bench()
    bench.serve(("10.1.1.1", 21, 0), port=21, persistence=300)
    assert bench.send(to=(VIRTUAL[4], 21)).verdict == Verdict.REJECT
    assert bench.send(to=(VIRTUAL[4], 40000)).verdict == Verdict.PASS


def test_an_ftp_servers_data_connection_is_not_scheduled() -> None:
    bench = Bench()
    bench.serve(ONE)
    assert bench.send(port=20).reason == Reason.NEW
    bench.serve(("10.1.1.1", 21), port=21)
    assert bench.send(port=20, to=(VIRTUAL[4], 21)).reason == Reason.NO_SERVICE
    bench.dp.update([], [(VIRTUAL[4], 21, "tcp")])
    assert bench.send(port=20, client="192.0.2.5").reason == Reason.NEW


# -- firewall marks --------------------------------------------------------------------------------

MARK4 = {"address": "0.0.0.0", "protocol": "fwmark"}


def test_a_mark_is_any_protocol_address_and_port() -> None:
    bench = Bench()
    bench.serve(ANY, port=7, **MARK4)
    for number, protocol in enumerate(("tcp", "udp", "sctp")):
        for address in (VIRTUAL[4], "203.0.113.9"):
            to = (address, 99 + number)
            result = bench.send(to=to, protocol=protocol, mark=7)
            if address == VIRTUAL[4]:
                assert result.reason == Reason.NEW
                assert wire.read(result.packet)[3:] == (ANY.address, to[1])
                answer = bench.reply(source=(ANY.address, to[1]), protocol=protocol)
                assert wire.read(answer.packet)[1:3] == to
            else:
                assert result.reason == Reason.NO_PORT, "one client port, one destination"
            assert bench.send(to=to, port=5, protocol=protocol).reason == Reason.NO_SERVICE
            assert bench.send(to=to, port=5, protocol=protocol, mark=8).reason == Reason.NO_SERVICE


def test_a_mark_goes_before_an_address() -> None:
    bench = Bench()
    bench.serve(ONE, port=80)
    bench.serve(TWO, port=7, **MARK4)
    assert served(bench, 80) == ONE
    assert served(bench, 80, mark=7) == TWO
    assert served(bench, 80, mark=6) == ONE


def test_marks_of_both_families() -> None:
    bench = Bench()
    big = (1 << 32) - 1
    bench.serve(ONE, port=big, **MARK4)
    bench.serve(("fd01::1", 80), port=big, address="::", protocol="fwmark")
    assert {service.spec.key for service in bench.dp.services()} == {
        fwmark_key(big),
        fwmark_key(big, 6),
    }
    assert served(bench, 80, mark=big) == ONE
    six = bench.send(client=CLIENT[6], to=(VIRTUAL[6], 81), mark=big)
    assert wire.read(six.packet)[3:] == ("fd01::1", 80)
    bench.dp.update([], [fwmark_key(big)])
    assert served(bench, 80, mark=big) is None
    assert bench.send(client=CLIENT[6], to=(VIRTUAL[6], 81), mark=big).verdict == Verdict.FORWARD


def test_a_known_connection_needs_no_mark() -> None:
    """A rule may mark only the first packet."""
    bench = Bench()
    bench.serve(ONE, port=7, **MARK4)
    assert bench.send(mark=7).reason == Reason.NEW
    assert bench.send("A").reason == Reason.ESTABLISHED
    assert bench.connection().fwmark == 7


def test_marks_in_a_batch() -> None:
    bench = Bench()
    bench.serve(ONE, port=1, **MARK4)
    bench.serve(TWO, port=2, **MARK4)
    batch = svcdp.PacketBatch(3)
    for mark in (0, 1, 2):
        packet = wire.packet("tcp", CLIENT[4], 40000 + mark, VIRTUAL[4], 80)
        batch.append(packet, mark=mark)
    bench.dp.process_batch(batch)
    assert [batch.verdict(i) for i in range(3)] == [
        Verdict.PASS,
        Verdict.FORWARD,
        Verdict.FORWARD,
    ]
    assert wire.read(batch[1])[3:] == ONE
    assert wire.read(batch[2])[3:] == TWO


def test_a_mark_is_given_back() -> None:
    bench = Bench()
    bench.serve(DestinationSpec(*ONE, mark=0x100), port=7, **MARK4)
    assert bench.send(mark=7).mark == 0x107
    assert bench.send(mark=9, port=2).mark == 9


def test_a_service_made_of_marks_is_edited_by_its_key() -> None:
    bench = Bench()
    bench.serve(ONE, port=7, **MARK4)
    with bench.dp.transaction() as tx:
        service = tx.service(*fwmark_key(7))
        service.add(*TWO)
        service.update(*ONE, weight=0)
    assert served(bench, 80, mark=7) == TWO
    (status,) = bench.dp.services()
    assert [d.weight for d in status.spec.destinations] == [0, 1]


def test_icmp_about_a_marked_connection() -> None:
    bench = Bench()
    bench.serve(ONE, port=7, **MARK4)
    sent = bytes(bench.send(mark=7).packet)
    error = wire.icmp_error(sent, ONE[0])
    result = bench.dp.process(error)
    assert (result.verdict, result.reason) == (Verdict.FORWARD, Reason.RELATED)
    assert wire.read(result.packet).source == VIRTUAL[4]
    quoted = bytes(result.packet)[28:]
    assert struct.unpack_from("!HH", quoted, 20) == (40000, 80)
