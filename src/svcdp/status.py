"""What a dataplane tells of itself: plain data, a picture of one moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from svcdp.types import Reason, ServiceSpec, Verdict

#: In `ConnectionState.flags` (uapi/linux/ip_vs.h). The method's bits are 0 for masq.
METHOD = 0x07
SYNC = 0x20
NOOUTPUT = 0x80
INACTIVE = 0x100
OUT_SEQ = 0x200
IN_SEQ = 0x400
SHIFTED = OUT_SEQ | IN_SEQ
NO_CPORT = 0x800
TEMPLATE = 0x1000
ONE_PACKET = 0x2000

__all__ = [
    "Captures",
    "Connection",
    "ConnectionState",
    "DestinationStatus",
    "SequenceShift",
    "ServiceStatus",
    "Stats",
]


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection. ``source`` is what the destination sees as client (masquerade)."""

    protocol: str
    client: str
    client_port: int
    virtual: str
    virtual_port: int
    destination: str
    destination_port: int
    source: str
    source_port: int
    state: str
    method: str
    fwmark: int  #: of its service, 0: none
    expires_in: float  #: seconds
    packets: int  #: from the client

    @classmethod
    def from_row(cls, row: tuple[Any, ...], now: int) -> Connection:
        """From a row of the core, which has a deadline in ns."""
        *fields, deadline, packets, _ = row
        fields += [max(deadline - now, 0) / 1e9, packets]
        return cls(*fields)


class SequenceShift(NamedTuple):
    """How far what one end says is shifted, because a helper made its text longer: TCP sequence
    numbers above ``position`` by ``delta`` bytes, others by ``previous_delta``.
    """

    position: int
    delta: int
    previous_delta: int


@dataclass(frozen=True, slots=True)
class ConnectionState:
    """All that another dataplane needs to go on with a connection, or with a persistence template
    (flag `TEMPLATE`), whose client is bound to a destination.

    Times in seconds. ``destination`` is the real server's, whatever the forwarding method.
    ``virtual`` and ``virtual_port`` of a template are those of its service; its ports are 0 where
    that is FTP's, whose data connections have any. ``state`` is one of
    `svcdp.dataplane.TIMEOUTS`, in upper case; a template's is NONE or ASSURED.
    """

    protocol: str
    client: str
    client_port: int
    virtual: str
    virtual_port: int
    destination: str
    destination_port: int
    source: str  #: what the destination sees as client
    source_port: int
    state: str
    timeout: float
    expires_in: float
    flags: int = 0  #: as in uapi/linux/ip_vs.h
    fwmark: int = 0  #: of the service, 0: none
    packets: int = 0  #: from the client
    #: Of an FTP control connection: what the client says, and what the destination says.
    sequences: tuple[SequenceShift, SequenceShift] | None = None

    @property
    def is_template(self) -> bool:
        return bool(self.flags & TEMPLATE)


@dataclass(frozen=True, slots=True)
class DestinationStatus:
    """A destination of a service, and its counters since it was added."""

    address: str
    port: int
    weight: int
    method: str
    active: int
    inactive: int
    connections_total: int
    packets_in: int  #: from clients
    bytes_in: int  #: IP lengths
    packets_out: int
    bytes_out: int
    ejected: bool = False  #: passed over, because it did not answer: see `PassiveHealth`
    failures: int = 0  #: clients that it left without an answer
    last_failure: float | None = None  #: seconds ago


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """A service as it is in force."""

    spec: ServiceSpec
    destinations: list[DestinationStatus]


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the dataplane was made, and what its table holds now."""

    packets: dict[tuple[Verdict, Reason], int]
    connections: int
    connections_max: int
    connections_created: int
    connections_expired: int
    persistence_templates: int
    scheduler_errors: int
    ejections: int = 0  #: of destinations that did not answer
    retries: int = 0  #: SYNs sent again that went to another destination


@dataclass(frozen=True, slots=True)
class Captures:
    """Whose packets must reach the dataplane: (protocol, address, port) of what they are sent to
    (``virtual``) or come from (``real``), where port 0 is every port; (protocol, address, first
    port, last port); and (firewall mark, IP version).

    ``tunnels`` are the keys of those services that send packets through tunnels. ``hops`` are
    (firewall mark, address): where packets with that mark must go, whatever their destination.
    """

    virtual: frozenset[tuple[str, str, int]] = frozenset()
    real: frozenset[tuple[str, str, int]] = frozenset()
    ranges: frozenset[tuple[str, str, int, int]] = frozenset()
    marks: frozenset[tuple[int, int]] = frozenset()
    tunnels: frozenset[tuple[str, int, str]] = frozenset()
    hops: frozenset[tuple[int, str]] = frozenset()

    def __or__(self, other: Captures) -> Captures:
        return Captures(
            self.virtual | other.virtual,
            self.real | other.real,
            self.ranges | other.ranges,
            self.marks | other.marks,
            self.tunnels | other.tunnels,
            self.hops | other.hops,
        )
