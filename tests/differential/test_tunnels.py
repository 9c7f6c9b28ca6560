"""Tunnels as IPVS writes them (ip_vs_xmit.c), and what comes back about them, built by scapy."""

from __future__ import annotations

import struct
from itertools import product
from typing import Any

import pytest
from partial import CSUM_PARTIAL, packets_of
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
)
from scapy.layers.l2 import GRE
from scapy.packet import Packet, Raw
from scapy_oracle import CLIENT, NODE, REAL, VIRTUAL, header

import svcdp
from svcdp import Reason, Settings, TunnelSpec, Verdict

HEADROOM = 64
GUE_PORT = 6080
ROUTER = {4: "203.0.113.9", 6: "2001:db8:ffff::9"}
KINDS: list[tuple[Any, bool]] = [
    ("ipip", False),
    ("gre", False),
    ("gre", True),
    ("gue", False),
    ("gue", True),
]
NAMES = ["ipip", "gre", "gre-checksum", "gue", "gue-checksum"]
#: Bytes that each adds to the outer IP header.
EXTRA = {("ipip", False): 0, ("gre", False): 4, ("gre", True): 8, ("gue", False): 12}
FAMILIES = [(outer, inner) for outer in (4, 6) for inner in (4, 6)]
NOT_ECT, ECT1, ECT0, CE = range(4)


def dataplane(
    outer: int, inner: int, kind: Any = "ipip", checksum: bool = False, mtu: int = 0, **fields: Any
) -> svcdp.Dataplane:
    """Everything for the virtual address goes into a tunnel."""
    settings = fields.pop("settings", Settings())
    dp = svcdp.Dataplane(64, 1, clock=lambda: 0, settings=settings)
    port = GUE_PORT if kind == "gue" else 0
    tunnel = TunnelSpec(kind, NODE[outer], port, checksum)
    with dp.transaction() as tx:
        for protocol in ("tcp", "udp"):
            tx.service(VIRTUAL[inner], 80, protocol, **fields).add(
                REAL[outer], 80, method="tunnel", tunnel=tunnel, mtu=mtu
            )
    return dp


def request(
    family: int, body: Packet | None = None, *, ttl: int = 64, tos: int = 0, df: bool = True
) -> Packet:
    fields: dict[str, Any] = {"ttl": ttl, "tos": tos}
    if family == 4:
        fields |= {"flags": "DF" if df else "", "id": 77}
    else:
        fields["fl"] = 0x12345
    body = TCP(sport=4000, dport=80, flags="S") if body is None else body
    return header(family, CLIENT[family], VIRTUAL[family], **fields) / body


def process(
    dp: svcdp.Dataplane, packet: bytes, headroom: int = HEADROOM
) -> tuple[svcdp.Result, bytes]:
    result = dp.process(bytearray(headroom) + packet, 0, headroom=headroom)
    return result, b"" if result.packet is None else bytes(result.packet)


def wrapped(outer: int, packet: Packet, kind: str, checksum: bool, got: bytes) -> bytes:
    """The tunnel packet around a packet; its random parts are those of what we got."""
    inner = packet.copy()
    family = inner.version
    ttl = (inner.ttl if family == 4 else inner.hlim) - 1
    tos = inner.tos if family == 4 else inner.tc
    df = family == 4 and "DF" in inner.flags
    if family == 4:
        inner.ttl = ttl
        del inner.chksum
    else:
        inner.hlim = ttl
    # RFC 3168, 9.1.1: full functionality.
    if tos & CE == CE:
        tos = tos & ~CE | ECT0
    number = {4: 4, 6: 41}[family]
    protocol = {"ipip": number, "gre": 47, "gue": 17}[kind]
    fields: dict[str, Any] = {"ttl": ttl, "tos": tos}
    fields |= {"proto": protocol} if outer == 4 else {"nh": protocol}
    if outer == 4:
        fields["flags"] = "DF" if df else ""
        fields["id"] = 0 if df else struct.unpack("!H", got[4:6])[0]
    head = header(outer, NODE[outer], REAL[outer], **fields)
    if kind == "ipip":
        return bytes(head / Raw(bytes(inner)))
    if kind == "gre":
        ether = 0x0800 if family == 4 else 0x86DD
        return bytes(head / GRE(proto=ether, chksum_present=checksum) / Raw(bytes(inner)))
    at = 20 if outer == 4 else 40
    (port,) = struct.unpack("!H", got[at : at + 2])
    assert port >= 49152
    udp = UDP(sport=port, dport=GUE_PORT) if checksum else UDP(sport=port, dport=GUE_PORT, chksum=0)
    return bytes(head / udp / Raw(bytes([0, number, 0, 0]) + bytes(inner)))


