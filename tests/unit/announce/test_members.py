"""Nodes that share addresses by their Leases, in a time that passes when all wait: whatever happens
on the way to the API server, no two have the same address.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import selectors
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any

import pytest

from svcdp.announce.members import LABEL, FixedMembers, LeaseMembers
from svcdp.announce.owner import owner
from svcdp.kube.reflector import ApiError

DURATION = 2
ADDRESSES = [f"192.0.2.{number}" for number in range(8)]
STEP = 0.01  # seconds between two looks
#: Until the survivors have what a dead node had: its Lease, a renewal of theirs, and the way.
TAKE_OVER = DURATION + DURATION / 4 + 0.2


class _Waits(selectors.SelectSelector):
    """Nothing ever comes: what would wait for it is told that the time has passed."""

    passed = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "all wait, and nobody for a time"
        self.passed += max(timeout, 0.0)
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._waits = _Waits()
        super().__init__(self._waits)

    def time(self) -> float:
        return self._waits.passed


def play(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(work)


def now() -> float:
    return asyncio.get_running_loop().time()


class Server:
    """Leases of one namespace, and all their versions in order."""

    def __init__(self) -> None:
        self.leases: dict[str, Any] = {}
        self.log: list[tuple[str, Any]] = []

    def write(self, kind: str, name: str, lease: Any) -> bytes:
        lease["metadata"]["resourceVersion"] = str(len(self.log) + 1)
        data = json.dumps(lease).encode()
        self.log.append((kind, data))
        self.leases[name] = lease
        return data

    def delete(self, name: str) -> None:
        self.write("DELETED", name, self.leases[name])
        del self.leases[name]


class Way:
    """One node's way to the server, as `svcdp.kube.client.Client` has it. ``delay`` gives the
    seconds that each part takes; while it is ``cut`` nothing comes through, while it ``stalls``
    no news do.
    """

    url = "https://played"

    def __init__(self, server: Server, delay: Callable[[], float] = lambda: 0.001) -> None:
        self._server = server
        self._delay = delay
        self.cut = self.stalls = False

    async def get(self, path: str, params: Mapping[str, str]) -> bytes:
        await self._pass()
        if params:
            assert params.get("labelSelector") == f"{LABEL}=true"
            version = str(len(self._server.log))
            items = list(self._server.leases.values())
            data = json.dumps({"metadata": {"resourceVersion": version}, "items": items}).encode()
        else:
            data = json.dumps(self._find(path)).encode()
        await self._pass()
        return data

    async def post(self, path: str, body: bytes) -> bytes:
        await self._pass()
        made = json.loads(body)
        made["metadata"]["namespace"] = "svcdp"
        name = made["metadata"]["name"]
        if name in self._server.leases:
            raise ApiError("already exists", status=409)
        data = self._server.write("ADDED", name, made)
        await self._pass()
        return data

    async def patch(self, path: str, body: bytes) -> bytes:
        await self._pass()
        change, held = json.loads(body), self._find(path)
        if change["metadata"]["resourceVersion"] != held["metadata"]["resourceVersion"]:
            raise ApiError("the object has been modified", status=409)
        patched = {part: {**held[part], **change.get(part, {})} for part in ("metadata", "spec")}
        data = self._server.write("MODIFIED", patched["metadata"]["name"], patched)
        await self._pass()
        return data

    async def watch(
        self, path: str, params: Mapping[str, str], silence: float
    ) -> AsyncGenerator[bytes, None]:
        await self._pass()
        yield b""
        for number in itertools.count(int(params["resourceVersion"])):
            asked = now()
            while number >= len(self._server.log) or self.stalls or self.cut:
                if now() - asked > silence and not self.stalls:
                    return
                await asyncio.sleep(STEP)
            await asyncio.sleep(self._delay())
            kind, data = self._server.log[number]
            yield b'{"type": "%s", "object": %s}' % (kind.encode(), data)

    def _find(self, path: str) -> Any:
        try:
            return self._server.leases[path.rpartition("/")[2]]
        except KeyError:
            raise ApiError("not found", status=404) from None

    async def _pass(self) -> None:
        await asyncio.sleep(self._delay())
        while self.cut:
            await asyncio.sleep(STEP)


class Node:
    """A node and its way to the server."""

    def __init__(self, server: Server, name: str, way: Way, duration: int = DURATION) -> None:
        self.name = name
        self.way = way
        self.is_fit = True
        self.members = LeaseMembers(way, "svcdp", name, duration, lambda: self.is_fit, clock=now)
        self._server = server
        self._task: asyncio.Task[None] | None = None

    @property
    def lease(self) -> Any:
        return self._server.leases[f"svcdp-node-{self.name}"]

    def start(self) -> None:
        self._task = asyncio.create_task(self.members.run())

    async def kill(self) -> None:
        """It says nothing more, and has nothing more."""
        self.is_fit = False
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def stop(self) -> None:
        await self.kill()
        await self.members.leave()

    def owned(self) -> set[str]:
        alive = self.members.alive()
        return {each for each in ADDRESSES if owner(each, alive) == self.name}


class Group:
    """Nodes of a cluster, watched all the time: no address is two nodes'."""

    def __init__(self, count: int, delay: Callable[[], float] = lambda: 0.001) -> None:
        self.server = Server()
        self.nodes = [self.make(f"n{number}", delay) for number in range(count)]

    def make(
        self, name: str, delay: Callable[[], float] = lambda: 0.001, duration: int = DURATION
    ) -> Node:
        return Node(self.server, name, Way(self.server, delay), duration)

    def start(self) -> None:
        for node in self.nodes:
            node.start()

    async def pass_(self, seconds: float) -> None:
        until = now() + seconds
        while now() < until:
            self.look()
            await asyncio.sleep(STEP)

    def look(self) -> dict[str, str]:
        """Who has each address."""
        found: dict[str, str] = {}
        for node in self.nodes:
            for address in node.owned():
                assert address not in found, f"{address}: {found[address]} and {node.name}"
                found[address] = node.name
        return found

    def by_node(self) -> dict[str, int]:
        found = list(self.look().values())
        return {name: found.count(name) for name in sorted(set(found))}

    def agreed(self, *names: str) -> dict[str, str]:
        return {each: owner(each, names) or "" for each in ADDRESSES}


