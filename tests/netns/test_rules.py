"""Capture rules in a real kernel, with real queues and real traffic.

``SVCDP_TEST_RULES=nft`` runs all of it with that backend, where the kernel has all it needs.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from svcdp import Dataplane, DestinationSpec, RulesError, ServiceSpec, SourceRule
from svcdp.cli._demo.stage import traces
from svcdp.dataplane import Captures
from svcdp.io.nfqueue import QueueWorkers
from svcdp.lab import Lab, Namespace, Topology, wait_until
from svcdp.rules import Backend, CapturePlan, choose

pytestmark = pytest.mark.netns

BACKEND = os.environ.get("SVCDP_TEST_RULES", "auto")
TIMEOUT = 5.0  # seconds
QUEUES = (100, 101)

PLAIN = ("10.96.0.10", "fd00:10:96::10")
MASQUERADED = ("10.96.0.11", "fd00:10:96::11")
HAIRPIN = ("10.96.0.12", "fd00:10:96::12")  # only the first server is behind it
NODE_PORT = 30080

FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])

Serve = Callable[..., AbstractContextManager[QueueWorkers]]
"""Apply what the dataplane wants, and read the queues meanwhile."""


def node_addresses(cluster: Topology) -> tuple[str, str]:
    return cluster.node_ipv4, cluster.node_ipv6


def server_addresses(cluster: Topology, number: int) -> tuple[str, str]:
    return cluster.servers[number].ipv4, cluster.servers[number].ipv6


def specs(cluster: Topology) -> Iterator[ServiceSpec]:
    """Plain, masqueraded, hairpin and node port services of both families."""
    masquerade = (SourceRule(masquerade=True),)
    for family, node in enumerate(node_addresses(cluster)):
        pods = [server_addresses(cluster, number)[family] for number in range(3)]
        real = tuple(DestinationSpec(pod, cluster.direct_port) for pod in pods)
        service = partial(ServiceSpec, port=80, destinations=real, masquerade_address=node)
        yield service(PLAIN[family])
        yield service(MASQUERADED[family], rules=masquerade)
        yield service(HAIRPIN[family], destinations=real[:1])
        yield service(node, port=NODE_PORT, rules=masquerade)
        closed = DestinationSpec(pods[0], 5354)
        yield service(PLAIN[family], protocol="udp", port=53, destinations=(closed,))


@pytest.fixture
def dataplane(cluster: Topology) -> Dataplane:
    dataplane = Dataplane(4096)
    dataplane.apply(specs(cluster))
    return dataplane


@pytest.fixture
def plan(cluster: Topology, dataplane: Dataplane) -> CapturePlan:
    captures = dataplane.captures()
    return CapturePlan(
        queues=QUEUES,
        service_cidrs=cluster.service_cidrs,
        addresses=node_addresses(cluster),
        virtual=captures.virtual,
        real=captures.real,
    )


@pytest.fixture
def new_backend(cluster: Topology, tmp_path: Path) -> Callable[[], Backend]:
    """Makes backends, as processes that are started one after the other would."""
    name = cluster.node.full_name
    return lambda: choose(BACKEND, netns=name, run_dir=str(tmp_path / "run"))


@pytest.fixture
def backend(new_backend: Callable[[], Backend]) -> Backend:
    return new_backend()


@pytest.fixture
def serve(cluster: Topology, dataplane: Dataplane, backend: Backend, plan: CapturePlan) -> Serve:
    @contextlib.contextmanager
    def serving(plan: CapturePlan = plan) -> Iterator[QueueWorkers]:
        workers = QueueWorkers(dataplane, *plan.queues, netns=cluster.node.full_name)
        workers.start()
        try:
            backend.apply(plan)
            if backend.name == "nft":
                let_through(cluster.node, plan)
            yield workers
        finally:
            workers.stop()

    return serving


def let_through(node: Namespace, plan: CapturePlan) -> None:
    """What docs/limitations.md asks for: an accept in our own nft table overrules no drop."""
    mark = f"{plan.forward_mark:#x}/{plan.forward_mark:#x}"
    for tool in ("iptables", "ip6tables"):
        node.run([tool, "-I", "FORWARD", "-m", "mark", "--mark", mark, "-j", "ACCEPT"])


def connect(place: Namespace, address: str, port: int) -> socket.socket:
    return place.call(socket.create_connection, (address, port), TIMEOUT)


def ask(connection: socket.socket) -> str:
    """One request; the JSON answer. The connection stays."""
    connection.sendall(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(4096)
        assert part, f"closed after {answer!r}"
        answer += part
    return answer.decode()


def get(place: Namespace, address: str, port: int) -> str:
    with connect(place, address, port) as connection:
        return ask(connection)


def count(node: Namespace, family: int) -> dict[str, int]:
    """Packets by the comment of a rule that counts them in mangle FORWARD."""
    tool = ("iptables-save", "ip6tables-save")[family]
    saved = node.run([tool, "-c", "-t", "mangle"]).stdout
    found = re.findall(r"\[(\d+):\d+\] -A FORWARD .*--comment (\w+)", saved)
    return {name: int(packets) for packets, name in found}


def count_states(node: Namespace, family: int) -> None:
    """Count forwarded TCP packets by what conntrack thinks of them."""
    states = ("NEW", "ESTABLISHED", "INVALID", "UNTRACKED")
    rules = "".join(
        f"-A FORWARD -p tcp -m conntrack --ctstate {state} -m comment --comment {state}\n"
        for state in states
    )
    tool = ("iptables-restore", "ip6tables-restore")[family]
    node.run([tool, "--noflush"], input=f"*mangle\n{rules}COMMIT\n")


def tracked(node: Namespace) -> int:
    """How many connections conntrack knows."""
    path = Path("/proc/sys/net/netfilter/nf_conntrack_count")
    return int(node.call(path.read_text))


def set_rp_filter(node: Namespace, everywhere: int, each: int | None = None) -> None:
    for path in node.call(lambda: list(Path("/proc/sys/net/ipv4/conf").iterdir())):
        value = everywhere if path.name == "all" or each is None else each
        node.sysctl(f"net/ipv4/conf/{path.name}/rp_filter", value)


PATHS = {
    "plain": lambda cluster, family: (cluster.client, PLAIN[family], 80),
    "masqueraded": lambda cluster, family: (cluster.client, MASQUERADED[family], 80),
    "node port": lambda cluster, family: (
        cluster.client,
        node_addresses(cluster)[family],
        NODE_PORT,
    ),
    "hairpin": lambda cluster, family: (cluster.servers[0].namespace, HAIRPIN[family], 80),
    "pod": lambda cluster, family: (cluster.servers[2].namespace, HAIRPIN[family], 80),
    "node": lambda cluster, family: (cluster.node, PLAIN[family], 80),
    "node to its port": lambda cluster, family: (
        cluster.node,
        node_addresses(cluster)[family],
        NODE_PORT,
    ),
    "direct": lambda cluster, family: (
        cluster.client,
        server_addresses(cluster, 0)[family],
        cluster.direct_port,
    ),
}


@pytest.mark.parametrize("rp_filter", [(0, 0), (1, 1), (2, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("cluster", [False, True], ids=["open", "firewall"], indirect=True)
def test_every_path_works(
    cluster: Topology, serve: Serve, rp_filter: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    """Also where the policy of FORWARD is DROP, and where rp_filter is strict."""
    set_rp_filter(cluster.node, *rp_filter)
    failures = []
    with serve():
        for name, path in PATHS.items():
            for family in (0, 1):
                try:
                    get(*path(cluster, family))
                except OSError as error:
                    failures.append((name, family, error))
    assert failures == []


@FAMILIES
def test_new_interfaces_are_served(lab: Lab, cluster: Topology, serve: Serve, family: int) -> None:
    """A Pod that comes later is masqueraded too, where every interface is strict."""
    set_rp_filter(cluster.node, 1)
    with serve():
        pod = lab.namespace("late")
        lab.link(cluster.node, pod)
        cluster.node.add_address("late", ("10.2.0.1/24", "fd00:10:2::1/64")[family])
        pod.add_address("node", ("10.2.0.2/24", "fd00:10:2::2/64")[family])
        pod.ip(f"route add default via {('10.2.0.1', 'fd00:10:2::1')[family]}")
        node = node_addresses(cluster)[family]
        assert node in get(pod, node, NODE_PORT)


@FAMILIES
@pytest.mark.parametrize("cluster", [True], ids=["firewall"], indirect=True)
def test_direct_traffic_of_an_endpoint(
    cluster: Topology, backend: Backend, serve: Serve, family: int
) -> None:
    """It goes through the queue, is tracked, and outlives the one who reads the queue."""
    count_states(cluster.node, family)
    address = server_addresses(cluster, 0)[family]
    with serve() as workers:
        connection = connect(cluster.client, address, cluster.direct_port)
        ask(connection)
        assert sum(stats.received for stats in workers.stats().values()) > 0
    with connection:
        ask(connection)
    get(cluster.client, address, cluster.direct_port)
    backend.remove()
    get(cluster.client, address, cluster.direct_port)
    counted = count(cluster.node, family)
    assert counted["ESTABLISHED"] > 0
    assert counted["INVALID"] == counted["UNTRACKED"] == 0


@FAMILIES
def test_rewritten_traffic_is_not_tracked(cluster: Topology, serve: Serve, family: int) -> None:
    """conntrack would see half of each translation."""
    count_states(cluster.node, family)
    before = tracked(cluster.node)
    with serve():
        for name in ("plain", "masqueraded", "node port", "hairpin"):
            get(*PATHS[name](cluster, family))
        assert tracked(cluster.node) == before
    counted = count(cluster.node, family)
    assert counted.pop("UNTRACKED") > 0
    assert set(counted.values()) == {0}


@FAMILIES
def test_rules_of_others_see_what_was_rewritten(
    cluster: Topology, serve: Serve, family: int
) -> None:
    """The verdict repeats the chain: rules behind ours in raw see the packet, as it is now."""
    tool = ("iptables", "ip6tables")[family]
    rule = ["-p", "tcp", "--dport", str(cluster.direct_port), "-j", "DROP"]
    cluster.node.run([tool, "-t", "raw", "-A", "PREROUTING", *rule])
    with serve(), pytest.raises(TimeoutError):
        cluster.client.call(socket.create_connection, (PLAIN[family], 80), 0.5)


@FAMILIES
def test_an_icmp_error_reaches_the_client(cluster: Topology, serve: Serve, family: int) -> None:
    """Nobody listens on the destination's UDP port; the client hears of it."""

    def ask_closed() -> None:
        kind = (socket.AF_INET, socket.AF_INET6)[family]
        with socket.socket(kind, socket.SOCK_DGRAM) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect((PLAIN[family], 53))
            sock.send(b"?")
            sock.recv(100)

    with serve(), pytest.raises(ConnectionRefusedError):
        cluster.client.call(ask_closed)


