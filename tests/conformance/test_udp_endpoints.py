"""UDP never sticks to the dead (kube-proxy.md, A7): whose endpoint leaves is served by another, or
told that there is none, with the next datagram. But an endpoint that serves keeps its clients, also
where readiness, traffic policies or topology take the new ones elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from random import Random
from typing import Any

import pytest
import wire
from kube_objects import case, endpoint, endpoints, port, service

from svcdp import Dataplane, Reason, ServiceSpec, SvcdpError, Verdict
from svcdp.kube import Change, NodeContext, resolve
from svcdp.kube.decode import decode_value
from svcdp.sync import Sync

NODE = NodeContext(name="n1", zone="a", addresses=["192.0.2.1"], pod_cidrs=["10.1.0.0/16"])
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


# -- endpoints that serve, and are not chosen any more ---------------------------------------------

IN_A, IN_B = ({"forZones": [{"name": zone}]} for zone in "ab")
ON_N1, ON_N2 = (
    {"forZones": [{"name": "a"}], "forNodes": [{"name": node}]} for node in ("n1", "n2")
)
HERE, THERE = endpoint(A, "ready", node="n1"), endpoint(A, "ready", node="n2")
B_HERE, B_THERE = endpoint(B, "ready", node="n1"), endpoint(B, "ready", node="n2")
TERMINATES = endpoint(A, "-ready", "serving", "terminating", node="n1")
UNREADY = endpoint(A, "-ready", "serving", node="n1")
LEAVES = endpoint(A, "-ready", "-serving", "terminating", node="n1")
CLUSTER, LOCAL = "Cluster", "Local"


class Cluster:
    """The daemon's way from objects to packets, each change in force when it returns."""

    def __init__(self, dataplane: Dataplane, sync: Sync, source: Told) -> None:
        self.dataplane, self._sync, self._source = dataplane, sync, source
        self._slice: Any = None
        self._service: Any = None

    async def become(self, *each: Any, **fields: Any) -> None:
        """A Service with these endpoints."""
        after = self._sync.generation
        self._service, self._slice = objects(*each, **fields)
        self._source.say(self._service, self._slice)
        await self._sync.wait(after)

    async def lose(self, *, service: bool) -> None:
        after = self._sync.generation
        self._source.say(gone=[self._service if service else self._slice])
        await self._sync.wait(after)

    def send(self, to: tuple[str, int], client: str, port: int = 40000) -> Any:
        return self.dataplane.process(wire.packet("udp", client, port, *to))

    def new_ones(self, to: tuple[str, int], client: str, first: int) -> set[str]:
        """Who serves new flows, or what becomes of them; as explain() says, too."""
        found = set()
        for number in range(first, first + 4):
            said = self.dataplane.explain(f"udp {client}:{number} -> {to[0]}:{to[1]}")
            result = self.send(to, client, number)
            if result.verdict == Verdict.FORWARD:
                assert result.reason == Reason.NEW
                assert result.destination[0] in {each.address for each in said.destinations}
                found.add(result.destination[0])
            else:
                assert said.action == result.verdict.name.lower()
                found.add(said.action)
        return found

    def assert_stays(self, to: tuple[str, int], client: str) -> None:
        """The flow that began first is A's, and A's answers are the client's."""
        result = self.send(to, client)
        assert (result.reason, result.destination) == (Reason.ESTABLISHED, (A, 53))
        sent = wire.read(bytes(result.packet))
        answer = wire.packet("udp", A, 53, sent.source, sent.source_port)
        result = self.dataplane.process(answer)
        assert (result.reason, result.next_hop) == (Reason.REPLY, client)
        assert ("udp", A, 53) in self.dataplane.captures().real


def run(test: Callable[[Cluster], Awaitable[None]]) -> None:
    async def inside() -> None:
        mode, source = Served(), Told()
        async with asyncio.timeout(20), Sync(mode, NODE) as sync:
            sync.follow(source)
            await test(Cluster(mode.dataplane, sync, source))

    asyncio.run(inside())


def hinted(each: Any, hints: Any) -> Any:
    return {**each, "hints": hints}


STAYS = [
    # Objects before and after, as (endpoints, policies), and who gets new flows then.
    case("terminates", (HERE,), {}, (TERMINATES, B_HERE), {}, B),
    case("is not ready", (HERE,), {}, (UNREADY, B_HERE), {}, B),
    case("is not ready, nobody is", (HERE,), {}, (UNREADY,), {}, "reject"),
    case("zone", (HERE, B_HERE), {}, (hinted(HERE, IN_B), hinted(B_HERE, IN_A)), {}, B),
    case("node", (HERE, B_HERE), {}, (hinted(HERE, ON_N2), hinted(B_HERE, ON_N1)), {}, B),
    case("policies", (THERE, B_HERE), {}, (THERE, B_HERE), {"policy": LOCAL}, B),
    case("policies, nobody here", (THERE,), {}, (THERE,), {"policy": LOCAL}, "drop"),
    case("one comes here", (THERE,), {"policy": CLUSTER}, (B_HERE, THERE), {"policy": LOCAL}, B),
    case(
        "terminates under Local", (HERE,), {"policy": LOCAL}, (TERMINATES, B_HERE),
        {"policy": LOCAL}, B,
    ),
]  # fmt: skip


