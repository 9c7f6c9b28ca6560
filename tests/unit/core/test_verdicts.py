"""Each verdict with each reason, and what processing a buffer promises."""

from __future__ import annotations

import array
import struct

import pytest
import wire
from bench import CLIENT, VIRTUAL, Bench

import svcdp
from svcdp import Reason, SourceRule, Verdict

REAL = ("10.1.1.7", 8080)
SYN = bytes(wire.packet("tcp", CLIENT[4], 40000, VIRTUAL[4], 80))
DATAGRAM = bytes(wire.packet("udp", CLIENT[4], 1, VIRTUAL[4], 80))
SYN6 = bytes(wire.packet("tcp", CLIENT[6], 40000, VIRTUAL[6], 80))
ERROR = bytes(wire.icmp_error(wire.packet("udp", CLIENT[4], 1, "10.0.0.1", 2), "10.0.0.1"))


def patched(packet: bytes, at: int, value: bytes) -> bytes:
    return packet[:at] + value + packet[at + len(value) :]


def extended(*kinds: int, body: bytes = bytes([0, 0, 0, 0, 0, 0])) -> bytes:
    """SYN6 behind extension headers of eight bytes each."""
    chain = b"".join(bytes([nxt]) + bytes([0]) + body for nxt in (*kinds[1:], wire.TCP))
    head = SYN6[:4] + struct.pack("!H", 20 + len(chain)) + bytes([kinds[0]]) + SYN6[7:40]
    return head + chain + SYN6[40:]


PASSED = [
    (b"", Reason.NOT_IP),
    (b"\0" * 40, Reason.NOT_IP),
    (b"\x50" + SYN[1:], Reason.NOT_IP),
    (SYN[:1], Reason.TRUNCATED),
    (SYN[:19], Reason.TRUNCATED),
    (SYN[:20], Reason.TRUNCATED),
    (SYN[:39], Reason.TRUNCATED),
    (SYN6[:39], Reason.TRUNCATED),
    (SYN6[:59], Reason.TRUNCATED),
    (patched(SYN, 2, b"\0\x29"), Reason.TRUNCATED),  # says 41 bytes, has 40
    (patched(SYN, 2, b"\0\x27"), Reason.TRUNCATED),  # no room for the TCP header
    (patched(SYN, 32, b"\x60"), Reason.TRUNCATED),  # TCP options that are not there
    (patched(SYN, 0, b"\x4f"), Reason.MALFORMED),  # the header is longer than the packet says
    (patched(SYN, 0, b"\x44"), Reason.MALFORMED),
    (patched(SYN, 2, b"\0\x13"), Reason.MALFORMED),
    (patched(SYN, 32, b"\x40"), Reason.MALFORMED),
    (patched(DATAGRAM, 24, b"\0\7"), Reason.MALFORMED),
    (patched(DATAGRAM, 24, b"\0\x09"), Reason.TRUNCATED),
    (patched(SYN, 6, b"\x20\0"), Reason.MALFORMED),  # the next would begin inside of 8 bytes
    (patched(SYN, 6, b"\0\1"), Reason.FRAGMENT),
    (extended(44, body=b"\0\1" + bytes(4)), Reason.MALFORMED),
    (extended(44, body=b"\0\x08" + bytes(4)), Reason.FRAGMENT),
    (extended(43, body=b"\0\1" + bytes(4)), Reason.PROTOCOL),  # segments left
    (patched(SYN, 9, b"\x2f"), Reason.PROTOCOL),  # GRE
    (patched(SYN6, 6, b"\x32"), Reason.PROTOCOL),  # ESP
    (patched(ERROR, 20, b"\x08"), Reason.PROTOCOL),  # echo
    (patched(ERROR, 20, b"\x05"), Reason.PROTOCOL),  # redirect
    (patched(ERROR, 37, b"\x01"), Reason.PROTOCOL),  # about ICMP
    (patched(ERROR, 34, b"\0\1"), Reason.FRAGMENT),  # about a later fragment
    (bytes(wire.packet("tcp", CLIENT[4], 1, VIRTUAL[4], 81)), Reason.NO_SERVICE),
    (bytes(wire.packet("udp", CLIENT[4], 1, VIRTUAL[4], 80)), Reason.NO_SERVICE),
    (bytes(wire.packet("tcp", CLIENT[4], 1, "10.96.0.11", 80)), Reason.NO_SERVICE),
    (bytes(wire.packet("tcp", *REAL, CLIENT[4], 1)), Reason.NO_SERVICE),
    (ERROR, Reason.NO_SERVICE),
]  # fmt: skip


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.serve(REAL)
    bench.serve(("fd01::7", 8080), address=VIRTUAL[6])
    return bench


