"""Names of hosts and ports, as ipvsadm reads and prints them."""

from __future__ import annotations

import socket
from functools import cache
from typing import Protocol

from svcdp.errors import ConfigError

__all__ = ["Names", "NumericNames", "SystemNames"]


class Names(Protocol):
    """Who knows what numbers are called. ConfigError for a name that means nothing; a number
    without a name is called by its number.
    """

    def address(self, host: str, version: int) -> str:
        """Of a host, an address of an IP version."""
        ...

    def number(self, port: str, protocol: str) -> int:
        """Of a named port of a protocol."""
        ...

    def host(self, address: str) -> str:
        """What to call an address."""
        ...

    def port(self, number: int, protocol: str) -> str:
        """What to call a port of a protocol."""
        ...


class NumericNames(Names):
    """Nothing has a name: what ``-n`` asks for."""

    def address(self, host: str, version: int) -> str:
        raise ConfigError(f"{host!r} is no IPv{version} address")

    def number(self, port: str, protocol: str) -> int:
        raise ConfigError(f"{port!r} is no port")

    def host(self, address: str) -> str:
        return address

    def port(self, number: int, protocol: str) -> str:
        return str(number)


class SystemNames(Names):
    """The host's own: its DNS and its files."""

    def address(self, host: str, version: int) -> str:
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        try:
            found = socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise ConfigError(f"{host!r} is neither an IPv{version} address nor a host") from None
        return str(found[0][4][0])

    def number(self, port: str, protocol: str) -> int:
        try:
            return socket.getservbyname(port, protocol)
        except OSError:
            raise ConfigError(f"{port!r} is no {protocol} port") from None

    def host(self, address: str) -> str:
        return _host(address)

    def port(self, number: int, protocol: str) -> str:
        try:
            return socket.getservbyport(number, protocol)
        except OSError:
            return str(number)


@cache  # a listing has many lines of the same few
def _host(address: str) -> str:
    try:
        return socket.gethostbyaddr(address)[0]
    except OSError:
        return address
