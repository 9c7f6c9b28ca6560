"""Mutated packets through a dataplane, and what must hold whatever they contain.

``python tests/fuzz/driver.py COUNT [SEED]`` for many of them, as ``make asan`` does with the
extension modules built for the sanitizers; ``test_fuzz.py`` for a few. Packets lie in arrays of
exactly their size, so that the sanitizer sees a read of one byte too many, or between guard
bytes, or in a PacketBatch.
"""

from __future__ import annotations

import ipaddress
import random
import struct
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import forwarding
import payloads
import wire

import svcdp
from svcdp import Reason, Verdict
from svcdp._core import engine
from svcdp.abc import Scheduler
from svcdp.types import Destination, Flow

BURST = 64
GUARD = 32
SECOND = 10**9

CLIENTS = {4: ("192.0.2.4", "10.1.0.1"), 6: ("2001:db8::4", "fd01::1")}
VIRTUAL = {4: "10.96.0.1", 6: "fd96::1"}
REAL = {4: ("10.1.0.1", "10.1.0.2"), 6: ("fd01::1", "fd01::2")}
NODE = {4: "198.51.100.1", 6: "2001:db8:1::1"}
PORTS = (61000, 61001)

#: The source port's lower byte, where there are neither options nor extension headers.
PORT_AT = {4: 21, 6: 41}

#: Values that length, offset and type fields are sensitive to.
BYTES = (
    0,
    1,
    4,
    5,
    6,
    7,
    8,
    17,
    20,
    40,
    43,
    44,
    58,
    60,
    0x45,
    0x46,
    0x4F,
    0x60,
    127,
    128,
    132,
    255,
)
WORDS = (0, 1, 7, 8, 19, 20, 21, 39, 40, 41, 63, 64, 0x1FFF, 0x2000, 0x3FFF, 0x7FFF, 0x8000, 0xFFFF)


#: Ports of the virtual address; 7 has no service.
SERVED = (7, 80, 81, 82, 83, 84, 90, 91, 92)


def real_port(port: int) -> int:
    """The port of the destinations: half of the services keep theirs."""
    return 8000 + port if port & 1 else port


@svcdp.register_scheduler("fuzz-first")
class First(Scheduler):
    """Python in the packet path."""

    def pick(self, flow: Flow, destinations: Sequence[Destination]) -> int | None:
        return None if flow.source_port & 1 else 0


#: Of the services whose destinations come and go.
LEAVING = {"on_removal": "reset", "removal_grace": 0.05}


def dataplane(seed: int) -> svcdp.Dataplane:
    """Services on every way through the core, in a table that is soon full."""
    masquerading = (svcdp.SourceRule(masquerade=True),)
    dp = svcdp.Dataplane(64, seed, clock=lambda: 0, masquerade_ports=PORTS)
    with dp.transaction() as tx:
        for family in (4, 6):
            for protocol in ("tcp", "udp", "sctp"):
                for port, fields in (
                    (80, {}),
                    (81, {"scheduler": "wrr", "masquerade_address": NODE[family]}),
                    (
                        82,
                        {
                            "rules": masquerading,
                            "masquerade_address": NODE[family],
                            "persistence": 60,
                        },
                    ),
                    (83, {"scheduler": "fuzz-first"}),
                    (84, {"scheduler": "random", "persistence": 5, **LEAVING}),
                ):
                    if protocol == "tcp" and port != 83:
                        fields["passive_health"] = svcdp.PassiveHealth(1, ejection=0.1)
                    service = tx.service(VIRTUAL[family], port, protocol, **fields)
                    for weight, address in enumerate(REAL[family], 1):
                        service.add(address, real_port(port), weight)
                tx.service(VIRTUAL[family], 90, protocol)
                tx.service(
                    VIRTUAL[family],
                    91,
                    protocol,
                    rules=(svcdp.SourceRule(sources=("203.0.113.0/24", "2001:db8:2::/48")),),
                )
                tx.service(VIRTUAL[family], 92, protocol, rules=masquerading).add(
                    REAL[family][0], 1
                )
    return dp