@pytest.mark.parametrize(("packet", "reason"), PASSED)
def test_what_passes_untouched(bench: Bench, packet: bytes, reason: Reason) -> None:
    buffer = bytearray(packet)
    result = bench.dp.process(buffer)
    assert (result.verdict, result.reason) == (Verdict.PASS, reason)
    assert buffer == packet
    assert bytes(result.packet) == packet
    assert result.next_hop is None
    assert result.destination is None
    assert bench.dp.stats().packets == {(Verdict.PASS, reason): 1}
    assert not bench.connections()


@pytest.mark.parametrize("kinds", [(0,), (43,), (44,), (60,), (0, 60, 43, 44, 60), (60,) * 8])
def test_extension_headers_are_walked(bench: Bench, kinds: tuple[int, ...]) -> None:
    assert bench.dp.process(bytearray(extended(*kinds))).reason == Reason.NEW


def test_more_extension_headers_than_rfc_8200_has(bench: Bench) -> None:
    assert bench.dp.process(bytearray(extended(*(60,) * 9))).reason == Reason.MALFORMED


def test_forwarding(bench: Bench) -> None:
    assert bench.send().reason == Reason.NEW
    assert bench.send("A").reason == Reason.ESTABLISHED
    result = bench.reply(source=REAL)
    assert (result.reason, result.next_hop, result.destination) == (Reason.REPLY, CLIENT[4], REAL)
    about = wire.packet("tcp", CLIENT[4], 40000, *REAL, "A")
    assert bench.dp.process(wire.icmp_error(about, REAL[0])).reason == Reason.RELATED
    (status,) = (s.destinations[0] for s in bench.dp.services() if s.spec.address == VIRTUAL[4])
    assert (status.connections_total, status.packets_in, status.bytes_in) == (1, 2, 80)
    # The error too.
    assert (status.packets_out, status.bytes_out) == (2, 108)


def test_the_first_source_rule_that_admits_decides() -> None:
    bench = Bench()
    bench.serve(
        REAL,
        masquerade_address="198.51.100.1",
        rules=(
            SourceRule(("192.0.2.0/30", "2001:db8::/32")),
            SourceRule(("192.0.2.0/24",), masquerade=True, on_empty="drop"),
        ),
    )
    outside = bench.send(client="192.0.3.4")
    assert (outside.verdict, outside.reason) == (Verdict.DROP, Reason.SOURCE_RANGE)
    assert outside.packet is None
    bench.send(client="192.0.2.3")
    bench.send(client="192.0.2.4")
    assert {c.client: c.source for c in bench.dp.connections()} == {
        "192.0.2.3": "192.0.2.3",
        "192.0.2.4": "198.51.100.1",
    }
    bench.serve(rules=bench.dp.services()[0].spec.rules)
    assert bench.send(client="192.0.2.3", port=1).verdict == Verdict.REJECT
    assert bench.send(client="192.0.2.4", port=1).verdict == Verdict.DROP


def test_rules_of_the_other_family_admit_nobody() -> None:
    bench = Bench()
    bench.serve(REAL, rules=(SourceRule(("::/0",)),))
    assert bench.send().reason == Reason.SOURCE_RANGE
    bench.serve(REAL, rules=(SourceRule(("0.0.0.0/0",)),))
    assert bench.send().reason == Reason.NEW


def test_masquerade_without_an_address() -> None:
    bench = Bench()
    bench.serve(REAL, rules=(SourceRule(masquerade=True),))
    result = bench.send()
    assert (result.verdict, result.reason) == (Verdict.DROP, Reason.NO_MASQUERADE)


def test_port_20_and_low_ports_are_like_any_other(bench: Bench) -> None:
    for port in (1, 20, 21, 65535):
        assert bench.send(port=port).reason == Reason.NEW


# -- buffers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(SYN),
        memoryview(bytearray(SYN)),
        memoryview(bytearray(b"xx" + SYN + b"yy"))[2:-2],
        array.array("B", SYN),
        array.array("I", SYN),
        memoryview(bytearray(SYN)).cast("B", (5, 8)),
    ],
    ids=["bytearray", "memoryview", "slice", "array", "words", "two-dimensional"],
)
def test_buffers_that_do(bench: Bench, buffer: bytearray) -> None:
    result = bench.dp.process(buffer)
    assert result.reason == Reason.NEW
    assert wire.read(memoryview(buffer).tobytes()).destination == REAL[0]
    assert result.packet.tobytes() == memoryview(buffer).tobytes()


