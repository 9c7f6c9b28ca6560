"""Services of scenarios, in ipvsadm's words."""

from __future__ import annotations

from scenario import GUE_PORT, Scenario
from topology import VIRTUAL, server

#: Forwarding methods by name: how ipvsadm says it, and the server's port.
METHODS = {
    "masq": ("-m", 8080),
    "masq-same-port": ("-m", 80),
    "dr": ("-g", 80),
    "ipip": ("-i", 80),
    "gre": ("-i --tun-type gre", 80),
    "gre-csum": ("-i --tun-type gre --tun-csum", 80),
    "gue": (f"-i --tun-type gue --tun-port {GUE_PORT}", 80),
    "gue-csum": (f"-i --tun-type gue --tun-port {GUE_PORT} --tun-csum", 80),
}
PROTOCOLS = {"tcp": "-t", "udp": "-u", "sctp": "--sctp-service"}


def shown(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def service(protocol: str, family: int = 4, port: int = 80) -> str:
    """The service of the virtual address, as ipvsadm names it."""
    return f"{PROTOCOLS[protocol]} {shown(VIRTUAL[family], port)}"


def serve(scenario: Scenario, family: int, method: str, outer: int | None = None) -> Scenario:
    """TCP, UDP and SCTP at port 80, by server 1, whose address is of another family for some."""
    options, port = METHODS[method]
    for protocol in PROTOCOLS:
        name = service(protocol, family)
        real = shown(server(1, outer or family), port)
        scenario.ipvs(f"-A {name} -s rr", f"-a {name} -r {real} {options}")
    return scenario
