"""Every byte of rewritten packets, against the packet that scapy builds for the same journey."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partial import CSUM_PARTIAL, packets_of
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP, IPOption_Router_Alert, IPOption_Timestamp
from scapy.layers.inet6 import (
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit
from scapy.packet import Packet, Raw
from scapy_oracle import (
    CLIENT,
    MASQUERADE_PORTS,
    NODE,
    PROTOCOLS,
    REAL,
    VIRTUAL,
    dataplane,
    header,
    ip_layer,
    rebuilt,
    transport,
)

import svcdp
from svcdp import Reason, Verdict

FAMILIES = (4, 6)
PORT = 40000

HEADERS: dict[str, tuple[int, Any]] = {
    "v4": (4, lambda p: p),
    "v4-options": (4, lambda p: p),
    "v6": (6, lambda p: p),
    "v6-hop-by-hop": (6, lambda p: p / IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * 12)])),
    "v6-routing": (6, lambda p: p / IPv6ExtHdrRouting(addresses=["fd00::9"], segleft=0)),
    "v6-destination": (6, lambda p: p / IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)])),
    "v6-atomic-fragment": (6, lambda p: p / IPv6ExtHdrFragment(id=77)),
    "v6-all": (
        6,
        lambda p: (
            p
            / IPv6ExtHdrHopByHop()
            / IPv6ExtHdrDestOpt()
            / IPv6ExtHdrRouting(addresses=["fd00::9"], segleft=0)
            / IPv6ExtHdrFragment(id=7)
            / IPv6ExtHdrDestOpt()
        ),
    ),
}
OPTIONS = [IPOption_Router_Alert(), IPOption_NOP(), IPOption_Timestamp()]


def body(protocol: str, payload: bytes = b"") -> Packet:
    """A transport header that begins a connection; the caller sets the ports."""
    if protocol == "tcp":
        return TCP(flags="S", seq=0xFFFFFFF0, options=[("MSS", 1460)]) / Raw(payload)
    if protocol == "udp":
        return UDP() / Raw(payload)
    # Only an INIT begins an association; what is behind it nobody reads.
    packet = SCTP(tag=0x12345678) / SCTPChunkInit()
    return packet / SCTPChunkData(data=payload) if payload else packet


def between(
    name: str, protocol: str, source: tuple[str, int], target: tuple[str, int], payload: bytes = b""
) -> Packet:
    """A packet with the headers called ``name``."""
    family, extend = HEADERS[name]
    fields = {"options": OPTIONS} if name == "v4-options" else {}
    packet = extend(header(family, source[0], target[0], ttl=37, tos=0xB8, **fields))
    packet = packet / body(protocol, payload)
    transport(packet).sport, transport(packet).dport = source[1], target[1]
    return packet


def journey(
    dp: svcdp.Dataplane,
    name: str,
    protocol: str,
    *,
    real_port: int = 8080,
    masquerade: bool = False,
    payload: bytes = b"",
    padding: bytes = b"",
    client: str | None = None,
) -> None:
    """Send a first packet, its reply and a second packet; compare all three."""
    family = HEADERS[name][0]
    here = (client or CLIENT[family], PORT)
    virtual, real = (VIRTUAL[family], 80), (REAL[family], real_port)
    request = between(name, protocol, here, virtual, payload)

    sent = bytearray(bytes(request) + padding)
    result = dp.process(sent, 0)
    assert (result.verdict, result.reason) == (Verdict.FORWARD, Reason.NEW)
    assert result.next_hop == REAL[family]
    assert result.destination == real
    (connection,) = dp.connections()
    seen = (connection.source, connection.source_port)
    if masquerade:
        assert seen[0] == NODE[family]
        assert MASQUERADE_PORTS[0] <= seen[1] <= MASQUERADE_PORTS[1]
    else:
        assert seen == here
    assert bytes(sent) == rebuilt(request, seen, real) + padding

    reply = between(name, protocol, real, seen, payload)
    sent = bytearray(bytes(reply) + padding)
    result = dp.process(sent, 1)
    assert (result.verdict, result.reason) == (Verdict.FORWARD, Reason.REPLY)
    assert result.next_hop == here[0]
    assert bytes(sent) == rebuilt(reply, virtual, here) + padding

    sent = bytearray(bytes(request))
    assert dp.process(sent, 2).reason == Reason.ESTABLISHED
    assert bytes(sent) == rebuilt(request, seen, real)


@pytest.mark.parametrize("masquerade", [False, True], ids=["plain", "masquerade"])
@pytest.mark.parametrize("real_port", [80, 8080], ids=["same-port", "other-port"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", HEADERS)
def test_a_connection(name: str, protocol: str, real_port: int, masquerade: bool) -> None:
    dp = dataplane(HEADERS[name][0], protocol, real_port=real_port, masquerade=masquerade)
    journey(dp, name, protocol, real_port=real_port, masquerade=masquerade, payload=b"odd")


def filling(size: int) -> bytes:
    return (b"\xc3\x5a\x99" * (size // 3 + 1))[:size]


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 1461, 1463])
def test_lengths(name: str, protocol: str, size: int) -> None:
    journey(dataplane(HEADERS[name][0], protocol), name, protocol, payload=filling(size))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["v4", "v6"])
@pytest.mark.parametrize("shorter", [0, 1])
def test_the_longest_packets(name: str, protocol: str, shorter: int) -> None:
    overhead = {"tcp": 24, "udp": 8, "sctp": 48}[protocol] + (20 if name == "v4" else 0)
    # The chunks of SCTP are padded to four bytes.
    size = 65535 - overhead - (3 if protocol == "sctp" else shorter)
    journey(dataplane(HEADERS[name][0], protocol), name, protocol, payload=filling(size))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["v4", "v6"])
@pytest.mark.parametrize("padding", [b"\0", b"\xff" * 6, bytes(range(18))])
def test_link_layer_padding_is_left_alone(name: str, protocol: str, padding: bytes) -> None:
    journey(dataplane(HEADERS[name][0], protocol), name, protocol, padding=padding)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["v4", "v6"])
def test_a_hairpin_is_masqueraded(name: str, protocol: str) -> None:
    family = HEADERS[name][0]
    journey(dataplane(family, protocol), name, protocol, client=REAL[family], masquerade=True)


@pytest.mark.parametrize("masquerade", [False, True])
@pytest.mark.parametrize("name", HEADERS)
def test_udp_without_a_checksum_gets_one(name: str, masquerade: bool) -> None:
    family = HEADERS[name][0]
    dp = dataplane(family, "udp", masquerade=masquerade)
    request = between(name, "udp", (CLIENT[family], PORT), (VIRTUAL[family], 80), b"abc")
    transport(request).chksum = 0
    sent = bytearray(bytes(request) + b"padding")
    assert dp.process(sent, 0).verdict == Verdict.FORWARD
    (connection,) = dp.connections()
    seen = (connection.source, connection.source_port)
    assert bytes(sent) == rebuilt(request, seen, (REAL[family], 8080)) + b"padding"
    reply = between(name, "udp", (REAL[family], 8080), seen, b"abcd")
    transport(reply).chksum = 0
    sent = bytearray(bytes(reply))
    assert dp.process(sent, 0).verdict == Verdict.FORWARD
    assert bytes(sent) == rebuilt(reply, (VIRTUAL[family], 80), (CLIENT[family], PORT))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_udp_checksum_of_zero_is_written_as_all_ones(family: int) -> None:
    """RFC 768: 0 says that there is none. Two bytes of payload bring the sum there."""
    dp = dataplane(family, "udp")
    request = header(family, CLIENT[family], VIRTUAL[family]) / UDP(sport=PORT, dport=80) / b"\0\0"
    real = (REAL[family], 8080)
    wanted = transport(request.__class__(rebuilt(request, (CLIENT[family], PORT), real))).chksum
    request[UDP].payload = Raw(wanted.to_bytes(2, "big"))
    sent = bytearray(bytes(request))
    dp.process(sent, 0)
    expected = rebuilt(request, (CLIENT[family], PORT), real)
    assert expected[-4:-2] == b"\xff\xff", "the payload was meant to bring the sum to zero"
    assert bytes(sent) == expected


@pytest.mark.parametrize("masquerade", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", HEADERS)
def test_a_partial_checksum_is_completed(name: str, protocol: str, masquerade: bool) -> None:
    family = HEADERS[name][0]
    dp = dataplane(family, protocol, masquerade=masquerade)
    here, virtual, real = (CLIENT[family], PORT), (VIRTUAL[family], 80), (REAL[family], 8080)

    def completed(packet: Packet) -> bytes:
        transport(packet).chksum = 0x1234  # what stands there says nothing
        batch = svcdp.PacketBatch(1)
        batch.append(bytes(packet))
        packets_of(batch)[0].flags = CSUM_PARTIAL
        dp.process_batch(batch, 0)
        assert not packets_of(batch)[0].flags & CSUM_PARTIAL
        return batch[0]

    request = between(name, protocol, here, virtual, b"abc")
    forwarded = completed(request)
    (connection,) = dp.connections()
    seen = (connection.source, connection.source_port)
    assert forwarded == rebuilt(request, seen, real)
    reply = between(name, protocol, real, seen, b"abc")
    assert completed(reply) == rebuilt(reply, virtual, here)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("name", ["v4", "v6"])
@pytest.mark.parametrize("wrong_by", [1, 0x100, 0x8000, 0xFFFE])
def test_a_wrong_checksum_stays_wrong_by_as_much(name: str, protocol: str, wrong_by: int) -> None:
    """RFC 1624 updates carry an error along, so that the receiver still sees it."""
    family = HEADERS[name][0]
    dp = dataplane(family, protocol)
    request = between(name, protocol, (CLIENT[family], PORT), (VIRTUAL[family], 80), b"abc")
    right = transport(request.__class__(bytes(request))).chksum
    transport(request).chksum = wrong = (right + wrong_by - 1) % 0xFFFF + 1
    sent = bytearray(bytes(request))
    assert dp.process(sent, 0).verdict == Verdict.FORWARD
    rewritten = transport(request.__class__(bytes(sent)))
    expected = transport(
        request.__class__(rebuilt(request, (CLIENT[family], PORT), (REAL[family], 8080)))
    )
    assert (rewritten.chksum - expected.chksum) % 0xFFFF == (wrong - right) % 0xFFFF != 0


def test_a_wrong_header_checksum_stays_wrong() -> None:
    dp = dataplane(4, "tcp")
    request = between("v4", "tcp", (CLIENT[4], PORT), (VIRTUAL[4], 80))
    right = IP(bytes(request)).chksum
    ip_layer(request).chksum = right ^ 0x0F00
    sent = bytearray(bytes(request))
    dp.process(sent, 0)
    expected = IP(rebuilt(request, (CLIENT[4], PORT), (REAL[4], 8080))).chksum
    assert (IP(bytes(sent)).chksum - expected) % 0xFFFF == ((right ^ 0x0F00) - right) % 0xFFFF


def test_sctp_keeps_its_crc_where_the_port_stays() -> None:
    """The CRC does not cover addresses: a wrong one must stay as it is."""
    dp = dataplane(4, "sctp", real_port=80)
    request = between("v4", "sctp", (CLIENT[4], PORT), (VIRTUAL[4], 80))
    transport(request).chksum = 0xDEADBEEF
    sent = bytearray(bytes(request))
    dp.process(sent, 0)
    assert IP(bytes(sent))[SCTP].chksum == 0xDEADBEEF


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, Packet, int, bool]:
    """(protocol, a first packet, the destination's port, masquerade?)"""
    family = draw(st.sampled_from(FAMILIES))
    protocol = draw(st.sampled_from(sorted(PROTOCOLS)))
    addresses = st.ip_addresses(v=family).map(str).filter(lambda a: a != REAL[family])
    ports = st.integers(1, 65535)
    fields = {"ttl": draw(st.integers(1, 255)), "tos": draw(st.integers(0, 255))}
    if family == 4:
        fields["id"] = draw(st.integers(0, 65535))
    packet = header(family, draw(addresses), VIRTUAL[family], **fields)
    if family == 6:
        for kind in draw(
            st.lists(st.sampled_from([IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt]), max_size=3)
        ):
            packet = packet / kind(options=[PadN(optdata=draw(st.binary(max_size=20)))])
    packet = packet / body(protocol, draw(st.binary(max_size=300)))
    if protocol == "tcp":
        packet[TCP].flags = draw(st.sampled_from(["S", "SE", "SPU", "SEC", "SF"]))
        packet[TCP].seq = draw(st.integers(0, 2**32 - 1))
        packet[TCP].urgptr = draw(st.integers(0, 65535))
    transport(packet).sport, transport(packet).dport = draw(ports), 80
    return protocol, packet, draw(ports), draw(st.booleans())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(requests(), st.binary(max_size=50))
def test_any_packet(request: tuple[str, Packet, int, bool], payload: bytes) -> None:
    protocol, packet, real_port, masquerade = request
    family = packet.version
    dp = dataplane(family, protocol, real_port=real_port, masquerade=masquerade)
    # scapy writes IPv4 addresses inside IPv6 ones in a way of its own.
    here = (str(ip_address(ip_layer(packet).src)), transport(packet).sport)
    sent = bytearray(bytes(packet))
    assert dp.process(sent, 0).reason == Reason.NEW
    (connection,) = dp.connections()
    seen = (connection.source, connection.source_port)
    assert masquerade or seen == here
    assert bytes(sent) == rebuilt(packet, seen, (REAL[family], real_port))
    reply = header(family, REAL[family], seen[0]) / body(protocol, payload)
    transport(reply).sport, transport(reply).dport = real_port, seen[1]
    sent = bytearray(bytes(reply))
    assert dp.process(sent, 0).reason == Reason.REPLY
    assert bytes(sent) == rebuilt(reply, (VIRTUAL[family], 80), here)
