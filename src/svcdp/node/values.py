"""Types of setting values: text or numbers that are valid once they exist.

Each constructor takes what YAML, the environment or a flag gives, and raises
``ValueError`` with a message that shows a good value.
"""

from __future__ import annotations

import ipaddress
import re

__all__ = ["Address", "Cidr", "Mark", "Range"]


class Address(str):
    """An IPv4 or IPv6 address, as :mod:`ipaddress` prints it."""

    def __new__(cls, text: str) -> Address:
        return super().__new__(cls, ipaddress.ip_address(text))


class Cidr(str):
    """An IPv4 or IPv6 network. Host bits may be set and are cleared."""

    def __new__(cls, text: str) -> Cidr:
        return super().__new__(cls, ipaddress.ip_network(text, strict=False))


class Range(str):
    """Two numbers from 0 to 65535 as ``first-last``, or one."""

    first: int
    last: int

    def __new__(cls, value: str | int) -> Range:
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(value))
        if match is None:
            raise ValueError(f"{value!r} is not a range such as 100-103")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last <= 0xFFFF:
            raise ValueError(f"{value!r} is not a rising range within 0-65535")
        self = super().__new__(cls, f"{first}-{last}" if first < last else f"{first}")
        self.first, self.last = first, last
        return self


class Mark(int):
    """One bit of the 32-bit packet mark."""

    def __new__(cls, value: str | int) -> Mark:
        try:
            number = value if isinstance(value, int) else int(value, 0)
        except ValueError:
            number = 0
        if not 0 < number < 1 << 32 or number & (number - 1):
            raise ValueError(f"{value!r} is not one bit of 32 such as 0x00100000")
        return super().__new__(cls, number)

    def __str__(self) -> str:
        return f"{int(self):#010x}"