@pytest.mark.parametrize(
    "buffer",
    [SYN, memoryview(SYN), memoryview(bytearray(SYN * 2))[::2], "text", None, 5, [SYN]],
    ids=["bytes", "read-only", "not-contiguous", "str", "None", "int", "list"],
)
def test_buffers_that_do_not(bench: Bench, buffer: object) -> None:
    for call in (
        lambda: bench.dp.process(buffer),
        lambda: bench.dp.process_batch([buffer]),
        lambda: bench.dp.process_batch([bytearray(SYN), buffer]),
    ):
        with pytest.raises((BufferError, TypeError)):
            call()
    assert not bench.dp.stats().packets
    assert not bench.connections()


def test_a_bad_buffer_far_behind_stops_all(bench: Bench) -> None:
    """All or nothing: no packet is rewritten without the caller learning its verdict."""
    buffers: list[object] = [bytearray(SYN) for _ in range(200)]
    with pytest.raises((BufferError, TypeError)):
        bench.dp.process_batch([*buffers, SYN])
    assert not bench.dp.stats().packets
    assert all(buffer == SYN for buffer in buffers)


def test_a_buffer_is_given_back(bench: Bench) -> None:
    buffer = bytearray(SYN)
    bench.dp.process(buffer)
    bench.dp.process_batch([buffer])
    buffer += b"more"


@pytest.mark.parametrize("now", [-1, 2**63 - 1, 2**63, 2**80, "0", 0.5])
def test_times_that_are_none(bench: Bench, now: int) -> None:
    for call in (
        lambda: bench.dp.process(bytearray(SYN), now),
        lambda: bench.dp.process_batch([bytearray(SYN)], now),
    ):
        with pytest.raises((ValueError, OverflowError, TypeError)):
            call()
    assert not bench.dp.stats().packets


def test_time_may_stand_still_and_go_back(bench: Bench) -> None:
    assert bench.dp.process(bytearray(SYN), 10**12).reason == Reason.NEW
    assert bench.dp.process(bytearray(SYN), 0).reason == Reason.ESTABLISHED


def test_handles_cannot_be_made() -> None:
    from svcdp._core.engine import Destination, Result

    for kind in (Destination, Result):
        try:
            made = kind()
        except TypeError:
            continue
        repr(made)


# -- batches ---------------------------------------------------------------------------------------


def stream() -> list[bytes]:
    """Packets of all kinds, several of one connection in a row."""
    packets = [packet for packet, _ in PASSED]
    for port in range(1, 40):
        packets.append(bytes(wire.packet("tcp", CLIENT[4], port, VIRTUAL[4], 80)))
        packets.append(bytes(wire.packet("tcp", CLIENT[4], port, VIRTUAL[4], 80, "A")))
        packets.append(bytes(wire.packet("tcp", *REAL, CLIENT[4], port, "SA")))
        packets.append(bytes(wire.packet("tcp", CLIENT[6], port, VIRTUAL[6], 80)))
        packets.append(bytes(wire.packet("tcp", CLIENT[4], 1000 + port, VIRTUAL[4], 80, "A")))
    return packets


def fresh() -> svcdp.Dataplane:
    bench = Bench(64)
    bench.serve(REAL, ("10.1.1.8", 8080), scheduler="random")
    bench.serve(("fd01::7", 8080), address=VIRTUAL[6])
    return bench.dp


@pytest.mark.parametrize("size", [1, 2, 7, 8, 63, 64, 65, 500])
def test_a_batch_is_its_packets_one_by_one(size: int) -> None:
    packets = stream()
    single, contiguous, listed, borrowed = fresh(), fresh(), fresh(), fresh()
    for start in range(0, len(packets), size):
        part = packets[start : start + size]
        buffers = [bytearray(packet) for packet in part]
        results = [single.process(buffer, start) for buffer in buffers]
        verdicts = bytes(result.verdict for result in results)

        batch = svcdp.PacketBatch(size)
        for packet in part:
            batch.append(packet)
        assert contiguous.process_batch(batch, start) == verdicts
        assert [batch[i] for i in range(len(batch))] == buffers
        assert [batch.reason(i) for i in range(len(batch))] == [r.reason for r in results]

        again = [bytearray(packet) for packet in part]
        assert listed.process_batch(again, start) == verdicts
        assert again == buffers

        arena = bytearray(b"".join(part))
        ends = [sum(map(len, part[: i + 1])) for i in range(len(part))]
        offsets = [end - len(packet) for end, packet in zip(ends, part, strict=True)]
        loan = svcdp.PacketBatch.from_buffer(arena, offsets, [len(packet) for packet in part])
        assert borrowed.process_batch(loan, start) == verdicts
        assert arena == b"".join(buffers)
    for other in (contiguous, listed, borrowed):
        assert other.stats() == single.stats()
        assert list(other.connections()) == list(single.connections())


