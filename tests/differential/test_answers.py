"""Answers to rejected packets: RFC 9293 3.10.7.1, RFC 792 and RFC 4443, read by scapy."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import GRE
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Packet
from scapy_oracle import CLIENT, REAL, VIRTUAL, header

import svcdp
from svcdp import Reason, Verdict


@pytest.fixture
def dp() -> svcdp.Dataplane:
    """Services that nobody serves, and one that somebody does."""
    dp = svcdp.Dataplane(64, 1, clock=lambda: 0)
    with dp.transaction() as tx:
        for family in (4, 6):
            for protocol in ("tcp", "udp", "sctp"):
                tx.service(VIRTUAL[family], 80, protocol)
            tx.service(VIRTUAL[family], 81, "tcp").add(REAL[family], 81)
    return dp


def answered(dp: svcdp.Dataplane, packet: Packet, reason: Reason, padding: bytes = b"") -> Packet:
    """The answer, whose checksums scapy has confirmed."""
    sent = bytearray(bytes(packet) + padding)
    before = bytes(sent)
    result = dp.process(sent, 0)
    assert (result.verdict, result.reason) == (Verdict.REJECT, reason)
    assert bytes(sent) == before
    assert result.packet is not None
    data = bytes(result.packet)
    assert dp.answer(before) == data
    answer = packet.__class__(data)
    at = 20 if answer.version == 4 else 40
    head = answer.__class__(data[:at])
    if at == 20:
        del head.len, head.chksum
    else:
        del head.plen
    if answer.haslayer(TCP):
        body = answer[TCP].copy()
        del body.chksum
    else:
        # As bytes: scapy would mend what is quoted.
        error = ICMP(type=3, code=3) if at == 20 else ICMPv6DestUnreach(code=4)
        body = error / data[at + 8 :]
    assert bytes(head / body) == data
    assert (answer.src, answer.dst) == (packet.dst, packet.src)
    return answer


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("flags", "payload", "reset"),
    [
        # (sequence number, acknowledgement, flags) of RFC 9293: with ACK <SEQ=SEG.ACK><RST>,
        # without <SEQ=0><ACK=SEG.SEQ+SEG.LEN><RST,ACK>; SYN and FIN count as one each.
        ("S", b"", (0, 1001, "RA")),
        ("S", b"fast open", (0, 1010, "RA")),
        ("SF", b"x", (0, 1003, "RA")),
        ("SA", b"", (77, 0, "R")),
    ],
)
def test_a_reset_from_a_service_without_destinations(
    dp: svcdp.Dataplane, family: int, flags: str, payload: bytes, reset: tuple[int, int, str]
) -> None:
    segment = TCP(sport=4000, dport=80, flags=flags, seq=1000, ack=77, options=[("NOP", None)] * 4)
    packet = header(family, CLIENT[family], VIRTUAL[family]) / segment / payload
    answer = answered(dp, packet, Reason.NO_DESTINATION, padding=b"pad")
    tcp = answer[TCP]
    assert (tcp.sport, tcp.dport) == (80, 4000)
    assert (tcp.seq, tcp.ack, str(tcp.flags)) == reset
    assert (tcp.dataofs, tcp.window, bytes(tcp.payload)) == (5, 0, b"")


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("flags", "reset"),
    [
        ("A", (77, 0, "R")),
        ("PA", (77, 0, "R")),
        ("FA", (77, 0, "R")),
        ("F", (0, 1004, "RA")),
        ("", (0, 1003, "RA")),
    ],
)
def test_a_reset_for_an_unknown_connection(
    dp: svcdp.Dataplane, family: int, flags: str, reset: tuple[int, int, str]
) -> None:
    segment = TCP(sport=4000, dport=81, flags=flags, seq=1000, ack=77) / b"abc"
    answer = answered(
        dp, header(family, CLIENT[family], VIRTUAL[family]) / segment, Reason.NO_CONNECTION
    )
    assert (answer[TCP].seq, answer[TCP].ack, str(answer[TCP].flags)) == reset


def test_sequence_numbers_wrap(dp: svcdp.Dataplane) -> None:
    segment = TCP(sport=1, dport=80, flags="S", seq=0xFFFFFFFF)
    assert (
        answered(dp, IP(src=CLIENT[4], dst=VIRTUAL[4]) / segment, Reason.NO_DESTINATION)[TCP].ack
        == 0
    )


@pytest.mark.parametrize("body", [UDP(sport=4000, dport=80), SCTP(sport=4000, dport=80)])
@pytest.mark.parametrize("size", [0, 1, 500, 547 - 28 + 1, 1231, 1400, 9000])
@pytest.mark.parametrize("family", [4, 6])
def test_port_unreachable(dp: svcdp.Dataplane, family: int, size: int, body: Packet) -> None:
    payload = b"q" * size if isinstance(body, UDP) else bytes(SCTPChunkInit()) + b"q" * size
    packet = header(family, CLIENT[family], VIRTUAL[family]) / body / payload
    answer = answered(dp, packet, Reason.NO_DESTINATION, padding=b"pad")
    whole = bytes(packet)
    if family == 4:
        # RFC 1812 4.3.2.3: as much as fits into 576 bytes.
        assert (answer[ICMP].type, answer[ICMP].code) == (3, 3)
        assert bytes(answer)[28:] == whole[: 576 - 28]
    else:
        # RFC 4443 2.4 (c): as much as fits into the minimum MTU.
        assert (answer[ICMPv6DestUnreach].type, answer[ICMPv6DestUnreach].code) == (1, 4)
        assert bytes(answer)[48:] == whole[: 1280 - 48]


def test_options_and_extension_headers(dp: svcdp.Dataplane) -> None:
    extended = IPv6(src=CLIENT[6], dst=VIRTUAL[6]) / IPv6ExtHdrDestOpt() / TCP(dport=80, flags="S")
    assert answered(dp, extended, Reason.NO_DESTINATION)[TCP].sport == 80


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        ("224.0.0.1", Verdict.REJECT),
        ("255.255.255.255", Verdict.REJECT),
        ("0.0.0.0", Verdict.REJECT),
        ("ff02::1", Verdict.REJECT),
        ("::", Verdict.REJECT),
    ],
)
@pytest.mark.parametrize("body", [TCP(dport=80, flags="S"), UDP(dport=80)], ids=["tcp", "udp"])
def test_not_to_an_address_that_is_no_host(
    dp: svcdp.Dataplane, source: str, verdict: Verdict, body: Packet
) -> None:
    family = 6 if ":" in source else 4
    result = dp.process(bytearray(bytes(header(family, source, VIRTUAL[family]) / body)), 0)
    assert result.verdict == verdict
    assert result.packet is None


@pytest.mark.parametrize("address", ["224.1.2.3", "255.255.255.255", "ff05::3"])
def test_not_for_packets_to_a_group(address: str) -> None:
    dp = svcdp.Dataplane(64, 1, clock=lambda: 0)
    family = 6 if ":" in address else 4
    with dp.transaction() as tx:
        tx.service(address, 80, "udp")
    packet = header(family, CLIENT[family], address) / UDP(dport=80)
    result = dp.process(bytearray(bytes(packet)), 0)
    assert (result.verdict, result.packet) == (Verdict.REJECT, None)


def test_not_to_a_reset_nor_to_an_error(dp: svcdp.Dataplane) -> None:
    reset = IP(src=CLIENT[4], dst=VIRTUAL[4]) / TCP(dport=81, flags="R")
    result = dp.process(bytearray(bytes(reset)), 0)
    assert (result.verdict, result.reason) == (Verdict.DROP, Reason.NO_CONNECTION)
    assert result.packet is None
    assert dp.answer(bytes(reset)) is None
    error = IP(src=CLIENT[4], dst=VIRTUAL[4]) / ICMP(type=3, code=3) / bytes(reset)
    assert dp.answer(bytes(error)) is None
    assert dp.answer(b"") is None
    assert dp.answer(b"\x45") is None


def test_drop_says_nothing() -> None:
    dp = svcdp.Dataplane(64, 1, clock=lambda: 0)
    with dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, "tcp", rules=(svcdp.SourceRule(on_empty="drop"),))
    packet = IP(src=CLIENT[4], dst=VIRTUAL[4]) / TCP(dport=80, flags="S")
    result = dp.process(bytearray(bytes(packet)), 0)
    assert (result.verdict, result.reason) == (Verdict.DROP, Reason.NO_DESTINATION)
    assert result.packet is None


@pytest.mark.parametrize(("protocol", "family"), [("tcp", 4), ("tcp", 6), ("udp", 4)])
def test_unreachable_for_tcp_too(protocol: str, family: int) -> None:
    dp = svcdp.Dataplane(64, 1, clock=lambda: 0)
    with dp.transaction() as tx:
        rules = (svcdp.SourceRule(on_empty="unreachable"),)
        tx.service(VIRTUAL[family], 80, protocol, rules=rules)
    body = TCP(dport=80, flags="S") if protocol == "tcp" else UDP(dport=80)
    packet = bytes(header(family, CLIENT[family], VIRTUAL[family]) / body)
    batch = svcdp.PacketBatch(2)
    batch.append(packet)
    batch.append(b"no packet")
    dp.process_batch(batch, 0)
    result = dp.process(bytearray(packet), 0)
    assert result.packet is not None
    assert batch.answer(0) == bytes(result.packet)
    assert batch.answer(1) is None
    if family == 4:
        error = IP(bytes(result.packet))
        assert (error[ICMP].type, error[ICMP].code, error.tos) == (3, 3, 0xC0)
        assert bytes(error)[28:] == packet
    else:
        error = IPv6(bytes(result.packet))
        assert error[ICMPv6DestUnreach].code == 4
        assert bytes(error)[48:] == packet


def test_how_many_answers_a_second() -> None:
    """RFC 4443, 2.4 (f): 50 at once, and then at the rate that was set."""
    dp = svcdp.Dataplane(64, 1, clock=lambda: 0, settings=svcdp.Settings(answer_rate=100))
    with dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, "udp")
    packet = bytes(IP(src=CLIENT[4], dst=VIRTUAL[4]) / UDP(dport=80))

    def answers(count: int, now: int) -> int:
        results = [dp.process(bytearray(packet), now) for _ in range(count)]
        assert {result.reason for result in results} == {Reason.NO_DESTINATION}
        verdicts = [result.verdict for result in results]
        assert set(verdicts) <= {Verdict.REJECT, Verdict.DROP}
        return verdicts.count(Verdict.REJECT)

    second = 10**9
    assert answers(200, second) == 50
    assert answers(10, second + second // 200) == 0
    assert answers(10, second + second // 100) == 1
    assert answers(200, 2 * second) == 50
    # A clock that goes back does not silence it.
    assert answers(1, 0) == 1


# -- where nobody is but services: pings, and protocols that services do not have ------------------

NETWORKS = {4: ("198.51.100.0/24", "198.51.100.77"), 6: ("2001:db8:77::/64", "2001:db8:77::7")}


def turned(address: str, on_empty: str, *sources: str) -> svcdp.ServiceSpec:
    rule = svcdp.SourceRule(sources=sources, on_empty=on_empty)  # type: ignore[arg-type]
    return svcdp.ServiceSpec(address, 0, "any", rules=(rule,))


def pings(target: str) -> list[Packet]:
    """Echo requests, and packets of other protocols."""
    if ":" in target:
        ip = IPv6(src=CLIENT[6], dst=target)
        found = [ip / ICMPv6EchoRequest(id=7), ip / IPv6ExtHdrDestOpt() / ICMPv6EchoRequest()]
    else:
        ip = IP(src=CLIENT[4], dst=target)
        found = [ip / ICMP(id=7), IP(src=CLIENT[4], dst=target, options=[IPOption_NOP()]) / ICMP()]
    return [*found, ip / ip / UDP(), ip / GRE() / b"x"]


@pytest.mark.parametrize("family", [4, 6])
def test_pings_of_services(family: int) -> None:
    """Refused as what has ports, where the address is a service's; else silence."""
    dp = svcdp.Dataplane(64, 1, clock=lambda: 0)
    network, nobody = NETWORKS[family]
    dp.apply([turned(network, "drop"), turned(VIRTUAL[family], "reject")])
    for packet in pings(VIRTUAL[family]):
        answer = answered(dp, packet, Reason.NO_DESTINATION)
        assert bytes(answer)[-len(packet) :] == bytes(packet), "all of it is quoted"
    for packet in pings(nobody):
        result = dp.process(bytearray(bytes(packet)))
        assert (result.verdict, result.reason) == (Verdict.DROP, Reason.NO_DESTINATION)
    for packet in pings(REAL[family]):
        result = dp.process(bytearray(bytes(packet)))
        assert (result.verdict, result.reason) == (Verdict.PASS, Reason.PROTOCOL)
    dp.apply([turned(network, "drop", NETWORKS[family][0])])
    result = dp.process(bytearray(bytes(pings(nobody)[0])))
    assert (result.verdict, result.reason) == (Verdict.DROP, Reason.SOURCE_RANGE)