def policies(policy: str = CLUSTER) -> dict[str, str]:
    return {"externalTrafficPolicy": policy, "internalTrafficPolicy": policy}


@pytest.mark.parametrize("to", ADDRESSES, ids=str)
@pytest.mark.parametrize(("before", "policy", "after", "policy_after", "others"), STAYS)
def test_an_endpoint_that_serves_keeps_its_flows(
    to: tuple[str, int],
    before: tuple[Any, ...],
    policy: dict[str, str],
    after: tuple[Any, ...],
    policy_after: dict[str, str],
    others: str,
) -> None:
    client = POD if to == CLUSTER_IP else OUTSIDE

    async def test(cluster: Cluster) -> None:
        await cluster.become(THERE if THERE in before else HERE, **policies(**policy))
        assert cluster.send(to, client).destination == (A, 53)
        await cluster.become(*before, **policies(**policy))
        await cluster.become(*after, **policies(**policy_after))
        for first in (50000, 51000):
            cluster.assert_stays(to, client)
            assert cluster.new_ones(to, client, first) == {others}
        # Serves no longer: as if it had never been kept.
        await cluster.become(LEAVES, B_HERE, **policies())
        moved = cluster.send(to, client)
        assert (moved.reason, moved.destination) == (Reason.NEW, (B, 53))

    run(test)


@pytest.mark.parametrize("to", ADDRESSES, ids=str)
@pytest.mark.parametrize("service", [False, True], ids=["slice", "service"])
def test_a_kept_flow_ends_with_the_objects(to: tuple[str, int], service: bool) -> None:
    """Zero endpoints and deleted Services included."""

    async def test(cluster: Cluster) -> None:
        await cluster.become(HERE)
        assert cluster.send(to, POD).destination == (A, 53)
        await cluster.become(TERMINATES, B_HERE)
        cluster.assert_stays(to, POD)
        await cluster.lose(service=service)
        result = cluster.send(to, POD)
        assert result.reason == (Reason.NO_SERVICE if service else Reason.NO_DESTINATION)
        cluster.dataplane.sweep()
        assert cluster.dataplane.stats().connections == 0

    run(test)


def test_a_kept_flow_goes_on_when_its_endpoint_is_back() -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.become(HERE)
        cluster.send(CLUSTER_IP, POD)
        for _ in range(3):
            await cluster.become(UNREADY, B_HERE)
            cluster.assert_stays(CLUSTER_IP, POD)
            await cluster.become(HERE, B_HERE)
            cluster.assert_stays(CLUSTER_IP, POD)
            assert cluster.dataplane.stats().connections == 1
        assert cluster.new_ones(CLUSTER_IP, POD, 50000) == {A, B}

    run(test)


def test_the_flows_of_one_address_do_not_matter_to_another() -> None:
    """Each was a destination where it was chosen."""

    async def test(cluster: Cluster) -> None:
        await cluster.become(HERE)
        for to in ADDRESSES:
            cluster.send(to, OUTSIDE)
        await cluster.become(TERMINATES, B_HERE)
        cluster.dataplane.sweep()
        for to in ADDRESSES:
            cluster.assert_stays(to, OUTSIDE)

    run(test)


def test_an_affinity_ends_where_a_flow_stays() -> None:
    """A5: who is out of the set loses its clients at once, for what is new."""
    affinity = {"sessionAffinity": "ClientIP"}

    async def test(cluster: Cluster) -> None:
        await cluster.become(HERE, **affinity)
        cluster.send(CLUSTER_IP, POD)
        await cluster.become(TERMINATES, B_HERE, **affinity)
        assert cluster.new_ones(CLUSTER_IP, POD, 50000) == {B}
        cluster.assert_stays(CLUSTER_IP, POD)
        await cluster.become(HERE, B_HERE, **affinity)
        assert cluster.new_ones(CLUSTER_IP, POD, 51000) == {B}

    run(test)


STATES = {
    "ready": ("ready",),
    "not ready": ("-ready", "serving"),
    "terminates": ("-ready", "serving", "terminating"),
    "dead": ("-ready", "-serving"),
}


