"""What FTP control connections say, other addresses in it, and sequence numbers that follow."""

from __future__ import annotations

import contextlib
import ipaddress
import struct
from typing import Any

import inlines
import pytest
import wire
from hypothesis import given
from hypothesis import strategies as st

core = inlines.load()

NOTHING, PASV, EPSV, PORT, EPRT, PASV_REPLY, EPSV_REPLY = range(7)
WRITTEN, NO_HEADROOM, WRONG_CHECKSUM = range(3)
CSUM_PARTIAL, CHANGED = 1, 2

CLIENT = {4: "192.0.2.4", 6: "2001:db8::4"}
SERVER = {4: "10.1.0.1", 6: "fd01::1"}
VIRTUAL = {4: "10.96.200.111", 6: "fd96::1"}

ADDRESS = bytes([10, 1, 0, 1])
REPLY = b"227 Entering Passive Mode (10,1,0,1,19,137).\r\n"
EXTENDED_REPLY = b"229 Entering Extended Passive Mode (|||5001|)\r\n"


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def segment(
    payload: bytes,
    from_client: bool = False,
    family: int = 4,
    number: int = 1000,
    acknowledged: int = 2000,
    options: bytes = b"",
) -> bytes:
    ends = [(CLIENT[family], 40000), (VIRTUAL[family], 21)]
    if not from_client:
        ends = [(SERVER[family], 21), ends[0]]
    (source, source_port), (target, target_port) = ends
    header = struct.pack(
        "!HHIIBBHHH",
        source_port,
        target_port,
        number % 2**32,
        acknowledged % 2**32,
        (5 + len(options) // 4) << 4,
        24,
        512,
        0,
        0,
    )
    return bytes(wire.ip(source, target, wire.TCP, header + options + payload))


def payload_of(packet: bytes) -> bytes:
    at = wire.transport_at(packet)
    return packet[at + (packet[at + 12] >> 4) * 4 :]


def numbers_of(packet: bytes) -> tuple[int, int]:
    numbers: tuple[int, int] = struct.unpack_from("!II", packet, wire.transport_at(packet) + 4)
    return numbers


@pytest.mark.parametrize(
    ("text", "kind", "address", "port", "found"),
    [
        (b"PASV\r\n", PASV, None, 0, b""),
        (b"pasv\n", PASV, None, 0, b""),
        (b"TYPE I\r\nPaSv\r\n", PASV, None, 0, b""),
        (b"EPSV\r\n", EPSV, None, 0, b""),
        (b"EPSV 1\r\n", EPSV, None, 0, b""),
        (b"epsv 2\r\n", EPSV, None, 0, b""),
        (b"PORT 10,1,0,1,19,137\r\n", PORT, ADDRESS, 5001, b"10,1,0,1,19,137"),
        (b"port 10,1,0,1,0,1\n", PORT, ADDRESS, 1, b"10,1,0,1,0,1"),
        (b"EPRT |1|10.1.0.1|5001|\r\n", EPRT, ADDRESS, 5001, b"|1|10.1.0.1|5001|"),
        (b"EPRT !2!fd01::1!65535!\r\n", EPRT, packed("fd01::1"), 65535, b"!2!fd01::1!65535!"),
        (b"NOOP\r\nEPRT |1|10.1.0.1|1|\r\n", EPRT, ADDRESS, 1, b"|1|10.1.0.1|1|"),
    ],
)
def test_what_clients_say(
    text: bytes, kind: int, address: bytes | None, port: int, found: bytes
) -> None:
    *said, start, end = core.ftp_line(text, True)
    assert (*said, text[start:end]) == (kind, address, port, found)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"P",
        b"PASV",
        b"XPASV\r\n",
        b"PASV x\r\n",
        b"EPSV ALL\r\n",
        b"EPSV",
        b"EPSV ",
        b"STOR PASV\r\n",
        b"PORT 10,1,0,1,19,137",
        b"PORT 10,1,0,1,19\r\n",
        b"PORT 10,1,0,256,19,137\r\n",
        b"PORT 10,1,0,1,0,0\r\n",
        b"PORT 10,1,0,,19,137\r\n",
        b"PORT 10.1.0.1.19.137\r\n",
        b"PORT  10,1,0,1,19,137\r\n",
        b"PORT 10,1,0,1,19,1370000000000000000000\r\n",
        b"EPRT |1|10.1.0.1|0|\r\n",
        b"EPRT |1|10.1.0.1|65536|\r\n",
        b"EPRT |1|10.1.0.1|5001\r\n",
        b"EPRT |1|10.1.0|5001|\r\n",
        b"EPRT |1|fd01::1|5001|\r\n",
        b"EPRT |2|10.1.0.1|5001|\r\n",
        b"EPRT |3|10.1.0.1|5001|\r\n",
        b"EPRT 11110.1.0.11500111\r\n",
        b"EPRT |1|10.1.0.1!5001|\r\n",
        b"EPRT |1|10.1.0.1\x00|5001|\r\n",
        b"EPRT |2|" + b"1" * 100 + b"|5001|\r\n",
        b"EPRT  1 10.1.0.1 5001 \r\n",
        b"EPRT |",
        b"EPRT |1|",
        REPLY,
    ],
)
def test_what_clients_do_not_say(text: bytes) -> None:
    assert core.ftp_line(text, True)[0] == NOTHING


