"""Plain data that crosses svcdp's borders: enums, flows and specs.

A *spec* is a wish, comparable and hashable, that knows nothing of a running
system; :class:`svcdp.Dataplane` turns specs into live objects.
This module imports nothing of svcdp.
"""

from __future__ import annotations

import enum
import typing
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Destination",
    "DestinationSpec",
    "Flow",
    "ForwardMethod",
    "Protocol",
    "Reason",
    "ServiceSpec",
    "Settings",
    "SourceRule",
    "TunnelSpec",
    "Verdict",
    "fwmark_key",
]


class Verdict(enum.IntEnum):
    """What the caller must do with a packet (``enum svcdp_verdict`` in abi.h)."""

    PASS = 0
    FORWARD = 1
    DROP = 2
    REJECT = 3


class Reason(enum.IntEnum):
    """Why a packet got its verdict (``enum svcdp_reason`` in abi.h). Each is counted."""

    NO_SERVICE = 0
    ESTABLISHED = 1
    REPLY = 2
    NEW = 3
    RELATED = 4
    NO_DESTINATION = 5
    SOURCE_RANGE = 6
    NO_CONNECTION = 7
    TABLE_FULL = 8
    NO_PORT = 9
    NO_MASQUERADE = 10
    TRUNCATED = 11
    MALFORMED = 12
    FRAGMENT = 13
    PROTOCOL = 14
    NOT_IP = 15
    TIME_EXCEEDED = 16
    TOO_BIG = 17
    OVERLOAD = 18
    NO_CALL_ID = 19
    DESTINATION_GONE = 20
    BYPASS = 21
    NO_HEADROOM = 22
    CHECKSUM = 23


class Protocol(enum.IntEnum):
    """What a service can have as protocol, by IP protocol number.

    ``fwmark`` stands for every packet with a firewall mark, whatever its protocol and port,
    ``any`` for what comes to a network and to no other service.
    """

    FWMARK = 0
    TCP = 6
    UDP = 17
    SCTP = 132
    ANY = 255


class ForwardMethod(enum.StrEnum):
    """How a packet reaches its destination, in IPVS's words."""

    MASQ = "masq"
    TUNNEL = "tunnel"
    DR = "dr"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Flow:
    """The 5-tuple of a packet, as it is on the wire. Ports in host order."""

    protocol: str
    source: str
    source_port: int
    destination: str
    destination_port: int

    def __str__(self) -> str:
        return (
            f"{self.protocol} {_endpoint(self.source, self.source_port)}"
            f" -> {_endpoint(self.destination, self.destination_port)}"
        )


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@dataclass(frozen=True, slots=True)
class TunnelSpec:
    """How packets are wrapped for a destination of method ``tunnel``.

    ``source`` is the outer source address, of the destination's family. ``port`` is GUE's UDP
    port. ``checksum`` asks for the one that GRE and GUE can do without.
    """

    type: Literal["ipip", "gre", "gue"] = "ipip"
    source: str = ""
    port: int = 0
    checksum: bool = False


@dataclass(frozen=True, slots=True)
class DestinationSpec:
    """One real server of a service. ``weight`` 0 quiesces it: no new connections.

    ``port`` 0 keeps the packet's. Methods ``tunnel``, ``dr`` and ``local`` never change a port:
    theirs is that of the service, or 0.
    At ``upper`` connections (0: no bound) the destination is overloaded and schedulers avoid
    it, until there are less than ``lower`` of them (0: three quarters of ``upper``).
    ``mtu`` is that of the path to it in bytes (0: packets are not checked). ``mark`` is or'ed
    into the firewall mark of the packets sent to it: for policy routes.
    """

    address: str
    port: int
    weight: int = 1
    method: str = "masq"
    upper: int = 0
    lower: int = 0
    tunnel: TunnelSpec | None = None
    mtu: int = 0
    mark: int = 0


