"""Neighbor Discovery for addresses that no interface has; scapy makes and reads the frames."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from scapy.utils6 import in6_getnsma, in6_getnsmac

from svcdp.announce import ndp

MAC, HOST = "02:00:00:00:00:01", "02:00:00:00:00:0a"
PACKED = bytes.fromhex(MAC.replace(":", ""))
OURS, THEIRS = "2001:db8:1::64", "2001:db8:1::a"
ADDRESS = socket.inet_pton(socket.AF_INET6, OURS)
OWNED = frozenset({ADDRESS})
GROUP = socket.inet_ntop(socket.AF_INET6, in6_getnsma(ADDRESS))


def asked(
    source: str = THEIRS,
    to: str = GROUP,
    target: str = OURS,
    options: Packet | None = None,
    hops: int = 255,
    code: int = 0,
) -> bytes:
    mac = in6_getnsmac(in6_getnsma(ADDRESS)) if to == GROUP else MAC
    message = ICMPv6ND_NS(tgt=target, code=code)
    if options is None and source != "::":
        options = ICMPv6NDOptSrcLLAddr(lladdr=HOST)
    if options:
        message /= options
    return bytes(Ether(src=HOST, dst=mac) / IPv6(src=source, dst=to, hlim=hops) / message)


def read(frame: bytes) -> tuple[Ether, IPv6, ICMPv6ND_NA]:
    """An advertisement; its checksum is right and its length complete."""
    found = Ether(frame)
    ip, message = found[IPv6], found[ICMPv6ND_NA]
    again = found.copy()
    del again[ICMPv6ND_NA].cksum
    del again[IPv6].plen
    assert bytes(again) == frame
    assert (ip.hlim, ip.nh, message.code, message.res) == (255, 58, 0, 0)
    assert message[ICMPv6NDOptDstLLAddr].lladdr == MAC
    return found, ip, message


@pytest.mark.parametrize("to", [GROUP, OURS], ids=["group", "unicast"])
def test_who_asks_is_told(to: str) -> None:
    reply = ndp.answer(asked(to=to), OWNED, PACKED)
    assert reply is not None
    frame, ip, message = read(reply)
    assert (frame.src, frame.dst, ip.src, ip.dst) == (MAC, HOST, OURS, THEIRS)
    assert (message.R, message.S, message.O, message.tgt) == (0, 1, 1, OURS)


def test_who_looks_for_duplicates_is_told_with_all_others() -> None:
    reply = ndp.answer(asked(source="::"), OWNED, PACKED)
    assert reply is not None
    frame, ip, message = read(reply)
    assert (frame.dst, ip.src, ip.dst) == ("33:33:00:00:00:01", OURS, "ff02::1")
    assert (message.S, message.O, message.tgt) == (0, 1, OURS)


def test_padding_changes_nothing() -> None:
    assert ndp.answer(asked() + bytes(9), OWNED, PACKED) == ndp.answer(asked(), OWNED, PACKED)


def wrong(frame: bytes, place: int, value: int) -> bytes:
    return frame[:place] + bytes([value]) + frame[place + 1 :]


EXTENDED = bytes(
    Ether(src=HOST)
    / IPv6(src=THEIRS, dst=GROUP, hlim=255)
    / IPv6ExtHdrHopByHop()
    / ICMPv6ND_NS(tgt=OURS)
)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(asked(target=THEIRS), id="another address"),
        pytest.param(asked(hops=254), id="from behind a router"),
        pytest.param(asked(code=1), id="code"),
        pytest.param(wrong(asked(), 57, asked()[57] ^ 1), id="checksum"),
        pytest.param(asked(to="ff02::1"), id="another group"),
        pytest.param(asked(source="::", to=OURS), id="probe at the address"),
        pytest.param(
            asked(source="::", options=ICMPv6NDOptSrcLLAddr(lladdr=HOST)), id="probe with a source"
        ),
        pytest.param(asked(source="ff02::1"), id="from a group"),
        pytest.param(asked(source=OURS), id="from the address itself"),
        pytest.param(asked(options=Raw(b"\x01\x00" + bytes(6))), id="option without length"),
        pytest.param(asked(options=Raw(b"\x01\x02" + bytes(6))), id="option beyond the end"),
        pytest.param(asked(options=Raw(b"\x01\x01\x00")), id="half an option"),
        pytest.param(wrong(asked(), 6, 0x33), id="from a group's MAC"),
        pytest.param(EXTENDED, id="behind another header"),
        pytest.param(
            bytes(Ether(src=HOST) / IPv6(src=THEIRS, dst=OURS, hlim=255) / ICMPv6ND_NA(tgt=OURS)),
            id="an advertisement",
        ),
        pytest.param(b"", id="nothing"),
    ],
)
def test_nothing_else_is_answered(frame: bytes) -> None:
    assert ndp.answer(frame, OWNED, PACKED) is None


def test_what_is_cut_short_is_not_answered() -> None:
    frame = asked()
    assert {ndp.answer(frame[:length], OWNED, PACKED) for length in range(len(frame))} == {None}


def test_an_announcement_goes_to_all() -> None:
    frame, ip, message = read(ndp.announcement(ADDRESS, PACKED))
    assert (frame.dst, ip.src, ip.dst) == ("33:33:00:00:00:01", OURS, "ff02::1")
    assert (message.R, message.S, message.O, message.tgt) == (0, 0, 1, OURS)


def test_the_group_is_known() -> None:
    assert ndp.solicited_node(ADDRESS) == in6_getnsma(ADDRESS)


@given(st.binary(max_size=160), st.dictionaries(st.integers(0, 85), st.integers(0, 255)))
def test_whatever_comes_is_borne(noise: bytes, changes: dict[int, int]) -> None:
    """Noise, noise as options, and a good solicitation with some bytes that are not."""
    assert ndp.answer(noise, OWNED, PACKED) is None or len(noise) >= 78
    frame = bytearray(asked())
    for place, value in changes.items():
        frame[place] = value
    for each in (bytes(frame), asked(options=Raw(noise or b"\x00"))):
        reply = ndp.answer(each, OWNED, PACKED)
        if reply is not None:
            assert read(reply)[2].tgt == OURS