@pytest.mark.parametrize(("kind", "checksum"), KINDS, ids=NAMES)
@pytest.mark.parametrize(("outer", "inner"), FAMILIES)
def test_every_header(outer: int, inner: int, kind: Any, checksum: bool) -> None:
    dp = dataplane(outer, inner, kind, checksum)
    bodies = [
        TCP(sport=4000, dport=80, flags="S") / b"odd",
        UDP(sport=4000, dport=80) / b"even",
        UDP(sport=4000, dport=80, chksum=0) / b"none",
    ]
    for body, tos, ttl, df in product(bodies, (0, ECT1, ECT0, CE, 0xB8 | CE), (2, 255), (0, 1)):
        packet = request(inner, body, ttl=ttl, tos=tos, df=bool(df))
        result, got = process(dp, bytes(packet) + b"padding")
        assert result.verdict == Verdict.FORWARD
        assert result.next_hop == REAL[outer]
        assert result.destination == (REAL[outer], 80)
        assert got == wrapped(outer, packet, kind, checksum, got)
        ours = svcdp.decapsulate(got)
        inside = packet.__class__(ours)
        assert (inside.src, inside.dst) == (packet.src, packet.dst)


@pytest.mark.parametrize("outer", [4, 6])
def test_the_flow_keeps_its_source_port(outer: int) -> None:
    dp = dataplane(outer, 4, "gue")
    at = 20 if outer == 4 else 40
    ports = []
    for source in (4000, 4000, 4001, 4002, 4003):
        packet = request(4, UDP(sport=source, dport=80))
        ports.append(process(dp, bytes(packet))[1][at : at + 2])
    assert ports[0] == ports[1]
    assert len(set(ports)) > 2


def test_ids_of_packets_that_may_be_fragmented_differ() -> None:
    dp = dataplane(4, 4)
    packets = [process(dp, bytes(request(4, df=False)))[1] for _ in range(8)]
    assert len({packet[4:6] for packet in packets}) > 4


@pytest.mark.parametrize(("kind", "checksum"), KINDS, ids=NAMES)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_partial_checksum_is_completed(
    family: int, protocol: str, kind: Any, checksum: bool
) -> None:
    dp = dataplane(4, family, kind, checksum)
    body = TCP(sport=4000, dport=80, flags="S") if protocol == "tcp" else UDP(sport=4000, dport=80)
    packet = request(family, body / b"payload")
    unfinished = packet.copy()
    unfinished[body.__class__].chksum = 0x1234  # what stands there says nothing
    batch = svcdp.PacketBatch(1)
    batch.append(bytes(unfinished))
    packets_of(batch)[0].flags = CSUM_PARTIAL
    dp.process_batch(batch, 0)
    assert not packets_of(batch)[0].flags & CSUM_PARTIAL
    assert batch[0] == wrapped(4, packet, kind, checksum, batch[0])


@pytest.mark.parametrize(("outer", "inner"), FAMILIES)
@pytest.mark.parametrize("ttl", [0, 1])
def test_no_hop_left(outer: int, inner: int, ttl: int) -> None:
    packet = bytes(request(inner, ttl=ttl))
    result, answer = process(dataplane(outer, inner), packet)
    assert (result.verdict, result.reason) == (Verdict.REJECT, Reason.TIME_EXCEEDED)
    error = IP(answer) if inner == 4 else IPv6(answer)
    assert (error.src, error.dst) == (VIRTUAL[inner], CLIENT[inner])
    if inner == 4:
        assert (error[ICMP].type, error[ICMP].code, error.tos) == (11, 0, 0xC0)
        assert answer[28:] == packet
    else:
        assert error[ICMPv6TimeExceeded].code == 0
        assert answer[48:] == packet


