"""IP packets cut into fragments, and put together again (RFC 791, RFC 8200 section 4.5)."""

from __future__ import annotations

import struct

import wire

MORE = 0x2000


def fragment(
    data: bytes, offset: int, payload: bytes, more: bool, number: int = 7, before: bytes = b""
) -> bytes:
    """A fragment of the packet ``data`` with this much of its payload, from ``offset`` on.

    ``before`` are IPv6 extension headers, one of them at most, that all fragments carry.
    """
    if data[0] >> 4 == 4:
        head = struct.pack("!BBHHH", 0x45, 0, 20 + len(payload), number, offset // 8)
        head += data[8:10] + bytes(2) + data[12:20]
        if more:
            head = head[:6] + bytes([head[6] | MORE >> 8]) + head[7:]
        checksum = struct.pack("!H", wire.internet_checksum(head))
        return head[:10] + checksum + head[12:] + payload
    header = struct.pack("!BBHI", data[6], 0, offset | more, number)
    body = before + header + payload
    following = 60 if before else 44
    return data[:4] + struct.pack("!HB", len(body), following) + data[7:40] + body


def cut(data: bytes, size: int, number: int = 7, before: bytes = b"") -> list[bytes]:
    """Fragments of a packet without options, ``size`` bytes of its payload in each."""
    assert size % 8 == 0
    payload = data[20 if data[0] >> 4 == 4 else 40 :]
    return [
        fragment(data, at, payload[at : at + size], at + size < len(payload), number, before)
        for at in range(0, len(payload), size)
    ]


def join(fragments: list[bytes]) -> bytes:
    """The packet that fragments without options are of."""
    if fragments[0][0] >> 4 == 4:
        payload = b"".join(packet[20:] for packet in fragments)
        head = fragments[0][:2] + struct.pack("!HHH", 20 + len(payload), 1, 0)
        head += fragments[0][8:10] + bytes(2) + fragments[0][12:20]
        return head[:10] + struct.pack("!H", wire.internet_checksum(head)) + head[12:] + payload
    payload = b"".join(packet[48:] for packet in fragments)
    head = fragments[0][:4] + struct.pack("!HB", len(payload), fragments[0][40])
    return head + fragments[0][7:40] + payload