IP4, IP6 = IP(src=CLIENT[4], dst=VIRTUAL[4]), IPv6(src=CLIENT[6], dst=VIRTUAL[6])
ROUTE = IPv6ExtHdrRouting(addresses=[REAL[6]], segleft=1)


@pytest.mark.parametrize(
    "packet",
    [
        *(IP4 / ICMP(type=kind) for kind in (0, 5, 9, 13)),
        IP4 / ICMP(type=3) / IP4 / ICMP(),
        IP6 / ICMPv6EchoReply(),
        IP6 / ICMPv6ND_NS(tgt=VIRTUAL[6]),
        IP6 / ICMPv6DestUnreach() / IP6 / ICMPv6EchoRequest(),
        IP6 / ROUTE / ICMPv6EchoRequest(),
    ],
    ids=repr,
)
def test_what_is_no_ping_of_a_service(packet: Packet) -> None:
    """Answers, errors, what the kernel has to do with neighbours; and who is on his way still."""
    dp = svcdp.Dataplane(64, 1, clock=lambda: 0)
    dp.apply([turned(VIRTUAL[family], "reject") for family in (4, 6)])
    data = bytes(packet)
    result = dp.process(bytearray(data))
    assert result.verdict == Verdict.PASS
    assert dp.answer(data) is None
