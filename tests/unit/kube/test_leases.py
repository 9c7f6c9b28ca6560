"""Leases against a server that holds one, at times that a test says."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from svcdp.errors import ManifestError
from svcdp.kube.leases import Lease, LeaseSpec, Observation, decode_lease, lease_resource
from svcdp.kube.reflector import ApiError

FOLDER = "/apis/coordination.k8s.io/v1/namespaces/svcdp/leases"
PATH = f"{FOLDER}/one"
NOBODY = ApiError("no answer")


class FakeServer:
    """Holds Leases as the API does: each write a new version, and 409 for a stale one. ``before``
    is called within each request."""

    url = "https://fake"

    def __init__(self) -> None:
        self.leases: dict[str, Any] = {}
        self.error: ApiError | None = None
        self.before: Callable[[], object] = lambda: None
        self._versions = itertools.count(1)

    async def get(self, path: str, params: Mapping[str, str]) -> bytes:
        self._asked()
        return self._found(path)

    async def post(self, path: str, body: bytes) -> bytes:
        self._asked()
        made = json.loads(body)
        name = f"{path}/{made['metadata']['name']}"
        if name in self.leases:
            raise ApiError("already exists", status=409)
        self.leases[name] = made
        return self._written(name)

    async def patch(self, path: str, body: bytes) -> bytes:
        self._asked()
        self._found(path)
        change, held = json.loads(body), self.leases[path]
        if change["metadata"]["resourceVersion"] != held["metadata"]["resourceVersion"]:
            raise ApiError("the object has been modified", status=409)
        for part in ("metadata", "spec"):
            held[part].update(change.get(part, {}))
        return self._written(path)

    def touch(self, path: str = PATH) -> None:
        """Somebody changes what does not matter."""
        self.leases[path]["metadata"].setdefault("annotations", {})["seen"] = "1"
        self._written(path)

    def _asked(self) -> None:
        self.before()
        if self.error is not None:
            raise self.error

    def _found(self, path: str) -> bytes:
        if path not in self.leases:
            raise ApiError("not found", status=404)
        return json.dumps(self.leases[path]).encode()

    def _written(self, path: str) -> bytes:
        self.leases[path]["metadata"]["resourceVersion"] = str(next(self._versions))
        return self._found(path)


class Clock:
    """``server.before = lambda: clock.pass_(n)``: time that a request takes."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lease(server: FakeServer, clock: Clock, who: str, duration: int = 3) -> Lease:
    return Lease(server, "svcdp", "one", who, duration, {"of": "nodes"}, clock=clock)


def acquire(each: Lease) -> bool:
    return asyncio.run(each.acquire())


def test_the_first_makes_it(server: FakeServer, clock: Clock) -> None:
    first = lease(server, clock, "a")
    assert not first.is_held
    assert acquire(first)
    made = server.leases[PATH]
    spec = made["spec"]
    assert made["metadata"]["labels"] == {"of": "nodes"}
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"]) == ("a", 3)
    assert spec["leaseTransitions"] == 0
    assert spec["acquireTime"] == spec["renewTime"]
    assert spec["renewTime"].endswith("Z")
    assert len(spec["renewTime"]) == len("2026-01-01T00:00:00.000000Z")


def test_one_of_two_holds_it_and_renewing_keeps_it(server: FakeServer, clock: Clock) -> None:
    first, second = lease(server, clock, "a"), lease(server, clock, "b")
    for _ in range(5):
        assert acquire(first)
        assert not acquire(second)
        assert second.holder == "a"
        clock.pass_(2)
    spec = server.leases[PATH]["spec"]
    assert spec["leaseTransitions"] == 0
    assert spec["acquireTime"] < spec["renewTime"]


def test_an_expired_one_is_taken_when_it_was_seen_long_enough(
    server: FakeServer, clock: Clock
) -> None:
    first, second = lease(server, clock, "a"), lease(server, clock, "b")
    acquire(first)
    clock.pass_(100)  # whatever was before, second has not seen it
    assert not acquire(second)
    clock.pass_(2.9)
    server.touch()  # is no renewal
    assert not acquire(second)
    clock.pass_(0.1)
    assert acquire(second)
    assert server.leases[PATH]["spec"]["leaseTransitions"] == 1
    assert not acquire(first)
    assert first.holder == "b"


def test_a_hold_ends_before_others_may_take_it(server: FakeServer, clock: Clock) -> None:
    """Counted from before the request, while others count from after theirs."""
    first, second = lease(server, clock, "a"), lease(server, clock, "b")
    server.before = lambda: clock.pass_(1)
    assert acquire(first)  # looked at until 1001, made until 1002
    assert not acquire(second)  # looked at until 1003
    server.before = lambda: None
    clock.pass_(1)
    assert not first.is_held
    assert not acquire(second)
    clock.pass_(1.9)
    assert not acquire(second)
    clock.pass_(0.1)
    assert acquire(second)


def test_an_answer_that_comes_too_late_is_no_hold(server: FakeServer, clock: Clock) -> None:
    first = lease(server, clock, "a")
    server.before = lambda: clock.pass_(3)
    assert not acquire(first)
    server.before = lambda: None
    assert acquire(first)


def test_the_duration_of_whoever_holds_it_counts(server: FakeServer, clock: Clock) -> None:
    first, second = lease(server, clock, "a", duration=60), lease(server, clock, "b", duration=3)
    acquire(first)
    assert not acquire(second)
    clock.pass_(59)
    assert not acquire(second)
    clock.pass_(1)
    assert acquire(second)


