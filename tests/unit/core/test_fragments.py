"""Packets that arrive in fragments: what is read of them, and the table that they meet."""

from __future__ import annotations

import ipaddress
from typing import Any

import inlines
import pytest
import wire
from hypothesis import example, given
from hypothesis import strategies as st
from pieces import cut, fragment, join
from wire import ICMP, SCTP, TCP, UDP

from svcdp import Reason

core = inlines.load()

SECOND = 10**9
LIFETIME = 30 * SECOND
BEFORE = bytes([44, 0, 1, 4, 0, 0, 0, 0])  # destination options, padding only
HOSTS = {4: ("192.0.2.4", "10.96.0.1"), 6: ("2001:db8::4", "fd96::1")}
#: Where a first fragment went: its addresses then.
ROUTES = {4: ("192.0.2.4", "10.1.0.1"), 6: ("2001:db8::4", "fd01::1")}

families = pytest.mark.parametrize("family", [4, 6])


def packet(family: int, protocol: str = "udp", size: int = 100) -> bytes:
    source, target = HOSTS[family]
    payload = bytes(range(256)) * (1 + size // 256)
    return bytes(wire.packet(protocol, source, 1000, target, 2000, payload=payload[:size]))


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def reason(data: bytes) -> Reason | None:
    found = core.Fragments().parse(data)[0]
    return None if found is None else Reason(found)


def remember(table: Any, data: bytes, destination: int = 1, now: int = 0) -> None:
    source, target = ROUTES[data[0] >> 4]
    table.remember(data, packed(source), packed(target), destination, now)


@pytest.mark.parametrize("before", [b"", BEFORE])
@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
@families
def test_what_is_read(family: int, protocol: str, before: bytes) -> None:
    if family == 4 and before:
        return
    first, *others = cut(packet(family, protocol), 24, before=before)
    transport = 20 if family == 4 else 48 + len(before)
    number = wire.NUMBERS[protocol]
    table = core.Fragments()
    assert table.parse(first) == (None, True, number, (1000, 2000), transport, len(first))
    assert others
    for other in others:
        assert table.parse(other) == (None, False, number, (0, 0), transport, len(other))
        assert table.parse(other + bytes(5))[-1] == len(other)
        for length in range(len(other)):
            assert table.parse(other[:length])[0] in (Reason.TRUNCATED, Reason.NOT_IP)


@families
def test_headers_behind_the_fragment_header(family: int) -> None:
    """Only the first fragment has them, and with them its ports."""
    if family == 4:
        return
    whole = packet(6)
    payload = bytes([17, 0, 1, 4, 0, 0, 0, 0]) + whole[40:]
    whole = whole[:6] + bytes([60]) + whole[7:40]
    table = core.Fragments()
    first = fragment(whole, 0, payload[:24], True)
    assert table.parse(first)[:4] == (None, True, UDP, (1000, 2000))
    assert table.parse(fragment(whole, 24, payload[24:], False))[:2] == (None, False)
    assert reason(fragment(whole, 0, payload[:8], True)) is not None


@pytest.mark.parametrize(("protocol", "size"), [("tcp", 20), ("udp", 8), ("sctp", 12)])
@families
def test_first_fragments_without_a_whole_header(family: int, protocol: str, size: int) -> None:
    whole = packet(family, protocol)
    payload = whole[20 if family == 4 else 40 :]
    for length in range(8, 40, 8):
        refused = reason(fragment(whole, 0, payload[:length], True)) == Reason.FRAGMENT
        assert refused == (length < size)


@families
def test_no_fragment_replaces_the_flags(family: int) -> None:
    """RFC 3128: offset 8 of TCP."""
    for protocol in ("tcp", "udp"):
        whole = packet(family, protocol)
        refused = reason(fragment(whole, 8, bytes(24), True))
        assert refused == (Reason.FRAGMENT if protocol == "tcp" else None)


@families
def test_what_cannot_be(family: int) -> None:
    whole = packet(family)
    assert reason(fragment(whole, 16, bytes(9), True)) == Reason.MALFORMED
    assert reason(fragment(whole, 16, bytes(9), False)) is None
    assert reason(fragment(whole, 16, b"", False)) == Reason.MALFORMED
    assert reason(fragment(whole, 65528, bytes(7), False)) is None
    assert reason(fragment(whole, 65528, bytes(8), False)) == Reason.MALFORMED
    assert reason(fragment(whole, 0, whole[20:], False)) == Reason.FRAGMENT  # is none


def test_other_protocols() -> None:
    error = bytes(wire.icmp_error(packet(4), "192.0.2.4"))
    assert reason(fragment(error, 0, error[20:44], True)) == Reason.PROTOCOL
    assert core.Fragments().parse(fragment(error, 24, error[44:], False))[2] == ICMP
    routed = fragment(packet(6), 8, bytes(8), True, before=bytes([44, 0, 0, 1, 0, 0, 0, 0]))
    routed = routed[:6] + bytes([43]) + routed[7:]
    assert reason(routed) == Reason.PROTOCOL


@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
@families
def test_they_follow_the_first(family: int, protocol: str) -> None:
    whole = packet(family, protocol, 200)
    first, *others = cut(whole, 48)
    table = core.Fragments()
    assert all(table.follow(other, 0) is None for other in others)
    remember(table, first, 5)
    assert table.follow(first, 0) is None
    seen = []
    for other in reversed(others):
        destination, rewritten = table.follow(other, LIFETIME - 1)
        assert destination == 5
        assert len(rewritten) == len(other)
        seen.insert(0, rewritten)
    source, target = ROUTES[family]
    at = (12, 16, 20) if family == 4 else (8, 24, 40)
    for before, after in zip(others, seen, strict=True):
        assert after[: at[0]] == before[: 10 if family == 4 else 8] + after[10 : at[0]]
        assert after[at[0] : at[2]] == packed(source) + packed(target)
        assert after[at[2] :] == before[at[2] :]
        if family == 4:
            assert wire.internet_checksum(after[:20]) == 0
    # Put together behind the first as NAT makes it, they are the datagram to the destination.
    port = wire.packet(protocol, source, 1000, target, 2000, payload=whole[-200:])
    again = fragment(bytes(port), 0, bytes(port)[at[2] : at[2] + 48], True)
    assert join([again, *seen]) == bytes(port)


@families
def test_packets_are_told_apart(family: int) -> None:
    first, other, *_ = cut(packet(family), 24)
    source, target = HOSTS[family]
    table = core.Fragments()
    remember(table, first)
    assert table.follow(other, 0) is not None
    tcp = packet(family, "tcp")
    for different in (
        cut(packet(family), 24, number=8)[1],
        cut(bytes(wire.packet("udp", target, 1, target, 2, payload=bytes(99))), 24)[1],
        cut(bytes(wire.packet("udp", source, 1, source, 2, payload=bytes(99))), 24)[1],
    ):
        assert table.follow(different, 0) is None
    # The identification of IPv6 is one for all protocols, for IPv4 it is the protocol's.
    assert (table.follow(fragment(tcp, 24, bytes(8), False), 0) is None) == (family == 4)


@families
def test_time_and_repetition(family: int) -> None:
    first, other, *_ = cut(packet(family), 24)
    table = core.Fragments()
    remember(table, first, 1)
    assert table.follow(other, LIFETIME) is None
    remember(table, first, 2, LIFETIME)
    assert table.follow(other, LIFETIME)[0] == 2
    remember(table, first, 3, LIFETIME + 1)
    assert table.follow(other, 2 * LIFETIME)[0] == 3
    assert table.follow(other, 2 * LIFETIME + 1) is None


def test_the_oldest_makes_room() -> None:
    """Bounded, and the newest is always there."""
    table = core.Fragments()
    whole = packet(4)
    pairs = [cut(whole, 48, number)[:2] for number in range(1, 10_001)]
    for now, (first, other) in enumerate(pairs):
        remember(table, first, now, now)
        assert table.follow(other, now)[0] == now
    kept = [now for now, (_, other) in enumerate(pairs) if table.follow(other, 10_000) is not None]
    assert len(kept) <= 4096
    assert len(kept) > 3500
    # 1024 buckets of 4: of entries this new hardly one is gone.
    assert sum(now >= 9_000 for now in kept) > 950


@given(data=st.binary(max_size=120), kind=st.sampled_from([0x45, 0x46, 0x4F, 0x60]))
@example(data=bytes(120), kind=0x60)
def test_any_bytes(data: bytes, kind: int) -> None:
    data = bytes([kind]) + data
    found, first, protocol, ports, transport, end = core.Fragments().parse(data)
    if found is None:
        assert transport < end <= len(data)
        if first:
            assert protocol in (TCP, UDP, SCTP)
            assert ports == tuple(
                int.from_bytes(data[at : at + 2], "big") for at in (transport, transport + 2)
            )


@given(
    family=st.sampled_from([4, 6]),
    protocol=st.sampled_from(["tcp", "udp", "sctp"]),
    offset=st.integers(0, 8191).map(lambda units: 8 * units),
    damage=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=3),
    length=st.integers(0, 90),
)
def test_damaged_fragments(
    family: int, protocol: str, offset: int, damage: list[tuple[int, int]], length: int
) -> None:
    table = core.Fragments()
    data = bytearray(fragment(packet(family, protocol), offset, bytes(40), True)[:length])
    for at, value in damage:
        if at < len(data):
            data[at] = value
    found, first, _, _, transport, end = table.parse(bytes(data))
    if found is None:
        assert transport < end <= len(data)
        if first:
            remember(table, bytes(data))
        assert table.follow(bytes(data), 0) is None