@pytest.mark.parametrize(("outer", "inner"), FAMILIES)
def test_no_headroom(outer: int, inner: int) -> None:
    needed = 20 if outer == 4 else 40
    packet = bytes(request(inner))
    result, _ = process(dataplane(outer, inner), packet, needed - 1)
    assert (result.verdict, result.reason) == (Verdict.DROP, Reason.NO_HEADROOM)
    result, got = process(dataplane(outer, inner), packet, needed)
    assert result.verdict == Verdict.FORWARD
    assert len(got) == len(packet) + needed


@pytest.mark.parametrize(("kind", "checksum"), KINDS, ids=NAMES)
@pytest.mark.parametrize(("outer", "inner"), FAMILIES)
def test_too_big(outer: int, inner: int, kind: Any, checksum: bool) -> None:
    mtu = 1500
    inside = mtu - (20 if outer == 4 else 40) - EXTRA.get((kind, checksum), 12)
    dp = dataplane(outer, inner, kind, checksum, mtu)
    room = inside - len(request(inner)) - 0
    body = TCP(sport=4000, dport=80, flags="S")
    result, got = process(dp, bytes(request(inner, body / bytes(room))))
    assert (result.verdict, len(got)) == (Verdict.FORWARD, mtu)
    packet = request(inner, body / bytes(room + 1))
    result, answer = process(dp, bytes(packet))
    assert (result.verdict, result.reason) == (Verdict.REJECT, Reason.TOO_BIG)
    error = IP(answer) if inner == 4 else IPv6(answer)
    assert (error.src, error.dst) == (VIRTUAL[inner], CLIENT[inner])
    if inner == 4:
        # The quoted packet has lost a hop already (ip_vs_xmit.c, decrement_ttl).
        packet.ttl -= 1
        icmp = error[ICMP]
        assert (icmp.type, icmp.code, icmp.nexthopmtu, error.tos) == (3, 4, inside, 0xC0)
        assert answer[28:] == bytes(packet)[:548]
    else:
        packet.hlim -= 1
        assert error[ICMPv6PacketTooBig].mtu == inside
        assert answer[48:] == bytes(packet)[:1232]


def test_what_may_be_fragmented_goes() -> None:
    big = UDP(sport=4000, dport=80) / bytes(2000)
    assert process(dataplane(4, 4, mtu=1500), bytes(request(4, big, df=False)))[1]
    # Without path MTU discovery the outer packet may be fragmented.
    dp = dataplane(4, 4, mtu=1500, settings=Settings(pmtu_disc=False))
    _, got = process(dp, bytes(request(4, big, df=True)))
    assert got[6] == 0
    assert svcdp.decapsulate(got) is not None
    # Not so of IPv6.
    dp = dataplane(4, 6, mtu=1500, settings=Settings(pmtu_disc=False))
    assert process(dp, bytes(request(6, big)))[0].reason == Reason.TOO_BIG


@pytest.mark.parametrize(
    ("outer", "inner", "mtu", "verdict"),
    [
        (4, 4, 87, Verdict.DROP),  # less than 68 inside (ip_vs_xmit.c)
        (4, 4, 88, Verdict.FORWARD),
        (6, 6, 1319, Verdict.DROP),  # less than 1280
        (6, 6, 1320, Verdict.FORWARD),
        (6, 4, 1319, Verdict.DROP),
    ],
)
def test_paths_too_narrow_for_a_tunnel(outer: int, inner: int, mtu: int, verdict: Verdict) -> None:
    result, _ = process(dataplane(outer, inner, mtu=mtu), bytes(request(inner)))
    assert result.verdict == verdict
    if verdict == Verdict.DROP:
        assert result.reason == Reason.TOO_BIG


