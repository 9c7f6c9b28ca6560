"""Services and connections as ``ipvsadm -L`` prints them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from svcdp import schedulers
from svcdp.ipvs.counters import counters_of
from svcdp.ipvs.names import Names
from svcdp.status import ConnectionState, DestinationStatus, ServiceStatus
from svcdp.types import DestinationSpec, Protocol, ServiceSpec

__all__ = ["VIEWS", "ListedService", "Rates", "connections", "flag_names", "mask", "services"]

#: Of the column of servers. ipvsadm cuts what does not fit, if it is not IPv6.
SERVER_WIDTH = 28
#: How numbers below a bound are cut to fit into a column.
UNITS = (
    (10**8, 1, ""),
    (10**9, 10**3, "K"),
    (10**11, 10**6, "M"),
    (10**14, 10**9, "G"),
    (math.inf, 10**12, "T"),
)

FORWARD = {"masq": "Masq", "local": "Local", "tunnel": "Tunnel", "dr": "Route"}


class Rates(NamedTuple):
    """What comes a second: connections, packets and bytes from clients and to them."""

    connections: float = 0.0
    packets_in: float = 0.0
    packets_out: float = 0.0
    bytes_in: float = 0.0
    bytes_out: float = 0.0


@dataclass(frozen=True, slots=True)
class ListedService:
    """A service, and of each destination its rates and how many clients are bound to it."""

    status: ServiceStatus
    rates: tuple[Rates, ...] = ()
    persistent: tuple[int, ...] = ()

    def rows(self) -> Iterator[Row]:
        """Its destinations, newest first: the order in which schedulers look at them."""
        specs = {(spec.address, spec.port): spec for spec in self.status.spec.destinations}
        for index in reversed(range(len(self.status.destinations))):
            status = self.status.destinations[index]
            yield Row(
                specs[status.address, status.port],
                status,
                self.rates[index] if self.rates else Rates(),
                self.persistent[index] if self.persistent else 0,
            )


@dataclass(frozen=True, slots=True)
class Row:
    """A destination in a listing."""

    spec: DestinationSpec
    status: DestinationStatus
    rates: Rates
    persistent: int


@dataclass(frozen=True, slots=True)
class View:
    """What a listing shows: the headers, and the columns of a destination or the numbers that a
    service has too.
    """

    headers: tuple[str, str]
    columns: Callable[[Row], str] | None = None
    numbers: Callable[[Row], Iterable[float]] | None = None


def _connections(row: Row) -> str:
    return f"{row.status.active:<10} {row.status.inactive:<10}"


def _forward(row: Row) -> str:
    return f"{FORWARD[row.spec.method]:<7}"


def _weight(row: Row) -> str:
    return f"{row.status.weight:<6}"


def _thresholds(row: Row) -> str:
    return f"{row.spec.upper:<10} {row.spec.lower:<10}"


def _tunnel(row: Row) -> str:
    tunnel = row.spec.tunnel
    if tunnel is None:
        return f"{'n/a':<13}"
    words: list[str] = [tunnel.type]
    if tunnel.port:
        words.append(str(tunnel.port))
    if tunnel.type != "ipip":
        words.append("+c" if tunnel.checksum else "-c")
    return f"{':'.join(words):<13}"


_SERVICE = "Prot LocalAddress:Port"
_SERVER = "  -> RemoteAddress:Port"

VIEWS = {
    "": View(
        (f"{_SERVICE} Scheduler Flags", f"{_SERVER:<33} Forward Weight ActiveConn InActConn"),
        lambda row: f"{_forward(row)} {_weight(row)} {_connections(row)}",
    ),
    "thresholds": View(
        (f"{_SERVICE:<33} Uthreshold Lthreshold ActiveConn InActConn ", _SERVER),
        lambda row: f"{_thresholds(row)} {_connections(row)}",
    ),
    "persistent-conn": View(
        (f"{_SERVICE:<33} Weight    PersistConn ActiveConn InActConn ", _SERVER),
        lambda row: f"{row.status.weight:<9} {row.persistent:<11} {_connections(row)}",
    ),
    "tun-info": View(
        (
            f"{_SERVICE} Scheduler Flags",
            f"{_SERVER:<33} Forward TunnelInfo    Weight ActiveConn InActConn",
        ),
        lambda row: f"{_forward(row)} {_tunnel(row)} {_weight(row)} {_connections(row)}",
    ),
    "stats": View(
        (f"{_SERVICE:<33}    Conns   InPkts  OutPkts  InBytes OutBytes", _SERVER),
        numbers=lambda row: counters_of(row.status),
    ),
    "rate": View(
        (f"{_SERVICE:<33}      CPS    InPPS   OutPPS    InBPS   OutBPS", _SERVER),
        numbers=lambda row: row.rates,
    ),
}
"""By the option that asks for it (none: what ``ipvsadm -L`` shows)."""


def services(
    listed: Iterable[ListedService],
    names: Names,
    *,
    view: str = "",
    exact: bool = False,
    order: bool = True,
) -> Iterator[str]:
    """The lines of a listing, after the one that names the program.

    ``order``: by address, and not services as they come and destinations newest first.
    ``exact``: no letters for thousands.
    """
    shown = VIEWS[view]
    yield from shown.headers
    for service in sorted(listed, key=_service_key) if order else listed:
        rows = list(service.rows())
        if order:
            rows.sort(key=lambda row: _address_key(row.spec.address, row.spec.port))
        spec = service.status.spec
        if shown.numbers:
            of_all = [shown.numbers(row) for row in rows] or [(0,) * 5]
            yield f"{_title(spec, names):<33}{_numbers(map(sum, zip(*of_all, strict=True)), exact)}"
        else:
            yield f"{_title(spec, names)} {_flags(spec)}"
        for row in rows:
            protocol = "tcp" if spec.protocol == "fwmark" else spec.protocol
            end = endpoint(row.spec.address, row.spec.port, protocol, names)
            if ":" not in row.spec.address:
                end = end[:SERVER_WIDTH]
            server = f"  -> {end:<{SERVER_WIDTH}}"
            if shown.numbers:
                yield server + _numbers(shown.numbers(row), exact)
            elif shown.columns:
                yield f"{server} {shown.columns(row)}"


def endpoint(address: str, port: int, protocol: str, names: Names) -> str:
    """``192.0.2.1:80`` or ``[2001:db8::1]:80``, or by their names."""
    host = names.host(address)
    if ":" in address:
        host = f"[{host}]"
    return f"{host}:{names.port(port, protocol) if port else 0}"


def mask(bits: int) -> str:
    """An IPv4 netmask."""
    return str(IPv4Address((1 << 32) - (1 << 32 - bits)))


def flag_names(spec: ServiceSpec) -> list[str]:
    """The scheduler's flags, in the order of their bits."""
    bits = schedulers.FLAGS.get(spec.scheduler, {})
    return sorted(set(spec.scheduler_flags), key=lambda flag: bits[flag])


