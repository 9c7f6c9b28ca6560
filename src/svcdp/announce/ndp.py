"""Neighbor Discovery for addresses that no interface has: answers and announcements (RFC 4861,
RFC 4862). Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Container

__all__ = ["announcement", "answer", "solicited_node"]

ETHERTYPE = 0x86DD
ICMPV6 = 58
SOLICITATION, ADVERTISEMENT = 135, 136
SOURCE_MAC, TARGET_MAC = 1, 2  # options
SOLICITED, OVERRIDE = 1 << 30, 1 << 29
HOPS = 255
UNSPECIFIED = bytes(16)
ALL_NODES = bytes.fromhex("ff020000000000000000000000000001")
#: Bytes: an Ethernet head, an IPv6 head, a solicitation without options.
ETHERNET, HEAD, LEAST = 14, 40, 24


def answer(frame: bytes, owned: Container[bytes], mac: bytes) -> bytes | None:
    """The advertisement for a solicitation of an address of ``owned`` (packed), which ``mac``
    (packed) has. None: there is nothing to answer, or not what RFC 4861, 7.1.1 calls valid.

    One that looks for duplicates, and so has no address yet, is answered to all.
    """
    start = ETHERNET + HEAD
    if len(frame) < start + LEAST or frame[12:14] != ETHERTYPE.to_bytes(2):
        return None
    first, length, following, hops = struct.unpack_from("!IHBB", frame, ETHERNET)
    if first >> 28 != 6 or following != ICMPV6 or hops != HOPS:
        return None
    if not LEAST <= length <= len(frame) - start:
        return None
    source, target = frame[22:38], frame[38:54]
    message = frame[start : start + length]
    wanted = message[8:24]
    if message[:2] != bytes((SOLICITATION, 0)) or wanted not in owned:
        return None
    if _checksum(source, target, message):
        return None
    options = _options(message[LEAST:])
    if options is None or target not in (wanted, solicited_node(wanted)):
        return None
    is_probe = source == UNSPECIFIED
    if is_probe and (target == wanted or SOURCE_MAC in options):
        return None
    if source[0] == 0xFF or source == wanted or frame[6] & 1:  # nobody's, or not another's
        return None
    if is_probe:
        return _advertisement(_multicast_mac(ALL_NODES), ALL_NODES, wanted, mac, OVERRIDE)
    return _advertisement(frame[6:12], source, wanted, mac, OVERRIDE | SOLICITED)


def announcement(address: bytes, mac: bytes) -> bytes:
    """An advertisement that nobody asked for: whoever knows ``address`` learns of ``mac``
    (RFC 4861, 7.2.6).
    """
    return _advertisement(_multicast_mac(ALL_NODES), ALL_NODES, address, mac, OVERRIDE)


def solicited_node(address: bytes) -> bytes:
    """The group that those listen to who have the address (RFC 4291, 2.7.1)."""
    return bytes.fromhex("ff0200000000000000000001ff") + address[13:]


def _multicast_mac(group: bytes) -> bytes:
    return b"\x33\x33" + group[12:]


def _options(data: bytes) -> set[int] | None:
    """Their types; None where one has no length, or more than there is."""
    found = set()
    while data:
        if len(data) < 8 or not 0 < 8 * data[1] <= len(data):
            return None
        found.add(data[0])
        data = data[8 * data[1] :]
    return found


def _advertisement(to: bytes, target: bytes, address: bytes, mac: bytes, flags: int) -> bytes:
    head = struct.pack("!BBHI", ADVERTISEMENT, 0, 0, flags)
    message = head + address + bytes((TARGET_MAC, 1)) + mac
    checksum = _checksum(address, target, message)
    message = message[:2] + checksum.to_bytes(2) + message[4:]
    ip = struct.pack("!IHBB", 6 << 28, len(message), ICMPV6, HOPS) + address + target
    return to + mac + ETHERTYPE.to_bytes(2) + ip + message


def _checksum(source: bytes, target: bytes, message: bytes) -> int:
    """What belongs into a message without one; of one that has it: 0 (RFC 4443, 2.3)."""
    data = source + target + struct.pack("!II", len(message), ICMPV6) + message
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
