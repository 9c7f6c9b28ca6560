"""Captured traffic: what arrives, and what the rest of the node's netfilter makes of it."""

from __future__ import annotations

import errno
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from capture import (
    FAMILIES,
    HAIRPIN,
    LOST,
    MASQUERADED,
    NODE_PORT,
    PLAIN,
    TIMEOUT,
    Serve,
    ask,
    connect,
    get,
    node_addresses,
    server_addresses,
    set_rp_filter,
)

from svcdp.lab import Lab, Namespace, Topology
from svcdp.rules import Backend, CapturePlan

pytestmark = pytest.mark.netns

# IP_RECVERR (linux/in.h), IPV6_RECVERR (linux/in6.h): also errors that are not the last word.
RECEIVE_ERRORS = ((socket.IPPROTO_IP, 11), (socket.IPPROTO_IPV6, 25))


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
        cluster.client.call(socket.create_connection, (PLAIN[family], 80), LOST)


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


@FAMILIES
def test_errors_of_the_node_itself(cluster: Topology, serve: Serve, family: int) -> None:
    """A firewall that refuses, and a packet whose hops end here: the client hears of both, also
    where the kernel tracks connections.
    """
    tool = ("iptables", "ip6tables")[family]
    refused = ["-p", "udp", "--dport", "7777", "-j", "REJECT"]
    accepted = ["-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT"]
    for rule in (accepted, refused):
        cluster.node.run([tool, "-A", "FORWARD", *rule])
    pod = server_addresses(cluster, 0)[family]
    get(cluster.client, pod, cluster.direct_port)
    assert tracked(cluster.node)

    def error(port: int, hops: int) -> int:
        kind = (socket.AF_INET, socket.AF_INET6)[family]
        level, option = (
            (socket.IPPROTO_IP, socket.IP_TTL),
            (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS),
        )[family]
        with socket.socket(kind, socket.SOCK_DGRAM) as sock:
            sock.settimeout(TIMEOUT)
            sock.setsockopt(level, option, hops)
            sock.setsockopt(*RECEIVE_ERRORS[family], 1)
            sock.connect((pod, port))
            sock.send(b"?")
            with pytest.raises(OSError, match="Errno") as raised:
                sock.recv(100)
            return raised.value.errno or 0

    with serve():
        assert cluster.client.call(error, 7777, 64) == errno.ECONNREFUSED
        assert cluster.client.call(error, 7778, 1) == errno.EHOSTUNREACH


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
            cluster.client.call(socket.create_connection, address, LOST)
