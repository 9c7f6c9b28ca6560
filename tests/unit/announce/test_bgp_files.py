"""Files for BGP speakers. Debian's took these: `bird` (2.0.12, a session too), `vtysh -C -f` (FRR
8.4.4) and `exabgp --validate` (4.2.21).
"""

from __future__ import annotations

import pytest

from svcdp.announce.bgp import Speaker, render

ADDRESSES = ["192.0.2.10", "2001:db8::10", "192.0.2.9"]
HEAD = "# Written by svcdp: changes are lost.\n"

BIRD = """\
protocol static svcdp4 {
    ipv4;
    route 192.0.2.9/32 blackhole;
    route 192.0.2.10/32 blackhole;
}
protocol static svcdp6 {
    ipv6;
    route 2001:db8::10/128 blackhole;
}
"""
EXABGP = """\
template {
    neighbor svcdp4 {
        static {
            route 192.0.2.9/32 next-hop self;
            route 192.0.2.10/32 next-hop self;
        }
    }
    neighbor svcdp6 {
        static {
            route 2001:db8::10/128 next-hop self;
        }
    }
}
"""
FRR = """\
router bgp 64512
 no bgp network import-check
 address-family ipv4 unicast
  network 192.0.2.9/32
  network 192.0.2.10/32
 exit-address-family
 address-family ipv6 unicast
  network 2001:db8::10/128
 exit-address-family
exit
"""
FILES = pytest.mark.parametrize(
    ("speaker", "text"), [("bird", BIRD), ("exabgp", EXABGP), ("frr", FRR)]
)


@FILES
def test_addresses_are_prefixes_of_their_own(speaker: Speaker, text: str) -> None:
    assert render(speaker, ADDRESSES, 64512) == HEAD + text
    assert render(speaker, reversed(ADDRESSES), 64512) == HEAD + text


@FILES
def test_without_addresses_all_else_stays(speaker: Speaker, text: str) -> None:
    lines = [line for line in text.splitlines() if "192.0.2." not in line and "2001:" not in line]
    assert render(speaker, [], 64512) == HEAD + "\n".join([*lines, ""])
