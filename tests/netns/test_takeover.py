"""Connections that outlive a daemon, and those that outlive a node.

::

             ┌─ node1 ─┬─ server-a
    client ──┤    ┊    ├─ server-b      node1 ┄ node2: the sync protocol
             └─ node2 ─┘

Client and servers are linked to both nodes and route all they send to one of them.
"""

from __future__ import annotations

import hashlib
import http.client
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from traffic import CLUSTER_IPS, PORT, UDP_PORT, Kept, Start, ask_udp, write_service

from svcdp.cli._demo.daemon import RunningDaemon, running_daemon
from svcdp.errors import SvcdpError
from svcdp.ipvs.saved import load
from svcdp.lab import Lab, Namespace, Server, Topology, wait_until
from svcdp.lab.servers import PATTERN

pytestmark = pytest.mark.netns

CLIENT = ("203.0.113.10", "2001:db8:1::10")
GATEWAY = ("169.254.0.1", "fe80::1")
END_IPV6 = "fe80::2"
TIMEOUT = 10.0  # seconds

FLOWS = 8
DOWNLOAD = 64 << 20  # bytes: more than what buffers hold
TASTE = 1 << 20


class Flow:
    """A UDP socket of a client that always talks to one server."""

    def __init__(self, source: Namespace, target: tuple[str, int]) -> None:
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        self._socket = source.call(socket.socket, family, socket.SOCK_DGRAM)
        self._socket.settimeout(TIMEOUT)
        self._socket.connect(target)
        self.server = self.ask()

    def ask(self) -> str:
        """The name of the server that answers."""
        self._socket.send(b"hello")
        return self._socket.recv(2000).decode().partition(" ")[0]

    def close(self) -> None:
        self._socket.close()


class Download:
    """A long answer over one TCP connection, read when the test says so."""

    def __init__(self, source: Namespace, target: tuple[str, int]) -> None:
        self._connection = http.client.HTTPConnection(*target, timeout=TIMEOUT)
        source.call(self._connection.connect)
        self._connection.request("GET", f"/bytes/{DOWNLOAD}")
        self._response = self._connection.getresponse()
        self._digest = hashlib.sha256()

    def read(self, count: int) -> None:
        while count:
            block = self._response.read(min(count, 1 << 18))
            assert block, "the stream ended early"
            self._digest.update(block)
            count -= len(block)

    def digest(self) -> str:
        """Of what was read."""
        return self._digest.hexdigest()

    def close(self) -> None:
        self._connection.close()


class Traffic:
    """Connections of all kinds, opened once."""

    def __init__(self, source: Namespace, stack: ExitStack) -> None:
        self.kept = [Kept(source, (address, PORT)) for address in CLUSTER_IPS]
        self.flows = [
            Flow(source, (address, UDP_PORT)) for address in CLUSTER_IPS for _ in range(FLOWS)
        ]
        self.download = Download(source, (CLUSTER_IPS[0], PORT))
        for each in (*self.kept, *self.flows, self.download):
            stack.callback(each.close)
        self.servers = [kept.ask() for kept in self.kept]
        self.download.read(TASTE)
        self.go_on()  # standbys are told of the third packet

    @property
    def count(self) -> int:
        return len(self.kept) + len(self.flows) + 1

    def go_on(self) -> None:
        """All are served, by the same servers as before, to which the client looks the same."""
        for _ in range(3):
            assert [kept.ask() for kept in self.kept] == self.servers
            assert [flow.ask() for flow in self.flows] == [flow.server for flow in self.flows]


def saved(file: Path) -> int:
    """Connections in a file."""
    return len(load(file)) if file.exists() else 0


def digest() -> str:
    whole, rest = divmod(DOWNLOAD, len(PATTERN))
    return hashlib.sha256(PATTERN * whole + PATTERN[:rest]).hexdigest()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# -- one node ------------------------------------------------------------------------------------


#: Nothing passes while no daemon runs: an end that got something untranslated would reset.
UNINTERRUPTED = ("--keep-rules", "--no-bypass")


def test_connections_go_on_after_a_restart(
    cluster: Topology, start: Start, tmp_path: Path, stack: ExitStack
) -> None:
    file = tmp_path / "connections"
    settings = ("--state-file", str(file), *UNINTERRUPTED)
    with start(*settings) as daemon:
        traffic = Traffic(cluster.client, stack)
        assert daemon.stop() == 0
    assert saved(file) == traffic.count
    with start(*settings) as daemon:
        traffic.go_on()
        traffic.download.read(DOWNLOAD - TASTE)
        assert traffic.download.digest() == digest()
        assert len(daemon.get("connections")) == traffic.count


