"""Forwarding by DR and through tunnels on a node: each server sees the client itself."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from capture import (
    CLIENT,
    FAMILIES,
    LOST,
    PLAIN,
    TIMEOUT,
    Directing,
    ask,
    connect,
    get,
    node_addresses,
    server_addresses,
)

from svcdp import Dataplane, DestinationSpec, Reason, ServiceSpec, TunnelSpec, Verdict
from svcdp.cli._demo.stage import traces
from svcdp.io.nfqueue import QueueWorkers
from svcdp.lab import Namespace, Server, Topology, wait_until
from svcdp.lab.servers import PATTERN
from svcdp.rules import Backend, CapturePlan
from svcdp.rules.hops import TABLES
from svcdp.rules.plan import Hop

pytestmark = pytest.mark.netns

CLIENTS = (CLIENT, "2001:db8:1::10")
VIRTUAL = PLAIN
KIND = (socket.AF_INET, socket.AF_INET6)
# linux/in.h, linux/in6.h
IP_MTU_DISCOVER, IP_MTU, IPV6_MTU_DISCOVER, IPV6_MTU = 10, 14, 23, 24
PMTUDISC_DONT, PMTUDISC_DO = 0, 2
FIREWALL = pytest.mark.parametrize(
    "cluster", [False, True], ids=["open", "firewall"], indirect=True
)

TRANSFER_TIMEOUT = 20.0  # seconds


def holds(server: Server, *addresses: str) -> None:
    """Make a server one that takes packets to virtual addresses, and is quiet about them."""
    for key, value in (("arp_ignore", 1), ("arp_announce", 2)):
        server.namespace.sysctl(f"net.ipv4.conf.all.{key}", value)
    server.namespace.add_address("lo", *(f"{a}/{128 if ':' in a else 32}" for a in addresses))


def service(
    cluster: Topology, family: int, method: str, tunnel: TunnelSpec | None = None, **fields: Any
) -> ServiceSpec:
    servers = [server_addresses(cluster, number)[family] for number in (0, 1)]
    return ServiceSpec(
        VIRTUAL[family],
        cluster.direct_port,
        destinations=tuple(
            DestinationSpec(each, cluster.direct_port, method=method, tunnel=tunnel)
            for each in servers
        ),
        **fields,
    )


def there_and_back(target: tuple[str, int]) -> tuple[str, str]:
    """The digests of what came and of what arrived."""
    connection = http.client.HTTPConnection(*target, timeout=TRANSFER_TIMEOUT)
    try:
        connection.request("GET", f"/bytes/{len(PATTERN)}")
        down = hashlib.sha256(connection.getresponse().read()).hexdigest()
        connection.request("POST", "/", PATTERN)
        return down, json.loads(connection.getresponse().read())["sha256"]
    finally:
        connection.close()


def whom(place: Namespace, address: str, port: int) -> tuple[str, str]:
    """Who answers, and whom it sees."""
    answer = json.loads(get(place, address, port).partition("\r\n\r\n")[2])
    return answer["server"], answer["client"][0]


@FAMILIES
@FIREWALL
def test_dr(cluster: Topology, directing: Directing, family: int) -> None:
    before = traces(cluster.node)
    port = cluster.direct_port
    for server in cluster.servers[:2]:
        holds(server, VIRTUAL[family])
    with directing(service(cluster, family, "dr")):
        answers = [whom(cluster.client, VIRTUAL[family], port) for _ in range(4)]
        local = {whom(cluster.node, VIRTUAL[family], port) for _ in range(2)}
    assert set(answers) == {("a", CLIENTS[family]), ("b", CLIENTS[family])}
    assert local == {(name, node_addresses(cluster)[family]) for name in "ab"}
    assert traces(cluster.node) == before


@FAMILIES
def test_dr_where_the_node_has_the_virtual_address(
    cluster: Topology, directing: Directing, family: int
) -> None:
    """As directors of IPVS do: its rule for local addresses must come after those for marks."""
    ip = f"-{'46'[family]}"
    for rule in (["add", "priority", "5000", "lookup", "local"], ["delete", "priority", "0"]):
        cluster.node.run(["ip", ip, "rule", *rule])
    cluster.node.add_address("lo", f"{VIRTUAL[family]}/{(32, 128)[family]}")
    for server in cluster.servers[:2]:
        holds(server, VIRTUAL[family])
        # Here replies pass the node; to it they seem to come from itself.
        cluster.node.sysctl(f"net.ipv4.conf.{server.namespace.name}.accept_local", 1)
    before = traces(cluster.node)
    with directing(service(cluster, family, "dr")):
        answers = {whom(cluster.client, VIRTUAL[family], cluster.direct_port) for _ in range(4)}
    assert answers == {("a", CLIENTS[family]), ("b", CLIENTS[family])}
    assert traces(cluster.node) == before


@pytest.fixture
def decap(cluster: Topology) -> Iterator[Callable[..., None]]:
    """Starts the other end of tunnels on the first two servers."""
    started: list[subprocess.Popen[str]] = []

    def start(kind: str, virtual: str) -> None:
        for server in cluster.servers[:2]:
            argv = [sys.executable, "-m", "svcdp", "decap", "--type", kind, "--vip", virtual]
            process = server.namespace.popen(argv, stdout=subprocess.PIPE)
            started.append(process)
            assert process.stdout is not None
            assert "come out here" in process.stdout.readline()

    yield start
    for process in started:
        process.terminate()
        process.wait(TIMEOUT)


@FAMILIES
@FIREWALL
@pytest.mark.parametrize("kind", ["ipip", "gre", "gue"])
def test_tunnel(
    cluster: Topology, directing: Directing, decap: Callable[..., None], kind: str, family: int
) -> None:
    before = traces(cluster.node)
    port = cluster.direct_port
    decap(kind, VIRTUAL[family])
    tunnel = TunnelSpec(kind, port=6080 if kind == "gue" else 0)
    with directing(service(cluster, family, "tunnel", tunnel)):
        answers = [whom(cluster.client, VIRTUAL[family], port) for _ in range(4)]
        local = {whom(cluster.node, VIRTUAL[family], port) for _ in range(2)}
    assert set(answers) == {("a", CLIENTS[family]), ("b", CLIENTS[family])}
    assert local == {(name, node_addresses(cluster)[family]) for name in "ab"}
    assert traces(cluster.node) == before


@FAMILIES
def test_big_transfers_through_a_tunnel(
    cluster: Topology,
    dataplane: Dataplane,
    directing: Directing,
    decap: Callable[..., None],
    family: int,
) -> None:
    """Full-sized segments do not fit: the client is told, by the node, and adapts."""
    decap("ipip", VIRTUAL[family])
    with directing(service(cluster, family, "tunnel", TunnelSpec())):
        target = (VIRTUAL[family], cluster.direct_port)
        digest = hashlib.sha256(PATTERN).hexdigest()
        assert cluster.client.call(there_and_back, target) == (digest, digest)
        assert dataplane.stats().packets[Verdict.REJECT, Reason.TOO_BIG] > 0


@FAMILIES
def test_a_datagram_that_does_not_fit(cluster: Topology, directing: Directing, family: int) -> None:
    """The client learns the MTU of the way through the tunnel."""
    spec = replace(service(cluster, family, "tunnel", TunnelSpec()), protocol="udp")
    level, discover, mtu = (
        (socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_MTU),
        (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_MTU),
    )[family]
    with (
        directing(spec),
        cluster.client.call(socket.socket, KIND[family], socket.SOCK_DGRAM) as client,
    ):
        client.setsockopt(level, discover, PMTUDISC_DO)
        client.connect((VIRTUAL[family], cluster.direct_port))
        client.send(bytes(1500 - (28, 48)[family]))
        overhead = (20, 40)[family]
        wait_until(
            lambda: client.getsockopt(level, mtu) == 1500 - overhead, TIMEOUT, "the path's MTU"
        )


@FAMILIES
@pytest.mark.parametrize("clamp", [True, False])
def test_tcp_peers_hear_what_fits(
    cluster: Topology,
    directing: Directing,
    decap: Callable[..., None],
    family: int,
    clamp: bool,
) -> None:
    decap("ipip", VIRTUAL[family])
    spec = service(cluster, family, "tunnel", TunnelSpec(), mss_clamp=clamp)
    with (
        directing(spec),
        connect(cluster.client, VIRTUAL[family], cluster.direct_port) as connection,
    ):
        segment = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    headers, timestamps, outer = (40, 60)[family], 12, (20, 40)[family]
    # Without an option TCP begins as the device allows.
    assert segment == 1500 - headers - timestamps - outer * clamp


@FAMILIES
def test_a_range_of_ports(cluster: Topology, directing: Directing, family: int) -> None:
    """Ports of the range go to one port, or each to its own; others to nobody."""
    port = cluster.direct_port
    one = DestinationSpec(server_addresses(cluster, 0)[family], port)
    ranged = ServiceSpec(VIRTUAL[family], port - 100, last_port=port - 1, destinations=(one,))
    own = ServiceSpec(
        VIRTUAL[family], port, last_port=port + 9, destinations=(replace(one, port=0),)
    )
    with directing(ranged, own):
        for dialled in (port - 100, port - 50, port - 1, port):
            assert whom(cluster.client, VIRTUAL[family], dialled) == ("a", CLIENTS[family])
        with pytest.raises(ConnectionRefusedError):
            get(cluster.client, VIRTUAL[family], port + 1)
        with pytest.raises(OSError, match=r"timed out|route|unreachable"):
            cluster.client.call(socket.create_connection, (VIRTUAL[family], port - 101), LOST)


@FAMILIES
@FIREWALL
@pytest.mark.parametrize("method", ["masq", "dr"])
def test_a_firewall_mark(cluster: Topology, directing: Directing, family: int, method: str) -> None:
    """Whatever the rules of others mark is one service."""
    tool = ("iptables", "ip6tables")[family]
    match = ["-d", VIRTUAL[family], "-p", "tcp", "--dport", "9000:9001"]
    mark = ["-t", "mangle", "-A", "PREROUTING", *match, "-j", "MARK", "--set-mark", "7"]
    cluster.node.run([tool, *mark])
    for server in cluster.servers[:2]:
        holds(server, VIRTUAL[family])
    destinations = tuple(
        DestinationSpec(server_addresses(cluster, number)[family], 0, method=method)
        for number in (0, 1)
    )
    spec = ServiceSpec(("0.0.0.0", "::")[family], 7, "fwmark", destinations=destinations)
    if method == "dr":
        # Replies that pass the node: nobody knows of which address.
        cluster.node.run([tool, "-A", "FORWARD", "-s", VIRTUAL[family], "-j", "ACCEPT"])
    before = traces(cluster.node)
    with directing(spec):
        answers = {whom(cluster.client, VIRTUAL[family], 9000) for _ in range(4)}
    assert answers == {("a", CLIENTS[family]), ("b", CLIENTS[family])}
    assert traces(cluster.node) == before


def test_a_next_hop_that_was_away(cluster: Topology, directing: Directing) -> None:
    """Its interface was down, and with it went all routes by it."""
    (server, *_), (virtual, _) = cluster.servers, VIRTUAL
    holds(server, virtual)
    spec = service(cluster, 0, "dr")
    with directing(replace(spec, destinations=spec.destinations[:1])) as mode:
        cluster.node.ip(
            f"link set {server.namespace.name} down",
            f"link set {server.namespace.name} up",
            f"route add {server.ipv4}/32 dev {server.namespace.name}",
        )
        with pytest.raises(OSError, match=r"unreachable|No route"):
            connect(cluster.client, virtual, cluster.direct_port)
        mode.trim()
        assert whom(cluster.client, virtual, cluster.direct_port) == ("a", CLIENT)


def test_a_next_hop_that_the_kernel_refuses(
    cluster: Topology, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """Others are not affected, and packets to it are unreachable."""
    server = cluster.servers[0].ipv4
    good, bad = Hop(1 << 22, server), Hop(2 << 22, node_addresses(cluster)[0])
    backend.apply(CapturePlan(items=frozenset({bad})))
    try:
        backend.update(CapturePlan(), [good], [])
        tables = [
            cluster.node.run(["ip", "route", "show", "table", str(TABLES + n)]).stdout
            for n in (1, 2)
        ]
    finally:
        backend.remove()
    assert f"default via {server} dev" in tables[0]
    assert "via" not in tables[1]
    assert tables[1].startswith("unreachable default")
    assert {record.message for record in caplog.records} == {"a next hop cannot be reached"}


@FAMILIES
@pytest.mark.parametrize("hop_marks", [0xFFC00000, 0xFF00])
def test_what_a_killed_process_left_is_taken_over(
    cluster: Topology,
    directing: Directing,
    new_backend: Callable[[], Backend],
    family: int,
    hop_marks: int,
) -> None:
    """Its marks may have meant other servers, and stood elsewhere."""
    before = traces(cluster.node)
    for server in cluster.servers[:2]:
        holds(server, VIRTUAL[family])
    addresses = [server_addresses(cluster, number)[family] for number in (2, 1, 0)]
    step = hop_marks & -hop_marks
    left = frozenset(Hop(n * step, address) for n, address in enumerate(addresses, 1))
    new_backend().apply(CapturePlan(items=left, hop_marks=hop_marks))
    assert traces(cluster.node) != before
    with directing(service(cluster, family, "dr")):
        answers = {whom(cluster.client, VIRTUAL[family], cluster.direct_port) for _ in range(4)}
    assert answers == {("a", CLIENTS[family]), ("b", CLIENTS[family])}
    assert traces(cluster.node) == before


def test_connections_by_dr_outlive_their_server(cluster: Topology, directing: Directing) -> None:
    """It takes no new ones; the policy route goes with the last of the old."""
    first, second = cluster.servers[:2]
    for server in (first, second):
        holds(server, VIRTUAL[0])
    spec = service(cluster, 0, "dr")
    with (
        directing(replace(spec, destinations=spec.destinations[:1])) as mode,
        connect(cluster.client, VIRTUAL[0], cluster.direct_port) as connection,
    ):
        assert '"a"' in ask(connection)
        mode.update([replace(spec, destinations=spec.destinations[1:])], [])
        mode.trim()
        assert '"a"' in ask(connection)
        assert whom(cluster.client, VIRTUAL[0], cluster.direct_port)[0] == "b"


def test_a_packet_that_outgrows_the_queue(
    cluster: Topology, directing: Directing, started: list[QueueWorkers]
) -> None:
    """The kernel takes no more than 65531 bytes with a verdict: it is dropped, and counted."""
    spec = replace(service(cluster, 0, "tunnel", TunnelSpec()), protocol="udp")
    with (
        directing(spec),
        cluster.client.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DONT)
        client.sendto(bytes(65533 - 20 - 28), (VIRTUAL[0], cluster.direct_port))
        (workers,) = started
        tunnel_queue = max(workers.stats())
        wait_until(lambda: workers.stats()[tunnel_queue].outgrown == 1, TIMEOUT, "it is counted")
