"""Mutated packets into tunnels and out of them, to routed destinations, and errors about both.

What `driver.py` is for NAT. Packets lie behind a headroom of some size, in arrays of exactly
their size.
"""

from __future__ import annotations

import ipaddress
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import wire

import svcdp
from svcdp import Reason, Settings, TunnelSpec, Verdict

BURST = 64
SECOND = 10**9

CLIENT = {4: "192.0.2.4", 6: "2001:db8::4"}
VIRTUAL = {4: "10.96.0.1", 6: "fd96::1"}
REAL = {4: "10.1.0.1", 6: "fd01::1"}
NODE = {4: "198.51.100.1", 6: "2001:db8:1::1"}
ROUTER = {4: "203.0.113.9", 6: "2001:db8:ffff::9"}
GUE = 6080
MTU = 1400
HEADROOMS = (0, 20, 51, 60, 64)
MARK = 7

KINDS: tuple[tuple[Any, bool], ...] = (
    ("ipip", False),
    ("gre", False),
    ("gre", True),
    ("gue", False),
    ("gue", True),
)
#: Port of the virtual address: tunnel type, checksum, family outside.
TUNNELS = {80 + n: (*kind, outer) for n, (kind, outer) in enumerate(product(KINDS, (4, 6)))}
DIRECT, LEAVING, CALLS, MARKED = 100, 101, 5060, 102
#: Bytes between the outer IP header and the packet inside.
EXTRA = {("ipip", False): 0, ("gre", False): 4, ("gre", True): 8}

MSS = bytes([1, 2, 4, 0x23, 0x28, 1, 1, 0])  # at an odd offset
INVITE = b"INVITE sip:a@b SIP/2.0\r\nCall-ID: x@y\r\n\r\n"


def dataplane(seed: int) -> svcdp.Dataplane:
    settings = Settings(drop_packet=3, am_droprate=40, cache_bypass=True, answer_rate=0)
    dp = svcdp.Dataplane(256, seed, clock=lambda: 0, settings=settings)
    with dp.transaction() as tx:
        for family, protocol in product((4, 6), ("tcp", "udp", "sctp")):
            virtual = VIRTUAL[family]
            for port, (kind, checksum, outer) in TUNNELS.items():
                tunnel = TunnelSpec(kind, NODE[outer], GUE if kind == "gue" else 0, checksum)
                tx.service(virtual, port, protocol, mss_clamp=True).add(
                    REAL[outer], port, method="tunnel", tunnel=tunnel, mtu=MTU
                )
            tx.service(virtual, DIRECT, protocol).add(
                REAL[family], DIRECT, method="dr", mark=1, mtu=MTU
            )
            tx.service(virtual, LEAVING, protocol, on_removal="drop").add(REAL[family], LEAVING)
        for family in (4, 6):
            tx.service(VIRTUAL[family], CALLS, "udp", persistence=60, persistence_engine="sip").add(
                REAL[family], CALLS
            )
            tx.service(*svcdp.fwmark_key(MARK, 4 if family == 4 else 6))
    return dp


def corpus() -> list[array[int]]:
    packets: list[bytes] = []
    for family, port in product((4, 6), (*TUNNELS, DIRECT, LEAVING)):
        here, virtual = (CLIENT[family], 4000 + port), (VIRTUAL[family], port)
        for flags, payload in (("S", b""), ("A", b"data"), ("A", bytes(1400)), ("FA", b"")):
            packets.append(bytes(wire.packet("tcp", *here, *virtual, flags, payload)))
        packets.append(with_mss(packets[-4]))
        packets.append(bytes(wire.packet("udp", *here, *virtual, payload=bytes(100))))
        packets.append(bytes(wire.packet("sctp", *here, *virtual)))
    packets += [with_ttl(packet, 1) for packet in packets[::7]]
    packets += [with_df(packet) for packet in packets if packet[0] >> 4 == 4]
    for family in (4, 6):
        for payload in (INVITE, b"no call"):
            call = wire.packet("udp", CLIENT[family], 5060, VIRTUAL[family], CALLS, payload=payload)
            packets.append(bytes(call))
            call = wire.packet("udp", REAL[family], CALLS, CLIENT[family], 5061, payload=payload)
            packets.append(bytes(call))
        packets.append(bytes(wire.packet("tcp", CLIENT[family], 9, ROUTER[family], MARKED)))
    packets += list(about_tunnels(packets))
    return [array("B", packet) for packet in packets]


def about_tunnels(packets: list[bytes]) -> Iterator[bytes]:
    """What is in the tunnels, and what routers say of it."""
    dp = dataplane(1)
    dp.configure(Settings())
    for packet in packets:
        result = dp.process(bytearray(64) + packet, 0, headroom=64)
        if result.verdict != Verdict.FORWARD or result.packet is None:
            continue
        sent = bytes(result.packet)
        if sent == packet:
            continue
        yield sent
        family = sent[0] >> 4
        number = wire.ICMP if family == 4 else wire.ICMP6
        kinds = [(3, 4, 1300), (3, 1, 0), (11, 0, 0), (12, 0, 0)]
        if family == 6:
            kinds = [(2, 0, 1300), (1, 0, 0), (3, 0, 0), (4, 0, 0)]
        kind, code, info = kinds[len(sent) % 4 if len(sent) % 3 else 0]
        message = struct.pack("!BBHI", kind, code, 0, info) + sent[:500]
        yield bytes(wire.ip(ROUTER[family], NODE[family], number, message))


