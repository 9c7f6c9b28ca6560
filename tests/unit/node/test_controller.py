"""The controller at a server that refuses, forgets and lags as a test says."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from svcdp.kube.assign import Decision, ObservedService, decide
from svcdp.kube.events import Event
from svcdp.kube.leases import Lease
from svcdp.kube.pools import ADDRESSES_ANNOTATION
from svcdp.kube.reflector import ApiError
from svcdp.node import controller
from svcdp.node.controller import Controller, _State

DEADLINE = 20.0
POOLS = "/apis/svcdp.io/v1alpha1/loadbalancerpools"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/svcdp/leases"
SERVICES = "/api/v1/namespaces/default/services"
LISTS = {"/api/v1/services": SERVICES, POOLS: POOLS}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeServer:
    """Holds objects by path, as the API does: each write a new version, and 409 for a stale one.
    ``before`` is told of each request, and raises what is to go wrong."""

    url = "https://fake"

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.before: Callable[[str, str], object] = lambda method, path: None
        #: Whether a patch of this path gets no answer.
        self.hangs: Callable[[str], bool] = lambda path: False
        #: Whether watches say nothing, until there is something new.
        self.lags = False
        self.clock = Clock()
        self._versions = itertools.count(1)
        self._watches: list[tuple[str, asyncio.Queue[Any]]] = []
        self._late: list[tuple[str, str]] = []

    # The objects.

    def has(self, path: str, found: Any) -> None:
        kind = "MODIFIED" if path in self.objects else "ADDED"
        self.objects[path] = found
        found["metadata"]["resourceVersion"] = str(next(self._versions))
        self._late.append((kind, path))
        if not self.lags:
            self.catch_up()

    def catch_up(self) -> None:
        late, self._late = self._late, []
        for kind, path in late:
            for folder, queue in self._watches:
                if path.startswith(f"{folder}/"):
                    item = json.loads(json.dumps(self.objects[path]))
                    queue.put_nowait({"type": kind, "object": item})

    def delete(self, path: str) -> None:
        found = self.objects.pop(path)
        for folder, queue in self._watches:
            if path.startswith(f"{folder}/"):
                queue.put_nowait({"type": "DELETED", "object": found})

    def now(self, act: Callable[[], object]) -> None:
        """Watches tell of this at once, and of nothing that they have not told yet."""
        late, self._late, self.lags = self._late, [], False
        act()
        self._late, self.lags = late, True

    def pool(self, *addresses: str) -> None:
        spec = {"addresses": list(addresses)}
        self.has(f"{POOLS}/lan", {"metadata": {"name": "lan"}, "spec": spec})

    def service(self, name: str, asks: str = "", **spec: Any) -> None:
        metadata = {"name": name, "namespace": "default", "annotations": {"n": "1"}}
        if asks:
            metadata["annotations"] = {ADDRESSES_ANNOTATION: asks}
        spec = {"type": "LoadBalancer", "ports": [{"port": 80}], **spec}
        self.has(f"{SERVICES}/{name}", {"metadata": metadata, "spec": spec, "status": {}})

    def addresses(self, name: str) -> list[str]:
        status = self.objects[f"{SERVICES}/{name}"]["status"]
        ingress = status.get("loadBalancer", {}).get("ingress") or ()
        return [each["ip"] for each in ingress]

    # The API.

    async def get(self, path: str, params: Mapping[str, str]) -> bytes:
        self.before("GET", path)
        folder = LISTS.get(path)
        if folder is None:
            return self._found(path)
        items = [each for name, each in self.objects.items() if name.startswith(f"{folder}/")]
        return json.dumps({"metadata": {"resourceVersion": "0"}, "items": items}).encode()

    async def watch(
        self, path: str, params: Mapping[str, str], silence: float
    ) -> AsyncGenerator[bytes, None]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._watches.append((LISTS[path], queue))
        yield b""
        while True:
            yield json.dumps(await queue.get()).encode()

    async def post(self, path: str, body: bytes) -> bytes:
        self.before("POST", path)
        made = json.loads(body)
        self.has(f"{path}/{made['metadata']['name']}", made)
        return self._found(f"{path}/{made['metadata']['name']}")

    async def patch(self, path: str, body: bytes) -> bytes:
        if self.hangs(path):
            await asyncio.Event().wait()
        path, _, manager = path.partition("/status?fieldManager=")
        self.before("PATCH", path)
        self._found(path)
        change, held = json.loads(body), self.objects[path]
        if change["metadata"]["resourceVersion"] != held["metadata"]["resourceVersion"]:
            raise ApiError("the object has been modified", status=409)
        if manager:
            fields = {"f:status": {"f:loadBalancer": {"f:ingress": {}}}}
            held["metadata"]["managedFields"] = [{"manager": manager, "fieldsV1": fields}]
        for part in ("metadata", "spec", "status"):
            held.setdefault(part, {}).update(change.get(part, {}))
        self.has(path, held)
        return self._found(path)

    def _found(self, path: str) -> bytes:
        if path not in self.objects:
            raise ApiError("not found", status=404)
        return json.dumps(self.objects[path]).encode()


class Stage:
    """A controller at that server."""

    def __init__(
        self,
        server: FakeServer,
        *,
        retry: tuple[float, float] = (0.001, 0.01),
        duration: int = 3600,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.server = server
        self.events: list[Event] = []
        clock = clock or server.clock
        lease = Lease(server, "svcdp", "svcdp-controller", "me", duration, clock=clock)
        self.controller = Controller(server, lease, self.events.append, retry=retry)

    def reasons(self) -> set[str]:
        return {f"{each.regarding.name} {each.reason}" for each in self.events}

    async def until(self, reached: Callable[[], object]) -> None:
        while not reached():
            await asyncio.sleep(0.001)

    def play(self, act: Callable[[Stage], Any]) -> None:
        async def main() -> None:
            task = asyncio.create_task(self.controller.run())
            acting = asyncio.create_task(act(self))
            async with asyncio.timeout(DEADLINE):
                await asyncio.wait({task, acting}, return_when=asyncio.FIRST_COMPLETED)
                assert not task.done(), task.exception()
                await acting
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())


@pytest.fixture
def server() -> FakeServer:
    server = FakeServer()
    server.pool("192.0.2.8-192.0.2.9")
    return server


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "PERIOD", 0.001)


@pytest.fixture
def stage(server: FakeServer) -> Stage:
    return Stage(server)


def test_gives_addresses_and_leaves_the_lease_to_others(server: FakeServer, stage: Stage) -> None:
    server.service("a", asks="192.0.2.9")

    async def act(stage: Stage) -> None:
        await stage.until(lambda: server.addresses("a") == ["192.0.2.9"])
        server.service("b")
        await stage.until(lambda: server.addresses("b") == ["192.0.2.8"])
        server.service("c")
        await stage.until(lambda: "c LoadBalancerPoolFull" in stage.reasons())
        assert stage.controller.checks() == {"lease": True, "sources": True, "writes": True}
        assert stage.controller.lacking() == 1
        [usage] = stage.controller.usages()
        assert (usage.addresses, usage.used) == (2, 2)

    stage.play(act)
    assert {"a LoadBalancerIPAllocated", "b LoadBalancerIPAllocated"} <= stage.reasons()
    assert stage.controller.writes == {"written": 2}
    assert server.objects[f"{LEASES}/svcdp-controller"]["spec"]["holderIdentity"] == ""


def test_a_service_that_changed_meanwhile_is_looked_at_again(
    server: FakeServer, stage: Stage
) -> None:
    server.service("a")

    def change(method: str, path: str) -> None:
        if method == "PATCH" and path == f"{SERVICES}/a" and not stage.controller.writes:
            server.service("a", asks="192.0.2.9")

    server.before = change

    async def act(stage: Stage) -> None:
        await stage.until(lambda: server.addresses("a") == ["192.0.2.9"])

    stage.play(act)
    assert stage.controller.writes == {"conflict": 1, "written": 1}


def test_a_service_that_changed_while_others_were_written_is_looked_at_again(
    server: FakeServer, stage: Stage
) -> None:
    server.service("a", asks="192.0.2.8")
    server.service("b", asks="192.0.2.9")

    async def act(stage: Stage) -> None:
        await stage.until(lambda: server.addresses("a"))
        server.service("b", asks="192.0.2.8")
        await stage.until(lambda: "b LoadBalancerIPAlreadyAllocated" in stage.reasons())

    slow = server.patch

    async def patch(path: str, body: bytes) -> bytes:
        """Others have their turn before the answer is there, and the watch has its."""
        answer = await slow(path, body)
        await asyncio.sleep(0.05)
        return answer

    server.patch = patch  # type: ignore[method-assign]
    stage.play(act)
    assert (server.addresses("a"), server.addresses("b")) == (["192.0.2.8"], [])
    assert stage.controller.writes == {"conflict": 1, "written": 1}


def test_a_conflict_that_nothing_explains_is_no_end(server: FakeServer, stage: Stage) -> None:
    refused = itertools.count()

    def refuse(method: str, path: str) -> None:
        if method == "PATCH" and path.startswith(SERVICES) and next(refused) < 2:
            raise ApiError("the object has been modified", status=409)

    server.before = refuse
    server.service("a")

    async def act(stage: Stage) -> None:
        await stage.until(lambda: server.addresses("a"))

    stage.play(act)
    assert stage.controller.writes == {"conflict": 2, "written": 1}


def test_what_was_written_counts_before_the_watch_says_so(server: FakeServer, stage: Stage) -> None:
    server.pool("192.0.2.9/32")
    server.service("a")

    async def act(stage: Stage) -> None:
        await stage.until(lambda: stage.controller.is_leader)
        server.lags = True
        await stage.until(lambda: server.addresses("a"))
        # Who asks for an address goes before who takes any, but not before who has it.
        server.now(lambda: server.service("b", asks="192.0.2.9"))
        await stage.until(lambda: "b LoadBalancerIPAlreadyAllocated" in stage.reasons())
        server.lags = False
        server.catch_up()

    stage.play(act)
    assert (server.addresses("a"), server.addresses("b")) == (["192.0.2.9"], [])
    assert stage.controller.writes == {"written": 1}


def test_what_was_written_twice_counts_before_the_watch_says_so(
    server: FakeServer, stage: Stage
) -> None:
    server.service("a")

    async def act(stage: Stage) -> None:
        await stage.until(lambda: stage.controller.is_leader)
        server.lags = True
        await stage.until(lambda: server.addresses("a"))
        for address in ("192.0.2.20", "192.0.2.21"):
            server.now(lambda address=address: server.pool(f"{address}/32"))
            await stage.until(lambda address=address: server.addresses("a") == [address])
        server.now(lambda: server.service("b", asks="192.0.2.21"))
        await stage.until(lambda: "b LoadBalancerIPAlreadyAllocated" in stage.reasons())
        server.lags = False
        server.catch_up()

    stage.play(act)
    assert (server.addresses("a"), server.addresses("b")) == (["192.0.2.21"], [])
    assert stage.controller.writes == {"written": 3}


def test_services_without_load_balancers_are_no_reason_to_look(
    server: FakeServer, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def counted(services: Sequence[ObservedService], *arguments: Any, **more: Any) -> Decision:
        seen.append({each.service.metadata.name for each in services})
        return decide(services, *arguments, **more)

    monkeypatch.setattr(controller, "decide", counted)
    server.service("a")
    server.service("plain", type="ClusterIP")

    async def act(stage: Stage) -> None:
        await stage.until(lambda: server.addresses("a"))
        server.service("plain", type="NodePort")
        server.service("last")
        await stage.until(lambda: server.addresses("last"))
        looks = len(seen)
        for _ in range(20):
            server.service("plain", type="ClusterIP")
            await asyncio.sleep(0.005)
        assert len(seen) < looks + 5  # the watch may have something to say of the last one
        server.service("a", type="ClusterIP")
        await stage.until(lambda: seen[-1] == {"last"})

    stage.play(act)
    assert not any("plain" in names for names in seen)


def test_others_have_their_turn_while_it_decides(
    server: FakeServer, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    waited: list[bool] = []

    def slow(*arguments: Any, **more: Any) -> Decision:
        begun.set()
        waited.append(may_end.wait(DEADLINE / 4))
        return decide(*arguments, **more)

    monkeypatch.setattr(controller, "decide", slow)
    server.service("a")

    async def act(stage: Stage) -> None:
        await stage.until(begun.is_set)
        may_end.set()
        await stage.until(lambda: server.addresses("a"))

    stage.play(act)
    assert all(waited)


def test_nothing_is_written_once_the_lease_is_over(server: FakeServer, stage: Stage) -> None:
    server.service("a")
    server.service("b")
    patched: list[str] = []

    def run_out(method: str, path: str) -> None:
        if method == "PATCH" and path.startswith(SERVICES):
            patched.append(path)
            server.clock.now += 3600

    server.before = run_out

    async def act(stage: Stage) -> None:
        await stage.until(lambda: patched)
        server.service("c")
        # Of a look, which then would have been the time to write b.
        await stage.until(lambda: "c LoadBalancerPoolFull" in stage.reasons())
        await asyncio.sleep(0)
        assert not stage.controller.is_leader
        assert len(patched) == 1

    stage.play(act)


def test_who_may_not_write_is_told_what_to_grant(
    server: FakeServer, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    server.service("a")
    server.service("b")
    refused = itertools.count()

    def refuse(method: str, path: str) -> None:
        if method == "PATCH" and path.startswith(SERVICES) and next(refused) < 3:
            raise ApiError("no", status=403)

    server.before = refuse

    async def act(stage: Stage) -> None:
        await stage.until(lambda: not stage.controller.checks()["writes"])
        await stage.until(lambda: server.addresses("a") and server.addresses("b"))
        await stage.until(lambda: stage.controller.checks()["writes"])

    stage.play(act)
    assert stage.controller.writes == {"failed": 3, "written": 2}
    assert "grant the verb patch on services/status" in caplog.text
    assert caplog.text.count("Service default/a: its status") == 1  # though it failed twice


def test_a_service_that_the_server_refuses_does_not_stop_others(
    server: FakeServer, stage: Stage
) -> None:
    server.service("a")
    server.service("b")

    def refuse(method: str, path: str) -> None:
        if method == "PATCH" and path == f"{SERVICES}/a":
            raise ApiError("invalid", status=422)

    server.before = refuse

    async def act(stage: Stage) -> None:
        await stage.until(lambda: server.addresses("b"))

    stage.play(act)
    assert server.addresses("a") == []


def test_many_services_that_the_server_refuses_do_not_stop_others(
    server: FakeServer, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by an admission policy, whose refusal looks like a missing right."""
    monkeypatch.setattr(controller, "BATCH", 3)
    monkeypatch.setattr(controller, "REFUSALS", 2)
    server.pool("192.0.2.0/24")
    for number in range(7):
        server.service(f"a{number}")
    server.service("b")
    allowed: set[str] = set()

    def refuse(method: str, path: str) -> None:
        name = path.rpartition("/")[2]
        if method == "PATCH" and name.startswith("a") and name not in allowed:
            raise ApiError("denied", status=403)

    server.before = refuse

    async def act(stage: Stage) -> None:
        await stage.until(lambda: server.addresses("b"))
        assert not stage.controller.checks()["writes"]
        # Each of them has its turn again, too.
        for name in ("a6", "a0"):
            allowed.add(name)
            await stage.until(lambda name=name: server.addresses(name))

    stage.play(act)


