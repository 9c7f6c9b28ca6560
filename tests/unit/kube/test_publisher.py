"""Events on their way to an API server: counted, held back, and never in anybody's way."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from svcdp.kube import Change, NodeContext
from svcdp.kube.decode import decode_value
from svcdp.kube.events import Event
from svcdp.kube.model import ObjectKey
from svcdp.kube.publisher import NOTE_MAX, WAITING_MAX, EventPublisher
from svcdp.kube.reflector import ApiError
from svcdp.kube.tracker import Tracker

DEADLINE = 20.0
WEB = ObjectKey("Service", "shop", "web")
EVENT = Event(WEB, "InvalidAnnotation", "no such scheduler")


class FakeServer:
    """Takes events; errors in ``answers`` are raised first, one a request. None: it is taken."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.events: dict[str, Any] = {}

    async def post(self, path: str, body: bytes) -> bytes:
        self._answer()
        made = json.loads(body)
        self.events[f"{path}/{made['metadata']['name']}"] = made
        return body

    async def patch(self, path: str, body: bytes) -> bytes:
        self._answer()
        if path not in self.events:
            raise ApiError("not found", status=404)
        self.events[path].update(json.loads(body))
        return body

    def _answer(self) -> None:
        self.asked += 1
        if self.answers and (error := self.answers.pop(0)):
            raise error

    def counts(self) -> list[int]:
        return [each.get("series", {"count": 1})["count"] for each in self.events.values()]


def publish(
    server: FakeServer,
    *steps: tuple[Callable[[EventPublisher], object], Callable[[], bool]],
    **options: Any,
) -> None:
    """In each step something is recorded, and something becomes so."""

    async def main() -> None:
        options.setdefault("period", 0.0)
        publisher = EventPublisher(server, "n1", lambda key: "uid", retry=(0.001, 0.002), **options)
        task = asyncio.create_task(publisher.run())
        async with asyncio.timeout(DEADLINE):
            for act, reached in steps:
                act(publisher)
                while not reached():
                    assert not task.done(), task.exception()
                    await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


def test_an_event_has_what_the_api_wants() -> None:
    server = FakeServer()
    publish(server, (lambda p: p.record(EVENT), lambda: bool(server.events)))
    [(path, found)] = server.events.items()
    assert path.startswith("/apis/events.k8s.io/v1/namespaces/shop/events/web.")
    assert found["regarding"] == {
        "apiVersion": "v1",
        "kind": "Service",
        "namespace": "shop",
        "name": "web",
        "uid": "uid",
    }
    assert (found["type"], found["reason"]) == ("Warning", "InvalidAnnotation")
    assert found["note"] == "no such scheduler"
    assert found["reportingInstance"] == "svcdp-n1"
    assert found["eventTime"].endswith("Z")


def test_what_comes_again_is_counted() -> None:
    server = FakeServer()
    publish(
        server,
        (lambda p: [p.record(EVENT) for _ in range(3)], lambda: server.counts() == [3]),
        (lambda p: p.record(EVENT), lambda: server.counts() == [4]),
        # After an hour the server has forgotten it.
        (lambda p: [server.events.clear(), p.record(EVENT)], lambda: server.counts() == [1]),
    )


def test_what_is_tried_again_is_counted_once() -> None:
    server = FakeServer(None, ApiError("busy", status=503))
    publish(
        server,
        (lambda p: [p.record(EVENT) for _ in range(3)], lambda: server.counts() == [3]),
        (lambda p: p.record(EVENT), lambda: server.counts() == [4]),
    )


def test_a_bug_costs_one_event(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer(KeyError("bug"))
    other = Event(WEB, "InvalidService", "no such type")
    publish(
        server,
        (lambda p: [p.record(EVENT), p.record(other)], lambda: bool(server.events)),
    )
    assert [each["reason"] for each in server.events.values()] == ["InvalidService"]
    assert "an event is lost" in caplog.text


def test_notes_and_names_are_as_long_as_the_api_allows() -> None:
    server = FakeServer()
    event = Event(ObjectKey("Node", "", "n" * 253), "R", "ä" * 2000)
    publish(server, (lambda p: p.record(event), lambda: bool(server.events)))
    [found] = server.events.values()
    assert len(found["note"].encode()) <= NOTE_MAX
    assert len(found["metadata"]["name"]) <= 253
    assert found["metadata"]["namespace"] == "default"


@pytest.mark.parametrize(
    ("kind", "version"),
    [("Service", "v1"), ("Node", "v1"), ("LoadBalancerPool", "svcdp.io/v1alpha1")],
)
def test_what_an_event_is_about(kind: str, version: str) -> None:
    server = FakeServer()
    event = Event(ObjectKey(kind, "", "lan"), "R", "wrong")
    publish(server, (lambda p: p.record(event), lambda: bool(server.events)))
    [found] = server.events.values()
    assert (found["regarding"]["kind"], found["regarding"]["apiVersion"]) == (kind, version)
    assert found["action"]


@pytest.mark.parametrize("status", [0, 429, 500])
def test_what_fails_for_now_is_tried_again(status: int) -> None:
    server = FakeServer(*(ApiError("not now", status=status) for _ in range(3)))
    publish(server, (lambda p: p.record(EVENT), lambda: server.counts() == [1]))
    assert server.asked == 4


def test_who_may_not_is_told_once_what_to_grant(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    server = FakeServer(*(ApiError("403 Forbidden", status=403) for _ in range(3)))
    events = [Event(WEB, "R", str(number)) for number in range(3)]
    publish(server, (lambda p: [p.record(each) for each in events], lambda: server.asked == 3))
    [record] = caplog.records
    assert "grant the verbs create and patch on events.events.k8s.io" in record.getMessage()


def test_a_storm_is_bounded_and_slow(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer()
    storm = [Event(WEB, "R", str(number)) for number in range(WAITING_MAX + 100)]
    publish(
        server,
        (lambda p: [p.record(each) for each in storm], lambda: server.asked == 5),
        burst=5,
        period=3600.0,
    )
    assert server.asked == 5
    [record] = caplog.records
    assert "too many events" in record.getMessage()


def test_services_have_events_of_their_own() -> None:
    def service(name: str, created: str, **annotations: str) -> Any:
        metadata = {"name": name, "uid": name, "creationTimestamp": created}
        noted = {f"svcdp.io/{key}": value for key, value in annotations.items()}
        spec = {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}
        kind = {"apiVersion": "v1", "kind": "Service"}
        return {**kind, "metadata": {**metadata, "annotations": noted}, "spec": spec}

    tracker = Tracker(NodeContext())
    objects = [service("a", "1", scheduler="best"), service("b", "2")]
    found = tuple(each for value in objects for each in decode_value(value))
    tracker.apply([(0, "", Change(objects=found))])
    bad, conflict = tracker.events()
    assert (bad.regarding.name, bad.reason) == ("a", "InvalidAnnotation")
    assert "scheduler" in bad.message
    assert (conflict.regarding.name, conflict.reason) == ("b", "AddressConflict")
    assert tracker.uid(conflict.regarding) == "b"
