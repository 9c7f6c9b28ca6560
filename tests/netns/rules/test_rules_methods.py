"""Forwarding by DR and through tunnels on a node: each server sees the client itself."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from capture import (
    CLIENT,
    FAMILIES,
    PLAIN,
    TIMEOUT,
    get,
    node_addresses,
    server_addresses,
)

from svcdp import Dataplane, DestinationSpec, ServiceSpec, TunnelSpec
from svcdp.cli._demo.stage import traces
from svcdp.io.nfqueue import QueueWorkers
from svcdp.lab import Namespace, Server, Topology
from svcdp.modes.nfqueue import NfqueueMode
from svcdp.rules import Backend, CapturePlan

pytestmark = pytest.mark.netns

CLIENTS = (CLIENT, "2001:db8:1::10")
VIRTUAL = PLAIN
FIREWALL = pytest.mark.parametrize(
    "cluster", [False, True], ids=["open", "firewall"], indirect=True
)

Directing = Callable[..., AbstractContextManager[NfqueueMode]]


@pytest.fixture
def dataplane() -> Dataplane:
    return Dataplane(4096)


@pytest.fixture
def directing(
    cluster: Topology, dataplane: Dataplane, backend: Backend, plan: CapturePlan
) -> Directing:
    """Serve these as the daemon does, until the end of the block."""

    @contextmanager
    def serve(*specs: ServiceSpec) -> Iterator[NfqueueMode]:
        workers = QueueWorkers(
            dataplane,
            *plan.queues,
            tunnel_queues=plan.tunnel_queues,
            netns=cluster.node.full_name,
        )
        mode = NfqueueMode(dataplane, backend, plan)
        with contextlib.ExitStack() as stack:
            stack.callback(workers.stop)
            workers.start()
            mode.update(specs, [])
            stack.callback(mode.close)
            mode.install()
            yield mode

    return serve


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