def test_what_the_server_refuses_is_not_tried_at_each_change(server: FakeServer) -> None:
    stage = Stage(server, retry=(60.0, 60.0))
    server.service("a")
    refused: list[str] = []

    def refuse(method: str, path: str) -> None:
        if method == "PATCH" and path == f"{SERVICES}/a":
            refused.append(server.objects[path]["metadata"]["resourceVersion"])
            raise ApiError("invalid", status=422)

    server.before = refuse

    async def act(stage: Stage) -> None:
        await stage.until(lambda: refused)
        for name in "bcd":
            server.service(name, asks="198.51.100.1")
            await stage.until(
                lambda name=name: f"{name} LoadBalancerIPOutOfRange" in stage.reasons()
            )
        assert len(refused) == 1
        assert not stage.controller.checks()["writes"]
        # It is another Service now.
        server.service("a")
        await stage.until(lambda: len(refused) == 2)
        server.before = lambda method, path: None
        server.service("a", type="ClusterIP")
        await stage.until(lambda: stage.controller.checks()["writes"])

    stage.play(act)


def test_a_server_that_is_busy_is_left_in_peace(server: FakeServer) -> None:
    stage = Stage(server)
    server.service("a")
    asked: list[float] = []

    def refuse(method: str, path: str) -> None:
        if method == "PATCH" and path.startswith(SERVICES):
            asked.append(time.monotonic())
            if len(asked) == 1:
                raise ApiError("busy", status=429, retry_after=0.5)

    server.before = refuse

    async def act(stage: Stage) -> None:
        await stage.until(lambda: asked)
        server.service("b")
        await stage.until(lambda: server.addresses("a") and server.addresses("b"))

    stage.play(act)
    assert asked[1] - asked[0] >= 0.5