@pytest.mark.parametrize(
    ("text", "kind", "address", "port", "found"),
    [
        (REPLY, PASV_REPLY, ADDRESS, 5001, b"10,1,0,1,19,137"),
        (b"227 =10,1,0,1,19,137\r\n", PASV_REPLY, ADDRESS, 5001, b"10,1,0,1,19,137"),
        (b"227 (10,1,0,1,19,137", NOTHING, None, 0, b""),
        (b"227 (10,1,0,1,19,137)", PASV_REPLY, ADDRESS, 5001, b"10,1,0,1,19,137"),
        (b"200 ok\r\n" + REPLY, PASV_REPLY, ADDRESS, 5001, b"10,1,0,1,19,137"),
        (b"227 x\r\n(10,1,0,1,19,137)\r\n", NOTHING, None, 0, b""),
        (b"227-(10,1,0,1,19,137)\r\n", NOTHING, None, 0, b""),
        (b"2227 (10,1,0,1,19,137)\r\n", NOTHING, None, 0, b""),
        (b"550 227 (10,1,0,1,19,137)\r\n", NOTHING, None, 0, b""),
        (EXTENDED_REPLY, EPSV_REPLY, None, 5001, b"|||5001|"),
        (b"229 ok (!!!1!)\r\n", EPSV_REPLY, None, 1, b"!!!1!"),
        (b"229 ok |||5001|\r\n", NOTHING, None, 0, b""),
        (b"229 ok (|||5001)\r\n", NOTHING, None, 0, b""),
        (b"229 ok (|||0|)\r\n", NOTHING, None, 0, b""),
        (b"229 ok (|||65536|)\r\n", NOTHING, None, 0, b""),
        (b"229 ok (||5001|)\r\n", NOTHING, None, 0, b""),
        (b"229 ok (|1|10.1.0.1|5001|)\r\n", NOTHING, None, 0, b""),
        (b"229 ok (111500111)\r\n", NOTHING, None, 0, b""),
        (b"229 ok (", NOTHING, None, 0, b""),
        (b"229 ok (|", NOTHING, None, 0, b""),
    ],
)
def test_what_servers_say(
    text: bytes, kind: int, address: bytes | None, port: int, found: bytes
) -> None:
    asked = PASV if text[:3] != b"229" else EPSV
    heard, *said, start, end = core.ftp_line(text, False, asked)
    assert heard == kind
    if kind != NOTHING:
        assert (*said, text[start:end]) == (address, port, found)
    for other in (NOTHING, PASV + EPSV - asked):
        assert core.ftp_line(text, False, other)[0] == NOTHING


