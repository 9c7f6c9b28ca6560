"""What packets must look like after a rewrite, said by scapy."""

from __future__ import annotations

from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw

import svcdp

SECOND = 10**9
CLIENT = {4: "192.0.2.4", 6: "2001:db8::4"}
VIRTUAL = {4: "10.96.0.10", 6: "fd96::10"}
REAL = {4: "10.1.1.7", 6: "fd01::7"}
NODE = {4: "198.51.100.1", 6: "2001:db8:1::1"}
MASQUERADE_PORTS = (61000, 61099)
PROTOCOLS = {"tcp": TCP, "udp": UDP, "sctp": SCTP}


def ip_layer(packet: Packet) -> Packet:
    return packet[IP] if packet.haslayer(IP) else packet[IPv6]


def transport(packet: Packet) -> Packet:
    return next(packet[kind] for kind in (TCP, UDP, SCTP) if packet.haslayer(kind))


def header(family: int, source: str, destination: str, **fields: Any) -> Packet:
    """An IP header. ``ttl`` and ``tos`` for both families."""
    if family == 4:
        return IP(src=source, dst=destination, **fields)
    if "ttl" in fields:
        fields["hlim"] = fields.pop("ttl")
    if "tos" in fields:
        fields["tc"] = fields.pop("tos")
    fields.pop("id", None)
    return IPv6(src=source, dst=destination, **fields)


def rebuilt(packet: Packet, source: tuple[str, int], destination: tuple[str, int]) -> bytes:
    """The packet between these endpoints, with all checksums computed from scratch."""
    copy = packet.copy()
    ip_layer(copy).src, transport(copy).sport = source
    ip_layer(copy).dst, transport(copy).dport = destination
    if copy.haslayer(IP):
        del copy[IP].chksum
    del transport(copy).chksum
    return bytes(copy)


def rechecked(data: bytes) -> bytes:
    """The same packet with all checksums computed from scratch."""
    packet = IP(data) if data[0] >> 4 == 4 else IPv6(data)
    for layer in (IP, TCP, UDP, SCTP, ICMP):
        if packet.haslayer(layer):
            del packet[layer].chksum
    inner: Packet | None = packet
    while inner is not None and not isinstance(inner, Raw):
        if hasattr(inner, "cksum"):
            del inner.cksum
        inner = inner.payload or None
    return bytes(packet)


def dataplane(
    family: int,
    protocol: str,
    *,
    port: int = 80,
    real_port: int = 8080,
    masquerade: bool = False,
    **fields: Any,
) -> svcdp.Dataplane:
    """A dataplane with one service of one destination."""
    dp = svcdp.Dataplane(64, 1, clock=lambda: 0, masquerade_ports=MASQUERADE_PORTS)
    with dp.transaction() as tx:
        service = tx.service(
            VIRTUAL[family],
            port,
            protocol,
            masquerade_address=NODE[family],
            rules=(svcdp.SourceRule(masquerade=masquerade),),
            **fields,
        )
        service.add(REAL[family], real_port)
    return dp