def test_flows_of_an_endpoint_that_terminates_go_on_after_a_restart(
    cluster: Topology, start: Start, folder: Path, tmp_path: Path, stack: ExitStack
) -> None:
    """It serves, so kube-proxy's conntrack entries would stay; new flows go to the other one."""
    settings = ("--state-file", str(tmp_path / "connections"), *UNINTERRUPTED)
    a, b, _ = cluster.servers

    def flows() -> list[Flow]:
        found = [Flow(cluster.client, (each, UDP_PORT)) for each in CLUSTER_IPS * 4]
        for flow in found:
            stack.callback(flow.close)
        return found

    with start(*settings) as daemon:
        write_service(folder / "manifests", [a])
        wait_until(lambda: usable(daemon) == {a.ipv4, a.ipv6}, TIMEOUT, "one endpoint")
        before = flows()
        write_service(folder / "manifests", [a, b], terminating=[a])
        wait_until(lambda: usable(daemon) == {b.ipv4, b.ipv6}, TIMEOUT, "the other one")
        assert {flow.ask() for flow in before} == {"a"}
        assert daemon.stop() == 0
    for _ in range(2):
        with start(*settings) as daemon:
            assert {flow.ask() for flow in before} == {"a"}
            assert {flow.server for flow in flows()} == {"b"}
            assert daemon.stop() == 0
    with start(*settings):
        write_service(folder / "manifests", [b])
        wait_until(lambda: {flow.ask() for flow in before} == {"b"}, TIMEOUT, "it is gone")


def usable(daemon: RunningDaemon) -> set[str]:
    """Addresses of the UDP port's endpoints that get new flows."""
    found = daemon.get("endpoints")
    return {each["address"] for each in found if each["service"] == "web:echo"}


def test_connections_go_on_after_a_crash(
    cluster: Topology, start: Start, tmp_path: Path, stack: ExitStack
) -> None:
    file = tmp_path / "connections"
    settings = ("--state-file", str(file), "--state-interval", "1", *UNINTERRUPTED)
    with start(*settings) as daemon:
        traffic = Traffic(cluster.client, stack)
        wait_until(lambda: saved(file) == traffic.count, TIMEOUT, "all are saved")
        daemon.process.kill()
        daemon.process.wait()
    with start(*settings):
        traffic.go_on()
        traffic.download.read(DOWNLOAD - TASTE)
        assert traffic.download.digest() == digest()


def test_idle_connections_go_on_when_the_rules_were_gone(
    cluster: Topology, start: Start, tmp_path: Path, stack: ExitStack
) -> None:
    settings = ("--state-file", str(tmp_path / "connections"))
    kept = None
    for _ in range(3):
        with start(*settings) as daemon:
            kept = kept or stack.enter_context(Kept(cluster.client, (CLUSTER_IPS[1], PORT)))
            assert kept.ask()
            assert daemon.stop() == 0