def test_only_what_the_client_asked_for() -> None:
    """The server's word counts once, and the client speaks for itself only."""
    helper = core.Ftp()
    for asks, reply, kind in (
        (b"PASV\r\n", REPLY, PASV_REPLY),
        (b"EPSV\r\n", EXTENDED_REPLY, EPSV_REPLY),
    ):
        assert helper.packet(segment(reply), False)[0] == NOTHING
        helper.packet(segment(asks, True), True)
        assert helper.packet(segment(b"150 wait\r\n"), False)[0] == NOTHING
        assert helper.packet(segment(reply), False)[:2] == (kind, 5001)
        assert helper.packet(segment(reply), False)[0] == NOTHING
    helper.packet(segment(b"PASV\r\n", True), True)
    for client, command, kind in (
        ("192.0.2.4", b"PORT 192,0,2,4,1,1\r\n", PORT),
        ("192.0.2.4", b"PORT 192,0,2,5,1,1\r\n", NOTHING),
        ("192.0.2.4", b"EPRT |1|192.0.2.4|257|\r\n", EPRT),
        ("192.0.2.4", b"EPRT |2|::ffff:192.0.2.4|257|\r\n", NOTHING),
        ("2001:db8::4", b"EPRT |2|2001:DB8::4|257|\r\n", EPRT),
        ("2001:db8::4", b"EPRT |2|2001:db8::5|257|\r\n", NOTHING),
    ):
        family = 6 if ":" in client else 4
        assert helper.packet(segment(command, True, family), True)[0] == kind
    assert helper.packet(segment(REPLY), False)[0] == NOTHING


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("family", "asks", "reply", "address", "expected"),
    [
        (4, b"PASV\r\n", REPLY, "10.96.200.111", b"(10,96,200,111,19,137)"),
        (4, b"PASV\r\n", REPLY, "1.2.3.4", b"(1,2,3,4,19,137)"),
        (4, b"PASV\r\n", b"227 (255,255,255,255,255,255)\r\n", "1.2.3.4", b"(1,2,3,4,19,137)"),
        (4, b"PASV\r\n", b"227 (1,2,3,4,0,9)\r\n", "255.255.255.255", b"(255,255,255,255,19,137)"),
        (4, b"EPSV\r\n", EXTENDED_REPLY, "10.96.200.111", b"(|||5001|)"),
        (4, b"EPSV\r\n", b"229 (!!!05!)\r\n", "10.96.200.111", b"(!!!5001!)"),
        (6, b"EPSV\r\n", b"229 (|||1|)\r\n", "fd96::1", b"(|||5001|)"),
    ],
)
def test_replies_name_the_service(
    family: int, asks: bytes, reply: bytes, address: str, expected: bytes, partial: bool
) -> None:
    helper = core.Ftp()
    helper.packet(segment(asks, True, family), True)
    before = segment(reply, family=family)
    flags = CSUM_PARTIAL if partial else 0
    _, _, outcome, flags, after = helper.packet(
        before, False, packed(address), 5001, headroom=16, flags=flags
    )
    assert outcome == WRITTEN
    assert wire.is_intact(after)
    assert wire.read(after) == wire.read(before)
    start = reply.index(b"(")
    assert payload_of(after) == reply[:start] + expected + reply[reply.index(b")") + 1 :]
    length = struct.unpack_from("!H", after, 2 if family == 4 else 4)[0]
    assert length == len(after) - (0 if family == 4 else 40)
    same = payload_of(after) == reply
    assert bool(flags & CHANGED) == (not same)
    difference = len(after) - len(before)
    assert helper.numbers[1] == ((1000, difference, 0) if difference else (0, 0, 0))


@pytest.mark.parametrize(
    ("family", "command", "address", "expected"),
    [
        (4, b"PORT 192,0,2,4,1,1\r\n", "198.51.100.1", b"PORT 198,51,100,1,19,137\r\n"),
        (4, b"EPRT |1|192.0.2.4|257|\r\n", "198.51.100.1", b"EPRT |1|198.51.100.1|5001|\r\n"),
        (6, b"EPRT #2#2001:db8::4#257#\r\n", "fd00::1", b"EPRT #2#fd00::1#5001#\r\n"),
        (
            6,
            b"EPRT |2|2001:db8::4|7|\r\n",
            "1111:2222:3333:4444:5555:6666:7777:8888",
            b"EPRT |2|1111:2222:3333:4444:5555:6666:7777:8888|5001|\r\n",
        ),
    ],
)
def test_commands_name_somebody_else(
    family: int, command: bytes, address: str, expected: bytes
) -> None:
    helper = core.Ftp()
    before = segment(command, True, family)
    _, port, outcome, _, after = helper.packet(before, True, packed(address), 5001, headroom=64)
    assert (port, outcome) in ((257, WRITTEN), (7, WRITTEN))
    assert wire.is_intact(after)
    assert payload_of(after) == expected
    assert helper.numbers[0] == (1000, len(expected) - len(command), 0)
    assert helper.numbers[1] == (0, 0, 0)


