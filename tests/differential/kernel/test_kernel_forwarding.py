"""What each forwarding method makes of packets, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
from packets import from_client, init, padded, syn, udp
from scapy.layers.inet import UDP, IPOption_NOP, IPOption_Router_Alert
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop
from scapy.packet import Packet
from scenario import Scenario
from services import METHODS, PROTOCOLS, serve, service, shown
from topology import director

#: Of the way to the server. A tunnel leaves less for the packet.
SERVER_MTU = 1400
EXTENSIONS = (IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop)
HEADERS = (0, 20, 24, 28, 32, 40, 44, 48, 52)


def bodies(ports: Iterator[int]) -> Iterator[Packet]:
    """Of first packets: each protocol, lengths odd and even, checksums right, wrong and missing."""
    yield syn(next(ports))
    yield syn(next(ports), payload=b"odd")
    wrong = syn(next(ports))
    wrong.chksum = 0x1234
    yield wrong
    for payload in (b"", b"odd", b"even"):
        yield udp(next(ports), payload=payload)
        yield udp(next(ports), payload=payload, chksum=0)
    yield udp(next(ports), chksum=0x1234)
    yield init(next(ports))
    wrong = init(next(ports))
    wrong.chksum = 0x1234
    yield wrong


def headers(family: int, ports: Iterator[int]) -> Iterator[Packet]:
    """TTL, TOS with every ECN field, DF, options."""
    for ttl in (255, 2, 1):
        for body in (syn(next(ports)), udp(next(ports)), init(next(ports))):
            yield from_client(family, body, ttl=ttl)
    for tos in (0xB8, 0x01, 0x02, 0x03, 0xFF):
        yield from_client(family, udp(next(ports)), tos=tos)
    yield from_client(family, syn(next(ports)), df=True)
    yield from_client(family, syn(next(ports)), df=True, id=0)
    if family == 4:
        options = [IPOption_Router_Alert(), IPOption_NOP()]
        yield from_client(4, syn(next(ports)), options=options)
    else:
        yield from_client(6, IPv6ExtHdrDestOpt() / udp(next(ports)))
        yield from_client(6, IPv6ExtHdrHopByHop() / udp(next(ports)))


def sizes(family: int, ports: Iterator[int]) -> Iterator[Packet]:
    """What just fits, and what just does not, with any of the tunnels."""
    for taken in HEADERS:
        for more in (0, 1):
            packet = from_client(family, UDP(sport=next(ports), dport=80), df=True)
            yield padded(packet, SERVER_MTU - taken + more)


def forwarding(name: str, family: int, outer: int, **sysctls: int) -> Scenario:
    """All that a client can send to a service of one method."""
    inside = {(4, 6): "4in6-", (6, 4): "6in4-"}.get((family, outer), f"v{family}-")
    title = f"{inside}{name}" + "".join(f"-{key}-{value}" for key, value in sysctls.items())
    scenario = Scenario(title, mtu={"s1": SERVER_MTU})
    for key, value in sysctls.items():
        scenario.sysctl(key, value)
    serve(scenario, family, name, outer)
    ports = count(1025)
    scenario.send(*map(bytes, (from_client(family, body) for body in bodies(ports))))
    # Before there are errors: the kernel counts its own as packets out (not with masq).
    scenario.counters()
    scenario.send(*map(bytes, headers(family, ports)))
    scenario.send(*map(bytes, sizes(family, ports)))
    return scenario.connections()


def at_home(family: int, option: str) -> Scenario:
    """The director is the server: packets go on to its own stack, as they are."""
    scenario = Scenario(f"v{family}-local{option}")
    for protocol in PROTOCOLS:
        name = service(protocol, family)
        real = shown(director("s1", family), 80)
        scenario.ipvs(f"-A {name} -s rr", f"-a {name} -r {real} {option}")
    ports = count(1025)
    packets = [from_client(family, body) for body in bodies(ports)]
    packets += headers(family, ports)
    # IPv6 shows its sockets no extension headers. What the stack answers is not looked at.
    return scenario.send(*(bytes(p) for p in packets if not isinstance(p.payload, EXTENSIONS)))


SCENARIOS = [
    *(forwarding(name, family, family) for name in METHODS for family in (4, 6)),
    *(
        forwarding(name, inner, outer)
        for name in METHODS
        if "-i" in METHODS[name][0]
        for inner, outer in ((4, 6), (6, 4))
    ),
    *(forwarding(name, 4, 4, pmtu_disc=0) for name in ("ipip", "gre", "gue")),
    *(at_home(family, option) for family in (4, 6) for option in ("-g", "-i")),
]


@pytest.mark.usefixtures("agree")
def test_a_method(scenario: Scenario) -> None:
    """Nothing more: `agree` compares."""
