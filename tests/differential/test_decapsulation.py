"""Taking packets out of tunnels that scapy wrote."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import TCP, UDP
from scapy.layers.l2 import GRE
from scapy.packet import Packet, Raw
from scapy_oracle import CLIENT, NODE, REAL, VIRTUAL, header

import svcdp
from svcdp._core.decap import decapsulate_payload

KINDS = ("ipip", "gre", "gre-sum", "gue", "gue-sum")
FAMILIES = [(outer, inner) for outer in (4, 6) for inner in (4, 6)]


def wrap(kind: str, outer: int, inner: bytes, tos: int = 0) -> Packet:
    """A tunnel packet as IPVS writes it."""
    version = inner[0] >> 4
    number = 4 if version == 4 else 41
    if kind == "ipip":
        head: Packet = Raw()
    elif kind.startswith("gre"):
        ether = 0x0800 if version == 4 else 0x86DD
        head, number = GRE(proto=ether, chksum_present="sum" in kind), 47
    else:
        gue = Raw(bytes([0, number, 0, 0]))
        fields: dict[str, Any] = {} if "sum" in kind else {"chksum": 0}
        head, number = UDP(sport=50000, dport=6080, **fields) / gue, 17
    name = "proto" if outer == 4 else "nh"
    ip = header(outer, NODE[outer], REAL[outer], tos=tos, **{name: number})
    return ip / head / Raw(inner)


def packet(family: int, tos: int = 0) -> bytes:
    return bytes(
        header(family, CLIENT[family], VIRTUAL[family], tos=tos, ttl=7)
        / TCP(dport=80, flags="S")
        / b"hello"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outer", "inner"), FAMILIES)
def test_the_packet_comes_out(outer: int, inner: int, kind: str) -> None:
    data = packet(inner)
    assert svcdp.decapsulate(bytes(wrap(kind, outer, data)) + b"padding") == data
    # What lies behind the inner packet is cut.
    assert svcdp.decapsulate(bytes(wrap(kind, outer, data + b"more"))) == data


@pytest.mark.parametrize(("outer", "inner"), FAMILIES)
@pytest.mark.parametrize("inside", range(4))
@pytest.mark.parametrize("outside", range(4))
def test_congestion(outer: int, inner: int, inside: int, outside: int) -> None:
    not_ect, ect1, ect0, ce = range(4)
    # RFC 6040, figure 4.
    table: dict[tuple[int, int], int | None] = {
        (not_ect, ce): None,
        (ect0, ect1): ect1,
        (ect0, ce): ce,
        (ect1, ce): ce,
    }
    result = table.get((inside, outside), inside)
    sent = bytes(wrap("ipip", outer, packet(inner, 0x28 | inside), 0x50 | outside))
    expected = None if result is None else packet(inner, 0x28 | result)
    assert svcdp.decapsulate(sent) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outer", "inner"), FAMILIES)
def test_no_damaged_bit_goes_unseen_where_a_checksum_covers_it(
    outer: int, inner: int, kind: str
) -> None:
    data = packet(inner)
    sent = bytes(wrap(kind, outer, data))
    # All that is inside; of IPv4's header everything, of IPv6's the addresses, by UDP.
    at = 20 if outer == 4 else 40
    covered = set(range(at, len(sent))) if "sum" in kind else set()
    if outer == 4:
        covered |= set(range(20))
    elif kind == "gue-sum":
        covered |= set(range(8, 40))
    for at in covered:
        damaged = bytearray(sent)
        damaged[at] ^= 0x10
        assert svcdp.decapsulate(damaged) is None, at


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outer", "inner"), FAMILIES)
def test_every_shorter_packet_is_refused(outer: int, inner: int, kind: str) -> None:
    sent = bytes(wrap(kind, outer, packet(inner)))
    assert not any(svcdp.decapsulate(sent[:size]) for size in range(len(sent)))
    # And those whose outer header does not say that something is missing.
    for size in range(len(packet(inner))):
        assert svcdp.decapsulate(bytes(wrap(kind, outer, packet(inner)[:size] or b"E"))) is None


@pytest.mark.parametrize(
    "sent",
    [
        wrap("gue", 4, packet(4)).__class__(bytes(wrap("gue", 4, packet(4)))[:22] + b"\x17\xbf"),
        header(4, NODE[4], REAL[4]) / GRE(proto=0x0800, key_present=1, key=1) / packet(4),
        header(4, NODE[4], REAL[4]) / GRE(proto=0x0800, seqnum_present=1) / packet(4),
        header(4, NODE[4], REAL[4]) / GRE(proto=0x0800, version=1) / packet(4),
        header(4, NODE[4], REAL[4]) / GRE(proto=0x6558) / packet(4),
        header(4, NODE[4], REAL[4], proto=41) / Raw(packet(4)),
        header(4, NODE[4], REAL[4], proto=4) / Raw(packet(6)),
        header(4, NODE[4], REAL[4], proto=4, flags="MF") / Raw(packet(4)),
        header(4, NODE[4], REAL[4]) / UDP(dport=6080) / (b"\x01\x04\0\0\0\0\0\0" + packet(4)),
        header(4, NODE[4], REAL[4]) / UDP(dport=6080) / (b"\x20\x04\0\0" + packet(4)),
        header(4, NODE[4], REAL[4]) / UDP(dport=6080) / (b"\x40\x04\0\0" + packet(4)),
        header(4, NODE[4], REAL[4]) / UDP(dport=6080) / (b"\0\x04\x10\0" + packet(4)),
        header(4, NODE[4], REAL[4]) / UDP(dport=6080) / (b"\0\x06\0\0" + packet(4)),
        header(4, NODE[4], REAL[4]) / UDP(dport=6081) / (b"\0\x04\0\0" + packet(4)),
        header(4, NODE[4], REAL[4]) / TCP() / packet(4),
    ],
    ids=str,
)
def test_other_tunnels(sent: Packet) -> None:
    assert svcdp.decapsulate(bytes(sent)) is None


def test_another_port() -> None:
    sent = header(4, NODE[4], REAL[4]) / UDP(dport=5555) / (b"\0\x04\0\0" + packet(4))
    assert svcdp.decapsulate(bytes(sent), 5555) == packet(4)


@pytest.mark.parametrize("kind", ["ipip", "gre-sum"])
@pytest.mark.parametrize("family", [4, 6])
def test_what_receive_offload_joined(family: int, kind: str) -> None:
    whole = packet(family)
    # As in net/ipv4/tcp_offload.c: the checksum field has the pseudo header's sum.
    segment = whole[20 if family == 4 else 40 :]
    pseudo = whole[12:20] if family == 4 else whole[8:40]
    words = struct.unpack(f"!{len(pseudo) // 2}H", pseudo)
    total = sum(words) + 6 + len(segment)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    at = (20 if family == 4 else 40) + 16
    joined = whole[:at] + struct.pack("!H", total) + whole[at + 2 :]
    sent = bytearray(bytes(wrap(kind, 4, joined)))
    if kind == "gre-sum":
        sent[24] ^= 1  # the checksum of one of the packets that were joined
    assert svcdp.decapsulate(sent) == whole


@pytest.mark.parametrize("family", [4, 6])
def test_payloads_that_sockets_give(family: int) -> None:
    data = packet(family, 2)
    number = 4 if family == 4 else 41
    ether = b"\x08\x00" if family == 4 else b"\x86\xdd"
    assert decapsulate_payload(data, number) == data
    assert decapsulate_payload(b"\0\0" + ether + data, 47) == data
    assert decapsulate_payload(bytes([0, number, 0, 0]) + data, 17) == data
    assert decapsulate_payload(data, number, 3) == packet(family, 3)
    assert decapsulate_payload(b"", number) is None


@given(st.binary(max_size=200), st.sampled_from([4, 17, 41, 47]), st.integers(0, 255))
def test_anything(data: bytes, protocol: int, traffic_class: int) -> None:
    decapsulate_payload(data, protocol, traffic_class)
    svcdp.decapsulate(data)
    head = bytes(header(4, NODE[4], REAL[4], proto=protocol, tos=traffic_class, len=20 + len(data)))
    result = svcdp.decapsulate(head + data)
    assert result is None or len(result) <= len(data)
