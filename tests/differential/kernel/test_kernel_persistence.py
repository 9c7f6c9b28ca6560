"""Persistence, quiescent servers, services of marks and of all ports, single packets, SIP."""

from __future__ import annotations

from typing import Any

import pytest
import wire
from packets import from_client, from_server, padded, pieces, sip
from scapy.layers.inet import UDP
from scapy.packet import Raw
from scenario import Packet, Scenario
from services import shown
from topology import CLIENT, MARKED, VIRTUAL, server

NEIGHBOURS = {
    4: [f"198.51.{net}.{host}" for net in (100, 101) for host in (4, 5, 130, 200)],
    6: [f"2001:db8:{net}::{host}" for net in ("1", "1:1", "2") for host in (4, 5, "8000:1")],
}


def opened(
    family: int, ports: range, *, to: str = "", to_port: int = 80, protocol: str = "tcp"
) -> list[Packet]:
    """First packets of every neighbour's connections."""
    target = to or VIRTUAL[family]
    return [
        wire.packet(protocol, client, port, target, to_port, payload=b"x" * (protocol == "udp"))
        for port in ports
        for client in NEIGHBOURS[family]
    ]


def with_servers(
    scenario: Scenario,
    name: str,
    options: str,
    family: int = 4,
    port: int = 80,
    forward: str = "-m",
) -> Scenario:
    """A service of three servers."""
    scenario.ipvs(f"-A {name} {options}")
    servers = (shown(server(n, family), port) for n in (1, 2, 3))
    return scenario.ipvs(*(f"-a {name} -r {real} {forward}" for real in servers))


def by_client(family: int, option: str, title: str) -> Scenario:
    """New connections of a client go where its others are, whatever becomes of the server."""
    name = f"-t {shown(VIRTUAL[family], 80)}"
    gone = shown(server(1, family), 80)
    scenario = with_servers(Scenario(title), name, f"-s rr -p 100 {option}", family)
    scenario.send(*opened(family, range(2000, 2002))).connections().services()
    scenario.ipvs(f"-e {name} -r {gone} -m -w 0")  # quiescent: templates hold
    scenario.send(*opened(family, range(2002, 2003)))
    scenario.sysctl("expire_quiescent_template", 1)
    scenario.send(*opened(family, range(2003, 2004)))
    scenario.ipvs(f"-e {name} -r {gone} -m -w 1").send(*opened(family, range(2004, 2005)))
    scenario.ipvs(f"-d {name} -r {shown(server(2, family), 80)}")
    scenario.send(*opened(family, range(2005, 2007)))
    return scenario.connections().services()


def all_ports(options: str = "") -> Scenario:
    """A service of port 0: every port of its address, but what has its own service."""
    name = f"-t {VIRTUAL[4]}:0"
    scenario = with_servers(Scenario(f"port-0{options}"), name, f"-s rr -p 60 {options}", port=0)
    scenario.ipvs(f"-A -t {VIRTUAL[4]}:443 -s rr", f"-a -t {VIRTUAL[4]}:443 -r {server(5)}:8443 -m")
    for port in (80, 443, 8080):
        scenario.send(*opened(4, range(2000, 2002), to_port=port))
    return scenario.connections().services()


def by_mark(family: int, persistent: str) -> Scenario:
    """A service of a firewall mark: all addresses, ports and protocols with it."""
    version = "-6" if family == 6 else ""
    scenario = Scenario(f"mark-v{family}{persistent}").marks()
    with_servers(scenario, f"-f 1 {version}", f"-s rr {persistent}", family, port=0)
    # A server must be able to tell two virtual addresses apart: other ports of the clients.
    for first, target in ((2000, MARKED[family]), (3000, MARKED[family] + "1")):
        for port in (80, 81):
            for protocol in ("tcp", "udp", "sctp"):
                ports = range(first, first + 1)
                scenario.send(*opened(family, ports, to=target, to_port=port, protocol=protocol))
    return scenario.connections().services()


def single_packets(forward: str, persistent: str) -> Scenario:
    """Each datagram is scheduled by itself, and no connection is seen."""
    name = f"-u {VIRTUAL[4]}:80"
    scenario = Scenario(f"one-packet{forward}{persistent}")
    with_servers(scenario, name, f"-s rr -o {persistent}", forward=forward)
    for _ in range(4):
        scenario.send(wire.packet("udp", CLIENT[4], 2000, VIRTUAL[4], 80, payload=b"query"))
    scenario.services().connections()
    if forward == "-m":
        ways = [flow("UDP", 2000, 80, server(n)) for n in ((3,) if persistent else (1, 2, 3))]
        template = ["UDP", CLIENT[4], 0, VIRTUAL[4], 80, server(3), 80, "NONE", 50]
        ours = [*ways, *([template] if persistent else [])]
        scenario.differs(ours, "the way back is remembered, so that answers are rewritten")
    return scenario


def flow(protocol: str, port: int, virtual_port: int, real: str) -> list[Any]:
    """A UDP connection of the client, as it is listed."""
    return [protocol, CLIENT[4], port, VIRTUAL[4], virtual_port, real, virtual_port, "UDP", 300]