def test_an_established_flow_survives_removals_within_its_burst() -> None:
    """Slots of the connection table move when others leave, also after they were prefetched."""
    for seed in range(40):
        bench = Bench(16, seed)
        bench.serve(("10.1.1.7", 53), protocol="udp", port=53)
        bench.serve(REAL)
        for port in range(8):
            bench.send(protocol="udp", port=2000 + port, to=(VIRTUAL[4], 53))
        for port in range(8):
            bench.send(port=1000 + port)
            bench.send("A", port=1000 + port)
        bench.dp.apply([s.spec for s in bench.dp.services() if s.spec.protocol == "tcp"])
        batch = svcdp.PacketBatch(16)
        for port in range(8):
            batch.append(wire.packet("udp", CLIENT[4], 2000 + port, VIRTUAL[4], 53))
        for port in range(8):
            batch.append(wire.packet("tcp", CLIENT[4], 1000 + port, VIRTUAL[4], 80, "A"))
        bench.dp.process_batch(batch, 400 * 10**9)
        assert [batch.reason(i).name for i in range(16)] == ["NO_SERVICE"] * 8 + ["ESTABLISHED"] * 8


def test_batch_arguments() -> None:
    for arguments in ((0,), ((1 << 20) + 1,), (1, 64, 64), (1, 1 << 21), (1, 1 << 17, 1 << 16)):
        with pytest.raises(ValueError, match="must"):
            svcdp.PacketBatch(*arguments)
    batch = svcdp.PacketBatch(2, 100, 20)
    assert (len(batch), batch.capacity, batch.slot_size, batch.headroom) == (0, 2, 100, 20)
    with pytest.raises(ValueError, match="81"):
        batch.append(bytes(81))
    assert batch.append(bytes(80)) == 0
    assert batch.append(SYN) == 1
    with pytest.raises(IndexError, match="full"):
        batch.append(SYN)
    assert batch[-1] == SYN
    for index in (2, -3):
        with pytest.raises(IndexError):
            batch[index]
        with pytest.raises(IndexError):
            batch.verdict(index)
    batch.clear()
    assert len(batch) == 0
    assert svcdp.Dataplane(16).process_batch(batch) == b""


@pytest.mark.parametrize(
    ("offsets", "lengths", "headroom"),
    [
        ([0], [101], 0),
        ([100], [1], 0),
        ([-1], [1], 0),
        ([0], [-1], 0),
        ([2**63 - 1], [1], 0),
        ([1], [2**63 - 1], 0),
        ([10], [10], 11),
        ([0, 10], [10], 0),
        ([], [], 0),
        ([0], [1], 1 << 16),
    ],
)
def test_borrowed_memory_is_checked(offsets: list[int], lengths: list[int], headroom: int) -> None:
    with pytest.raises(ValueError, match=r"must|fit"):
        svcdp.PacketBatch.from_buffer(bytearray(100), offsets, lengths, headroom)


def test_borrowed_memory_counts_what_it_is_given() -> None:
    class Odd:
        def __len__(self) -> int:
            return 1

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter([0] * 5000)

    try:
        batch = svcdp.PacketBatch.from_buffer(bytearray(10), Odd(), Odd())
    except ValueError:
        return
    assert len(batch) == 5000


def test_borrowed_memory_stays_exported() -> None:
    memory = bytearray(100)
    batch = svcdp.PacketBatch.from_buffer(memory, [0], [40])
    with pytest.raises(BufferError):
        memory += b"x"
    with pytest.raises(ValueError, match="borrow"):
        batch.append(SYN)
    del batch
    memory += b"x"


def test_one_buffer_twice_is_harmless(bench: Bench) -> None:
    """The second time it is what the first made of it, or at least stays within its bounds."""
    packet = wire.packet("udp", CLIENT[4], 1, VIRTUAL[4], 80)
    bench.serve(REAL, protocol="udp")
    packet[26:28] = bytes(2)
    verdicts = bench.dp.process_batch([packet, packet, packet])
    assert verdicts[0] == Verdict.FORWARD
    assert wire.read(packet).destination == REAL[0]
