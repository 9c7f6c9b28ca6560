"""Packets written and read without svcdp and without scapy: quick enough for many of them."""

from __future__ import annotations

import ipaddress
import struct
from typing import NamedTuple

ICMP, TCP, UDP, ICMP6, SCTP = 1, 6, 17, 58, 132
NUMBERS = {"tcp": TCP, "udp": UDP, "sctp": SCTP}
NAMES = {number: name for name, number in NUMBERS.items()}
FLAGS = {"F": 1, "S": 2, "R": 4, "P": 8, "A": 16}
#: Where the checksum is in the transport header.
CHECKSUM_AT = {TCP: 16, UDP: 6, ICMP: 2, ICMP6: 2}
#: What begins an SCTP association (RFC 9260, 3.3.2).
INIT_CHUNK = struct.pack("!BBHIIHHI", 1, 0, 20, 7, 65535, 1, 1, 1)


class Wire(NamedTuple):
    """What a packet's headers say."""

    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int


def internet_checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC32C = _crc32c_table()


def crc32c(data: bytes) -> int:
    """RFC 9260, appendix A."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def pseudo_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    if len(source) == 4:
        return source + destination + struct.pack("!HH", protocol, length)
    return source + destination + struct.pack("!II", length, protocol)


def with_checksum(source: bytes, destination: bytes, protocol: int, transport: bytes) -> bytes:
    """The transport header and payload with the checksum that they should have."""
    if protocol == SCTP:
        body = transport[:8] + bytes(4) + transport[12:]
        return body[:8] + struct.pack("<I", crc32c(body)) + body[12:]
    at = CHECKSUM_AT[protocol]
    body = transport[:at] + bytes(2) + transport[at + 2 :]
    pseudo = b"" if protocol == ICMP else pseudo_header(source, destination, protocol, len(body))
    checksum = internet_checksum(pseudo + body)
    if protocol == UDP and checksum == 0:
        checksum = 0xFFFF
    return body[:at] + struct.pack("!H", checksum) + body[at + 2 :]


def ip(source: str, destination: str, protocol: int, transport: bytes) -> bytearray:
    """An IP packet around a transport header, checksums included."""
    a, b = ipaddress.ip_address(source).packed, ipaddress.ip_address(destination).packed
    body = with_checksum(a, b, protocol, transport)
    if len(a) == 16:
        header = struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + a + b
        return bytearray(header + body)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, protocol, 0) + a + b
    header = header[:10] + struct.pack("!H", internet_checksum(header)) + header[12:]
    return bytearray(header + body)


def packet(
    protocol: str,
    source: str,
    source_port: int,
    destination: str,
    destination_port: int,
    flags: str = "S",
    payload: bytes = b"",
    *,
    numbers: tuple[int, int] = (1000, 2000),
) -> bytearray:
    """A packet of a flow; ``flags`` (letters of ``FLAGS``) and ``numbers`` (sequence and
    acknowledgment) are TCP's. SCTP begins an association where there is no payload."""
    ports = struct.pack("!HH", source_port, destination_port)
    if protocol == "tcp":
        bits = sum(FLAGS[flag] for flag in flags)
        transport = ports + struct.pack("!IIBBHHH", *numbers, 0x50, bits, 512, 0, 0)
    elif protocol == "udp":
        transport = ports + struct.pack("!HH", 8 + len(payload), 0)
    else:
        transport = ports + struct.pack("!II", 7, 0)
        payload = payload or INIT_CHUNK
    return ip(source, destination, NUMBERS[protocol], transport + payload)


def answer_to(data: bytes, flags: str = "SA") -> bytearray:
    """What the receiver of a TCP, UDP or SCTP packet sends back."""
    flow = read(data)
    return packet(
        NAMES[flow.protocol],
        flow.destination,
        flow.destination_port,
        flow.source,
        flow.source_port,
        flags,
    )


def icmp_error(about: bytes, sender: str, kind: int | None = None, code: int = 3) -> bytearray:
    """An ICMP error of ``sender`` to the source of a packet: port unreachable by default."""
    target = read(about).source
    if about[0] >> 4 == 4:
        return ip(sender, target, ICMP, struct.pack("!BBHI", kind or 3, code, 0, 0) + about[:100])
    if kind is None:
        kind, code = 1, 4
    return ip(sender, target, ICMP6, struct.pack("!BBHI", kind, code, 0, 0) + about[:200])


def transport_at(data: bytes) -> int:
    """Offset of the transport header, of a packet without IPv6 extension headers."""
    return (data[0] & 15) * 4 if data[0] >> 4 == 4 else 40


def read(data: bytes) -> Wire:
    """The 5-tuple of a packet without IPv6 extension headers."""
    at = transport_at(data)
    first, size, protocol = (12, 4, data[9]) if data[0] >> 4 == 4 else (8, 16, data[6])
    source, destination = (
        str(ipaddress.ip_address(bytes(data[start : start + size])))
        for start in (first, first + size)
    )
    ports = struct.unpack_from("!HH", data, at) if protocol in NUMBERS.values() else (0, 0)
    return Wire(protocol, source, ports[0], destination, ports[1])


def is_intact(data: bytes) -> bool:
    """Whether all checksums are right, of a packet without IPv6 extension headers or padding."""
    at = transport_at(data)
    body = bytes(data[at:])
    if data[0] >> 4 == 4:
        if internet_checksum(bytes(data[:at])) != 0:
            return False
        source, destination = data[12:16], data[16:20]
    else:
        source, destination = data[8:24], data[24:40]
    protocol = read(data).protocol
    return with_checksum(bytes(source), bytes(destination), protocol, body) == body
