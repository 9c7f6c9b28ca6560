"""One Ethernet segment: nodes, servers, and a client that finds them by ARP and NDP."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from traffic import endpoint_slice, meets, write_objects

from svcdp.cli._demo.daemon import RunningDaemon, running_daemon
from svcdp.lab import Lab, Namespace, Server, wait_until

TIMEOUT = 15.0  # seconds
SWITCH = "switch"  # the interface of each host
PORT, ENDPOINT_PORT = 80, 9000
#: By the number of families.
POLICIES = {1: "SingleStack", 2: "RequireDualStack"}
POOL = ("192.0.2.128/28", "fd00:2::80/124")
CLIENT = ("192.0.2.10", "fd00:2::10")
CLUSTER_IPS = ("10.96.0.0/16", "fd00:10:96::/112")


class Segment:
    """``node-1`` and ``node-2``, each with a Pod that serves HTTP at ``ENDPOINT_PORT`` and has its
    default route to its node.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.switch = lab.namespace("lan")
        self.switch.ip("link add br0 type bridge mcast_snooping 0", "link set br0 up")
        self.client = self._host("client", 10)
        self.nodes = tuple(self._host(f"node-{number}", number) for number in (1, 2))
        for node in self.nodes:
            for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
                node.sysctl(key, 1)
        self.servers = tuple(self._pod(number) for number in (1, 2))

    def mac(self, host: Namespace, interface: str = SWITCH) -> str:
        """Of a host's interface."""
        return str(_json(host, "link", "show", "dev", interface)[0]["address"])

    def plug(self, host: Namespace, interface: str) -> None:
        """Give a host an interface at the switch."""
        other = f"{host.name}-{interface}"
        host.ip(
            f"link add name {interface} type veth peer name {other} netns {self.switch.full_name}",
            f"link set dev {interface} up",
        )
        self.switch.ip(f"link set dev {other} master br0 up")

    def neighbour(self, address: str) -> str:
        """Where the client sends what is for an address: a MAC address, or "" if it knows none."""
        found = _json(self.client, "neigh", "show", address, "dev", SWITCH)
        return str(found[0].get("lladdr", "")) if found else ""

    def known_at(self, address: str) -> str:
        """The node by whose MAC address the client reaches an address, "" if it is none's."""
        by_mac = {self.mac(node): node.name for node in self.nodes}
        return by_mac.get(self.neighbour(address), "")

    def met(self, address: str) -> str:
        """Who serves the client there; "nobody" where it finds no MAC address, else as `meets`."""
        try:
            return meets(self.client, (address, PORT))
        except OSError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            return "nobody"

    def is_nowhere(self, address: str) -> bool:
        """Whether nobody answers when the client looks for it."""
        self.met(address)
        return self.neighbour(address) == ""

    def until_served(self, address: str) -> None:
        servers = {each.name for each in self.servers}
        wait_until(lambda: self.met(address) in servers, TIMEOUT, f"{address} is served")

    @contextmanager
    def daemon(self, number: int, folder: Path, *settings: str) -> Iterator[RunningDaemon]:
        """``svcdp run`` on a node, by default on ``folder/manifests``."""
        node = self.nodes[number]
        own = folder / node.name
        own.mkdir(exist_ok=True)
        if not (own / "manifests").is_symlink():
            (own / "manifests").symlink_to(folder / "manifests")
        more = ["--node-name", node.name, "--service-cidrs", ",".join(CLUSTER_IPS)]
        with running_daemon(node.popen, own, *more, "--announce=l2", *settings) as daemon:
            yield daemon

    def direct(self, *addresses: str) -> None:
        """The Pods have these addresses too, tell nobody, and answer the client without a node,
        as DR wants it."""
        for server in self.servers:
            pod = server.namespace
            for key, value in (("arp_ignore", 1), ("arp_announce", 2)):
                pod.sysctl(f"net.ipv4.conf.all.{key}", value)
            pod.add_address("lo", *(f"{each}/{128 if ':' in each else 32}" for each in addresses))
            pod.ip(f"route add {CLIENT[0]} dev {SWITCH}", f"route add {CLIENT[1]} dev {SWITCH}")

    def forget(self) -> None:
        """The client knows no MAC addresses any more."""
        self.client.ip(f"neigh flush dev {SWITCH}")

    def write(
        self,
        folder: Path,
        count: int = 1,
        policy: str = "Cluster",
        servers: Sequence[int] = (0, 1),
    ) -> None:
        """Have a pool, and what :meth:`objects` gives, as manifests."""
        write_objects(folder, pool(), *self.objects(count, policy, servers))

    def objects(
        self,
        count: int = 1,
        policy: str = "Cluster",
        servers: Sequence[int] = (0, 1),
        families: Sequence[str] = ("IPv4", "IPv6"),
    ) -> list[dict[str, Any]]:
        """Services ``web-0``... of type LoadBalancer, served by these of the servers."""
        found: list[dict[str, Any]] = []
        for number in range(count):
            name = f"web-{number}"
            found.append(
                {
                    "apiVersion": "v1",
                    "kind": "Service",
                    "metadata": {"name": name},
                    "spec": {
                        "type": "LoadBalancer",
                        "externalTrafficPolicy": policy,
                        "allocateLoadBalancerNodePorts": False,
                        "ipFamilyPolicy": POLICIES[len(families)],
                        "ipFamilies": list(families),
                        "ports": [{"name": "http", "port": PORT}],
                    },
                }
            )
            for family in families:
                endpoints = [
                    {
                        "addresses": [pod_addresses(number + 1)[family == "IPv6"]],
                        "nodeName": self.nodes[number].name,
                    }
                    for number in servers
                ]
                ports = [{"name": "http", "port": ENDPOINT_PORT}]
                found.append(endpoint_slice(name, family, ports, endpoints))
        return found

    def _pod(self, number: int) -> Server:
        """On the node with this number, and on the same cable."""
        pod = self._host(f"pod-{number}")
        own, gateways = pod_addresses(number), addresses(number)
        pod.add_address(SWITCH, *(f"{a}/{n}" for a, n in zip(own, (32, 128), strict=True)))
        for gateway in gateways:
            pod.ip(f"route add {gateway} dev {SWITCH}", f"route add default via {gateway}")
        for node in self.nodes:
            node.ip(*(f"route add {address} dev {SWITCH}" for address in own))
        server = Server(f"p{number}", pod, *own)
        server.start(http=(ENDPOINT_PORT,))
        return server

    def _host(self, name: str, number: int | None = None) -> Namespace:
        host = self._lab.namespace(name)
        self.plug(host, SWITCH)
        if number is not None:
            own = zip(addresses(number), (24, 64), strict=True)
            host.add_address(SWITCH, *(f"{a}/{n}" for a, n in own))
        return host


def balanced(daemon: RunningDaemon) -> list[str]:
    """All addresses of load balancers that a daemon serves."""
    found = [each for item in daemon.get("services") for each in item["loadBalancerIPs"]]
    assert found
    return found


def addresses(number: int) -> tuple[str, str]:
    """Of the host with this number, of each family."""
    return f"192.0.2.{number}", f"fd00:2::{number}"


def pod_addresses(number: int) -> tuple[str, str]:
    """Of the Pod on the node with this number, of each family."""
    return f"10.1.{number}.11", f"fd00:1:{number}::b"


def pool() -> dict[str, Any]:
    return {
        "apiVersion": "svcdp.io/v1alpha1",
        "kind": "LoadBalancerPool",
        "metadata": {"name": "lan"},
        "spec": {"addresses": list(POOL)},
    }


def _json(host: Namespace, *arguments: str) -> Any:
    return json.loads(host.run(["ip", "-json", *arguments]).stdout or "[]")
