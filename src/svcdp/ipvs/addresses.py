"""IP addresses as they are on the wire, quickly."""

from __future__ import annotations

import ipaddress
import socket

__all__ = ["from_wire", "to_wire"]


def to_wire(text: str) -> bytes:
    """4 or 16 bytes. OSError when the text is no address."""
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def from_wire(address: bytes) -> str:
    """As ipaddress prints it; the C library has its own form for IPv4 inside IPv6."""
    if len(address) == 4:
        return socket.inet_ntop(socket.AF_INET, address)
    return str(ipaddress.IPv6Address(address))