def test_ipv6_is_never_told_less_than_its_least() -> None:
    """1290 - 20 bytes do not carry what every IPv6 path must: the outer packet has no DF."""
    dp = dataplane(4, 6, mtu=1290)
    fits = UDP(sport=4000, dport=80) / bytes(1280 - 48)
    assert process(dp, bytes(request(6, fits)))[0].verdict == Verdict.FORWARD
    _, answer = process(dp, bytes(request(6, fits / b"more")))
    assert IPv6(answer)[ICMPv6PacketTooBig].mtu == 1280


def test_a_packet_longer_than_ip_can_say() -> None:
    body = UDP(sport=4000, dport=80) / bytes(65535 - 28)
    result, _ = process(dataplane(4, 4), bytes(request(4, body, df=False)))
    assert (result.verdict, result.reason) == (Verdict.DROP, Reason.TOO_BIG)


@pytest.mark.parametrize("family", [4, 6])
def test_segments_are_made_to_fit(family: int) -> None:
    dp = dataplane(4, family, mtu=1500, mss_clamp=True)
    options: list[Any] = [("SAckOK", b""), ("MSS", 1460), ("NOP", None), ("WScale", 7)]
    packet = request(family, TCP(sport=4000, dport=80, flags="S", options=options))
    _, got = process(dp, bytes(packet))
    options[1] = ("MSS", 1480 - (40 if family == 4 else 60))
    expected = request(family, TCP(sport=4000, dport=80, flags="S", options=options))
    assert got == wrapped(4, expected, "ipip", False, got)


@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("family", [4, 6])
def test_the_mss_at_any_offset(family: int, offset: int) -> None:
    dp = dataplane(6, family, mtu=1500, mss_clamp=True)
    options: list[Any] = [("NOP", None)] * offset + [("MSS", 9000)]
    _, got = process(dp, bytes(request(family, TCP(sport=1, dport=80, flags="S", options=options))))
    options[-1] = ("MSS", 1460 - (40 if family == 4 else 60))
    expected = request(family, TCP(sport=1, dport=80, flags="S", options=options))
    assert got == wrapped(6, expected, "ipip", False, got)


@pytest.mark.parametrize(
    "options",
    [
        b"\x02\x04\x00",
        b"\x02\x03\x23\x28",
        b"\x02\x00\x00\x00",
        b"\x05\xff\x02\x04",
        b"\x00\x02\x04\x23",
    ],
)
def test_options_that_contradict_themselves(options: bytes) -> None:
    dp = dataplane(4, 4, mtu=1500, mss_clamp=True)
    options = options.ljust(4, b"\x23")
    segment = bytes(request(4, TCP(sport=1, dport=80, flags="S", dataofs=6) / options))
    _, got = process(dp, segment)
    assert got[60:] == segment[40:]


# -- errors about tunnels ----------------------------------------------------------------------


def reported(outer: int, error: Packet, about: bytes, sender: str | None = None) -> bytes:
    return bytes(header(outer, sender or ROUTER[outer], NODE[outer]) / error / Raw(about))


def sent(
    dp: svcdp.Dataplane, inner: int, *, df: bool = True, size: int = 1200
) -> tuple[bytes, bytes]:
    """A tunnel packet on its way, and the packet inside."""
    body = UDP(sport=4000, dport=80) / bytes(size)
    _, got = process(dp, bytes(request(inner, body, df=df)))
    inside = svcdp.decapsulate(got)
    assert inside is not None
    return got, inside