def test_released_it_is_free_at_once(server: FakeServer, clock: Clock) -> None:
    first, second = lease(server, clock, "a"), lease(server, clock, "b")
    acquire(first)
    acquire(second)
    asyncio.run(first.release())
    assert not first.is_held
    assert acquire(second)
    asyncio.run(first.release())  # is no longer its own
    assert acquire(second)
    assert server.leases[PATH]["spec"]["leaseTransitions"] == 1


def test_releasing_what_is_not_there(server: FakeServer, clock: Clock) -> None:
    asyncio.run(lease(server, clock, "a").release())
    assert not server.leases


def test_of_two_that_take_it_at_once_one_has_it(server: FakeServer, clock: Clock) -> None:
    first, second = lease(server, clock, "a"), lease(server, clock, "b")

    async def both() -> list[bool]:
        return list(await asyncio.gather(first.acquire(), second.acquire()))

    assert sorted(asyncio.run(both())) == [False, True]
    third, fourth = lease(server, clock, "c"), lease(server, clock, "d")
    acquire(third)
    acquire(fourth)
    clock.pass_(3)
    first, second = third, fourth
    assert sorted(asyncio.run(both())) == [False, True]


def test_one_that_somebody_else_changed_is_renewed_all_the_same(
    server: FakeServer, clock: Clock
) -> None:
    first = lease(server, clock, "a")
    acquire(first)
    server.touch()
    clock.pass_(2)
    assert acquire(first)
    clock.pass_(2)
    assert first.is_held
    assert server.leases[PATH]["metadata"]["annotations"] == {"seen": "1"}


def test_one_that_was_deleted_is_made_again(server: FakeServer, clock: Clock) -> None:
    first = lease(server, clock, "a")
    acquire(first)
    server.leases.clear()
    assert acquire(first)
    assert server.leases


def test_the_same_identity_started_again_need_not_wait(server: FakeServer, clock: Clock) -> None:
    acquire(lease(server, clock, "a"))
    assert acquire(lease(server, clock, "a"))
    assert server.leases[PATH]["spec"]["leaseTransitions"] == 0


def test_without_an_answer_it_is_held_until_it_ends(server: FakeServer, clock: Clock) -> None:
    first = lease(server, clock, "a")
    acquire(first)
    server.error = NOBODY
    for held in (True, False):
        with pytest.raises(ApiError, match="no answer"):
            acquire(first)
        assert first.is_held is held
        clock.pass_(3)
    server.error = None
    assert acquire(first)


def test_what_is_not_allowed_is_said(server: FakeServer, clock: Clock) -> None:
    server.error = ApiError("403 Forbidden", status=403)
    with pytest.raises(ApiError, match=r"the Lease one.*grant the verbs get, create and patch"):
        acquire(lease(server, clock, "a"))


def test_an_answer_that_is_none(server: FakeServer, clock: Clock) -> None:
    server.leases[PATH] = {"metadata": {"name": 5}}
    with pytest.raises(ApiError, match="no API server's answer"):
        acquire(lease(server, clock, "a"))


def test_a_lease_without_a_spec_is_nobodys(server: FakeServer, clock: Clock) -> None:
    server.leases[PATH] = {"metadata": {"name": "one", "resourceVersion": "7"}, "spec": {}}
    assert acquire(lease(server, clock, "a"))
    assert server.leases[PATH]["spec"]["leaseTransitions"] == 1


@pytest.mark.parametrize(("duration", "who"), [(0, "a"), (3, "")])
def test_what_no_lease_can_be(server: FakeServer, clock: Clock, duration: int, who: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        lease(server, clock, who, duration)


def test_how_long_it_is_held(server: FakeServer, clock: Clock) -> None:
    first = lease(server, clock, "a")
    assert first.remaining == 0
    server.before = lambda: clock.pass_(0.25)
    acquire(first)  # by a look and a write, of which the time before the latter counts
    assert first.remaining == 2.75
    clock.pass_(2.5)
    assert first.remaining == 0.25
    clock.pass_(5)
    assert first.remaining == 0
    assert not first.is_held


def test_a_hold_ends_while_the_machine_sleeps(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other machines do not wait for it."""
    now = {time.CLOCK_BOOTTIME: 1000.0, time.CLOCK_MONOTONIC: 1000.0}
    monkeypatch.setattr(time, "clock_gettime", now.__getitem__)
    first = Lease(server, "svcdp", "web", "a", 3)
    assert acquire(first)
    now[time.CLOCK_BOOTTIME] += 3
    assert not first.is_held


def test_observing_for_whoever_watches() -> None:
    seen = Observation()
    assert seen.holder(5.0) == ""
    spec = LeaseSpec(holder_identity="n1", lease_duration_seconds=3, renew_time="x")
    seen.see(spec, 10.0)
    seen.see(spec, 12.0)
    assert (seen.holder(12.9), seen.holder(13.0), seen.ends) == ("n1", "", 13.0)
    seen.see(LeaseSpec(holder_identity="n1", lease_duration_seconds=3, renew_time="y"), 13.0)
    assert seen.holder(15.9) == "n1"


def test_leases_for_a_reflector() -> None:
    resource = lease_resource("svcdp", "of=nodes")
    assert resource.path == FOLDER
    assert resource.selectors == {"labelSelector": "of=nodes"}
    found = resource.decode(
        b'{"metadata":{"name":"one","resourceVersion":"7","labels":{"of":"nodes"}},'
        b'"spec":{"holderIdentity":"n1","leaseDurationSeconds":3,"strategy":"new"}}'
    )
    assert (found.metadata.name, found.spec.holder_identity) == ("one", "n1")
    with pytest.raises(ManifestError, match="not a Lease"):
        decode_lease(b'{"metadata":{"name":"one","resourceVersion":"7"},"spec":3}')
