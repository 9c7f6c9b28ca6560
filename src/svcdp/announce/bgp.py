"""What a BGP speaker on this node reads: the addresses that it announces for us. Pure.

svcdp speaks no BGP. Each address is a prefix of its whole length, with the speaker as next hop.
None is to become a route of the kernel's: the node's own clients would follow it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Literal, NamedTuple

__all__ = ["Speaker", "render"]

Speaker = Literal["bird", "exabgp", "frr"]


class _Prefixes(NamedTuple):
    """Of each family, sorted."""

    v4: list[str]
    v6: list[str]


def render(speaker: Speaker, addresses: Iterable[str], asn: int = 0) -> str:
    """The file for ``speaker``: the same for the same addresses, and valid without any.

    =========  ================================================================================
    bird       BIRD 2: protocols ``svcdp4`` and ``svcdp6``, for ``include``
    exabgp     ExaBGP 4: templates ``svcdp4`` and ``svcdp6``, one of which a neighbor inherits,
               before these in its configuration
    frr        FRR: networks of ``router bgp ASN``, behind its configuration, for frr-reload.py
    =========  ================================================================================
    """
    found = sorted(map(ipaddress.ip_address, addresses), key=lambda each: (each.version, int(each)))
    networks = [(each.version, f"{each}/{each.max_prefixlen}") for each in found]
    prefixes = _Prefixes(*([text for v, text in networks if v == n] for n in (4, 6)))
    if speaker == "bird":
        lines = _bird(prefixes)
    elif speaker == "exabgp":
        lines = _exabgp(prefixes)
    else:
        lines = _frr(prefixes, asn)
    return "\n".join(("# Written by svcdp: changes are lost.", *lines, ""))


def _bird(prefixes: _Prefixes) -> Iterable[str]:
    for family, found in zip((4, 6), prefixes, strict=True):
        yield f"protocol static svcdp{family} {{"
        yield f"    ipv{family};"
        yield from (f"    route {each} blackhole;" for each in found)
        yield "}"


def _exabgp(prefixes: _Prefixes) -> Iterable[str]:
    yield "template {"
    # A next hop is of the session's family.
    for family, found in zip((4, 6), prefixes, strict=True):
        yield f"    neighbor svcdp{family} {{"
        yield "        static {"
        yield from (f"            route {each} next-hop self;" for each in found)
        yield "        }"
        yield "    }"
    yield "}"


def _frr(prefixes: _Prefixes, asn: int) -> Iterable[str]:
    yield f"router bgp {asn}"
    yield " no bgp network import-check"  # no route of the kernel's is needed
    for family, found in zip((4, 6), prefixes, strict=True):
        yield f" address-family ipv{family} unicast"
        yield from (f"  network {each}" for each in found)
        yield " exit-address-family"
    yield "exit"