@pytest.mark.parametrize(("kind", "checksum"), KINDS, ids=NAMES)
@pytest.mark.parametrize(("outer", "inner"), FAMILIES)
def test_a_narrower_path_is_told_to_the_client(
    outer: int, inner: int, kind: Any, checksum: bool
) -> None:
    dp = dataplane(outer, inner, kind, checksum)
    packet, inside = sent(dp, inner, size=1400)
    told = 1400 - (20 if outer == 4 else 40) - EXTRA.get((kind, checksum), 12)
    error = ICMP(type=3, code=4, nexthopmtu=1400) if outer == 4 else ICMPv6PacketTooBig(mtu=1400)
    quote = packet[: 576 - 28] if outer == 4 else packet[: 1280 - 48]
    result, answer = process(dp, reported(outer, error, quote), 0)
    assert (result.verdict, result.reason) == (Verdict.FORWARD, Reason.RELATED)
    assert result.next_hop == CLIENT[inner]
    quoted = inside[: len(quote) - (len(packet) - len(inside))]
    if inner == 4:
        head = IP(src=VIRTUAL[4], dst=CLIENT[4], tos=0xC0, flags="DF", id=0)
        expected = head / ICMP(type=3, code=4, nexthopmtu=told) / Raw(quoted[:548])
    else:
        head = IPv6(src=VIRTUAL[6], dst=CLIENT[6])
        expected = head / ICMPv6PacketTooBig(mtu=told) / Raw(quoted[:1232])
    assert answer == bytes(expected)


@pytest.mark.parametrize(
    ("outer", "inner", "error", "expected"),
    [
        # IPv4 in IPv4 as the kernel does: the same type and code.
        (4, 4, ICMP(type=3, code=1), ICMP(type=3, code=1)),
        (4, 4, ICMP(type=3, code=2), ICMP(type=3, code=2)),
        (4, 4, ICMP(type=11, code=0), ICMP(type=11, code=0)),
        # RFC 4213, 3.4 and RFC 2473, 8: the other end is unreachable.
        (4, 6, ICMP(type=3, code=1), ICMPv6DestUnreach(code=3)),
        (4, 6, ICMP(type=11, code=0), ICMPv6DestUnreach(code=3)),
        (6, 6, ICMPv6DestUnreach(code=0), ICMPv6DestUnreach(code=3)),
        (6, 6, ICMPv6TimeExceeded(), ICMPv6DestUnreach(code=3)),
        (6, 4, ICMPv6DestUnreach(code=4), ICMP(type=3, code=1)),
        (6, 4, ICMPv6TimeExceeded(), ICMP(type=3, code=1)),
        # Routers older than RFC 1191 tell no MTU, and nobody tells IPv6 less than 1280.
        (4, 4, ICMP(type=3, code=4, nexthopmtu=0), ICMP(type=3, code=4, nexthopmtu=0)),
        (4, 4, ICMP(type=3, code=4, nexthopmtu=80), ICMP(type=3, code=4, nexthopmtu=68)),
        (4, 6, ICMP(type=3, code=4, nexthopmtu=600), ICMPv6PacketTooBig(mtu=1280)),
        (6, 6, ICMPv6PacketTooBig(mtu=1300), ICMPv6PacketTooBig(mtu=1280)),
    ],
    ids=str,
)
def test_other_errors(outer: int, inner: int, error: Packet, expected: Packet) -> None:
    dp = dataplane(outer, inner)
    packet, inside = sent(dp, inner, size=100)
    result, answer = process(dp, reported(outer, error, packet), 0)
    assert (result.verdict, result.reason) == (Verdict.FORWARD, Reason.RELATED)
    if inner == 4:
        head: Packet = IP(src=VIRTUAL[4], dst=CLIENT[4], tos=0xC0, flags="DF", id=0)
    else:
        head = IPv6(src=VIRTUAL[6], dst=CLIENT[6])
    assert answer == bytes(head / expected / Raw(inside))


@pytest.mark.parametrize(
    ("outer", "inner", "error", "df"),
    [
        # The client did not ask; this host fragments from now on, once its stack knows.
        (4, 4, ICMP(type=3, code=4, nexthopmtu=1000), False),
        (6, 4, ICMPv6PacketTooBig(mtu=1000), False),
        # RFC 6633, and what concerns our own header.
        (4, 4, ICMP(type=4), True),
        (4, 4, ICMP(type=12, ptr=1), True),
        (6, 6, ICMPv6ParamProblem(code=1, ptr=6), True),
    ],
    ids=str,
)
def test_errors_for_this_host(outer: int, inner: int, error: Packet, df: bool) -> None:
    dp = dataplane(outer, inner)
    packet, _ = sent(dp, inner, df=df)
    message = reported(outer, error, packet)
    result, answer = process(dp, message, 0)
    assert (result.verdict, result.reason) == (Verdict.PASS, Reason.RELATED)
    assert answer == message