def calls(form: str) -> Scenario:
    """SIP: datagrams of one call go to one server, whatever their source port."""
    name = f"-u {VIRTUAL[4]}:5060"
    scenario = with_servers(Scenario(f"sip-{form}"), name, "-s rr -p 60 --pe sip", port=5060)
    made = {3000: ("a@x", 3), 3001: ("b@x", 2), 3002: ("a@x", 3), 3003: ("c@x", 1)}
    for port, (call, _) in made.items():
        scenario.send(bytes(from_client(4, sip(port, call, form))))
    scenario.send(bytes(from_client(4, sip(3000, "d@x", form))))  # of a known connection
    scenario.send(bytes(from_client(4, UDP(sport=3100, dport=5060) / Raw(b"no call"))))
    scenario.services().connections()
    flows = [flow("UDP", port, 5060, server(number)) for port, (_, number) in made.items()]
    return scenario.differs(flows, "what binds calls is not listed")


def calls_of_servers(family: int, option: str = "") -> Scenario:
    """SIP: a server that calls is seen as the service, and gets what belongs to its call."""
    name = f"-u {shown(VIRTUAL[family], 5060)}"
    scenario = Scenario(f"sip-out-v{family}{option}")
    with_servers(scenario, name, f"-s rr -p 60 --pe sip {option}", family, port=5060)

    def out(number: int, *calls: tuple[str, int], own: int = 5060) -> None:
        bodies = [sip(own, call, to=port) for call, port in calls]
        packets = [bytes(from_server(family, body, number=number)) for body in bodies]
        scenario.send(*packets, side=f"s{number}")

    def back(call: str, *ports: int) -> None:
        scenario.send(*(bytes(from_client(family, sip(port, call))) for port in ports))

    out(2, ("a@x", 3000), ("a@x", 3000))
    out(1, ("b@x", 3001))
    back("a@x", 3000, 3100, 3101)
    back("b@x", 3110)
    back("c@x", 3111)
    out(3, ("a@x", 3002))  # goes on with another server's call
    back("a@x", 3120)
    out(4, ("d@x", 3003))  # none of the service's
    out(1, ("d@x", 3003), own=5061)
    silent = UDP(sport=5060, dport=3004) / Raw(b"no call")
    scenario.send(bytes(from_server(family, silent)), side="s1")
    scenario.services()
    out(1, ("e@x", 3200))
    out(2, ("f@x", 3200))
    back("e@x", 3200)  # the newest has the port, but where each packet is scheduled by itself
    return scenario


def calls_in_pieces(family: int) -> Scenario:
    """SIP: the first piece of a datagram has the Call-ID; or another one."""
    name = f"-u {shown(VIRTUAL[family], 5060)}"
    scenario = Scenario(f"sip-pieces-v{family}")
    with_servers(scenario, name, "-s rr -p 60 --pe sip", family, port=5060)
    for port, call in enumerate(("a@x", "b@x", "a@x", "c@x", "b@x"), 3000):
        scenario.send_pieces(*pieces(padded(from_client(family, sip(port, call), id=port), 1500)))
    late = sip(3100, "a@x", before="Subject: " + "x" * 1300)
    first, *others = pieces(from_client(family, late, id=3100))
    scenario.send_pieces(first, *others)
    ours = [["host", piece[40 * (family == 6) :].hex()] for piece in others]
    return scenario.differs(ours, "it reads the first fragment, and drops what has no call")


def ftp_at_servers(family: int, forward: str) -> Scenario:
    """A persistent service of port 21: data connections of a client follow its control
    connection, which nobody reads along.
    """
    name = f"-t {shown(VIRTUAL[family], 21)}"
    scenario = Scenario(f"ftp-v{family}{forward}")
    with_servers(scenario, name, "-s rr -p 100", family, 21, forward)
    for port in (21, 30000, 20, 1023, 1024):
        scenario.send(*opened(family, range(2000 + port, 2001 + port), to_port=port))
    scenario.send(*opened(family, range(20, 21), to_port=21))
    return scenario.connections().services()


SCENARIOS = [
    by_client(4, "", "v4"),
    by_client(6, "", "v6"),
    by_client(4, "-M 255.255.255.0", "v4-netmask"),
    by_client(4, "-M 255.255.255.128", "v4-netmask-25"),
    by_client(6, "-M 48", "v6-netmask"),
    by_client(6, "-M 64", "v6-netmask-64"),
    all_ports(),
    all_ports("-M 255.255.0.0"),
    *(by_mark(family, options) for family in (4, 6) for options in ("", "-p 50")),
    *(single_packets(forward, options) for forward in ("-m", "-g") for options in ("", "-p 50")),
    *(calls(form) for form in ("crlf", "lf", "short")),
    *(calls_in_pieces(family) for family in (4, 6)),
    *(ftp_at_servers(family, forward) for family in (4, 6) for forward in ("-g", "-i")),
    *(calls_of_servers(family, option) for family in (4, 6) for option in ("", "-o")),
]


@pytest.mark.usefixtures("agree")
def test_persistence(scenario: Scenario) -> None:
    """Nothing more: `agree` compares."""