def test_many_are_written_though_nothing_else_happens(
    server: FakeServer, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "BATCH", 2)
    server.pool("192.0.2.0/24")
    for number in range(5):
        server.service(f"s{number}")
    server.lags = True

    async def act(stage: Stage) -> None:
        await stage.until(lambda: stage.controller.writes["written"] == 5)

    stage.play(act)


def test_a_write_without_an_answer_ends_with_the_lease(server: FakeServer) -> None:
    stage = Stage(server, duration=1, clock=time.monotonic)
    server.service("a")
    server.hangs = lambda path: path.startswith(SERVICES) and not stage.controller.writes

    async def act(stage: Stage) -> None:
        await stage.until(lambda: server.addresses("a"))

    stage.play(act)
    assert stage.controller.writes == {"failed": 1, "written": 1}


def test_without_an_answer_for_its_lease_it_leads_no_longer(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(server, duration=1, clock=time.monotonic)
    server.service("a")

    async def act(stage: Stage) -> None:
        await stage.until(lambda: server.addresses("a"))
        server.hangs = lambda path: path.startswith(LEASES)
        await stage.until(lambda: "no longer leading" in caplog.text)
        await stage.until(lambda: not stage.controller.usages())  # its work ends
        assert not stage.controller.checks()["lease"]
        server.hangs = lambda path: False
        await stage.until(lambda: stage.controller.is_leader)
        server.service("b")
        await stage.until(lambda: server.addresses("b"))

    stage.play(act)
    assert stage.controller.writes == {"written": 2}


def test_of_a_deleted_pool_nothing_stays(server: FakeServer, stage: Stage) -> None:
    server.service("a")

    async def act(stage: Stage) -> None:
        await stage.until(lambda: server.addresses("a"))
        server.delete(f"{POOLS}/lan")
        await stage.until(lambda: not server.addresses("a"))
        assert not stage.controller.usages()

    stage.play(act)


def test_what_is_wrong_is_told_once_until_it_is_wrong_again(
    server: FakeServer, stage: Stage
) -> None:
    server.service("a", asks="198.51.100.1")

    def told() -> int:
        return sum(each.reason == "LoadBalancerIPOutOfRange" for each in stage.events)

    async def act(stage: Stage) -> None:
        await stage.until(told)
        server.service("b")
        await stage.until(lambda: server.addresses("b"))
        assert told() == 1
        server.pool("192.0.2.8-192.0.2.10")
        server.service("a", asks="192.0.2.10")
        await stage.until(lambda: server.addresses("a"))
        server.service("a", asks="198.51.100.1")
        await stage.until(lambda: told() == 2)

    stage.play(act)


def test_what_one_still_has_is_not_written_to_another(server: FakeServer, stage: Stage) -> None:
    server.pool("192.0.2.9/32")
    server.service("a")

    def refuse(method: str, path: str) -> None:
        if method == "PATCH" and path == f"{SERVICES}/a" and not may_release:
            raise ApiError("later", status=422)

    may_release = True
    server.before = refuse

    async def act(stage: Stage) -> None:
        nonlocal may_release
        await stage.until(lambda: server.addresses("a"))
        await stage.until(lambda: not stage.server._late)
        may_release = False
        former = server.objects[f"{SERVICES}/a"]
        former["spec"]["loadBalancerClass"] = "example.com/cloud"
        server.has(f"{SERVICES}/a", former)
        server.service("b")
        await stage.until(lambda: stage.controller.writes["failed"] > 2)
        assert server.addresses("b") == []
        may_release = True
        await stage.until(lambda: server.addresses("b") == ["192.0.2.9"])

    stage.play(act)
    assert server.addresses("a") == []
    assert "a LoadBalancerIPReleased" in stage.reasons()


def test_without_the_kind_it_waits_for_it(
    server: FakeServer, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    server.service("a")

    def refuse(method: str, path: str) -> None:
        if path == POOLS and not installed:
            raise ApiError("the server could not find the requested resource", status=404)

    installed = False
    server.before = refuse

    async def act(stage: Stage) -> None:
        nonlocal installed
        await stage.until(lambda: "loadbalancerpools.yaml" in caplog.text)
        assert stage.controller.checks() == {"lease": True, "sources": False, "writes": True}
        installed = True
        await stage.until(lambda: server.addresses("a"))

    stage.play(act)
    assert caplog.text.count("install its CustomResourceDefinition") == 1


def test_a_pool_that_cannot_be_read_counts_as_it_was(server: FakeServer, stage: Stage) -> None:
    server.pool("192.0.2.9/32")

    async def act(stage: Stage) -> None:
        server.service("a")
        await stage.until(lambda: server.addresses("a"))
        server.pool("192.0.2.9-192.0.2.1")
        await stage.until(lambda: "lan InvalidLoadBalancerPool" in stage.reasons())
        server.service("b")
        await stage.until(lambda: "b LoadBalancerPoolFull" in stage.reasons())

    stage.play(act)
    assert server.addresses("a") == ["192.0.2.9"]
    # The next one does not know how it was.
    after = Stage(server)

    async def look(stage: Stage) -> None:
        await stage.until(lambda: "lan InvalidLoadBalancerPool" in stage.reasons())
        server.pool("192.0.2.8-192.0.2.9")
        await stage.until(lambda: server.addresses("b") == ["192.0.2.8"])

    after.play(look)
    assert server.addresses("a") == ["192.0.2.9"]
    assert after.controller.writes == {"written": 1}


def test_a_service_that_cannot_be_read_is_told_once(
    server: FakeServer, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    server.service("new", type="BetterLoadBalancer")
    server.service("a")

    async def act(stage: Stage) -> None:
        await stage.until(lambda: server.addresses("a"))
        server.service("b")
        await stage.until(lambda: server.addresses("b"))
        assert stage.controller.checks()["sources"]

    stage.play(act)
    assert caplog.text.count("Invalid enum value 'BetterLoadBalancer'") == 1


def test_the_how_to_lists_its_metrics(stage: Stage) -> None:
    text = (Path(__file__).parents[3] / "docs" / "howto-load-balancer.md").read_text()
    listed = re.findall(r"^\| `(svcdp_\w+)` \| (\w+) \|", text, re.M)
    assert sorted(listed) == sorted(
        (family.name + "_total" * (family.type == "counter"), family.type)
        for family in _State(stage.controller).collect()
        if family.name != "svcdp_build_info"
    )


def test_a_lease_that_cannot_be_had_is_told(
    server: FakeServer, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(method: str, path: str) -> None:
        if path.startswith(LEASES):
            raise ApiError("no", status=403)

    server.before = refuse

    async def act(stage: Stage) -> None:
        await stage.until(lambda: not stage.controller.checks()["lease"])
        assert not stage.controller.is_leader

    stage.play(act)
    assert "grant the verbs get, create and patch on leases" in caplog.text
