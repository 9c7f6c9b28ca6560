"""ICMP errors about packets of connections, and about the director's own tunnels."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
import wire
from packets import from_client, icmp_errors, init, padded, syn, udp
from replay import routed
from scapy.layers.inet import GRE, ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoRequest, ICMPv6PacketTooBig, IPv6
from scapy.packet import Packet, Raw
from scenario import GUE_PORT, Outcome, Scenario
from services import METHODS, serve
from topology import CLIENT, ROUTER, VIRTUAL, director, server

#: Of the header before what an ICMP error quotes.
QUOTED_AT = {4: 28, 6: 48}
ICMP_FIXES = "6.1.187"
TUNNEL_FIXES = "6.1.180"


def requests(family: int) -> list[Packet]:
    bodies = (syn(5000), udp(5001, payload=b"x" * 300), init(5002))
    return [from_client(family, body) for body in bodies]


def toward_server(request: Packet, port: int) -> Packet:
    """What the server got of a request, with masq."""
    packet = request.copy()
    packet.dst = server(1, request.version)
    packet.payload.dport = port
    del packet.payload.chksum
    return packet


def reply(request: Packet) -> Packet:
    """What the client got."""
    packet = request.copy()
    packet.src, packet.dst = request.dst, request.src
    packet.payload.sport, packet.payload.dport = request.payload.dport, request.payload.sport
    return packet


def finished(error: Packet) -> Packet:
    """The error with its checksums as numbers."""
    return error.__class__(bytes(error))


def spoiled(error: Packet) -> Packet:
    """The error with a wrong checksum."""
    packet = finished(error)
    name = "chksum" if packet.version == 4 else "cksum"
    setattr(packet.payload, name, getattr(packet.payload, name) ^ 0x0101)
    return packet


def cut(error: Packet, length: int) -> Packet:
    """The error with only so many bytes quoted."""
    packet = error.__class__(bytes(error)[: QUOTED_AT[error.version] + length])
    if packet.version == 4:
        del packet.len, packet.chksum, packet.payload.chksum
    else:
        del packet.plen, packet.payload.cksum
    return packet


def cuts(error: Packet) -> list[bytes]:
    """The error with hardly enough quoted, and with less."""
    least = {4: 20, 6: 40}[error.version]
    lengths = (least + 8, least + 4, least + 3, least, least - 1, 0)
    return [bytes(cut(error, length)) for length in lengths]


def sent(packets: list[Packet], side: str) -> Outcome:
    """What comes out where each packet goes to a side."""
    return [[[side, bytes(packet).hex()]] for packet in packets]


def relayed(error: Packet, port: int, *, to_client: bool) -> Packet:
    """What masq makes of an error: the addresses of the other side, in what it quotes, too; the
    transport checksum that is quoted stays.
    """
    data, family = bytearray(routed(bytes(error))), error.version
    quoted = QUOTED_AT[family]
    size, at = {4: (4, 12), 6: (16, 8)}[family]
    source, target = slice(at, at + size), slice(at + size, at + 2 * size)
    ours, ports = (
        (VIRTUAL[family], 80) if to_client else (server(1, family), port),
        quoted + ((data[quoted] & 15) * 4 if family == 4 else 40),
    )
    address = ip_address(ours[0]).packed
    inside = data[quoted:ports]
    data[source if to_client else target] = address
    inside[target if to_client else source] = address
    if family == 4:
        inside[10:12] = bytes(2)
        inside[10:12] = wire.internet_checksum(bytes(inside)).to_bytes(2, "big")
        data[10:12] = bytes(2)
        data[10:12] = wire.internet_checksum(bytes(data[:20])).to_bytes(2, "big")
    data[quoted:ports] = inside
    number = slice(ports + 2, ports + 4) if to_client else slice(ports, ports + 2)
    data[number] = ours[1].to_bytes(2, "big")
    start = 20 if family == 4 else 40
    protocol = wire.ICMP if family == 4 else wire.ICMP6
    body = wire.with_checksum(
        bytes(data[source]), bytes(data[target]), protocol, bytes(data[start:])
    )
    return error.__class__(bytes(data[:start]) + body)


def parameter_problem(source: str, about: Packet) -> Packet:
    quoted = bytes(finished(about))[:48]
    return IP(src=source, dst=about.src, ttl=33) / ICMP(type=12, ptr=9) / Raw(quoted)


EVERY_KIND = "an error of any type is its connection's, and reaches who can act on it"


def from_servers(family: int, method: str) -> Scenario:
    """The server, or a router before it, complains of requests."""
    scenario = serve(Scenario(f"v{family}-{method}-from-server"), family, method)
    port = METHODS[method][1]
    masq = method == "masq"
    router = {4: "10.1.1.77", 6: "fd01:1::77"}[family]
    for request in requests(family):
        scenario.send(bytes(request))
        about = toward_server(request, port) if masq else request
        for source in (server(1, family), router):
            errors = icmp_errors(source, about, ttl=33)
            scenario.send(*map(bytes, errors), side="s1")
            if masq and family == 6:
                ours = sent([relayed(error, port, to_client=True) for error in errors], "c")
                scenario.differs(ours, "it forgot the pseudo header in the checksum", ICMP_FIXES)
            else:
                scenario.send(*cuts(errors[0]), side="s1")
            scenario.send(bytes(spoiled(errors[0])), side="s1")
        if family == 4:
            error = parameter_problem(router, about)
            scenario.send(bytes(error), side="s1")
            if masq:
                ours = sent([relayed(error, port, to_client=True)], "c")
                scenario.differs(ours, EVERY_KIND)
    return scenario.connections()


def from_clients(family: int, method: str) -> Scenario:
    """The client, or a router before it, complains of replies."""
    scenario = serve(Scenario(f"v{family}-{method}-from-client"), family, method)
    port = METHODS[method][1]
    for request in requests(family):
        scenario.send(bytes(request))
        about = reply(request)
        for source in (CLIENT[family], ROUTER[family]):
            errors = icmp_errors(source, about, ttl=33)
            scenario.send(*map(bytes, errors), *cuts(errors[0]))
        for ttl in (2, 1):
            scenario.send(bytes(icmp_errors(CLIENT[family], about, ttl=ttl)[0]))
        if method == "masq" and family == 6:
            scenario.send(bytes(spoiled(errors[0])))
            scenario.differs([[]], "it did not look at the checksum", ICMP_FIXES)
        elif method == "dr" and family == 4:
            scenario.send(bytes(spoiled(errors[0])))
            passed = IP(routed(bytes(spoiled(errors[0]))))
            scenario.differs(sent([passed], "s1"), "it judged what it only passes", ICMP_FIXES)
        if method != "ipip" and family == 4:
            error = parameter_problem(CLIENT[4], about)
            scenario.send(bytes(error))
            masq = method == "masq"
            passed = relayed(error, port, to_client=False) if masq else IP(routed(bytes(error)))
            scenario.differs(sent([passed], "s1"), EVERY_KIND)
    return scenario.connections()


def counted(method: str) -> Scenario:
    """Errors count as packets of their connection: what is sent on, or has no hop left."""
    scenario = serve(Scenario(f"v4-{method}-counted"), 4, method)
    request = requests(4)[1]
    about = toward_server(request, METHODS[method][1]) if method == "masq" else request
    scenario.send(bytes(request))
    scenario.send(bytes(icmp_errors(server(1), about)[0]), side="s1")
    errors = icmp_errors(CLIENT[4], reply(request))
    scenario.send(*map(bytes, errors))
    if method == "masq":
        scenario.send(bytes(spoiled(errors[0])))
    scenario.send(bytes(icmp_errors(CLIENT[4], reply(request), ttl=1)[0]))
    return scenario.counters()


def of_strangers(family: int, **sysctls: int) -> Scenario:
    """About flows that nobody knows; and an echo request."""
    name = "".join(f"-{key}-{value}" for key, value in sysctls.items())
    scenario = Scenario(f"v{family}-strangers{name}")
    for key, value in sysctls.items():
        scenario.sysctl(key, value)
    serve(scenario, family, "masq")
    for request in requests(family):
        errors = icmp_errors(CLIENT[family], reply(request))
        scenario.send(*map(bytes, errors)).connections()
    echo = ICMP(type=8) if family == 4 else ICMPv6EchoRequest()
    return scenario.send(bytes(from_client(family, echo / Raw(b"ping"))))


def headers_of(method: str, inner: Packet) -> bytes:
    """What a tunnel to server 1 puts before a packet."""
    outer = IP(src=director("s1", 4), dst=server(1), ttl=63, id=7)
    is_ipv4 = inner.version == 4
    tunnel: Packet = outer / GRE(proto=0x0800 if is_ipv4 else 0x86DD)
    if method == "ipip":
        tunnel = IP(bytes(outer / inner)[:20])
        return bytes(tunnel)
    if method == "gue":
        gue = bytes([0, 4 if is_ipv4 else 41, 0, 0])
        tunnel = outer / UDP(sport=50000, dport=GUE_PORT, chksum=0, len=12 + len(inner)) / Raw(gue)
    whole = IP(bytes(tunnel))
    whole.len += len(inner)
    del whole.chksum
    return bytes(whole)


def about_tunnels(family: int, method: str) -> Scenario:
    """A router on the way to the server complains of what the director sent."""
    scenario = Scenario(f"v{family}-{method}-about-tunnel", mtu={"s1": 1400})
    serve(scenario, family, method, outer=4)
    for df in (False, True):
        request = padded(from_client(family, udp(5001), df=df), 1200)
        scenario.send(bytes(request))
        tunnel = headers_of(method, request)
        quoted = bytes(request)[:60]
        mtu = 1300 - len(tunnel)
        for error in icmp_errors("10.1.1.77", IP(tunnel), tunnel + quoted):
            scenario.send(bytes(error), side="s1")
            kind = (error[ICMP].type, error[ICMP].code)
            to_host = [[["host", bytes(error).hex()]]]
            if family == 6:
                if kind[0] in (3, 11):
                    body = ICMPv6DestUnreach(code=3)
                    if kind == (3, 4):
                        body = ICMPv6PacketTooBig(mtu=max(mtu, 1280))
                    told = IPv6(src=VIRTUAL[6], dst=CLIENT[6]) / body / Raw(quoted)
                    scenario.differs(sent([told], "c"), "it only knows IPv4 in IPv4")
            elif kind == (4, 0):
                scenario.differs(to_host, "nobody heeds source quench any more (RFC 6633)")
            elif kind == (3, 4) and not df:
                scenario.differs(to_host, "the stack remembers path MTUs")
            elif kind == (3, 4) and method != "ipip":
                body = ICMP(type=3, code=4, nexthopmtu=mtu)
                told = IP(src=VIRTUAL[4], dst=CLIENT[4], tos=0xC0) / body / Raw(quoted)
                scenario.differs(sent([told], "c"), "it took off 20 bytes only", TUNNEL_FIXES)
    return scenario.connections()


SCENARIOS = [
    *(from_servers(family, method) for family in (4, 6) for method in ("masq", "dr", "ipip")),
    *(from_clients(family, method) for family in (4, 6) for method in ("masq", "dr", "ipip")),
    *(counted(method) for method in ("masq", "dr")),
    *(of_strangers(family) for family in (4, 6)),
    *(of_strangers(family, schedule_icmp=1) for family in (4, 6)),
    *(about_tunnels(family, method) for family in (4, 6) for method in ("ipip", "gre", "gue")),
]


@pytest.mark.usefixtures("agree")
def test_errors(scenario: Scenario) -> None:
    """Nothing more: `agree` compares."""