def test_nodes_share_the_addresses_after_a_lease_s_time() -> None:
    async def work() -> None:
        group = Group(3)
        group.start()
        await group.pass_(DURATION)
        assert group.look() == {}  # others, unknown yet, may have them
        await group.pass_(0.1)
        assert group.look() == group.agreed("n0", "n1", "n2")
        labels = group.nodes[0].lease["metadata"]["labels"]
        assert labels == {LABEL: "true"}
        assert group.nodes[0].members.problem == ""

    play(work())


def test_a_dead_node_s_are_taken_in_time() -> None:
    async def work() -> None:
        group = Group(3)
        group.start()
        await group.pass_(10)
        await group.nodes[0].kill()
        await group.pass_(DURATION - DURATION / 4 - 0.1)
        assert set(group.look()) == {
            a for a, n in group.agreed("n0", "n1", "n2").items() if n != "n0"
        }
        await group.pass_(TAKE_OVER - (DURATION - DURATION / 4 - 0.1))
        assert group.look() == group.agreed("n1", "n2")

    play(work())


def test_one_that_stops_leaves_at_once() -> None:
    async def work() -> None:
        group = Group(2)
        group.start()
        await group.pass_(10)
        await group.nodes[0].stop()
        await group.pass_(0.1)
        assert group.look() == group.agreed("n1")

    play(work())


def test_one_that_is_not_fit_leaves_until_it_is() -> None:
    async def work() -> None:
        group = Group(2)
        group.start()
        await group.pass_(10)
        group.nodes[0].is_fit = False
        assert group.nodes[0].owned() == set()
        await group.pass_(1)
        assert group.look() == group.agreed("n1")
        group.nodes[0].is_fit = True
        await group.pass_(DURATION + 1)
        assert group.look() == group.agreed("n0", "n1")

    play(work())


