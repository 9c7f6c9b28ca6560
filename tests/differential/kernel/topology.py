"""Who is where: one client side and five server sides around a director, and its virtual IPs.

Everything that is not a server is behind the client side's router.
"""

from __future__ import annotations

SERVERS = range(1, 6)
#: The director's interfaces, also the names of the sides.
SIDES = ("c", *(f"s{n}" for n in SERVERS))

CLIENT = {4: "198.51.100.4", 6: "2001:db8:1::4"}
ROUTER = {4: "192.0.2.254", 6: "2001:db8::fe"}
#: On the director. The /16 and /32 are local there as a whole, to have many of them.
VIRTUAL = {4: "10.96.0.10", 6: "fd96::10"}
VIRTUAL_NETWORK = {4: "10.96.0.0/16", 6: "fd96::/32"}
#: Packets to these have the firewall mark 1; they are local, too.
MARKED_NETWORK = {4: "10.97.0.0/16", 6: "fd97::/32"}
MARKED = {4: "10.97.0.10", 6: "fd97::10"}
#: Packets to these have the firewall mark 1 and are not local, but behind the client side.
FOREIGN_NETWORK = {4: "10.98.0.0/16", 6: "fd98::/32"}
FOREIGN = {4: "10.98.1.2", 6: "fd98::1:2"}
MTU = 1500


def director(side: str, family: int) -> str:
    """The director's address on a side."""
    if side == "c":
        return {4: "192.0.2.1", 6: "2001:db8::1"}[family]
    number = int(side[1:])
    return {4: f"10.1.{number}.1", 6: f"fd01:{number}::1"}[family]


def server(number: int, family: int = 4) -> str:
    return {4: f"10.1.{number}.2", 6: f"fd01:{number}::2"}[family]


def prefix(family: int) -> int:
    """Of the networks between the director and its neighbours."""
    return {4: 24, 6: 64}[family]


def side_of(address: str) -> str:
    """The side where an address is."""
    for number in SERVERS:
        if address in (server(number, 4), server(number, 6)):
            return f"s{number}"
    return "c"
