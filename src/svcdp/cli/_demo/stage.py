"""Where the demo plays: the standard lab, and what a proxy may leave in it."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from svcdp.cli._demo.introduction import TARGET_PORT
from svcdp.cli._demo.manifests import PORT, Backend
from svcdp.errors import SvcdpError
from svcdp.lab import Lab, Namespace, Server, Topology

__all__ = ["Stage", "open_stage", "take_virtual_addresses", "traces"]


@dataclass(frozen=True)
class Stage:
    """A client, a node, and three servers that listen."""

    topology: Topology

    @property
    def client(self) -> Namespace:
        return self.topology.client

    @property
    def node(self) -> Namespace:
        return self.topology.node

    @property
    def backends(self) -> tuple[Backend, ...]:
        return tuple(Backend(s.name, s.ipv4, s.ipv6) for s in self.topology.servers)

    @property
    def node_addresses(self) -> tuple[str, str]:
        return (self.topology.node_ipv4, self.topology.node_ipv6)

    @property
    def dns_address(self) -> str:
        """Where the cluster's DNS server is asked: the tenth address of the Service network."""
        return str(ipaddress.ip_network(self.topology.service_cidrs[0])[10])

    @property
    def daemon_arguments(self) -> tuple[str, ...]:
        return (
            *("--node-name", "demo"),
            *("--pod-cidrs", ",".join(self.topology.pod_cidrs)),
            *("--service-cidrs", ",".join(self.topology.service_cidrs)),
        )


@contextmanager
def open_stage() -> Iterator[Stage]:
    """Build it; everything in it is gone afterwards."""
    with Lab() as lab:
        topology = Topology.build(lab)
        topology.start_servers(http=(PORT, TARGET_PORT), udp=PORT)
        yield Stage(topology)


def take_virtual_addresses(
    servers: Iterable[Server], plain: Iterable[str], tunnelled: Iterable[str]
) -> None:
    """Have servers take packets to virtual addresses: as they are, and out of tunnels."""
    command = [sys.executable, "-m", "svcdp", "decap"]
    for address in tunnelled:
        command += ["--vip", address]
    ends = []
    for server in servers:
        # Nobody may hear from them, in ARP, that they have the addresses.
        for key, value in (("arp_ignore", 1), ("arp_announce", 2)):
            server.namespace.sysctl(f"net.ipv4.conf.all.{key}", value)
        for address in plain:
            server.namespace.add_address("lo", f"{address}/{128 if ':' in address else 32}")
        ends.append(server.namespace.popen(command, stdout=subprocess.PIPE))
    for end in ends:
        assert end.stdout is not None
        if not end.stdout.readline():
            raise SvcdpError("`svcdp decap` did not start; its error is above")


def traces(place: Namespace) -> set[str]:
    """What a proxy can leave in a namespace: rules, chains, sets, routes, settings.

    Asked of the kernel's own tools, not of svcdp.
    """
    found: set[str] = set()
    for tool in ("iptables-save", "ip6tables-save"):
        # ":NAME POLICY [counters]" with policy "-" is a chain that somebody made.
        lines = place.run([tool], check=False).stdout.splitlines()
        found |= {f"{tool}: {line}" for line in lines if line.startswith("-A")}
        found |= {f"{tool}: {line.split()[0]}" for line in lines if " - [" in line}
    for command in (
        ["ipset", "list", "-name"],
        ["ip", "rule", "show"],
        ["ip", "-6", "rule", "show"],
        ["ip", "route", "show", "table", "all"],
        ["ip", "-6", "route", "show", "table", "all"],
        ["sysctl", "-a", "--pattern", r"\.(accept_local|rp_filter|route_localnet)$"],
    ):
        lines = place.run(command, check=False).stdout.splitlines()
        found |= {f"{' '.join(command[:2])}: {line.strip()}" for line in lines}
    tables = place.run(["nft", "list", "tables"], check=False).stdout.splitlines()
    found |= {f"nft: {line}" for line in tables if "svcdp" in line}
    return found
