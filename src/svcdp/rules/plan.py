"""What to capture, and how: plain data that knows no host and no tool."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

from svcdp.dataplane import Captures
from svcdp.errors import ConfigError

__all__ = [
    "CapturePlan",
    "Element",
    "Hop",
    "Item",
    "Kind",
    "Mark",
    "Network",
    "family_of",
    "items_of",
]

Kind = Literal["tunnel", "virtual", "real"]


class Element(NamedTuple):
    """What a capture set holds: packets to (``virtual``; ``tunnel`` if they may leave in one) or
    from (``real``) an address. Without a protocol: all its packets.
    """

    kind: Kind
    address: str
    protocol: str = ""
    port: int = 0


class Mark(NamedTuple):
    """A firewall mark whose packets are captured, of IP version 4 or 6. ``kind`` is that of an
    element: virtual or tunnel.
    """

    mark: int
    family: int
    kind: Kind = "virtual"


class Network(NamedTuple):
    """All packets to a CIDR."""

    cidr: str


class Hop(NamedTuple):
    """Where packets with a mark go, whatever their destination says."""

    mark: int
    address: str


Item = Element | Mark | Network | Hop

QUEUE_MAX = 0xFFFF
MARK_MAX = 0xFFFFFFFF
#: As iptables has it: a name, or how it begins and "+".
_INTERFACE = re.compile(r"[\w.@-]{1,15}|[\w.@-]{1,14}\+", re.ASCII)


def family_of(address: str) -> int:
    """4 or 6, of an address or CIDR."""
    return 6 if ":" in address else 4


def items_of(captures: Captures) -> frozenset[Item]:
    """What the kernel must be told for captures.

    It captures single ports or whole addresses: for a range of ports, and where every port is
    meant, more comes than is needed, and passes.
    """
    return frozenset(_items(captures))


def _items(captures: Captures) -> Iterator[Item]:
    for key in captures.virtual:
        yield Network(key[1]) if "/" in key[1] else _element(_kind(captures, key), *key)
    for protocol, address, first, _ in captures.ranges:
        yield Element(_kind(captures, (protocol, address, first)), address)
    for protocol, address, port in captures.real:
        yield Element("real", address, protocol, port) if port else Element("real", address)
    for mark, family in captures.marks:
        unspecified = "0.0.0.0" if family == 4 else "::"
        yield Mark(mark, family, _kind(captures, ("fwmark", unspecified, mark)))
    for hop in captures.hops:
        yield Hop(*hop)


def _kind(captures: Captures, endpoint: tuple[str, str, int]) -> Kind:
    protocol, address, port = endpoint
    return "tunnel" if (address, port, protocol) in captures.tunnels else "virtual"


def _element(kind: Kind, protocol: str, address: str, port: int) -> Element:
    return Element(kind, address, protocol, port) if port else Element(kind, address)


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """Which packets go to which queues, and what becomes of them afterwards.

    ``items`` say which (see :func:`items_of`). Packets spread over the ``queues``, from the
    first to the last; those that may leave in a tunnel over the ``tunnel_queues``. While nobody
    listens there, they go their way if ``bypass`` is set, else they are dropped.

    The marks are one bit each, which the verdict sets and nobody else may use:
    ``forward_mark`` on packets that were rewritten, ``pass_mark`` on those that were not.
    ``hop_marks`` is a mask: the field of the mark by whose value a :class:`Hop` is chosen.

    ``pod_mark`` is set on packets that come in by ``pod_interface`` (``cni0``; ``veth+`` is every
    interface whose name begins so), before they are captured; without one it is nobody's.

    ``service_cidrs`` are given a route, so that programs on the node itself can connect to
    service addresses; its source is the first of ``addresses`` of that family, which must be
    the node's own.

    ``hosted`` are addresses and ports that programs of this host serve, by UDP and TCP, whatever
    the items say: their packets are left alone, and the addresses are made local.
    """

    queues: tuple[int, int] = (100, 103)
    tunnel_queues: tuple[int, int] = (104, 104)
    forward_mark: int = 0x00100000
    pass_mark: int = 0x00200000
    hop_marks: int = 0xFFC00000
    pod_mark: int = 0x00080000
    pod_interface: str = ""
    bypass: bool = True
    service_cidrs: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    hosted: tuple[tuple[str, int], ...] = ()
    items: frozenset[Item] = frozenset()

    def __post_init__(self) -> None:
        for name, (first, last) in (("", self.queues), ("tunnel ", self.tunnel_queues)):
            if not 0 <= first <= last <= QUEUE_MAX:
                raise ConfigError(
                    f"{name}queues {first}-{last}: not a range within 0 to {QUEUE_MAX}"
                )
        if max(self.queues[0], self.tunnel_queues[0]) <= min(self.queues[1], self.tunnel_queues[1]):
            raise ConfigError("queues and tunnel_queues overlap: change one of them")
        own = {"forward_mark": self.forward_mark, "pass_mark": self.pass_mark}
        if self.pod_interface:
            own["pod_mark"] = self.pod_mark
        for name, mark in own.items():
            if mark.bit_count() != 1 or not 0 < mark <= MARK_MAX:
                raise ConfigError(f"{name} {mark:#x}: not one bit of 32")
        for (one, mark), (other, same) in combinations(own.items(), 2):
            if mark == same:
                raise ConfigError(f"{one} and {other} are both {mark:#x}")
        if self.pod_interface and not _INTERFACE.fullmatch(self.pod_interface):
            raise ConfigError(f"pod_interface {self.pod_interface!r} is no name of interfaces")
        if not 0 < self.hop_marks <= MARK_MAX or not _is_field(self.hop_marks):
            raise ConfigError(f"hop_marks {self.hop_marks:#x}: not a row of bits of 32")
        if self.hop_marks & ~self.free_marks:
            raise ConfigError(f"hop_marks {self.hop_marks:#x} hold {' or '.join(own)}")
        for mark, *_ in self.marks:
            if mark & ~self.free_marks:
                raise ConfigError(f"fwmark {mark:#x} holds {' or '.join(own)}")
            if mark & self.hop_marks:
                raise ConfigError(
                    f"fwmark {mark:#x} holds bits of hop_marks {self.hop_marks:#x}: its packets"
                    " would take the way of destinations by dr"
                )
        try:
            for cidr in self.service_cidrs:
                ipaddress.ip_network(cidr)
            for address in (*self.addresses, *(address for address, _ in self.hosted)):
                ipaddress.ip_address(address)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def free_marks(self) -> int:
        """The bits that are not ours alone."""
        pods = self.pod_mark if self.pod_interface else 0
        return (self.forward_mark | self.pass_mark | pods) ^ MARK_MAX

    @property
    def elements(self) -> list[Element]:
        """The items that sets hold."""
        return [item for item in self.items if isinstance(item, Element)]

    @property
    def marks(self) -> list[Mark]:
        """The items that are marks, in order."""
        return sorted(item for item in self.items if isinstance(item, Mark))

    @property
    def networks(self) -> list[Network]:
        """The items that are networks, in order."""
        return sorted(item for item in self.items if isinstance(item, Network))

    @property
    def hops(self) -> list[Hop]:
        """The items that are next hops."""
        return [item for item in self.items if isinstance(item, Hop)]

    def queues_of(self, kind: Kind) -> tuple[int, int]:
        """The first and last queue for elements of a kind."""
        return self.tunnel_queues if kind == "tunnel" else self.queues

    def source_of(self, cidr: str) -> str | None:
        """The node's own address from which service addresses of a CIDR are dialled."""
        family = family_of(cidr)
        return next((a for a in self.addresses if family_of(a) == family), None)


def _is_field(mask: int) -> bool:
    """Whether the bits of a mask stand side by side."""
    count = mask // (mask & -mask)
    return count & (count + 1) == 0
