"""Mutated packets whose payload the core reads: FTP, SIP, SCTP chunks; and packets in fragments.

What `driver.py` is for NAT. Packets lie behind a headroom of some size, in arrays of exactly
their size.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import product

import pieces
import wire

import svcdp
from svcdp import Reason, Settings, SourceRule, TunnelSpec, Verdict

SECOND = 10**9

CLIENT = {4: "192.0.2.4", 6: "2001:db8::4"}
VIRTUAL = {4: "10.96.200.1", 6: "fd96::1"}
REAL = {4: "10.1.0.1", 6: "fd01::1"}
NODE = {4: "198.51.100.1", 6: "2001:db8:1::1"}
ROOM = 64
HEADROOMS = (0, 7, ROOM)

FTP, FTP_MASQUERADED, CALLS, PLAIN, MOVED, TUNNEL = 21, 2121, 5060, 80, 81, 82
#: What clients and servers say on control connections.
COMMANDS = (
    b"PASV\r\n",
    b"EPSV\r\n",
    b"EPSV 2\r\n",
    b"TYPE I\r\nPASV\r\n",
    b"PORT 192,0,2,4,156,64\r\n",
    b"EPRT |1|192.0.2.4|40000|\r\n",
    b"EPRT |2|2001:db8::4|40000|\r\n",
)
REPLIES = (
    b"227 Entering Passive Mode (10,1,0,1,19,137).\r\n",
    b"200 ok\r\n227 =255,255,255,255,19,137\r\n",
    b"229 Entering Extended Passive Mode (|||5001|)\r\n",
    b"150 ok\r\n",
)
CALL = (
    b"INVITE sip:a@b SIP/2.0\r\nVia: x\r\nCall-ID: abc@%d\r\n\r\n",
    b"BYE sip:a@b SIP/2.0\ni:\n abc@%d\n\n",
)
SACK = struct.pack("!BBBBIIII", 1, 1, 5, 18, 1010, 1020, 1040, 1050)


def dataplane(seed: int) -> svcdp.Dataplane:
    dp = svcdp.Dataplane(
        128,
        seed,
        clock=lambda: 0,
        masquerade_ports=(61000, 61003),
        settings=Settings(sloppy_sctp=bool(seed & 1), secure_tcp=bool(seed & 2), answer_rate=0),
    )
    masquerade = (SourceRule(masquerade=True),)
    with dp.transaction() as tx:
        for family in (4, 6):
            virtual, real, node = VIRTUAL[family], REAL[family], NODE[family]
            tx.service(virtual, FTP, helper="ftp").add(real, FTP)
            tx.service(
                virtual, FTP_MASQUERADED, helper="ftp", rules=masquerade, masquerade_address=node
            ).add(real, FTP_MASQUERADED)
            tx.service(virtual, CALLS, "udp", persistence=60, persistence_engine="sip").add(
                real, CALLS
            )
            for protocol in ("tcp", "udp", "sctp"):
                tx.service(virtual, PLAIN, protocol).add(real, PLAIN)
                tx.service(virtual, MOVED, protocol).add(real, 8081)
                tx.service(virtual, TUNNEL, protocol).add(
                    real, TUNNEL, method="tunnel", tunnel=TunnelSpec("ipip", node)
                )
    return dp


def tcp(
    source: tuple[str, int], target: tuple[str, int], flags: str, payload: bytes, options: bytes
) -> bytes:
    bits = sum(wire.FLAGS[flag] for flag in flags)
    length = (20 + len(options)) // 4 << 4
    header = struct.pack("!HHIIBBHHH", source[1], target[1], 1000, 1040, length, bits, 9, 0, 0)
    return bytes(wire.ip(source[0], target[0], wire.TCP, header + options + payload))


def control_connections() -> Iterator[bytes]:
    for family, port in product((4, 6), (FTP, FTP_MASQUERADED)):
        here, virtual = (CLIENT[family], 40000 + port), (VIRTUAL[family], port)
        seen = here if port == FTP else (NODE[family], 61000)
        real = (REAL[family], port)
        yield tcp(here, virtual, "S", b"", b"")
        yield tcp(real, seen, "SA", b"", b"")
        for command, reply in product(COMMANDS, REPLIES):
            yield tcp(here, virtual, "A", command, b"")
            yield tcp(real, seen, "A", reply, SACK)
            yield tcp(here, virtual, "A", b"", SACK)
        for flags in ("S", "A", "FA", "R"):
            yield tcp((CLIENT[family], 40001), (VIRTUAL[family], 5001), flags, b"", b"")
            yield tcp((REAL[family], 20), (CLIENT[family], 40000), flags, b"", b"")
        yield tcp(here, virtual, "R", b"", b"")


def calls() -> Iterator[bytes]:
    for family, text, number in product((4, 6), CALL, range(3)):
        here, there = (CLIENT[family], 5060), (VIRTUAL[family], CALLS)
        yield bytes(wire.packet("udp", *here, *there, payload=text % number))
        yield bytes(wire.packet("udp", REAL[family], CALLS, *here, payload=text % number))


def associations() -> Iterator[bytes]:
    kinds = (0, 1, 2, 6, 7, 8, 9, 10, 11, 14, 192)
    for family, port, kind, bundled in product((4, 6), (PLAIN, MOVED, TUNNEL), kinds, (b"", b"x")):
        chunk = struct.pack("!BBHI", kind, 0, 8, 1)
        chunk += bundled and struct.pack("!BBH", 6, 0, 4)
        here, there = (CLIENT[family], 4000), (VIRTUAL[family], port)
        yield bytes(wire.packet("sctp", *here, *there, payload=chunk))
        real = (REAL[family], 8081 if port == MOVED else port)
        yield bytes(wire.packet("sctp", *real, *here, payload=chunk))


def fragments() -> Iterator[bytes]:
    number = 0
    for family, protocol, port in product((4, 6), wire.NUMBERS, (PLAIN, MOVED, TUNNEL)):
        here, there = (CLIENT[family], 4000), (VIRTUAL[family], port)
        real = (REAL[family], 8081 if port == MOVED else port)
        for source, target in ((here, there), (real, here)):
            number += 1
            flags = "S" if source == here else "SA"
            payload = struct.pack("!BBHI", 1, 0, 90, 1) + bytes(82)
            packet = bytes(wire.packet(protocol, *source, *target, flags, payload))
            yield from pieces.cut(packet, 24 if number % 3 else 40, number)
        zero = bytearray(wire.packet("udp", *here, *there, payload=bytes(90)))
        at = 26 if family == 4 else 46
        zero[at : at + 2] = bytes(2)
        yield from pieces.cut(bytes(zero), 32, number + 1000)


def corpus() -> list[array[int]]:
    packets = [*control_connections(), *calls(), *associations(), *fragments()]
    return [array("B", packet) for packet in packets]


def stories() -> list[list[array[int]]]:
    """Packets that mean something one after the other."""
    sessions = [array("B", packet) for packet in control_connections()]
    parts = [array("B", packet) for packet in fragments()]
    return [sessions, parts]


def check(before: bytes, result: svcdp.Result, room: int) -> None:
    """What holds for one packet, whatever it was."""
    if result.packet is None:
        assert result.verdict in (Verdict.DROP, Verdict.REJECT)
        return
    after = bytes(result.packet)
    if result.verdict == Verdict.PASS:
        assert after == before
    elif result.verdict == Verdict.REJECT:
        assert wire.is_intact(after)
    else:
        assert len(after) <= len(before) + room
        if len(after) != len(before) and wire.read(after).source not in NODE.values():
            # A longer or shorter text, which was not written into a damaged segment.
            assert is_intact_segment(before)
            assert is_intact_segment(after)
            assert after[end_of(after) :] == before[end_of(before) :]
        if after[0] == before[0] == 0x45:
            assert error(before[:20]) == error(after[:20]) or after[9] != before[9]


def end_of(packet: bytes) -> int:
    if packet[0] >> 4 == 4:
        return packet[2] << 8 | packet[3]
    return 40 + (packet[4] << 8 | packet[5])


def is_intact_segment(packet: bytes) -> bool:
    """Whether TCP's checksum is right, of a packet without IPv6 extension headers."""
    start, size = (12, 4) if packet[0] >> 4 == 4 else (8, 16)
    source, target = packet[start : start + size], packet[start + size : start + 2 * size]
    segment = packet[wire.transport_at(packet) : end_of(packet)]
    return wire.with_checksum(source, target, wire.TCP, segment) == segment