def test_a_damaged_file_does_not_keep_the_node_from_serving(
    cluster: Topology, start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "connections"
    file.write_bytes(b"nothing of ours")
    with start("--state-file", str(file)) as daemon:
        assert "this file has no connections of svcdp" in (daemon.folder / "log").read_text()
        assert ask_udp(cluster.client, (CLUSTER_IPS[0], UDP_PORT))
        assert daemon.stop() == 0
    with start("--state-file", str(file)) as daemon:
        assert len(daemon.get("connections")) == 1


# -- two nodes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two nodes between a client and servers."""

    client: Namespace
    nodes: tuple[Namespace, Namespace]
    servers: Sequence[Server]

    @classmethod
    def build(cls, lab: Lab) -> Pair:
        client = lab.namespace("client")
        nodes = (lab.namespace("node1"), lab.namespace("node2"))
        servers = [
            Server(name, lab.namespace(f"server-{name}"), f"10.1.1.{i}", f"fd00:10:1::{i}")
            for i, name in enumerate("ab", 11)
        ]
        ends = [(client, CLIENT)]
        ends += [(server.namespace, (server.ipv4, server.ipv6)) for server in servers]
        for end, (ipv4, ipv6) in ends:
            end.add_address("lo", f"{ipv4}/32", f"{ipv6}/128")
        for number, node in enumerate(nodes, 1):
            node.add_address("lo", f"192.0.2.{number}/32", f"2001:db8:2::{number}/128")
            for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
                node.sysctl(key, 1)
            for end, (ipv4, ipv6) in ends:
                lab.link(node, end)
                node.add_address(end.name, f"{GATEWAY[0]}/32", f"{GATEWAY[1]}/64")
                # Who has an address on another interface answers ARP for it, but not NDP.
                end.add_address(node.name, f"{END_IPV6}/64")
                node.ip(
                    f"route add {ipv4}/32 dev {end.name}",
                    f"route add {ipv6}/128 via {END_IPV6} dev {end.name}",
                )
        lab.link(*nodes)
        nodes[0].add_address("node2", "192.168.0.1/24", "fd00:192::1/64")
        nodes[1].add_address("node1", "192.168.0.2/24", "fd00:192::2/64")
        pair = cls(client, nodes, servers)
        pair.move_to(0)
        for server in servers:
            server.start()
        return pair

    def move_to(self, number: int) -> None:
        """Everybody sends to this node from now on."""
        node = self.nodes[number].name
        ends = [(self.client, *CLIENT)]
        ends += [(server.namespace, server.ipv4, server.ipv6) for server in self.servers]
        for end, ipv4, ipv6 in ends:
            end.ip(
                f"route replace default via {GATEWAY[0]} dev {node} onlink src {ipv4}",
                f"route replace default via {GATEWAY[1]} dev {node} onlink src {ipv6}",
            )

    @contextmanager
    def daemon(self, number: int, folder: Path, *settings: str) -> Iterator[RunningDaemon]:
        """``svcdp run`` on a node; what the other node needs to hear of is what it serves."""
        home = folder / f"node{number + 1}"
        (home / "manifests").mkdir(parents=True, exist_ok=True)
        write_service(home / "manifests", self.servers)
        arguments = ["--node-name", f"node{number + 1}", "--service-cidrs"]
        arguments += [
            "10.96.0.0/12,fd00:10:96::/112",
            "--sync-role",
            "both",
            "--no-bypass",
            *settings,
        ]
        with running_daemon(self.nodes[number].popen, home, *arguments) as daemon:
            yield daemon


@pytest.fixture
def pair(lab: Lab) -> Pair:
    return Pair.build(lab)


#: How the nodes reach each other: settings of the first and of the second.
BY_MULTICAST = (["--sync-interface", "node2"], ["--sync-interface", "node1"])
BY_IPV6 = (
    ["--sync-interface", "node2", "--sync-group", "ff02::81"],
    ["--sync-interface", "node1", "--sync-group", "ff02::81"],
)
BY_UNICAST = (["--sync-group", "192.168.0.2"], ["--sync-group", "192.168.0.1"])

NETWORKS = "10.1.0.0/16,fd00:10:1::/64"


def known(daemon: RunningDaemon) -> set[tuple[str, int]]:
    """What a daemon knows of: protocol and port of clients."""
    return {
        (connection["protocol"], connection["clientPort"])
        for connection in daemon.get("connections")
    }


@pytest.mark.parametrize(
    ("ways", "pods"),
    [(BY_MULTICAST, ""), (BY_IPV6, ""), (BY_UNICAST, ""), (BY_MULTICAST, NETWORKS)],
    ids=["multicast", "ipv6", "unicast", "masqueraded"],
)
def test_connections_outlive_a_node(
    pair: Pair, tmp_path: Path, stack: ExitStack, ways: tuple[list[str], list[str]], pods: str
) -> None:
    """The first node dies, the second takes over; then the first comes back, is told all, and
    takes over again.
    """
    first, second = ([*way, *(["--pod-cidrs", pods] if pods else [])] for way in ways)
    with (
        pair.daemon(1, tmp_path, *second) as standby,
        pair.daemon(0, tmp_path, *first) as active,
    ):
        traffic = Traffic(pair.client, stack)
        if pods:
            assert {c["source"] for c in active.get("connections")} == {
                "192.0.2.1",
                "2001:db8:2::1",
            }
        everything = known(active)
        assert len(everything) == traffic.count
        wait_until(lambda: known(standby) == everything, TIMEOUT, "the standby hears of all")

        active.process.send_signal(signal.SIGKILL)
        active.process.wait()
        pair.move_to(1)
        traffic.go_on()
        traffic.download.read(TASTE)

        with pair.daemon(0, tmp_path, *first) as active:
            wait_until(lambda: known(active) == everything, 3 * TIMEOUT, "it is told of all")
            # In this order: what a node without rules passes on gets resets.
            pair.move_to(0)
            traffic.go_on()
            assert standby.stop() == 0
            traffic.go_on()
            traffic.download.read(DOWNLOAD - 2 * TASTE)
            assert traffic.download.digest() == digest()


def test_a_bad_interface_is_an_error(pair: Pair, tmp_path: Path) -> None:
    with (
        pytest.raises(SvcdpError, match=r"cannot synchronise by 224\.0\.0\.81 port 8848 on eth7"),
        pair.daemon(0, tmp_path, "--sync-interface", "eth7"),
    ):
        pytest.fail("it started")
