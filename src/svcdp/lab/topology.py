"""The standard topology: clients reach a node, and servers as pods behind it.

::

    client ──────────────── node ─┬─ server-a  10.1.1.11  fd00:10:1::11
    192.0.2.10              ┊     ├─ server-b  10.1.1.12  fd00:10:1::12
    2001:db8:1::10          ┊     └─ server-c  10.1.1.13  fd00:10:1::13
                 192.0.2.1  2001:db8:1::1

Pods are routed, each on its own link, as a CNI plug-in would do it. All default routes lead to the
node, so packets to cluster IPs do too.
"""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from dataclasses import dataclass

from svcdp.errors import FeatureUnavailable, PlatformError
from svcdp.lab.lab import Lab
from svcdp.lab.namespace import Namespace

__all__ = ["Server", "Topology"]

START_TIMEOUT = 20.0  # seconds in which a server must listen

#: What a node with a strict firewall has: nothing is forwarded but connections that conntrack
#: knows, and direct ones to one port of the pods.
FIREWALL = """\
*filter
:FORWARD DROP [0:0]
-A FORWARD -m conntrack --ctstate INVALID -j DROP
-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A FORWARD -d {pods} -p tcp --dport {port} -j ACCEPT
COMMIT
"""


@dataclass(frozen=True)
class Server:
    """A pod: its namespace and addresses."""

    name: str
    namespace: Namespace
    ipv4: str
    ipv6: str

    def start(self, *, http: tuple[int, ...] = (8080, 9000), udp: int = 5353) -> None:
        """Run :mod:`svcdp.lab.servers` here; it listens when this returns."""
        self._wait_ready(self._launch(http, udp))

    def _launch(self, http: tuple[int, ...], udp: int) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "svcdp.lab.servers", "--name", self.name, "--udp", str(udp)]
        for port in http:
            argv += ["--http", str(port)]
        return self.namespace.popen(argv, stdout=subprocess.PIPE)

    def _wait_ready(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        watchdog = threading.Timer(START_TIMEOUT, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline()
        finally:
            watchdog.cancel()
            process.stdout.close()
        if line != "READY\n":
            raise PlatformError(
                errno.EIO, f"server {self.name} did not start; what it said is above"
            )


@dataclass(frozen=True)
class Topology:
    """Client, node and servers, with the addresses that tests need."""

    client: Namespace
    node: Namespace
    servers: tuple[Server, ...]

    client_ipv4: str = "192.0.2.10"
    client_ipv6: str = "2001:db8:1::10"
    node_ipv4: str = "192.0.2.1"
    node_ipv6: str = "2001:db8:1::1"
    pod_cidrs: tuple[str, str] = ("10.1.0.0/16", "fd00:10:1::/64")
    service_cidrs: tuple[str, str] = ("10.96.0.0/12", "fd00:10:96::/112")
    #: A TCP port of the pods to which a firewall lets clients connect directly.
    direct_port: int = 9000

    @classmethod
    def build(cls, lab: Lab, *, firewall: bool = False) -> Topology:
        """Make it in ``lab``. ``firewall``: the node drops what it would forward, but for
        established connections and direct ones to the pods' ``direct_port``.

        FeatureUnavailable when a firewall is asked for and iptables or conntrack are missing.
        """
        client, node = lab.namespace("client"), lab.namespace("node")
        servers = tuple(
            Server(
                name, lab.namespace(f"server-{name}"), f"10.1.1.{number}", f"fd00:10:1::{number}"
            )
            for number, name in enumerate("abc", 11)
        )
        topology = cls(client, node, servers)
        topology._connect_client(lab)
        for server in servers:
            topology._connect(lab, server)
        for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            node.sysctl(key, 1)
        if firewall:
            topology._close_firewall()
        return topology

    def start_servers(self, *, http: tuple[int, ...] = (8080, 9000), udp: int = 5353) -> None:
        """Start all of them, on the same ports; all listen when this returns."""
        launched = [(server, server._launch(http, udp)) for server in self.servers]
        for server, process in launched:
            server._wait_ready(process)

    def _connect_client(self, lab: Lab) -> None:
        lab.link(self.client, self.node)
        self.client.add_address("node", f"{self.client_ipv4}/24", f"{self.client_ipv6}/64")
        self.node.add_address("client", f"{self.node_ipv4}/24", f"{self.node_ipv6}/64")
        self.client.ip(
            f"route add default via {self.node_ipv4}", f"route add default via {self.node_ipv6}"
        )

    def _connect(self, lab: Lab, server: Server) -> None:
        lab.link(self.node, server.namespace)
        interface = server.namespace.name
        server.namespace.add_address("node", f"{server.ipv4}/32", f"{server.ipv6}/128")
        # The gateway is the same for all pods, and on no network of theirs.
        for pod, gateway, length in (
            (server.ipv4, "10.1.1.1", 32),
            (server.ipv6, "fd00:10:1::1", 128),
        ):
            self.node.add_address(interface, f"{gateway}/{length}")
            self.node.ip(f"route add {pod}/{length} dev {interface}")
            server.namespace.ip(
                f"route add {gateway}/{length} dev node", f"route add default via {gateway}"
            )

    def _close_firewall(self) -> None:
        for tool, pods in zip(("iptables", "ip6tables"), self.pod_cidrs, strict=True):
            rules = FIREWALL.format(pods=pods, port=self.direct_port)
            try:
                self.node.run([f"{tool}-restore"], input=rules)
            except subprocess.CalledProcessError as error:
                raise FeatureUnavailable(
                    errno.EOPNOTSUPP,
                    f"{tool}-restore failed: {error.stderr.strip()}; the firewall of a lab needs"
                    " iptables and a kernel with xt_conntrack",
                ) from error
