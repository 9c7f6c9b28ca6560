"""Pods on a bridge, which are known by it and not by their addresses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from traffic import (
    CLUSTER_IPS,
    NODE_PORT,
    PORT,
    PORTS,
    UDP_PORT,
    ask,
    ask_udp,
    meets,
    write_service,
)

from svcdp.cli._demo.daemon import running_daemon
from svcdp.lab import Lab, Namespace, Server

pytestmark = pytest.mark.netns

CLIENT, NODE, GATEWAY = (
    ("192.0.2.10", "2001:db8:1::10"),
    ("192.0.2.1", "2001:db8:1::1"),
    ("10.1.1.1", "fd00:10:1::1"),
)
LENGTHS = (24, 64)


@dataclass(frozen=True)
class Host:
    """A node with two Pods on its bridge ``cni0``, and a client outside."""

    client: Namespace
    node: Namespace
    pods: tuple[Server, Server]

    def filter_bridge(self, on: bool) -> None:
        """Whether what the bridge passes on comes to the rules."""
        for tool in ("iptables", "ip6tables"):
            self.node.sysctl(f"net.bridge.bridge-nf-call-{tool}", int(on))


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Lab() as lab:
        client, node = lab.namespace("client"), lab.namespace("node")
        lab.link(client, node)
        client.add_address("node", *with_lengths(CLIENT))
        node.add_address("client", *with_lengths(NODE))
        client.ip(*(f"route add default via {address}" for address in NODE))
        node.ip("link add cni0 type bridge", "link set dev cni0 up")
        node.add_address("cni0", *with_lengths(GATEWAY))
        one, other = (plug_in(lab, node, name, number) for number, name in enumerate("ab", 11))
        for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            node.sysctl(key, 1)
        yield Host(client, node, (one, other))


def with_lengths(addresses: tuple[str, str]) -> list[str]:
    return [f"{address}/{length}" for address, length in zip(addresses, LENGTHS, strict=True)]


def plug_in(lab: Lab, node: Namespace, name: str, number: int) -> Server:
    """A Pod as CNI's bridge plug-in has it with ``hairpinMode``."""
    pod = Server(name, lab.namespace(f"pod-{name}"), f"10.1.1.{number}", f"fd00:10:1::{number}")
    lab.link(node, pod.namespace)
    node.ip(f"link set dev pod-{name} master cni0")
    node.ip(f"link set dev pod-{name} type bridge_slave hairpin on")
    pod.namespace.add_address("node", *with_lengths((pod.ipv4, pod.ipv6)))
    pod.namespace.ip(*(f"route add default via {address}" for address in GATEWAY))
    pod.start(http=(PORTS[0],), udp=PORTS[1])
    return pod


@pytest.mark.parametrize(
    ("mode", "interface"), [("BridgeInterface", "cni0"), ("InterfaceNamePrefix", "cni+")]
)
def test_pods_of_a_bridge(host: Host, tmp_path: Path, mode: str, interface: str) -> None:
    """They reach each other and themselves by a Service, and who is no Pod is masqueraded.

    That needs the bridge to show the rules what it passes on: else the answer of a Pod goes
    straight to the other one, which does not know its address. ``svcdp check`` says so.
    """
    a, b = host.pods
    host.filter_bridge(True)
    (tmp_path / "manifests").mkdir()
    write_service(tmp_path / "manifests", [a])
    settings = ["--node-name", "node", "--service-cidrs", "10.96.0.0/12,fd00:10:96::/112"]
    settings += ["--detect-local-mode", mode, "--pod-interface", interface]
    settings += ["--addresses", ",".join(NODE)]
    with running_daemon(host.node.popen, tmp_path, *settings):
        for family, own in enumerate((b.ipv4, b.ipv6)):
            virtual, port = (CLUSTER_IPS[family], PORT), (NODE[family], NODE_PORT)
            for source in (host.client, host.node, a.namespace, b.namespace):
                seen = own if source is b.namespace else NODE[family]
                assert ask(source, virtual)["client"][0] == seen
                assert ask(source, port)["client"][0] == NODE[family]
                assert ask_udp(source, (virtual[0], UDP_PORT)) == b"a hello"
        assert bridge_checks(host, tmp_path) == {"ok"}
        host.filter_bridge(False)
        assert bridge_checks(host, tmp_path) == {"warn"}
        assert meets(b.namespace, (CLUSTER_IPS[0], PORT)) == "silence"
        assert meets(b.namespace, (NODE[0], NODE_PORT)) == "a"


def bridge_checks(host: Host, folder: Path) -> set[str]:
    command = [sys.executable, "-m", "svcdp", "check", "-o", "json"]
    found = host.node.run([*command, "--run-dir", str(folder / "run")], check=False).stdout
    return {
        each["status"]
        for each in json.loads(found)["checks"]
        if each["name"].startswith("net.bridge.")
    }