def test_no_headroom() -> None:
    grown = len(b"10,96,200,111") - len(b"10,1,0,1")
    for headroom in range(grown + 2):
        helper = core.Ftp()
        helper.packet(segment(b"PASV\r\n", True), True)
        before = segment(REPLY)
        _, _, outcome, flags, after = helper.packet(
            before, False, packed(VIRTUAL[4]), 5001, headroom
        )
        if headroom < grown:
            assert (outcome, flags, after) == (NO_HEADROOM, 0, before)
            assert helper.numbers[1] == (0, 0, 0)
        else:
            assert outcome == WRITTEN


def test_the_longest_packet() -> None:
    helper = core.Ftp()
    for room, outcome in ((5, WRITTEN), (4, NO_HEADROOM)):
        helper.packet(segment(b"PASV\r\n", True), True)
        text = REPLY + bytes(65535 - 40 - room - len(REPLY))
        result = helper.packet(segment(text), False, packed(VIRTUAL[4]), 5001, 16)
        assert result[2] == outcome
        assert len(result[-1]) == (65535 if outcome == WRITTEN else 65531)
        assert wire.is_intact(result[-1])


def test_a_wrong_checksum_stays_wrong() -> None:
    helper = core.Ftp()
    helper.packet(segment(b"PASV\r\n", True), True)
    before = bytearray(segment(REPLY))
    before[-1] ^= 1
    _, _, outcome, flags, after = helper.packet(bytes(before), False, packed(VIRTUAL[4]), 5001, 16)
    assert (outcome, flags, after) == (WRONG_CHECKSUM, 0, bytes(before))


class Stream:
    """What a sender says, and where its text is in what the receiver gets."""

    def __init__(self, first: int) -> None:
        self.sent = self.received = first
        #: (number sent, number received) of the first byte of each segment, and of the next one
        self.marks = [(first, first)]

    def add(self, sent: int, received: int) -> None:
        self.sent += sent
        self.received += received
        self.marks.append((self.sent, self.received))


@given(
    first=st.sampled_from([0, 1000, 2**31 - 60, 2**32 - 60]),
    lines=st.lists(
        st.tuples(st.booleans(), st.integers(1, 300), st.sampled_from(["1.1.1.1", VIRTUAL[4]])),
        min_size=1,
        max_size=12,
    ),
)
def test_streams_stay_whole(first: int, lines: list[tuple[bool, int, str]]) -> None:
    """Each segment begins where the one before it ended, also when it is sent again, and what is
    acknowledged is what was sent.
    """
    helper = core.Ftp()
    stream = Stream(first)
    for asks, size, address in lines:
        text = REPLY if asks else b"x" * size
        for _ in range(2):
            if asks:
                helper.packet(segment(b"PASV\r\n", True), True)
            *_, out = helper.packet(
                segment(text, number=stream.sent), False, packed(address), 5001, 64
            )
            assert wire.is_intact(out)
            assert numbers_of(out)[0] == stream.received % 2**32
            expected = text
            if asks:
                given_address = address.replace(".", ",").encode()
                expected = text.replace(b"10,1,0,1", given_address)
            assert payload_of(out) == expected
        stream.add(len(text), len(expected))
        # Of this segment and the one before; older ones need not be told from each other.
        for sent, received in stream.marks[-2:]:
            *_, back = helper.packet(segment(b"", True, acknowledged=received), True)
            assert numbers_of(back) == (1000, sent % 2**32)
            assert wire.is_intact(back)


