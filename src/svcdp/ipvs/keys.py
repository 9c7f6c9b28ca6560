"""Which service, which server: as ipvsadm's options name them."""

from __future__ import annotations

from collections.abc import Mapping

from svcdp.errors import ConfigError
from svcdp.ipvs.names import Names
from svcdp.ipvs.words import SERVICES, read_number
from svcdp.records import Key, parse_address
from svcdp.types import fwmark_key

__all__ = ["read_endpoint", "read_key"]

MARK_MAX = (1 << 32) - 1


def read_key(options: Mapping[str, str], names: Names) -> Key:
    """The key of the service that the options (by their long names) say. ConfigError."""
    option = next((name for name in SERVICES if name in options), None)
    if option is None:
        raise ConfigError("which service? Give -t, -u, --sctp-service or -f")
    if option == "fwmark-service":
        mark = read_number(options[option], 1, MARK_MAX, "-f")
        return fwmark_key(mark, 6 if "ipv6" in options else 4)
    if "ipv6" in options:
        raise ConfigError("-6 is for -f: put IPv6 addresses in brackets")
    protocol = option.removesuffix("-service")
    address, port = read_endpoint(options[option], protocol, names)
    return (address, port or 0, protocol)


def read_endpoint(text: str, protocol: str, names: Names) -> tuple[str, int | None]:
    """The address and port (None: not given) of ``192.0.2.1:80``, ``[2001:db8::1]:80``,
    ``2001:db8::1`` or ``www:http``. ConfigError.
    """
    colon, version = "", 4
    if text.startswith("["):
        version = 6
        host, bracket, rest = text[1:].partition("]")
        before, colon, port = rest.partition(":")
        if not bracket or before:
            raise ConfigError(f"{text!r} is not like [2001:db8::1]:80")
    elif text.count(":") > 1:
        host, version, port = text, 6, ""
    else:
        host, colon, port = text.partition(":")
    address = _read_address(host, version, names)
    if not colon:
        return address, None
    if port.isdecimal() and port.isascii():
        return address, read_number(port, 0, 65535, "port")
    return address, names.number(port, protocol)


def _read_address(host: str, version: int, names: Names) -> str:
    address = None
    try:
        address = parse_address(host)
    except ValueError:
        # Names end in a label with a letter first (RFC 1123 2.1); no half-written number does.
        if ":" not in host and host.rpartition(".")[2][:1].isalpha():
            address = parse_address(names.address(host, version))
    if address is None or address.version != version:
        raise ConfigError(f"{host!r} is no IPv{version} address")
    return address.text