def course(random: Random) -> Iterator[tuple[set[str], Dataplane]]:
    """A cluster over time: who serves now, and what packets meet."""
    dataplane = Dataplane(1000, seed=1, clock=lambda: 0)
    for _ in range(20):
        states = {
            address: random.choice([*STATES, ""]) for address in (A, B, "10.1.0.3")
        }  # "": it is not there
        found = [
            hinted(
                endpoint(address, *STATES[state], node=random.choice(["n1", "n2"])),
                random.choice([{}, IN_A, IN_B]),
            )
            for address, state in states.items()
            if state
        ]
        policy = policies(random.choice([CLUSTER, LOCAL]))
        is_there = random.random() < 0.95
        dataplane.apply(resolve(objects(*found, **policy) if is_there else [], NODE))
        if random.random() < 0.3:
            dataplane.sweep()
        serving = {address for address, state in states.items() if state not in ("", "dead")}
        yield serving if is_there else set(), dataplane


@pytest.mark.parametrize("seed", range(20))
def test_any_course_of_events(seed: int) -> None:
    """A flow stays with its endpoint exactly as long as that serves; else new ones' way is its."""
    random = Random(seed)
    held: dict[tuple[str, int], str | None] = {}
    left: set[tuple[str, int]] = set()  # whose endpoint did not serve since the last datagram
    for serving, dataplane in course(random):
        left |= {to for to, address in held.items() if address not in serving}
        for number, to in enumerate(ADDRESSES):
            if random.random() < 0.4:
                continue
            client = POD if to == CLUSTER_IP else OUTSIDE
            said = dataplane.explain(f"udp {client}:9 -> {to[0]}:{to[1]}")
            result = dataplane.process(wire.packet("udp", client, 40000 + number, *to))
            address = result.destination[0] if result.destination else None
            if held.get(to) and to not in left:
                assert (result.reason, address) == (Reason.ESTABLISHED, held[to])
            elif address is None:
                assert said.destinations == ()
            else:
                assert address in serving
                assert address == held.get(to) or address in {e.address for e in said.destinations}
            held[to] = address
            left.discard(to)


def test_what_is_kept_is_let_go_of_when_its_flows_are_over() -> None:
    now = [0]
    dataplane = Dataplane(1000, seed=1, clock=lambda: now[0])
    dataplane.apply(resolve(objects(HERE), NODE))
    send(dataplane, CLUSTER_IP)
    dataplane.apply(resolve(objects(TERMINATES, B_HERE), NODE))
    assert ("udp", A, 53) in dataplane.captures().real
    now[0] = 301 * 10**9
    dataplane.sweep()
    assert ("udp", A, 53) not in dataplane.captures().real
    assert send(dataplane, CLUSTER_IP).destination == (B, 53)


@pytest.mark.parametrize("to", ADDRESSES, ids=str)
def test_a_flow_stays_over_a_restart(to: tuple[str, int]) -> None:
    """kube-proxy's flows are the kernel's, and outlive it."""
    client = POD if to == CLUSTER_IP else OUTSIDE
    before, after = served(HERE), served(TERMINATES, B_HERE)
    assert send(before, to, client).destination == (A, 53)
    before.apply(resolve(objects(TERMINATES, B_HERE), NODE))
    for state in before.export_connections():
        assert after.import_connection(state) == "created"
    kept = send(after, to, client)
    assert (kept.reason, kept.destination) == (Reason.ESTABLISHED, (A, 53))
    after.apply(resolve(objects(LEAVES, B_HERE), NODE))
    moved = send(after, to, client)
    assert (moved.reason, moved.destination) == (Reason.NEW, (B, 53))


@pytest.mark.parametrize(
    ("after", "stays"),
    [
        case("elsewhere", hinted(endpoint(A, "ready"), IN_B), True),
        case("is not ready", endpoint(A, "-ready", "serving"), False),
        case("terminates", endpoint(A, "-ready", "serving", "terminating"), False),
    ],
)
def test_resets_of_removed_endpoints_do_not_meet_others(after: Any, stays: bool) -> None:
    """svcdp.io/on-endpoint-removal, TCP: a hint removes nobody."""
    web = service(annotations={"svcdp.io/on-endpoint-removal": "reset"})
    dataplane = Dataplane(1000, seed=1, clock=lambda: 0)
    dataplane.apply(resolve([web, endpoints(A)], NODE))
    for flags in ("S", "A"):
        client = wire.packet("tcp", POD, 40000, "10.96.0.10", 80, flags)
        assert dataplane.process(client).destination == (A, 8080)
    other = hinted(endpoint(B, "ready"), IN_A)
    dataplane.apply(resolve([web, endpoints(after, other)], NODE))
    result = dataplane.process(wire.packet("tcp", POD, 40000, "10.96.0.10", 80, "A"))
    assert result.verdict == (Verdict.FORWARD if stays else Verdict.REJECT)
    new = dataplane.process(wire.packet("tcp", POD, 40001, "10.96.0.10", 80, "S"))
    assert new.destination == (B, 8080)