@pytest.mark.parametrize("nops", [0, 1, 2, 3])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_selective_acknowledgements(blocks: int, nops: int) -> None:
    helper = core.Ftp()
    helper.packet(segment(b"PASV\r\n", True), True)
    *_, out = helper.packet(segment(REPLY, number=5000), False, packed(VIRTUAL[4]), 5001, 16)
    difference = len(payload_of(out)) - len(REPLY)
    edges = [5000 + len(payload_of(out)) + 100 * i for i in range(2 * blocks)]
    option = bytes([1]) * nops + struct.pack("!BB", 5, 2 + 8 * blocks)
    option += struct.pack(f"!{2 * blocks}I", *edges)
    option += bytes(-len(option) % 4)
    before = segment(b"", True, acknowledged=5000, options=option)
    *_, after = helper.packet(before, True)
    assert wire.is_intact(after)
    assert numbers_of(after) == (1000, 5000)
    start = wire.transport_at(after) + 20 + nops + 2
    assert list(struct.unpack_from(f"!{2 * blocks}I", after, start)) == [
        edge - difference for edge in edges
    ]
    changed = {i for i in range(len(after)) if after[i] != before[i]}
    assert changed <= {36, 37, *range(start, start + 8 * blocks)}


@pytest.mark.parametrize(
    "options", [b"\5", b"\5\xff", b"\5\x0a\1\2", b"\5\0\0\0", b"\5\1\0\0", b"\1\1\1\5", b"\0\5\2\2"]
)
def test_options_that_lie(options: bytes) -> None:
    """Nothing outside the header is read or written."""
    helper = core.Ftp()
    helper.packet(segment(b"PASV\r\n", True), True)
    helper.packet(segment(REPLY, number=5000), False, packed(VIRTUAL[4]), 5001, 16)
    options += bytes(-len(options) % 4)
    before = segment(b"NOOP\r\n", True, acknowledged=9000, options=options)
    *_, after = helper.packet(before, True)
    assert wire.is_intact(after)
    assert payload_of(after) == b"NOOP\r\n"
    assert after[40 : 40 + len(options)] == options


TEXTS = st.lists(
    st.one_of(
        st.sampled_from(b"PORT |EPRT |PASV|EPSV|227 |229 |(|,|\r\n|192,0,2,4,1,1|5001".split(b"|")),
        st.sampled_from(
            [b"|", b"|||", b"|1|192.0.2.4|257|", b"|2|2001:db8::4|257|", b"(|||5001|)"]
        ),
        st.binary(max_size=4),
        st.integers(0, 70000).map(lambda number: str(number).encode()),
    ),
    max_size=12,
).map(b"".join)


@given(
    exchanges=st.lists(st.tuples(st.booleans(), TEXTS, st.integers(0, 24)), max_size=6),
    family=st.sampled_from([4, 6]),
)
def test_any_text(exchanges: list[tuple[bool, bytes, int]], family: int) -> None:
    """Only an address and a port in it change, and lengths and checksums stay right."""
    helper: Any = core.Ftp()
    for from_client, text, headroom in exchanges:
        before = segment(text, from_client, family)
        kind, port, outcome, _, after = helper.packet(
            before, from_client, packed(VIRTUAL[family]), 5001, headroom
        )
        assert wire.is_intact(after)
        if kind in (NOTHING, PASV, EPSV) or outcome != WRITTEN:
            assert payload_of(after) == text
        else:
            assert 1 <= port <= 65535
            assert len(after) <= len(before) + headroom


@given(
    damage=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 255)), max_size=4),
    length=st.integers(0, 120),
    family=st.sampled_from([4, 6]),
)
def test_damaged_packets(damage: list[tuple[int, int]], length: int, family: int) -> None:
    helper: Any = core.Ftp()
    helper.packet(segment(b"PASV\r\n", True, family), True)
    data = bytearray(segment(REPLY, family=family, options=b"\1\1\5\x0a" + bytes(8))[:length])
    for at, value in damage:
        if at < len(data):
            data[at] = value
    with contextlib.suppress(ValueError):  # the parser did not take it
        helper.packet(bytes(data), False, packed(VIRTUAL[family]), 5001, 16)