def with_options(packet: bytes, options: bytes) -> bytes:
    """An IPv4 packet with options in its header, all checksums right."""
    length = len(packet) + len(options)
    header = bytes([0x45 + len(options) // 4]) + packet[1:2] + struct.pack("!H", length)
    header += packet[4:10] + bytes(2) + packet[12:20] + options
    checksum = struct.pack("!H", wire.internet_checksum(header))
    return header[:10] + checksum + header[12:] + packet[20:]


def with_extensions(packet: bytes, headers: Sequence[int]) -> bytes:
    """An IPv6 packet with extension headers of these types in front of its transport."""
    kinds = [*headers, packet[6]]
    chain = b"".join(
        bytes([following, 0, 0, 0 if kind in (43, 44) else 4, 0, 0, 0, 0])
        for kind, following in pairwise(kinds)
    )
    length = struct.pack("!H", len(packet) - 40 + len(chain))
    return packet[:4] + length + bytes([kinds[0]]) + packet[7:40] + chain + packet[40:]


def corpus() -> list[array[int]]:
    """Valid packets of all kinds, many of one and the same flows."""
    packets: list[bytes] = []
    for family, protocol in product((4, 6), ("tcp", "udp", "sctp")):
        sends = ("S", "S", "S", "A", "A", "FA", "R") if protocol == "tcp" else ("",)
        for port, client, flags in product(SERVED, CLIENTS[family], sends):
            packet = wire.packet(
                protocol, client, 4000 + port, VIRTUAL[family], port, flags, b"data!"
            )
            packets.append(bytes(packet))
        receivers = [(CLIENTS[family][0], 4000), (NODE[family], 61000)]
        for port, real, (receiver, back) in product(range(80, 85), REAL[family], receivers):
            packet = wire.packet(
                protocol,
                real,
                real_port(port),
                receiver,
                back + (port if back == 4000 else 3),
                "RA" if len(packets) % 3 else "SA",
                numbers=(5000, 1001),
            )
            packets.append(bytes(packet))
    for packet in [*packets]:
        sender = REAL[4][0] if packet[0] >> 4 == 4 else REAL[6][0]
        about = packet if len(packets) & 1 else wire.answer_to(packet)
        packets.append(bytes(wire.icmp_error(about, sender)))
        if packet[0] >> 4 == 4:
            packets.append(with_options(packet, bytes([1, 1, 1, 1]) * (1 + len(packet) % 10)))
        else:
            headers = [(0,), (43, 60), (44,), (0, 43, 44, 60), (60,) * 8][len(packets) % 5]
            packets.append(with_extensions(packet, headers))
    return [array("B", packet) for packet in packets]


class Mutator:
    """Packets of the corpus, most of them damaged. One seed, one sequence."""

    def __init__(self, packets: Sequence[array[int]], seed: int) -> None:
        self.packets = packets
        self.random = random.Random(seed)

    def __iter__(self) -> Iterator[array[int]]:
        packets, draw, count = self.packets, self.random.random, len(self.packets)
        while True:
            # Slices of arrays have exactly their size in memory; arrays that grow do not.
            packet = packets[int(draw() * count)][:]
            if draw() < 0.3:
                packet[PORT_AT[packet[0] >> 4]] = int(draw() * 256)  # another flow
            for _ in range(int(draw() * 4)):
                packet = self.damage(packet)
            yield packet

    def damage(self, packet: array[int]) -> array[int]:
        draw = self.random.random
        size = len(packet)
        if size < 2:
            return packet
        # Headers are where mistakes are; most damage is there.
        at = int(draw() * (size if draw() < 0.2 else min(size, 64)))
        kind = int(draw() * 8)
        if kind < 2:
            packet[at] ^= 1 << int(draw() * 8)
        elif kind == 2:
            packet[at] = BYTES[int(draw() * len(BYTES))]
        elif kind == 3:
            packet[at] = int(draw() * 256)
        elif kind == 4:
            value = WORDS[int(draw() * len(WORDS))]
            at = min(at & ~1, size - 2)
            packet[at : at + 2] = array("B", (value >> 8, value & 255))
        elif kind == 5:
            packet = packet[:at]
        elif kind == 6:
            other = self.packets[int(draw() * len(self.packets))]
            start = int(draw() * len(other))
            part = other[start : start + min(size - at, 1 + int(draw() * 40))]
            packet[at : at + len(part)] = part
        else:
            packet = (packet + array("B", bytes(int(draw() * 20))))[:]
        return packet


def check(before: bytes, after: bytes, verdict: int, dp: svcdp.Dataplane) -> None:
    """What holds for one packet, whatever it was."""
    assert len(before) == len(after)
    if verdict == Verdict.FORWARD:
        check_forwarded(before, after)
    else:
        assert before == after, "changed, and not forwarded"
    if verdict == Verdict.REJECT:
        answer = dp.answer(after)
        if answer is not None:
            assert wire.is_intact(answer)
            assert answer[0] >> 4 == before[0] >> 4


def check_forwarded(before: bytes, after: bytes) -> None:
    """Only addresses, ports and checksums changed, and no checksum got better or worse."""
    family = before[0] >> 4
    if family == 4:
        header = (before[0] & 15) * 4
        end = before[2] << 8 | before[3]
        assert before[:10] == after[:10]
        assert before[20:header] == after[20:header]
        assert error(before[:header]) == error(after[:header])
        addresses = (after[12:16], after[16:20])
    else:
        end = 40 + (before[4] << 8 | before[5])
        assert before[:8] == after[:8]
        addresses = (after[8:24], after[24:40])
    assert end <= len(before)
    assert before[end:] == after[end:], "bytes behind the packet changed"
    source, destination = (str(ipaddress.ip_address(address)) for address in addresses)
    assert source == VIRTUAL[family] or destination in REAL[family]


def error(data: bytes) -> int:
    """How far a header's checksum is off, 0 when it is right."""
    return wire.internet_checksum(data) % 0xFFFF


def run(count: int, seed: int) -> Counter[Reason]:
    """Process ``count`` mutated packets. What became of them; AssertionError when it is wrong."""
    dp = dataplane(seed)
    reasons: Counter[Reason] = Counter()
    packets = iter(Mutator(corpus(), seed))
    batch = svcdp.PacketBatch(BURST, 4096, 16)
    now = 0
    leaving = [each.spec for each in dp.services() if each.spec.on_removal == "reset"]
    for number in range(-(-count // BURST)):
        if number % 50 == 49:
            left = number // 50 % 2
            dp.update([replace(each, destinations=each.destinations[left:]) for each in leaving])
        burst = [next(packets) for _ in range(BURST)]
        before = [packet.tobytes() for packet in burst]
        # Mostly a few ms pass; sometimes enough for connections to expire.
        now += 400 * SECOND if number % 31 == 30 else SECOND // 100
        if number % 8 == 6:
            batch.clear()
            for packet in burst:
                batch.append(packet)
            verdicts = dp.process_batch(batch, now)
            after = [batch[index] for index in range(BURST)]
        elif number % 8 == 7:
            verdicts, after = guarded(dp, before, now)
        elif number % 8 == 5:
            results = [dp.process(packet, now) for packet in burst]
            verdicts = bytes(result.verdict for result in results)
            after = [packet.tobytes() for packet in burst]
        else:
            verdicts = dp.process_batch(burst, now)
            after = [packet.tobytes() for packet in burst]
        for i in range(BURST):
            check(before[i], after[i], verdicts[i], dp)
    stats = dp.stats()
    for (_, reason), packets_seen in stats.packets.items():
        reasons[reason] += packets_seen
    assert sum(reasons.values()) == BURST * -(-count // BURST)
    assert stats.connections <= stats.connections_max
    assert stats.ejections > 0
    assert stats.retries > 0
    return reasons


def guarded(dp: svcdp.Dataplane, packets: list[bytes], now: int) -> tuple[bytes, list[bytes]]:
    """Process packets that lie one behind the other, with guard bytes in between."""
    arena = bytearray(b"\xa5" * GUARD).join(packets)
    offsets, start = [], 0
    for packet in packets:
        offsets.append(start)
        start += len(packet) + GUARD
    view = memoryview(arena)
    verdicts = dp.process_batch(
        [view[at : at + len(p)] for at, p in zip(offsets, packets, strict=True)], now
    )
    for at, packet in zip(offsets[:-1], packets, strict=False):
        assert arena[at + len(packet) : at + len(packet) + GUARD] == b"\xa5" * GUARD
    return verdicts, [
        bytes(arena[at : at + len(p)]) for at, p in zip(offsets, packets, strict=True)
    ]


def main() -> None:
    count = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    print(engine.__file__)
    report("NAT", run, count, seed)
    packets = iter(Mutator(forwarding.corpus(), seed))
    report("tunnels", partial(forwarding.run, packets=packets), count // 4, seed)
    packets = iter(Mutator(payloads.corpus(), seed))
    report("payloads", partial(payloads.run, packets=packets), count // 4, seed)


def report(what: str, work: Callable[..., Counter[Reason]], count: int, seed: int) -> None:
    began = time.monotonic()
    reasons = work(count, seed=seed)
    print(f"{what}: {count} packets, seed {seed}, {time.monotonic() - began:.0f} s")
    for reason, seen in reasons.most_common():
        print(f"{seen:10} {reason.name}")


if __name__ == "__main__":
    main()