def error(data: bytes) -> int:
    """How far a header's checksum is off, 0 when it is right."""
    return wire.internet_checksum(data) % 0xFFFF


def run(count: int, packets: Iterator[array[int]], seed: int) -> Counter[Reason]:
    """Process ``count`` packets, whole stories now and then. What became of them; AssertionError
    when it is wrong.
    """
    dp = dataplane(seed)
    told = stories()
    waiting: list[array[int]] = []
    reasons: Counter[Reason] = Counter()
    now = 0
    for number in range(count):
        if number % 1024 == 512:
            waiting = told[number // 1024 % len(told)][::-1]
        # Between two packets of a story a mutated one may come.
        packet = waiting.pop() if waiting and number % 3 else next(packets)
        before = packet.tobytes()
        now += 400 * SECOND if number % 4096 == 4095 else SECOND // 1000
        room = HEADROOMS[number % len(HEADROOMS)]
        result = dp.process(array("B", bytes(room)) + packet, now, headroom=room)
        check(before, result, room)
        reasons[result.reason] += 1
    assert dp.stats().connections <= dp.stats().connections_max
    check_nothing_stays(dp, now)
    return reasons


def check_nothing_stays(dp: svcdp.Dataplane, now: int) -> None:
    """When nobody sends any more all is forgotten: connections, helpers, and their counts."""
    stray = wire.packet("udp", "192.0.2.99", 1, "192.0.2.98", 1)
    for hour in range(1, 8):
        for _ in range(200):
            dp.process(stray, now + hour * 3600 * SECOND)
    assert dp.stats().connections == 0
    for service in dp.services():
        for destination in service.destinations:
            assert (destination.active, destination.inactive) == (0, 0)