class Destination(typing.Protocol):
    """What a scheduler sees of a real server: ``active`` and ``inactive`` count connections."""

    @property
    def address(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def weight(self) -> int: ...
    @property
    def active(self) -> int: ...
    @property
    def inactive(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SourceRule:
    """What a service does with new connections from some sources.

    A service has an ordered list of these; the first whose ``sources`` (CIDRs;
    empty means any) hold the client's address decides. A client that no rule
    admits is dropped (``Reason.SOURCE_RANGE``). ``mark``: only packets whose firewall mark has all
    of these bits. ``endpoints``, (address, port) each, are those of the service's destinations
    that serve these clients (None: all do); schedulers see no others then, and an affinity to
    another one does not count. When there is nobody to serve it,
    a client is told by a TCP reset or ICMP ("reject"), by ICMP port unreachable for
    TCP too ("unreachable", as kube-proxy and IPVS do), or not at all ("drop").
    """

    sources: tuple[str, ...] = ()
    masquerade: bool = False
    on_empty: Literal["reject", "unreachable", "drop"] = "reject"
    mark: int = 0
    endpoints: tuple[tuple[str, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class PassiveHealth:
    """When to pass over destinations that leave clients without an answer (TCP, method masq).

    A reset or an ICMP error instead of the answer to a SYN, a SYN that has to be sent again, and
    a connection that is never answered are failures. After so many ``failures`` in a row new
    connections go elsewhere for ``ejection`` seconds, twice as long each time up to
    ``max_ejection``, until it answers. If all others are gone too they are all asked again. A
    SYN that is sent again goes to another destination, if there is one that may serve it.
    """

    failures: int = 3
    ejection: float = 10
    max_ejection: float = 300


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One virtual service: an address, port and protocol, and who serves it.

    ``port`` 0 is every port of the address; ``last_port`` makes a range of ports. The most
    special service of an address gets the packet; ranges of one address must not overlap. With
    protocol ``fwmark``, ``port`` is a firewall mark and ``address`` the unspecified address of
    the IP family: see `fwmark_key`. With protocol ``any`` the service turns away, by its rules'
    ``on_empty``, what goes to a network (``address`` is a CIDR, or one address; ``port`` is 0) and
    that no other service gets, but of ICMP pings alone; it has no destinations.
    ``scheduler_flags`` are sh-port, sh-fallback, mh-port and mh-fallback; ``mh_table_size`` is
    a prime from 251 to 655373.

    ``persistence`` is the affinity timeout in seconds (None: off). Services that
    share a non-empty ``persistence_group`` share their affinity (kube-proxy keys
    it by service port, not by the address that was dialled). An affinity lasts that long from its
    last new connection, and as long as connections made by it (IPVS), unless it is
    ``persistence_timed``: then no longer (kube-proxy). Clients that agree in the first
    ``persistence_netmask`` bits of their address are one client; ``persistence_engine`` "sip"
    binds calls (Call-ID, RFC 3261) instead of clients.
    ``one_packet`` schedules each UDP datagram by itself.
    ``timeouts`` are (state, seconds) that replace the dataplane's.
    ``on_removal`` says what becomes of connections whose destination is removed: they go on
    until they end ("drain"; UDP, which has no end, is scheduled anew), they are forgotten
    ("expire"), their packets are dropped ("drop"; what IPVS does by default), or both ends of
    those over TCP hear of a reset when they next send ("reset"), once they had ``removal_grace``
    seconds more, counted from the first packet or sweep after the removal.
    ``kept`` are servers, (address, port) each, that get no new connections, but are there: where
    one of them was a destination, its connections go on as if it still were, those over UDP too,
    until it is named no more.

    ``masquerade_address`` is the source address given to masqueraded connections;
    where it is set, a client that would reach itself (hairpin) is masqueraded too.
    ``mss_clamp`` lowers the MSS that TCP peers offer to what fits into the tunnel.
    ``helper`` "ftp" follows the data connections of FTP (masq only).
    ``passive_health`` (None: off) passes over destinations that do not answer; an affinity to one
    of them does not count, and sh, mh and dh send its clients to the others. Not with a helper.
    ``name`` is for people: it appears in listings and in ``explain()``.
    """

    address: str
    port: int
    protocol: str = "tcp"
    destinations: tuple[DestinationSpec, ...] = ()
    scheduler: str = "rr"
    persistence: int | None = None
    persistence_group: str = ""
    rules: tuple[SourceRule, ...] = (SourceRule(),)
    masquerade_address: str | None = None
    name: str = ""
    last_port: int = 0
    scheduler_flags: tuple[str, ...] = ()
    mh_table_size: int = 65537
    persistence_netmask: int | None = None
    persistence_engine: str = ""
    one_packet: bool = False
    timeouts: tuple[tuple[str, float], ...] = ()
    on_removal: Literal["drain", "expire", "drop", "reset"] = "drain"
    mss_clamp: bool = False
    helper: str = ""
    persistence_timed: bool = False
    removal_grace: float = 0
    passive_health: PassiveHealth | None = None
    kept: tuple[tuple[str, int], ...] = ()

    @property
    def key(self) -> tuple[str, int, str]:
        """What identifies a service: address, port, protocol."""
        return (self.address, self.port, self.protocol)

    def __str__(self) -> str:
        if self.name:
            return self.name
        if self.protocol == "fwmark":
            return f"fwmark {self.port} (IPv{6 if ':' in self.address else 4})"
        if self.protocol == "any":
            return f"{self.address} (any port)"
        last = f"-{self.last_port}" if self.last_port else ""
        return f"{_endpoint(self.address, self.port)}{last}/{self.protocol}"


def fwmark_key(mark: int, version: Literal[4, 6] = 4) -> tuple[str, int, str]:
    """The key of the service of all packets with a firewall mark, in one IP family."""
    return ("0.0.0.0" if version == 4 else "::", mark, "fwmark")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a dataplane treats packets; the names are those of IPVS's sysctls where it has one.

    Not IPVS's: ``decrement_ttl`` is for a dataplane that is itself the router, as IPVS is: it
    lowers TTLs and answers "time exceeded". Leave it off where a kernel forwards what comes
    out. (A tunnel lowers the inner TTL in any case.)

    ``drop_entry`` and ``drop_packet`` are what to do under load: 0 nothing, 1 act while the
    connection table is nearly full, 3 act always. Acting means to forget half-open connections,
    and to drop one in ``am_droprate`` of the packets that would open one.
    ``lblc_expiration`` and ``lblcr_expiration`` are the seconds after which those schedulers
    forget a destination address that nobody asked for; the latter also those after which a set of
    servers that did not change has one server less.
    ``answer_rate`` bounds the resets and ICMP messages sent a second and worker (0: no bound).
    """

    conn_reuse_mode: int = 1
    expire_quiescent_template: bool = False
    sloppy_tcp: bool = False
    sloppy_sctp: bool = False
    secure_tcp: bool = False
    schedule_icmp: bool = False
    cache_bypass: bool = False
    drop_entry: int = 0
    drop_packet: int = 0
    am_droprate: int = 10
    pmtu_disc: bool = True
    decrement_ttl: bool = False
    answer_rate: int = 1000
    lblc_expiration: int = 86400
    lblcr_expiration: int = 86400
