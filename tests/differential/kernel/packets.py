"""Packets of scenarios, built by scapy."""

from __future__ import annotations

from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrFragment,
    fragment6,
)
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Packet, Raw
from topology import CLIENT, VIRTUAL, server

__all__ = [
    "from_client",
    "from_server",
    "header",
    "icmp_errors",
    "init",
    "padded",
    "pieces",
    "sip",
    "syn",
    "udp",
]

HEADER = {4: 20, 6: 40}
#: Bytes of a fragment.
PIECE = {4: 600, 6: 1280}


def header(family: int, source: str, destination: str, **fields: Any) -> Packet:
    """An IP header; ``ttl`` and ``tos`` are of both families, ``df`` and ``id`` of IPv4."""
    ttl, tos = fields.pop("ttl", 64), fields.pop("tos", 0)
    if family == 6:
        fields = {name: value for name, value in fields.items() if name not in ("df", "id")}
        return IPv6(src=source, dst=destination, hlim=ttl, tc=tos, **fields)
    flags = "DF" if fields.pop("df", False) else 0
    id = fields.pop("id", 0x1234)
    return IP(src=source, dst=destination, ttl=ttl, tos=tos, flags=flags, id=id, **fields)


def from_client(family: int, body: Packet, *, to: str = "", **fields: Any) -> Packet:
    return header(family, CLIENT[family], to or VIRTUAL[family], **fields) / body


def from_server(family: int, body: Packet, *, number: int = 1, **fields: Any) -> Packet:
    return header(family, server(number, family), CLIENT[family], **fields) / body


def syn(port: int, to: int = 80, flags: str = "S", payload: bytes = b"") -> Packet:
    options = [("MSS", 1460), ("NOP", None), ("WScale", 7)] if "S" in flags else []
    return TCP(sport=port, dport=to, flags=flags, seq=1000, ack=2000, options=options) / Raw(
        payload
    )


def init(port: int, to: int = 80) -> Packet:
    return SCTP(sport=port, dport=to, tag=7) / SCTPChunkInit(init_tag=9)


def padded(packet: Packet, length: int) -> Packet:
    """The packet with so much payload that it has this length."""
    return packet / Raw(b"\x5a" * (length - len(packet)))


def pieces(packet: Packet) -> list[bytes]:
    """Its fragments, which the source port, if any, tells from those of others in IPv6."""
    number = getattr(packet.payload, "sport", 77)
    packet = packet.__class__(bytes(packet))
    if packet.version == 4:
        return [bytes(piece) for piece in fragment(packet, PIECE[4])]
    head, body = packet.copy(), packet.payload
    head.remove_payload()
    del head.nh  # that of the header which comes between them
    extended = head / IPv6ExtHdrFragment(id=number) / body
    return [bytes(piece) for piece in fragment6(extended, PIECE[6])]


def icmp_errors(source: str, about: Packet, quoted: bytes = b"", **fields: Any) -> list[Packet]:
    """Every kind of ICMP error, about a packet, to its sender."""
    bodies: list[Packet]
    if about.version == 4:
        bodies = [
            ICMP(type=3, code=1),
            ICMP(type=3, code=3),
            ICMP(type=3, code=4, nexthopmtu=1300),
            ICMP(type=4),
            ICMP(type=5, gw="192.0.2.77"),
            ICMP(type=11),
        ]
        data = quoted or bytes(about)[:72]
    else:
        bodies = [
            ICMPv6DestUnreach(code=4),
            ICMPv6PacketTooBig(mtu=1300),
            ICMPv6TimeExceeded(),
            ICMPv6ParamProblem(code=1),
        ]
        data = quoted or bytes(about)[:200]
    outer = header(about.version, source, about.src, **fields)
    return [outer / body / Raw(data) for body in bodies]


def udp(port: int, to: int = 80, payload: bytes = b"hello", **fields: Any) -> Packet:
    return UDP(sport=port, dport=to, **fields) / Raw(payload)


def sip(port: int, call: str, form: str = "crlf", to: int = 5060, before: str = "") -> Packet:
    """A request of a call; ``form`` is of its lines and of its Call-ID, and ``before`` a line
    before it.
    """
    end = "\n" if form == "lf" else "\r\n"
    name = "i" if form == "short" else "Call-ID"
    lines = ["OPTIONS sip:a@x SIP/2.0", before or "Via: SIP/2.0/UDP x", f"{name}: {call}"]
    return UDP(sport=port, dport=to) / Raw(
        "".join(f"{line}{end}" for line in [*lines, "CSeq: 1 OPTIONS", ""]).encode()
    )