@pytest.mark.parametrize("cut", ["cut", "stalls"])
def test_one_that_loses_the_server_has_none_before_others_take_them(cut: str) -> None:
    async def work() -> None:
        group = Group(2)
        group.start()
        await group.pass_(10)
        setattr(group.nodes[0].way, cut, True)
        await group.pass_(DURATION)
        assert group.nodes[0].owned() == set()
        await group.pass_(30)
        # One that only hears nothing is known to live: what it had is nobody's.
        both = group.agreed("n0", "n1")
        mine = {address: name for address, name in both.items() if name == "n1"}
        assert group.look() == (group.agreed("n1") if cut == "cut" else mine)
        setattr(group.nodes[0].way, cut, False)
        await group.pass_(10)
        assert group.look() == both

    play(work())


def test_nobody_has_any_without_the_server() -> None:
    async def work() -> None:
        group = Group(2)
        group.start()
        await group.pass_(10)
        for node in group.nodes:
            node.way.cut = True
        await group.pass_(DURATION + 0.1)
        assert group.look() == {}
        await group.pass_(1)
        assert group.nodes[0].members.problem == "no answer in time"

    play(work())


def test_a_deleted_lease_is_made_again() -> None:
    async def work() -> None:
        group = Group(2)
        group.start()
        await group.pass_(10)
        group.server.delete("svcdp-node-n0")
        for _ in range(300):
            await group.pass_(STEP)
            assert group.look() == group.agreed("n0", "n1")

    play(work())


def test_a_dead_node_s_lease_may_be_deleted() -> None:
    async def work() -> None:
        group = Group(2)
        group.start()
        await group.pass_(10)
        await group.nodes[0].kill()
        group.server.delete("svcdp-node-n0")
        await group.pass_(TAKE_OVER)
        assert group.look() == group.agreed("n1")

    play(work())


def test_nodes_may_differ_in_the_duration() -> None:
    async def work() -> None:
        group = Group(1)
        group.nodes.append(group.make("n1", duration=6))
        group.start()
        await group.pass_(7)
        assert group.look() == group.agreed("n0", "n1")
        group.nodes[1].way.cut = True
        await group.pass_(4)
        assert "n1" in group.by_node()  # for longer than the other's Leases last
        await group.pass_(4)
        assert group.look() == group.agreed("n0")
        group.nodes.append(group.make("n2"))
        group.nodes[-1].start()
        await group.pass_(10)
        assert group.look() == group.agreed("n0", "n2")

    play(work())


def test_a_lease_of_a_node_that_is_no_more_counts_once() -> None:
    async def work() -> None:
        group = Group(2)
        group.start()
        await group.pass_(10)
        await group.nodes[0].kill()
        await group.pass_(TAKE_OVER)
        group.nodes.append(group.make("n2"))
        group.nodes[2].start()
        await group.pass_(DURATION + 0.6)
        assert group.look() == group.agreed("n1", "n2")

    play(work())


@pytest.mark.parametrize("seed", range(10))
def test_no_address_is_two_nodes_whatever_the_network_does(seed: int) -> None:
    """Slow requests, late news, cuts, crashes, Leases deleted; then, in peace, all agree."""
    chance = random.Random(seed)

    def delay() -> float:
        slow = chance.random() < 0.05
        return chance.uniform(0.0, 3 * DURATION if slow else 0.05)

    async def work() -> None:
        group = Group(4, delay)
        group.start()
        for _ in range(40):
            await group.pass_(chance.uniform(0.0, 2 * DURATION))
            node = chance.choice(group.nodes)
            kind = chance.randrange(5)
            if kind == 0:
                node.way.cut = not node.way.cut
            elif kind == 1:
                node.way.stalls = not node.way.stalls
            elif kind == 2:
                node.is_fit = not node.is_fit
            elif kind == 3 and f"svcdp-node-{node.name}" in group.server.leases:
                group.server.delete(f"svcdp-node-{node.name}")
            elif kind == 4:
                await node.kill()
                index = group.nodes.index(node)
                group.nodes[index] = group.make(node.name, delay)
                group.nodes[index].start()
        for node in group.nodes:
            node.is_fit, node.way.cut, node.way.stalls = True, False, False
            node.way._delay = lambda: 0.001
        await group.pass_(10 * DURATION)
        assert group.look() == group.agreed(*(node.name for node in group.nodes))

    play(work())


def test_fixed_members() -> None:
    fit = [True]
    members = FixedMembers(["n1", "n2"], lambda: fit[0])
    assert members.alive() == {"n1", "n2"}
    fit[0] = False
    assert members.alive() == frozenset()
