"""ARP for addresses that no interface has: answers and announcements (RFC 826, RFC 5227). Pure."""

from __future__ import annotations

import struct
from collections.abc import Container

__all__ = ["announcement", "answer"]

ETHERTYPE = 0x0806
BROADCAST = b"\xff" * 6
NOBODY = bytes(6)
REQUEST, REPLY = 1, 2
#: Hardware: Ethernet; protocol: IPv4; their addresses' lengths.
KIND = struct.pack("!HHBB", 1, 0x0800, 6, 4)
LENGTH = 14 + 28  # bytes of a frame; what follows pads it


def answer(frame: bytes, owned: Container[bytes], mac: bytes) -> bytes | None:
    """The reply to a request for an address of ``owned`` (packed), which ``mac`` (packed) has.
    None: there is nothing to reply to.

    A probe of somebody who wants the address gets one too (RFC 5227, 2.1.1), an announcement of
    somebody who has taken it does not.
    """
    if len(frame) < LENGTH or frame[12:14] != ETHERTYPE.to_bytes(2) or frame[14:20] != KIND:
        return None
    operation, sender_mac, sender, target = struct.unpack_from("!H6s4s6x4s", frame, 20)
    if operation != REQUEST or target not in owned or sender == target:
        return None
    if sender_mac[0] & 1 or sender_mac == NOBODY:  # no host's
        return None
    return _frame(sender_mac, REPLY, (mac, target), (sender_mac, sender))


def announcement(address: bytes, mac: bytes) -> bytes:
    """A request for the own address: whoever knows it learns of ``mac`` (RFC 5227, 2.3)."""
    return _frame(BROADCAST, REQUEST, (mac, address), (NOBODY, address))


def _frame(
    to: bytes, operation: int, sender: tuple[bytes, bytes], target: tuple[bytes, bytes]
) -> bytes:
    head = to + sender[0] + ETHERTYPE.to_bytes(2) + KIND + operation.to_bytes(2)
    return b"".join((head, *sender, *target))
