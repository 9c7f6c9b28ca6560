"""ICMP errors about connections, against what IPVS makes of them, built by scapy."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Packet
from scapy_oracle import CLIENT, NODE, REAL, VIRTUAL, dataplane, header

import svcdp
from svcdp import Reason, Verdict

ROUTER = {4: "203.0.113.9", 6: "2001:db8:ffff::9"}
ERRORS: dict[int, list[Packet]] = {
    4: [
        ICMP(type=3, code=3),
        ICMP(type=3, code=4, nexthopmtu=1400),
        ICMP(type=4),
        ICMP(type=11, code=0),
        ICMP(type=12, code=0, ptr=8),
    ],
    6: [
        ICMPv6DestUnreach(code=4),
        ICMPv6PacketTooBig(mtu=1400),
        ICMPv6TimeExceeded(code=0),
        ICMPv6ParamProblem(code=1, ptr=6),
    ],
}
KINDS = [(family, error) for family in (4, 6) for error in ERRORS[family]]
BODIES: dict[str, Packet] = {
    "tcp": TCP(flags="S") / b"payload",
    "udp": UDP() / b"payload",
    "sctp": SCTP() / SCTPChunkInit(),
}


def packet(family: int, protocol: str, source: tuple[str, int], target: tuple[str, int]) -> bytes:
    body = BODIES[protocol].copy()
    body.sport, body.dport = source[1], target[1]
    return bytes(header(family, source[0], target[0], ttl=60) / body)


def connected(
    family: int, protocol: str, **fields: Any
) -> tuple[svcdp.Dataplane, svcdp.dataplane.Connection]:
    dp = dataplane(family, protocol, **fields)
    here, virtual = (CLIENT[family], 40000), (VIRTUAL[family], 80)
    assert dp.process(bytearray(packet(family, protocol, here, virtual)), 0).reason == Reason.NEW
    (connection,) = dp.connections()
    return dp, connection


def requoted(data: bytes, source: tuple[str, int], target: tuple[str, int]) -> bytes:
    """A quoted packet with other ends: the transport checksum stays what it was."""
    if data[0] >> 4 == 4:
        at = (data[0] & 15) * 4
        head = IP(data[:at])
        head.src, head.dst = source[0], target[0]
        del head.chksum
    else:
        at = 40
        head = IPv6(data[:at])
        head.src, head.dst = source[0], target[0]
    return bytes(head) + struct.pack("!HH", source[1], target[1]) + data[at + 4 :]


def error_packet(family: int, error: Packet, source: str, target: str, quoted: bytes) -> bytes:
    return bytes(header(family, source, target) / error / quoted)


def later(data: bytes) -> bytes:
    """The packet some hops on, as a router quotes it."""
    kind = IP if data[0] >> 4 == 4 else IPv6
    at = (data[0] & 15) * 4 if kind is IP else 40
    head = kind(data[:at])
    if kind is IP:
        head.ttl -= 3
        del head.chksum
    else:
        head.hlim -= 3
    return bytes(head) + data[at:]


@pytest.mark.parametrize("masquerade", [False, True], ids=["plain", "masquerade"])
@pytest.mark.parametrize("protocol", BODIES)
@pytest.mark.parametrize(("family", "error"), KINDS, ids=lambda k: getattr(k, "name", str(k)))
@pytest.mark.parametrize("sender", ["destination", "router"])
@pytest.mark.parametrize("quote", ["all", "eight", "four"])
def test_from_the_destinations_side(
    family: int, error: Packet, protocol: str, masquerade: bool, sender: str, quote: str
) -> None:
    dp, connection = connected(family, protocol, masquerade=masquerade)
    seen, here = (connection.source, connection.source_port), (CLIENT[family], 40000)
    real, virtual = (REAL[family], 8080), (VIRTUAL[family], 80)
    about = later(packet(family, protocol, seen, real))
    if quote != "all":
        about = about[: (20 if family == 4 else 40) + (8 if quote == "eight" else 4)]
    origin = REAL[family] if sender == "destination" else ROUTER[family]
    sent = bytearray(error_packet(family, error, origin, seen[0], about))
    result = dp.process(sent, 1)
    assert (result.verdict, result.reason) == (Verdict.FORWARD, Reason.RELATED)
    assert result.next_hop == here[0]
    # The source is the virtual address whoever sent it (ipvs: outer source := VIP).
    assert bytes(sent) == error_packet(
        family, error, virtual[0], here[0], requoted(about, here, virtual)
    )


@pytest.mark.parametrize("masquerade", [False, True], ids=["plain", "masquerade"])
@pytest.mark.parametrize("protocol", BODIES)
@pytest.mark.parametrize(("family", "error"), KINDS, ids=lambda k: getattr(k, "name", str(k)))
def test_from_the_clients_side(family: int, error: Packet, protocol: str, masquerade: bool) -> None:
    dp, connection = connected(family, protocol, masquerade=masquerade)
    seen, here = (connection.source, connection.source_port), (CLIENT[family], 40000)
    real, virtual = (REAL[family], 8080), (VIRTUAL[family], 80)
    about = later(packet(family, protocol, virtual, here))
    sent = bytearray(error_packet(family, error, here[0], virtual[0], about))
    result = dp.process(sent, 1)
    assert (result.verdict, result.reason) == (Verdict.FORWARD, Reason.RELATED)
    assert result.next_hop == real[0]
    source = NODE[family] if masquerade else here[0]
    assert bytes(sent) == error_packet(family, error, source, real[0], requoted(about, real, seen))


def test_a_quoted_extension_header_and_padding() -> None:
    dp, _ = connected(6, "udp")
    error = ICMPv6DestUnreach(code=4)
    quoted = bytes(
        IPv6(src=CLIENT[6], dst=REAL[6])
        / IPv6ExtHdrHopByHop()
        / UDP(sport=40000, dport=8080)
        / b"abc"
    )
    sent = bytearray(error_packet(6, error, REAL[6], CLIENT[6], quoted) + b"pad")
    assert dp.process(sent, 1).reason == Reason.RELATED
    head = bytes(IPv6(src=CLIENT[6], dst=VIRTUAL[6], plen=len(quoted) - 40, nh=0))
    inner = head + quoted[40:48] + struct.pack("!HH", 40000, 80) + quoted[52:]
    assert bytes(sent) == error_packet(6, error, VIRTUAL[6], CLIENT[6], inner) + b"pad"


def test_an_error_does_not_keep_a_connection_alive() -> None:
    dp, connection = connected(4, "tcp")
    about = packet(4, "tcp", (CLIENT[4], 40000), (REAL[4], 8080))
    dp.process(bytearray(error_packet(4, ERRORS[4][0], REAL[4], CLIENT[4], about)), 10**9)
    (after,) = dp.connections()
    assert after == connection


def test_an_error_goes_the_way_of_its_connection_and_is_counted() -> None:
    dp, _ = connected(4, "tcp")
    (spec,) = (status.spec for status in dp.services())
    (destination,) = spec.destinations
    dp.apply([replace(spec, destinations=(replace(destination, mark=0x100),))])
    here, virtual, real = (CLIENT[4], 40000), (VIRTUAL[4], 80), (REAL[4], 8080)
    to_server = error_packet(
        4, ERRORS[4][1], CLIENT[4], VIRTUAL[4], packet(4, "tcp", virtual, here)
    )
    to_client = error_packet(4, ERRORS[4][1], REAL[4], CLIENT[4], packet(4, "tcp", here, real))
    (before,) = dp.services()[0].destinations
    assert dp.process(bytearray(to_server), 1).mark == 0x100
    assert dp.process(bytearray(to_client), 1).mark == 0
    (after,) = dp.services()[0].destinations
    assert after == replace(
        before,
        packets_in=before.packets_in + 1,
        bytes_in=before.bytes_in + len(to_server),
        packets_out=before.packets_out + 1,
        bytes_out=before.bytes_out + len(to_client),
    )


@pytest.mark.parametrize("family", [4, 6])
def test_errors_about_nothing_known_pass_untouched(family: int) -> None:
    dp, _ = connected(family, "tcp")
    about = packet(family, "tcp", (CLIENT[family], 1), (VIRTUAL[family], 80))
    for origin, target in ((CLIENT[family], VIRTUAL[family]), (REAL[family], CLIENT[family])):
        sent = error_packet(family, ERRORS[family][0], origin, target, about)
        buffer = bytearray(sent)
        result = dp.process(buffer, 0)
        assert (result.verdict, result.reason) == (Verdict.PASS, Reason.NO_SERVICE)
        assert bytes(buffer) == sent


def test_echo_to_the_virtual_address_is_not_ours() -> None:
    dp, _ = connected(4, "tcp")
    echo = bytearray(bytes(IP(src=CLIENT[4], dst=VIRTUAL[4]) / ICMP()))
    assert dp.process(echo, 0).reason == Reason.PROTOCOL
    echo = bytearray(bytes(IPv6(src=CLIENT[6], dst=VIRTUAL[6]) / ICMPv6EchoRequest()))
    assert dp.process(echo, 0).reason == Reason.PROTOCOL
