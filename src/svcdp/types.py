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
    "SourceRule",
    "Verdict",
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


class Protocol(enum.IntEnum):
    """Transport protocols a service can have, by IP protocol number."""

    TCP = 6
    UDP = 17
    SCTP = 132


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
class DestinationSpec:
    """One real server of a service. ``weight`` 0 quiesces it: no new connections."""

    address: str
    port: int
    weight: int = 1
    method: str = "masq"


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
    admits is dropped (``Reason.SOURCE_RANGE``).
    """

    sources: tuple[str, ...] = ()
    masquerade: bool = False
    on_empty: Literal["reject", "drop"] = "reject"


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One virtual service: an address, port and protocol, and who serves it.

    ``persistence`` is the affinity timeout in seconds (None: off). Services that
    share a non-empty ``persistence_group`` share their affinity (kube-proxy keys
    it by service port, not by the address that was dialled).
    ``masquerade_address`` is the source address given to masqueraded connections;
    where it is set, a client that would reach itself (hairpin) is masqueraded too.
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

    @property
    def key(self) -> tuple[str, int, str]:
        """What identifies a service: address, port, protocol."""
        return (self.address, self.port, self.protocol)

    def __str__(self) -> str:
        return self.name or f"{_endpoint(self.address, self.port)}/{self.protocol}"