def with_mss(syn: bytes) -> bytes:
    at = 20 if syn[0] >> 4 == 4 else 40
    flow = wire.read(syn)
    segment = syn[at:]
    segment = segment[:12] + bytes([0x70]) + segment[13:] + MSS
    return bytes(wire.ip(flow.source, flow.destination, wire.TCP, segment))


def with_ttl(packet: bytes, ttl: int) -> bytes:
    return with_header(packet, 8 if packet[0] >> 4 == 4 else 7, ttl)


def with_df(packet: bytes) -> bytes:
    return with_header(packet, 6, 0x40)


def with_header(packet: bytes, at: int, value: int) -> bytes:
    changed = bytearray(packet)
    changed[at] = value
    if changed[0] >> 4 == 4:
        changed[10:12] = bytes(2)
        changed[10:12] = struct.pack("!H", wire.internet_checksum(bytes(changed[:20])))
    return bytes(changed)


def end_of(packet: bytes) -> int:
    if packet[0] >> 4 == 4:
        return packet[2] << 8 | packet[3]
    return 40 + (packet[4] << 8 | packet[5])


def ends_of(packet: bytes) -> tuple[str, str]:
    """Source and destination."""
    at, size = (12, 4) if packet[0] >> 4 == 4 else (8, 16)
    source, target = packet[at : at + size], packet[at + size : at + 2 * size]
    return str(ipaddress.ip_address(source)), str(ipaddress.ip_address(target))


def check(before: bytes, result: svcdp.Result) -> None:
    """What holds for one packet, whatever it was."""
    if result.packet is None:
        assert result.verdict in (Verdict.DROP, Verdict.REJECT)
        return
    after = bytes(result.packet)
    if result.verdict == Verdict.PASS:
        assert after == before
    elif result.verdict == Verdict.REJECT:
        assert wire.is_intact(after)
        assert ends_of(after) == ends_of(before)[::-1]
    elif ends_of(after)[0] in NODE.values() and ends_of(after) != ends_of(before):
        check_tunnel(before, after)
    elif result.reason == Reason.RELATED and len(after) != len(before):
        # An error about a tunnel, told to the client.
        assert wire.is_intact(after)
        assert ends_of(after)[0] in VIRTUAL.values()
        assert len(after) <= len(before)
    else:
        assert len(after) == len(before)


def check_tunnel(before: bytes, after: bytes) -> None:
    """The packet is inside as it was, but for a hop and its MSS."""
    outer = 20 if after[0] >> 4 == 4 else 40
    assert ends_of(after)[1] in REAL.values()
    assert end_of(after) == len(after)
    if outer == 20:
        assert wire.internet_checksum(after[:20]) == 0
    overhead = len(after) - end_of(before)
    assert overhead - outer in (0, 4, 8, 12)
    inner, was = bytearray(after[overhead:]), bytearray(before[: end_of(before)])
    for packet in (inner, was):
        if packet[0] >> 4 == 4:
            packet[8] = packet[10] = packet[11] = 0
            at = (packet[0] & 15) * 4
        else:
            packet[7] = 0
            at = 40
        is_tcp = (packet[9] if packet[0] >> 4 == 4 else packet[6]) == wire.TCP
        if is_tcp and len(packet) > at + 20 and packet[at + 13] & 2:
            packet[at + 16 : at + 18] = bytes(2)
            packet[at + 20 : at + 60] = bytes(len(packet[at + 20 : at + 60]))
    if not has_extensions(before):
        assert inner == was


def has_extensions(packet: bytes) -> bool:
    return packet[0] >> 4 == 6 and packet[6] not in (wire.TCP, wire.UDP, wire.SCTP, wire.ICMP6)


def run(count: int, packets: Iterator[array[int]], seed: int) -> Counter[Reason]:
    """Process ``count`` mutated packets. What became of them; AssertionError when it is wrong."""
    dp = dataplane(seed)
    reasons: Counter[Reason] = Counter()
    now = 0
    for number in range(count):
        packet = next(packets)
        before = packet.tobytes()
        now += 400 * SECOND if number % 2048 == 2047 else SECOND // 1000
        if number % 512 == 511:
            leave_or_come_back(dp, gone=number % 1024 == 511)
        room = HEADROOMS[number % len(HEADROOMS)]
        buffer = array("B", bytes(room)) + packet
        mark = MARK if number % 16 == 15 else 0
        result = dp.process(buffer[:], now, headroom=room, mark=mark)
        check(before, result)
        reasons[result.reason] += 1
        taken = svcdp.decapsulate(packet)
        assert taken is None or end_of(taken) == len(taken) < len(packet)
    return reasons


def leave_or_come_back(dp: svcdp.Dataplane, gone: bool) -> None:
    with dp.transaction() as tx:
        for family, protocol in product((4, 6), ("tcp", "udp", "sctp")):
            service = tx.service(VIRTUAL[family], LEAVING, protocol, on_removal="drop")
            if gone:
                service.remove(REAL[family], LEAVING)
            else:
                service.add(REAL[family], LEAVING)
