"""UDP never sticks to the dead (kube-proxy.md, A7): whose endpoint leaves is served by another, or
told that there is none, with the next datagram.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import pytest
import wire
from kube_objects import case, endpoint, endpoints, port, service

from svcdp import Dataplane, Reason, ServiceSpec, SvcdpError, Verdict
from svcdp.kube import Change, NodeContext, resolve
from svcdp.kube.decode import decode_value
from svcdp.sync import Sync

NODE = NodeContext(name="n1", addresses=["192.0.2.1"], pod_cidrs=["10.1.0.0/16"])
POD, OUTSIDE = "10.1.9.9", "198.51.100.7"
A, B = "10.1.0.1", "10.1.0.2"
DNS = [port(53, "dns", "UDP", nodePort=30053)]
SLICE = {"ports": [port(53, "dns", "UDP")]}

CLUSTER_IP = ("10.96.0.10", 53)
NODE_PORT = ("192.0.2.1", 30053)
EXTERNAL = ("203.0.113.1", 53)
BALANCER = ("203.0.113.2", 53)
ADDRESSES = [CLUSTER_IP, NODE_PORT, EXTERNAL, BALANCER]


def objects(*each: Any, **more: Any) -> list[Any]:
    """A Service with every kind of address and these endpoints."""
    dns = service(type="LoadBalancer", ports=DNS, externalIPs=[EXTERNAL[0]], **more)
    dns["status"] = {"loadBalancer": {"ingress": [{"ip": BALANCER[0]}]}}
    return [dns, endpoints(*each, **SLICE)]


def send(dataplane: Dataplane, to: tuple[str, int], client: str = POD) -> Any:
    return dataplane.process(wire.packet("udp", client, 40000, *to))


def served(*each: Any, **more: Any) -> Dataplane:
    dataplane = Dataplane(1000, seed=1, clock=lambda: 0)
    dataplane.apply(resolve(objects(*each, **more), NODE))
    return dataplane


@pytest.mark.parametrize("to", ADDRESSES, ids=str)
@pytest.mark.parametrize("policy", ["Cluster", "Local"])
@pytest.mark.parametrize(
    "left",
    [
        case("deleted", ()),
        case("not ready", (endpoint(A, "-ready", "-serving", node="n1"),)),
        case("ends", (endpoint(A, "-ready", "-serving", "terminating", node="n1"),)),
    ],
)
def test_an_endpoint_that_left_gets_no_datagram(
    to: tuple[str, int], policy: str, left: tuple[Any, ...]
) -> None:
    client = POD if to == CLUSTER_IP else OUTSIDE
    dataplane = served(endpoint(A, "ready", node="n1"), externalTrafficPolicy=policy)
    assert send(dataplane, to, client).destination == (A, 53)
    after = [*left, endpoint(B, "ready", node="n1")]
    dataplane.apply(resolve(objects(*after, externalTrafficPolicy=policy), NODE))
    moved = send(dataplane, to, client)
    assert (moved.reason, moved.destination) == (Reason.NEW, (B, 53))


@pytest.mark.parametrize("to", ADDRESSES, ids=str)
def test_the_last_endpoint_leaves(to: tuple[str, int]) -> None:
    dataplane = served(A)
    assert send(dataplane, to).destination == (A, 53)
    dataplane.apply(resolve(objects(), NODE))
    for _ in range(2):
        result = send(dataplane, to)
        assert (result.verdict, result.reason) == (Verdict.REJECT, Reason.NO_DESTINATION)
    dataplane.sweep()
    assert dataplane.stats().connections == 0
    dataplane.apply(resolve(objects(B), NODE))
    assert send(dataplane, to).destination == (B, 53)


@pytest.mark.parametrize("to", ADDRESSES, ids=str)
def test_the_service_is_deleted(to: tuple[str, int]) -> None:
    dataplane = served(A)
    assert send(dataplane, to).destination == (A, 53)
    dataplane.apply([])
    result = send(dataplane, to)
    assert (result.verdict, result.reason) == (Verdict.PASS, Reason.NO_SERVICE)
    assert dataplane.stats().connections == 0


@pytest.mark.parametrize("to", ADDRESSES, ids=str)
def test_a_flow_that_began_before_its_service_is_picked_up(to: tuple[str, int]) -> None:
    dataplane = Dataplane(1000, seed=1, clock=lambda: 0)
    for _ in range(3):
        assert send(dataplane, to).reason == Reason.NO_SERVICE
    dataplane.apply(resolve(objects(), NODE))
    assert send(dataplane, to).verdict == Verdict.REJECT
    dataplane.apply(resolve(objects(A), NODE))
    result = send(dataplane, to)
    assert (result.reason, result.destination) == (Reason.NEW, (A, 53))


def test_local_clients_of_a_node_port_lose_only_what_is_gone() -> None:
    """An endpoint of another node serves Pods, and one of this node everybody."""
    here, there = endpoint(A, "ready", node="n1"), endpoint(B, "ready", node="n2")
    dataplane = served(here, there, externalTrafficPolicy="Local")
    assert send(dataplane, NODE_PORT, OUTSIDE).destination == (A, 53)
    dataplane.apply(resolve(objects(there, externalTrafficPolicy="Local"), NODE))
    lost = send(dataplane, NODE_PORT, OUTSIDE)
    assert (lost.verdict, lost.reason) == (Verdict.DROP, Reason.NO_DESTINATION)
    assert send(dataplane, NODE_PORT, POD).destination == (B, 53)


def test_a_sweep_forgets_idle_flows_and_others_stay() -> None:
    dataplane = served(A, B)
    for number in range(8):
        dataplane.process(wire.packet("udp", POD, 50000 + number, *CLUSTER_IP))
    dataplane.apply(resolve(objects(B), NODE))
    dataplane.sweep()
    assert {connection.destination for connection in dataplane.connections()} == {B}
    assert dataplane.stats().connections == 4


class Told:
    """A source that says what a test tells it."""

    name = "test"

    def __init__(self) -> None:
        self.errors: list[SvcdpError] = []
        self.queue: asyncio.Queue[list[Change]] = asyncio.Queue()

    def say(self, *manifests: Any, gone: Sequence[Any] = ()) -> None:
        records = [record for each in manifests for record in decode_value(each)]
        keys = tuple(record.key for each in gone for record in decode_value(each))
        self.queue.put_nowait([Change(objects=tuple(records), deleted=keys)])

    async def changes(self) -> AsyncIterator[Sequence[Change]]:
        while True:
            yield await self.queue.get()


class Served:
    """A mode that is a dataplane and nothing else."""

    def __init__(self) -> None:
        self.dataplane = Dataplane(1000, seed=1, clock=lambda: 0)

    def update(self, specs: Iterable[ServiceSpec], removed: Iterable[tuple[str, int, str]]) -> None:
        self.dataplane.update(specs, removed)


@pytest.mark.parametrize("to", ADDRESSES, ids=str)
def test_from_objects_to_packets(to: tuple[str, int]) -> None:
    """By the daemon's way: each change is committed, and the next datagram knows."""

    async def test() -> None:
        mode, source = Served(), Told()
        async with Sync(mode, NODE) as sync:
            sync.follow(source)
            service, slice_of_a = objects(A)
            source.say(service)
            await sync.ready()
            assert send(mode.dataplane, to).verdict == Verdict.REJECT
            source.say(slice_of_a)
            await sync.wait(1)
            assert send(mode.dataplane, to).destination == (A, 53)
            source.say(objects(B)[1])
            await sync.wait(2)
            assert send(mode.dataplane, to).destination == (B, 53)
            source.say(gone=[slice_of_a])
            await sync.wait(3)
            assert send(mode.dataplane, to).verdict == Verdict.REJECT
            source.say(gone=[service])
            await sync.wait(4)
            assert send(mode.dataplane, to).reason == Reason.NO_SERVICE
            assert mode.dataplane.stats().connections == 0

    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())
