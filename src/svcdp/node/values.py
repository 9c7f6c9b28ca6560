"""Types of setting values: text or numbers that are valid once they exist.

Each constructor takes what YAML, the environment or a flag gives, and raises
``ValueError`` with a message that shows a good value.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import replace
from typing import Any

from svcdp.dataplane import TIMEOUTS
from svcdp.errors import ConfigError
from svcdp.records import check_settings
from svcdp.types import Settings

__all__ = [
    "IN_CLUSTER",
    "Address",
    "Bind",
    "Cidr",
    "Mark",
    "MarkField",
    "Range",
    "Server",
    "StateTimeout",
    "Switch",
]

IN_CLUSTER = "in-cluster"
"""In place of a kubeconfig's path: by the service account of the Pod."""


class Address(str):
    """An IPv4 or IPv6 address, as :mod:`ipaddress` prints it."""

    def __new__(cls, text: str) -> Address:
        return super().__new__(cls, ipaddress.ip_address(text))


class Bind(str):
    """An address and port to listen at, such as ``0.0.0.0:80`` or ``[::]:80``; empty: nowhere."""

    place: tuple[str, int] | None

    def __new__(cls, text: str) -> Bind:
        if not text:
            self = super().__new__(cls, "")
            self.place = None
            return self
        host, _, port = text.rpartition(":")
        is_bracketed = host.startswith("[") and host.endswith("]")
        try:
            address = Address(host[1:-1] if is_bracketed else host)
            number = int(port) if re.fullmatch("[0-9]{1,5}", port) else 0
        except ValueError:
            address, number = Address("::"), 0
        if is_bracketed != (":" in address) or not 0 < number <= 0xFFFF:
            raise ValueError(f"{text!r} is not an address and port such as 127.0.0.1:10249")
        self = super().__new__(
            cls, f"[{address}]:{number}" if is_bracketed else f"{address}:{number}"
        )
        self.place = (str(address), number)
        return self


class Server(str):
    """An address to ask, with a port that is not 53 or without: ``192.0.2.1``, ``[::1]:5300``."""

    place: tuple[str, int]

    def __new__(cls, text: str) -> Server:
        try:
            address, port = str(Address(text)), 53
        except ValueError:
            bind = Bind(text)
            if bind.place is None:
                raise ValueError("an address such as 192.0.2.1 is missing") from None
            address, port = bind.place
        self = super().__new__(cls, text)
        self.place = (address, port)
        return self


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


class MarkField(int):
    """A row of bits of the 32-bit packet mark."""

    def __new__(cls, value: str | int) -> MarkField:
        try:
            number = value if isinstance(value, int) else int(value, 0)
        except ValueError:
            number = 0
        values = number // (number & -number) if 0 < number < 1 << 32 else 0
        if not values or values & (values + 1):
            raise ValueError(f"{value!r} is not a row of bits of 32 such as 0xffc00000")
        return super().__new__(cls, number)

    def __str__(self) -> str:
        return f"{int(self):#010x}"


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


class Switch(str):
    """One of :class:`svcdp.Settings`, as ``name=value``."""

    name: str
    value: Any

    def __new__(cls, text: str) -> Switch:
        name, _, value = (part.strip() for part in text.partition("="))
        known = [*Settings.__dataclass_fields__]
        if name not in known:
            raise ValueError(f"{text!r} sets none of {', '.join(known)}")
        if not re.fullmatch(r"\d{1,10}", value):
            raise ValueError(f"{text!r} is not a name=number such as conn_reuse_mode=1")
        self = super().__new__(cls, f"{name}={value}")
        self.name = name
        self.value = int(value)
        if isinstance(getattr(Settings(), name), bool):
            if self.value > 1:
                raise ValueError(f"{name} is 0 or 1, not {value}")
            self.value = bool(self.value)
        try:
            check_settings(replace(Settings(), **{name: self.value}))
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class StateTimeout(str):
    """A timeout of a state of connections, as ``state=seconds``."""

    state: str
    seconds: float

    def __new__(cls, text: str) -> StateTimeout:
        state, _, seconds = (part.strip() for part in text.partition("="))
        if state not in TIMEOUTS:
            raise ValueError(f"{text!r} sets none of {', '.join(TIMEOUTS)}")
        if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", seconds) or not float(seconds):
            raise ValueError(f"{text!r} is not a state=seconds such as udp=30")
        self = super().__new__(cls, f"{state}={seconds}")
        self.state, self.seconds = state, float(seconds)
        return self
