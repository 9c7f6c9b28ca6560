"""What IPVS's sysctls change, and removed servers."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest
import wire
from replay import routed
from scenario import Packet, Scenario
from topology import CLIENT, FOREIGN, MARKED, VIRTUAL, server

TCP, UDP = f"-t {VIRTUAL[4]}:80", f"-u {VIRTUAL[4]}:80"


def packet(port: int, flags: str = "S", protocol: str = "tcp") -> Packet:
    return wire.packet(protocol, CLIENT[4], port, VIRTUAL[4], 80, flags, b"x" * (protocol == "udp"))


def answer(port: int, flags: str = "SA", number: int = 1, protocol: str = "tcp") -> Packet:
    return wire.packet(
        protocol, server(number), 80, CLIENT[4], port, flags, b"x" * (protocol == "udp")
    )


def two_servers(name: str, option: str = "-m", **sysctls: int) -> Scenario:
    """TCP and UDP; the second server is picked first."""
    scenario = Scenario(name + "".join(f"-{key}-{value}" for key, value in sysctls.items()))
    for key, value in sysctls.items():
        scenario.sysctl(key, value)
    for service in (TCP, UDP):
        scenario.ipvs(f"-A {service} -s rr")
        scenario.ipvs(*(f"-a {service} -r {server(number)}:80 {option}" for number in (1, 2)))
    return scenario


def removed_server(option: str, expire: int) -> Scenario:
    """Packets and replies of connections whose server was removed, and came back."""
    scenario = two_servers(f"removed{option}", option, expire_nodest_conn=expire)
    scenario.send(
        *(packet(port) for port in (1, 2)), *(packet(port, protocol="udp") for port in (1, 2))
    )
    scenario.send(*(packet(port, "A") for port in (1, 2)))
    scenario.ipvs(f"-d {TCP} -r {server(2)}:80", f"-d {UDP} -r {server(2)}:80")
    if expire:
        scenario.wait(0.3)  # the kernel forgets the connections soon after
    else:
        scenario.send(answer(1, "A", 2), answer(1, number=2, protocol="udp"), side="s2")
    scenario.send(*(packet(port, "A") for port in (1, 2)))
    scenario.send(*(packet(port, protocol="udp") for port in (1, 2)))
    scenario.services().connections()
    scenario.ipvs(f"-a {TCP} -r {server(2)}:80 {option}", f"-a {UDP} -r {server(2)}:80 {option}")
    scenario.send(*(packet(port, "A") for port in (1, 2)))
    scenario.send(packet(1), packet(2), packet(3))
    scenario.send(*(packet(port, protocol="udp") for port in (1, 2, 3)))
    return scenario.services().connections()


def removed_service(expire: int) -> Scenario:
    """All servers of a service are gone with it."""
    scenario = two_servers("removed-service", expire_nodest_conn=expire)
    scenario.send(packet(1), packet(2), packet(1, "A"))
    scenario.ipvs(f"-D {TCP}").wait(0.3).send(packet(1, "A"), packet(2, "A"), packet(3))
    scenario.ipvs(f"-A {TCP} -s rr", f"-a {TCP} -r {server(1)}:80 -m")
    return scenario.send(packet(1, "A"), packet(2, "A"), packet(3), packet(2)).connections()


#: What a client and its server did before the client opens the connection anew.
PASTS: dict[str, list[tuple[str, str]]] = {
    "syn": [("c", "S")],
    "established": [("c", "S"), ("c", "A")],
    "client-reset": [("c", "S"), ("c", "A"), ("c", "RA")],
    "client-fin": [("c", "S"), ("c", "A"), ("c", "FA")],
    "both-fin": [("c", "S"), ("s", "SA"), ("c", "A"), ("s", "FA"), ("c", "FA")],
    "server-fin": [("c", "S"), ("s", "SA"), ("c", "A"), ("s", "FA")],
    "server-reset": [("c", "S"), ("s", "RA")],
}


def reused_ports(option: str, mode: int, expire: int = 0) -> Scenario:
    """A client's SYN from a port that it has used before, after each past."""
    scenario = two_servers(
        f"reuse{option}", option, conn_reuse_mode=mode, expire_nodest_conn=expire
    )
    for index, past in enumerate(PASTS.values()):
        # Two connections: round robin comes back to where it was.
        for port in (1000 + 2 * index, 1001 + 2 * index):
            number = 2 - port % 2
            for side, flags in past:
                if side == "c":
                    scenario.send(packet(port, flags))
                elif option == "-m":
                    scenario.send(answer(port, flags, number), side=f"s{number}")
    scenario.connections()
    scenario.send(*(packet(1000 + 2 * index) for index in range(len(PASTS))))
    scenario.connections()
    scenario.ipvs(f"-e {TCP} -r {server(2)}:80 {option} -w 0")
    scenario.send(*(packet(1000 + port) for port in range(2 * len(PASTS))))
    return scenario.connections()


