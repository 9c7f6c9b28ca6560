"""Fragments, put together again by scapy, and cut by the rules of RFC 791 and RFC 8200."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption_Router_Alert, IPOption_Timestamp, defragment
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    defragment6,
)
from scapy.packet import Packet, Raw
from scapy_oracle import CLIENT, VIRTUAL

import svcdp

# scapy's are not typed.
joined4: Any = defragment
joined6: Any = defragment6


def ipv4(size: int, **fields: Any) -> Packet:
    return (
        IP(src=CLIENT[4], dst=VIRTUAL[4], id=7, tos=0x29, ttl=9, **fields)
        / UDP()
        / Raw(bytes(i % 251 for i in range(size)))
    )


def ipv6(size: int, *headers: Packet) -> Packet:
    packet = IPv6(src=CLIENT[6], dst=VIRTUAL[6], tc=0x29, fl=77, hlim=9)
    for header in headers:
        packet /= header.copy()
    return packet / UDP() / Raw(bytes(i % 251 for i in range(size)))


@given(st.integers(0, 9000), st.integers(68, 9000), st.booleans())
def test_ipv4_comes_together_again(size: int, mtu: int, options: bool) -> None:
    fields: dict[str, Any] = (
        {"options": [IPOption_Router_Alert(), IPOption_Timestamp()]} if options else {}
    )
    whole = bytes(ipv4(size, **fields))
    pieces = svcdp.fragment(whole + b"padding", mtu)
    if len(whole) <= mtu:
        assert pieces == [whole]
        return
    for index, piece in enumerate(pieces):
        assert len(piece) <= mtu
        packet = IP(piece)
        kept = (
            ["IP Option Router Alert"]
            if index
            else [
                "IP Option Router Alert",
                "IP Option Timestamp",
            ]
        )
        # The Router Alert is copied into every fragment, the time stamp stays in the first.
        names = [option.name for option in packet.options if option.option]
        assert names == (kept if options else [])
        again = packet.copy()
        del again.chksum, again.len
        assert bytes(again) == piece
        # As much as fits, in units of 8 bytes.
        if index < len(pieces) - 1:
            assert mtu - len(piece) < 8
    (packet,) = joined4([IP(piece) for piece in pieces])
    assert bytes(packet)[packet.ihl * 4 :] == whole[(whole[0] & 15) * 4 :]
    assert (packet.tos, packet.ttl, packet.id) == (0x29, 9, 7)


@given(st.integers(0, 9000), st.integers(1280, 9000), st.integers(0, 3))
def test_ipv6_comes_together_again(size: int, mtu: int, kind: int) -> None:
    hop, routing = IPv6ExtHdrHopByHop(), IPv6ExtHdrRouting(segleft=0)
    # Extension headers, and the bytes of them that every fragment has: the routing header and
    # what is before it, else hop-by-hop options.
    headers, repeated = [
        ((), 0),
        ((hop,), 8),
        ((IPv6ExtHdrDestOpt(),), 0),
        ((hop, IPv6ExtHdrDestOpt(), routing), 24),
    ][kind]
    front = 40 + repeated
    whole = bytes(ipv6(size, *headers))
    pieces = svcdp.fragment(whole, mtu, identification=0xDEADBEEF)
    if len(whole) <= mtu:
        assert pieces == [whole]
        return
    for piece in pieces:
        assert len(piece) <= mtu
        packet = IPv6(piece)
        assert packet.plen == len(piece) - 40
        assert packet[IPv6ExtHdrFragment].id == 0xDEADBEEF
        assert (packet.tc, packet.fl, packet.hlim) == (0x29, 77, 9)
        assert IPv6(piece[: front + 8]).haslayer(IPv6ExtHdrFragment)
    joined = joined6([IPv6(piece) for piece in pieces])
    assert bytes(joined)[front:] == whole[front:]


def test_a_fragment_is_cut_further() -> None:
    first, second = svcdp.fragment(bytes(ipv4(1000)), 600)
    pieces = [*svcdp.fragment(first, 100), *svcdp.fragment(second, 100)]
    (packet,) = joined4([IP(piece) for piece in pieces])
    assert bytes(packet)[20:] == bytes(ipv4(1000))[20:]


def test_random_identifications() -> None:
    cut = [IPv6(svcdp.fragment(bytes(ipv6(2000)), 1280)[0]) for _ in range(4)]
    assert len({packet[IPv6ExtHdrFragment].id for packet in cut}) > 1


@pytest.mark.parametrize(
    ("packet", "mtu", "what"),
    [
        (bytes(ipv4(1000, flags="DF")), 500, "has DF"),
        (bytes(ipv4(100)), 67, "least of IPv4"),
        (bytes(ipv6(100)), 1279, "least of IPv6"),
        (bytes(ipv6(2000, IPv6ExtHdrFragment())), 1280, "fragment"),
        (bytes(ipv6(2000, IPv6ExtHdrHopByHop()))[:40] + b"\x3c\xff" + bytes(2014), 1280, "damaged"),
        (bytes(ipv4(1000))[:-1], 500, "of which"),
        (b"", 500, "not an IP packet"),
        (b"\x45", 500, "not an IP packet"),
        (b"\x43" + bytes(40), 500, "bytes"),
        (bytes(ipv4(2000, frag=8190)), 500, "ends behind"),
    ],
)
def test_what_cannot_be_cut(packet: bytes, mtu: int, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        svcdp.fragment(packet, mtu)


@given(st.binary(max_size=200), st.integers(68, 1500))
def test_anything(packet: bytes, mtu: int) -> None:
    try:
        pieces = svcdp.fragment(packet, mtu)
    except ValueError:
        return
    assert all(len(piece) <= mtu for piece in pieces)