@pytest.mark.parametrize(("kind", "checksum"), KINDS, ids=NAMES)
@pytest.mark.parametrize(("outer", "inner"), FAMILIES)
def test_a_damaged_error_is_dropped(outer: int, inner: int, kind: Any, checksum: bool) -> None:
    dp = dataplane(outer, inner, kind, checksum)
    packet, _ = sent(dp, inner)
    error = ICMP(type=3, code=1) if outer == 4 else ICMPv6DestUnreach()
    message = bytearray(reported(outer, error, packet))
    message[-1] ^= 1
    result, _ = process(dp, bytes(message), 0)
    assert (result.verdict, result.reason) == (Verdict.DROP, Reason.CHECKSUM)


@pytest.mark.parametrize(("outer", "inner"), FAMILIES)
@pytest.mark.parametrize("part", ["source", "destination", "kind", "flow"])
def test_errors_about_tunnels_of_others(outer: int, inner: int, part: str) -> None:
    dp = dataplane(outer, inner)
    packet, inside = sent(dp, inner, size=100)
    kind = IP if outer == 4 else IPv6
    about = kind(packet)
    if part == "source":
        about.src = ROUTER[outer]
    elif part == "destination":
        about.dst = ROUTER[outer]
    elif part == "kind":
        name, ether = ("proto" if outer == 4 else "nh"), (0x0800 if inner == 4 else 0x86DD)
        about = header(outer, NODE[outer], REAL[outer], **{name: 47})
        about = about / GRE(proto=ether) / Raw(inside)
    else:
        about[UDP].sport = 9
    if outer == 4:
        del about.chksum
    error = ICMP(type=3, code=1) if outer == 4 else ICMPv6DestUnreach()
    message = reported(outer, error, bytes(about))
    result, answer = process(dp, message, 0)
    assert result.verdict == Verdict.PASS
    assert answer == message


@pytest.mark.parametrize(("outer", "inner"), FAMILIES)
def test_a_quote_that_is_cut_short(outer: int, inner: int) -> None:
    dp = dataplane(outer, inner)
    packet, inside = sent(dp, inner, size=100)
    least = len(packet) - len(inside) + (20 if inner == 4 else 40) + 4
    error = ICMP(type=3, code=1) if outer == 4 else ICMPv6DestUnreach()
    for size in range(20, least + 8):
        result, _ = process(dp, reported(outer, error, packet[:size]), 0)
        assert (result.verdict == Verdict.FORWARD) == (size >= least)


def test_a_balanced_tunnel_is_not_ours() -> None:
    """GUE to a service is UDP like any other: an error about it goes to who sent it."""
    dp = svcdp.Dataplane(64, 1, clock=lambda: 0)
    with dp.transaction() as tx:
        tx.service(VIRTUAL[4], GUE_PORT, "udp").add(REAL[4], GUE_PORT)
    inside = bytes(IP(src="10.7.7.7", dst="10.8.8.8") / UDP() / b"x")
    body = UDP(sport=4000, dport=GUE_PORT) / Raw(bytes([0, 4, 0, 0]) + inside)
    forwarded = bytearray(bytes(IP(src=CLIENT[4], dst=VIRTUAL[4]) / body))
    assert dp.process(forwarded, 0).verdict == Verdict.FORWARD
    error = IP(src=REAL[4], dst=CLIENT[4]) / ICMP(type=3, code=3) / Raw(bytes(forwarded))
    result, answer = process(dp, bytes(error), 0)
    assert (result.verdict, result.reason) == (Verdict.FORWARD, Reason.RELATED)
    assert IP(answer).src == VIRTUAL[4]
    assert IP(answer).dst == CLIENT[4]