@pytest.mark.parametrize("bypass", [True, False])
def test_nobody_listens(
    cluster: Topology, backend: Backend, plan: CapturePlan, bypass: bool
) -> None:
    """Packets pass or are dropped, as the plan says."""
    backend.apply(replace(plan, bypass=bypass))
    address = (cluster.servers[0].ipv4, cluster.direct_port)
    if bypass:
        get(cluster.client, *address)
    else:
        with pytest.raises(TimeoutError):
            cluster.client.call(socket.create_connection, address, 0.5)


SOURCES = {
    "client": "192.0.2.10",
    "the node's address there": "192.0.2.1",
    "the node's address elsewhere": "10.1.1.1",
    "loopback": "127.0.0.1",
    "broadcast": "192.0.2.255",
    "a pod": "10.1.1.12",
    "no route back": "203.0.113.9",
}


def udp_packet(source: str, target: str, port: int) -> bytes:
    """No checksum (0): RFC 768 allows that."""
    udp = b"".join(number.to_bytes(2, "big") for number in (40000, port, 8 + 1, 0)) + b"?"
    head = bytes([0x45, 0, 0, 20 + len(udp), 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0, 0])
    return head + socket.inet_aton(source) + socket.inet_aton(target) + udp


def arrivals(cluster: Topology, target: str, port: int) -> set[str]:
    """Which SOURCES a packet sent by the client may pretend to have and still reach a server."""
    server = cluster.servers[0].namespace

    def send(source: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            sock.sendto(udp_packet(source, target, port), (target, port))

    def received() -> int:
        lines = server.run(["cat", "/proc/net/snmp"]).stdout.splitlines()
        names, values = (line.split() for line in lines if line.startswith("Udp:"))
        return int(values[names.index("InDatagrams")])

    arrived = set()
    for name, source in SOURCES.items():
        before = received()
        cluster.client.call(send, source)
        cluster.client.call(send, SOURCES["client"])  # the one that surely arrives, and later
        wait_until(lambda before=before: received() > before, TIMEOUT, "the second one")
        last = wait_until(lambda: stable(received), TIMEOUT, "both")
        if last - before == 2:
            arrived.add(name)
    return arrived


def stable(number: Callable[[], int]) -> int:
    """The number once it is the same twice; else 0."""
    first = number()
    return first if number() == first else 0


@pytest.mark.parametrize(
    "sysctls",
    [
        {},
        {"all/rp_filter": 1},
        {"client/rp_filter": 1},
        {"all/rp_filter": 2},
        {"server-b/rp_filter": 1},
        {"all/accept_local": 1},
        {"client/accept_local": 1},
        {"client/accept_local": 1, "all/rp_filter": 1},
        {"default/rp_filter": 1, "server-a/rp_filter": 1},
    ],
    ids=str,
)
def test_martians(
    cluster: Topology,
    backend: Backend,
    serve: Serve,
    plan: CapturePlan,
    dataplane: Dataplane,
    sysctls: dict[str, int],
) -> None:
    """Exactly the packets that the kernel drops without svcdp are dropped with it.

    But where one interface is strict, all become loose, also those that had no check at all: a
    source to which no route leads is dropped there too.
    """
    node = cluster.node
    set_rp_filter(node, 0)
    for name, value in sysctls.items():
        node.sysctl(f"net/ipv4/conf/{name}", value)
    pod = cluster.servers[0].ipv4
    expected = arrivals(cluster, pod, 5353)
    if any(name.endswith("/rp_filter") and value == 1 for name, value in sysctls.items()):
        expected -= {"no route back", "broadcast"}
    dataplane.update(
        [ServiceSpec(PLAIN[0], 54, "udp", destinations=(DestinationSpec(pod, 5353),))], []
    )
    captures = dataplane.captures()
    with serve(replace(plan, queues=(100, 100), virtual=captures.virtual, real=captures.real)):
        assert arrivals(cluster, pod, 5353) == expected
        assert arrivals(cluster, PLAIN[0], 54) == expected


FOREIGN = """\
*raw
:THEIRS - [0:0]
-A PREROUTING -s 198.51.100.1 -j THEIRS
-A OUTPUT -d 198.51.100.1 -j RETURN
COMMIT
*filter
-A FORWARD -s 198.51.100.1 -j DROP
-A INPUT -s 198.51.100.1 -j DROP
COMMIT
"""


@pytest.fixture
def busy_node(cluster: Topology) -> Namespace:
    """A node on which others have rules, sets and routes."""
    cluster.node.run(["iptables-restore"], input=FOREIGN)
    cluster.node.run(["ipset", "create", "THEIRS", "hash:ip,port"])
    cluster.node.ip("route add blackhole 198.51.100.0/24")
    set_rp_filter(cluster.node, 1)
    return cluster.node


def in_order(shown: str) -> list[str]:
    """Without what is random in it: the order of elements and the seed of their hash."""
    return sorted(re.sub(r"initval \S+", "", shown).replace(",", " ").split())


def test_apply_and_remove_leave_the_rest_alone(
    busy_node: Namespace, new_backend: Callable[[], Backend], plan: CapturePlan
) -> None:
    before = traces(busy_node)
    backend = new_backend()
    assert backend.show() == ""
    backend.remove()  # nothing is there, and that is fine
    assert traces(busy_node) == before
    backend.apply(plan)
    applied, shown = traces(busy_node), backend.show()
    assert {trace for trace in before - applied if "=" not in trace} == set()  # but for sysctls
    backend.apply(plan)
    assert traces(busy_node) == applied
    other = new_backend()  # after a crash
    assert in_order(other.show()) == in_order(shown)
    other.apply(replace(plan, queues=(7, 9), service_cidrs=(), virtual=frozenset()))
    assert re.search(r"\b7[:-]9\b", other.show())
    assert not re.search(r"\b100[:-]101\b", other.show())
    assert PLAIN[0] not in other.show()
    other.apply(plan)
    assert in_order(other.show()) == in_order(shown)
    other.remove()
    assert traces(busy_node) == before
    assert other.show() == ""


def test_a_killed_process(busy_node: Namespace, backend: Backend, tmp_path: Path) -> None:
    """What it left is taken back by the next one, sysctls included."""
    before = traces(busy_node)
    program = (
        "import os; from svcdp.rules import CapturePlan, choose\n"
        f"backend = choose({backend.name!r}, run_dir={str(tmp_path / 'run')!r})\n"
        "backend.apply(CapturePlan(virtual=frozenset({('tcp', '10.96.0.1', 443)})))\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
    )
    for _ in range(2):  # the second one finds what the first one left
        killed = busy_node.run([sys.executable, "-c", program], check=False, timeout=60)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert traces(busy_node) != before
    backend.remove()
    assert traces(busy_node) == before


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("broken", ["ip", "ipset", "iptables-restore", "ip6tables-restore", "nft"])
def test_a_failing_tool(
    busy_node: Namespace,
    backend: Backend,
    plan: CapturePlan,
    broken: str,
    applied: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error names it and what it said; what it could not undo, remove() undoes later."""
    uses = {"iptables": {"ip", "ipset", "iptables-restore", "ip6tables-restore"}}
    if broken not in uses.get(backend.name, {"ip", "nft"}):
        return
    before = traces(busy_node)
    if applied:
        backend.apply(plan)
    folder = tmp_path / "bin"
    folder.mkdir()
    tool = folder / broken
    tool.write_text("#!/bin/sh\necho 'no room' >&2\nexit 3\n")
    tool.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        with pytest.raises(RulesError) as caught:
            backend.apply(replace(plan, queues=(1, 2)))
    assert caught.value.argv[0] == broken
    assert caught.value.stderr == "no room"
    if not applied:
        assert traces(busy_node) - before <= sets_left(busy_node)
    backend.remove()
    assert traces(busy_node) == before


def sets_left(node: Namespace) -> set[str]:
    """Sets that cannot be destroyed because the tool that does it is broken: they do nothing."""
    names = node.run(["ipset", "list", "-name"]).stdout.split()
    return {f"ipset list: {name}" for name in names}


def test_a_bad_element_changes_nothing(
    busy_node: Namespace, backend: Backend, plan: CapturePlan
) -> None:
    backend.apply(plan)
    shown = backend.show()
    bad = Captures(frozenset({("tcp", "10.96.7.7", 80), ("tcp", "no address", 80)}), frozenset())
    gone = Captures(frozenset({("tcp", PLAIN[0], 80)}), frozenset())
    with pytest.raises(RulesError):
        backend.update(bad, gone)
    assert in_order(backend.show()) == in_order(shown)


def test_thousands_of_elements(cluster: Topology, backend: Backend, plan: CapturePlan) -> None:
    def elements(start: int, stop: int) -> frozenset[tuple[str, str, int]]:
        protocols = ("tcp", "udp", "sctp")
        return frozenset(
            (protocols[n % 3], f"10.97.{n >> 8}.{n & 255}" if n % 2 else f"fd00:10:97::{n:x}", 80)
            for n in range(start, stop)
        )

    def held() -> set[str]:
        return set(re.findall(r"(?:10\.97\.|fd00:10:97::)[0-9a-f.]+", backend.show()))

    def addresses(elements: frozenset[tuple[str, str, int]]) -> set[str]:
        return {address for _, address, _ in elements}

    first, second = elements(1, 20000), elements(20000, 24000)
    backend.apply(replace(plan, virtual=first, real=frozenset()))
    assert held() == addresses(first)
    backend.update(Captures(second, frozenset()), Captures(elements(1, 4000), frozenset()))
    assert held() == addresses(elements(4000, 24000))
    backend.apply(replace(plan, virtual=second, real=frozenset()))
    assert held() == addresses(second)


def test_render_is_what_apply_does(cluster: Topology, backend: Backend, plan: CapturePlan) -> None:
    """The text changes nothing, and the tools take it as it is."""
    before = traces(cluster.node)
    text = backend.render(plan)
    assert text == backend.render(plan)
    assert traces(cluster.node) == before
    for protocol, address, port in plan.virtual:
        assert re.search(rf"{address}\b.*{protocol}.*\b{port}\b", text)


def test_sctp_ports_match(cluster: Topology, backend: Backend, plan: CapturePlan) -> None:
    """A port of SCTP is matched as such, and another one is not."""
    virtual = frozenset({("sctp", PLAIN[0], 7)})
    backend.apply(replace(plan, virtual=virtual, bypass=False))
    node = cluster.node
    node.run(["iptables", "-t", "mangle", "-A", "PREROUTING", "-p", "sctp"])

    def send(port: int) -> None:
        packet = bytearray(udp_packet(SOURCES["client"], PLAIN[0], port) + bytes(8))
        packet[9] = socket.IPPROTO_SCTP  # both begin with the ports
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            sock.sendto(packet, (PLAIN[0], 0))

    for port in (7, 7, 8):  # those to port 7 wait in a queue that nobody has: they are dropped
        cluster.client.call(send, port)

    def seen() -> int:
        saved = node.run(["iptables-save", "-c", "-t", "mangle"]).stdout
        found = re.search(r"\[(\d+):\d+\] -A PREROUTING -p sctp", saved)
        assert found
        return int(found[1])

    assert wait_until(seen, TIMEOUT, "the packet to port 8") == 1


def test_it_needs_root(tmp_path: Path) -> None:
    program = "from svcdp.rules import choose; choose('auto')"
    result = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert "MissingCapability" in result.stderr
    assert "root" in result.stderr