def _title(spec: ServiceSpec, names: Names) -> str:
    if spec.protocol == "fwmark":
        return f"FWM  {spec.port}" + (" IPv6" if ":" in spec.address else "")
    last = f"-{names.port(spec.last_port, spec.protocol)}" if spec.last_port else ""
    end = endpoint(spec.address, spec.port, spec.protocol, names)
    return f"{spec.protocol.upper():<4} {end}{last}"


def _flags(spec: ServiceSpec) -> str:
    words = [spec.scheduler]
    if spec.scheduler_flags:
        words.append(f"({','.join(flag_names(spec))})")
    if spec.persistence is not None:
        words.append(f"persistent {spec.persistence}")
        if spec.persistence_netmask is not None:
            bits = spec.persistence_netmask
            words.append(f"mask {bits if ':' in spec.address else mask(bits)}")
    if spec.persistence_engine:
        words.append(f"pe {spec.persistence_engine}")
    if spec.one_packet:
        words.append("ops")
    return " ".join(words)


def _numbers(values: Iterable[float], exact: bool) -> str:
    """Columns of nine, of which the first is a space."""
    return "".join(f" {_number(round(value), exact):>8}" for value in values)


def _number(value: int, exact: bool) -> str:
    if exact:
        return str(value)
    unit, letter = next((unit, letter) for bound, unit, letter in UNITS if value < bound)
    return f"{value // unit}{letter}"


def _address_key(address: str, port: int) -> tuple[int, bytes, int]:
    parsed = ip_address(address)
    return (parsed.version, parsed.packed, port)


def _service_key(service: ListedService) -> tuple[int, int, int, bytes, int]:
    """Those of addresses first, IPv4 first; TCP, UDP, SCTP; address; port."""
    spec = service.status.spec
    version, packed, port = _address_key(spec.address, spec.port)
    protocol = Protocol[spec.protocol.upper()]
    mark = port if protocol == Protocol.FWMARK else 0
    return (mark, version, protocol, packed, port)


def connections(listed: Iterable[ConnectionState], names: Names) -> Iterator[str]:
    """The lines of ``ipvsadm -L -c``, persistence templates among them."""
    yield "IPVS connection entries"
    yield "pro expire state       source             virtual            destination"
    for each in listed:
        protocol, virtual = each.protocol.upper(), each.virtual
        if each.is_template and each.fwmark:  # of every protocol; the mark stands for an address
            protocol = "IP"
            mark = each.fwmark
            virtual = str(IPv4Address(mark) if "." in virtual else IPv6Address(mark << 96))
        ends = (
            endpoint(each.client, each.client_port, each.protocol, names),
            endpoint(virtual, each.virtual_port, each.protocol, names),
            endpoint(each.destination, each.destination_port, each.protocol, names),
        )
        minutes, seconds = divmod(int(each.expires_in), 60)
        expires = f"{minutes:02}:{seconds:02}"
        state = _STATES.get(each.state, each.state)
        yield f"{protocol:<3} {expires:<6} {state:<11} {ends[0]:<18} {ends[1]:<18} {ends[2]}"


#: The kernel's names of SCTP's states (ip_vs_proto_sctp.c).
_STATES = {
    "SCTP_NONE": "NONE",
    "SCTP_INIT1": "INIT1",
    "SCTP_INIT": "INIT",
    "SCTP_COOKIE_SENT": "C-SENT",
    "SCTP_COOKIE_REPLIED": "C-REPLIED",
    "SCTP_COOKIE_WAIT": "C-WAIT",
    "SCTP_COOKIE": "COOKIE",
    "SCTP_COOKIE_ECHOED": "C-ECHOED",
    "SCTP_ESTABLISHED": "ESTABLISHED",
    "SCTP_SHUTDOWN_SENT": "S-SENT",
    "SCTP_SHUTDOWN_RECEIVED": "S-RECEIVED",
    "SCTP_SHUTDOWN_ACK_SENT": "S-ACK-SENT",
    "SCTP_REJECTED": "REJECTED",
    "SCTP_CLOSED": "CLOSED",
}