def dropped_packets() -> Scenario:
    """Of what would be scheduled one in a few is dropped."""
    scenario = two_servers("drop-packet", am_droprate=3, drop_packet=3)
    scenario.send(*(packet(port) for port in range(1, 20))).send(
        *(packet(port, "A") for port in range(1, 20))
    )
    return scenario.sysctl("drop_packet", 0).send(*(packet(port) for port in range(30, 34)))


def bypassed(enabled: int) -> Scenario:
    """Nobody serves what was meant for somebody else: let it go there."""
    scenario = Scenario(f"cache-bypass-{enabled}").sysctl("cache_bypass", enabled).marks()
    scenario.ipvs("-A -f 1 -s rr")
    # Without it a local address, whose host can answer as it.
    target = (FOREIGN if enabled else MARKED)[4]
    for protocol, port in product(("tcp", "udp"), (80, 443)):
        data = b"x" * (protocol == "udp")
        sent = wire.packet(protocol, CLIENT[4], 1000, target, port, payload=data)
        scenario.send(sent, sent)
    return scenario.connections()


def unserved() -> Scenario:
    """No server, no server with a weight, all overloaded; source port 20; no service."""
    scenario = Scenario("unserved").ipvs(f"-A {TCP} -s rr", f"-A {UDP} -s wlc")
    scenario.send(packet(1), packet(1, protocol="udp"))
    scenario.ipvs(f"-a {TCP} -r {server(1)}:80 -m -w 0").send(
        packet(2), packet(3, "A"), packet(4, "RA")
    )
    scenario.ipvs(f"-e {TCP} -r {server(1)}:80 -m -w 1 -x 1").send(packet(5), packet(6))
    scenario.send(wire.packet("tcp", CLIENT[4], 7, VIRTUAL[4], 81))
    scenario.ipvs(f"-A -t {VIRTUAL[4]}:90 -s rr", f"-a -t {VIRTUAL[4]}:90 -r {server(1)}:90 -m")
    scenario.send(wire.packet("tcp", CLIENT[4], 20, VIRTUAL[4], 90))
    ours = [[["s1", routed(wire.packet("tcp", CLIENT[4], 20, server(1), 90)).hex()]]]
    scenario.differs(ours, "port 20 is FTP data for services of that helper only")
    return scenario.send(wire.packet("sctp", CLIENT[4], 7, VIRTUAL[4], 80))


def chosen_timeouts() -> Scenario:
    scenario = two_servers("timeouts").ipvs("--set 50 40 30")
    scenario.send(packet(1), packet(1, "A"), packet(2), packet(2, "A"), packet(2, "FA"))
    scenario.send(packet(3, protocol="udp")).connections().ipvs("--set 0 0 7")
    return scenario.send(packet(4, protocol="udp"), packet(1, "A")).connections()


def scenarios() -> Iterable[Scenario]:
    yield from (removed_server(option, expire) for option in ("-m", "-g") for expire in (0, 1))
    yield from (removed_service(expire) for expire in (0, 1))
    yield from (reused_ports(option, mode) for option in ("-m", "-g") for mode in (0, 1, 2))
    yield reused_ports("-m", 1, expire=1)
    yield dropped_packets()
    yield from (bypassed(enabled) for enabled in (0, 1))
    yield unserved()
    yield chosen_timeouts()


SCENARIOS = [*scenarios()]


@pytest.mark.usefixtures("agree")
def test_sysctls(scenario: Scenario) -> None:
    """Nothing more: `agree` compares."""
