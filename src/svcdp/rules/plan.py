"""What to capture, and how: plain data that knows no host and no tool."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from svcdp.errors import ConfigError

__all__ = ["CapturePlan", "Element", "family_of"]

Element = tuple[str, str, int]
"""Protocol, address, port: what a capture set holds."""

QUEUE_MAX = 0xFFFF
MARK_MAX = 0xFFFFFFFF


def family_of(address: str) -> int:
    """4 or 6, of an address or CIDR."""
    return 6 if ":" in address else 4


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """Which packets go to which queues, and what becomes of them afterwards.

    ``virtual`` are the addresses that clients dial, ``real`` those whose replies must be
    translated back. Packets spread over the ``queues``, from the first to the last. While
    nobody listens there, they go their way if ``bypass`` is set, else they are dropped.

    The marks are one bit each, which the verdict sets and nobody else may use:
    ``forward_mark`` on packets that were rewritten, ``pass_mark`` on those that were not.

    ``service_cidrs`` are given a route, so that programs on the node itself can connect to
    service addresses; its source is the first of ``addresses`` of that family, which must be
    the node's own.
    """

    queues: tuple[int, int] = (100, 103)
    forward_mark: int = 0x00100000
    pass_mark: int = 0x00200000
    bypass: bool = True
    service_cidrs: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    virtual: frozenset[Element] = frozenset()
    real: frozenset[Element] = frozenset()

    def __post_init__(self) -> None:
        first, last = self.queues
        if not 0 <= first <= last <= QUEUE_MAX:
            raise ConfigError(f"queues {first}-{last}: not a range within 0 to {QUEUE_MAX}")
        for name, mark in (("forward_mark", self.forward_mark), ("pass_mark", self.pass_mark)):
            if mark.bit_count() != 1 or not 0 < mark <= MARK_MAX:
                raise ConfigError(f"{name} {mark:#x}: not one bit of 32")
        if self.forward_mark == self.pass_mark:
            raise ConfigError(f"forward_mark and pass_mark are both {self.pass_mark:#x}")
        try:
            for cidr in self.service_cidrs:
                ipaddress.ip_network(cidr)
            for address in self.addresses:
                ipaddress.ip_address(address)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def source_of(self, cidr: str) -> str | None:
        """The node's own address from which service addresses of a CIDR are dialled."""
        family = family_of(cidr)
        return next((a for a in self.addresses if family_of(a) == family), None)
