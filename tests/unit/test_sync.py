"""Sources at one end, a mode at the other, and what happens when either misbehaves."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any

import msgspec
import pytest

import svcdp.sync
from svcdp.errors import ClosedError, ConfigError, ManifestError, SourceError, SvcdpError
from svcdp.kube import Change, NodeContext, decode
from svcdp.kube.events import Event
from svcdp.kube.model import ObjectKey
from svcdp.sync import Counts, Progress, ServiceChange, Sync, Update
from svcdp.types import ServiceSpec

DEADLINE = 20.0
RETRY = (0.01, 0.02)


class FakeSource:
    """Says what a test puts in; an exception is raised, None ends it."""

    def __init__(self, name: str = "fake") -> None:
        self.name = name
        self.errors: list[SvcdpError] = []
        self._queue: asyncio.Queue[list[Change] | Exception | None] = asyncio.Queue()

    def say(self, *said: Change | Exception | None) -> None:
        for each in said:
            self._queue.put_nowait([each] if isinstance(each, Change) else each)

    def say_nothing_new(self) -> None:
        self._queue.put_nowait([])

    async def changes(self) -> AsyncIterator[Sequence[Change]]:
        while (said := await self._queue.get()) is not None:
            if isinstance(said, Exception):
                raise said
            yield said


class FakeMode:
    """Holds what it was told to; ``failures`` are raised first, one an update."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, int, str], ServiceSpec] = {}
        self.calls: list[tuple[list[str], list[str]]] = []
        self.failures: list[Exception] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def update(self, specs: Iterable[ServiceSpec], removed: Iterable[tuple[str, int, str]]) -> None:
        specs, removed = list(specs), list(removed)
        self.entered.set()
        assert self.open.wait(DEADLINE)
        self.calls.append(([spec.address for spec in specs], [key[0] for key in removed]))
        if self.failures:
            raise self.failures.pop(0)
        self.held.update((spec.key, spec) for spec in specs)
        for key in removed:
            del self.held[key]


def objects(*names: str, endpoint: str = "10.1.0.1", weights: str = "") -> tuple[Any, ...]:
    """A Service and a slice of each name; ``web3`` is at 10.96.0.3."""
    text = "---".join(
        f"""
apiVersion: v1
kind: Service
metadata: {{name: {name}, annotations: {{svcdp.io/weights: "{weights}"}}}}
spec: {{clusterIP: 10.96.0.{name[-1]}, ports: [{{name: http, port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{name: http, port: 8080}}]
endpoints:
- {{addresses: [{endpoint}], nodeName: n1, targetRef: {{name: pod}}}}
- {{addresses: [10.1.9.9], conditions: {{ready: false}}}}
"""
        for name in names
    )
    found = decode(text.encode())
    assert not found.errors
    return tuple(found.objects)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE):
            await test()

    asyncio.run(bounded())


def test_only_what_differs_is_sent() -> None:
    async def test() -> None:
        mode, source = FakeMode(), FakeSource()
        async with Sync(mode, NodeContext()) as sync:
            sync.follow(source)
            source.say(Change(objects=objects("web1", "web2", "web3")))
            await sync.ready()
            assert mode.calls == [(["10.96.0.1", "10.96.0.2", "10.96.0.3"], [])]
            assert sync.generation == 1

            source.say(Change(objects=objects("web2", endpoint="10.1.0.2")))
            assert await sync.wait(1) == 2
            assert mode.calls[1:] == [(["10.96.0.2"], [])]

            [gone, _] = objects("web3")
            source.say(Change(deleted=(gone.key,)))
            await sync.wait(2)
            assert mode.calls[2:] == [([], ["10.96.0.3"])]

            source.say(Change(objects=objects("web1")))
            await sync.wait(3)
            assert mode.calls[3:] == []
            assert {key[0] for key in mode.held} == {"10.96.0.1", "10.96.0.2"}

    run(test)


def test_new_addresses_of_the_node_are_sent() -> None:
    async def test() -> None:
        mode, source = FakeMode(), FakeSource()
        async with Sync(mode, NodeContext(addresses=["192.0.2.1"])) as sync:
            sync.follow(source)
            source.say(Change(objects=objects("web1")))
            await sync.ready()
            sync.renumber(["192.0.2.2"])
            await sync.wait(1)
            [(sent, removed)] = mode.calls[1:]
            assert (sent, removed) == (["10.96.0.1"], [])
            [spec] = mode.held.values()
            assert spec.masquerade_address == "192.0.2.2"

    run(test)


def test_nothing_is_sent_before_every_source_was_listed() -> None:
    async def test() -> None:
        mode, first, second = FakeMode(), FakeSource("first"), FakeSource("second")
        sync = Sync(mode, NodeContext())
        sync.follow(first)
        sync.follow(second)
        async with sync:
            first.say(Change(objects=objects("web1")))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(sync.ready(), 0.05)
            assert mode.calls == []
            second.say(Change(objects=objects("web2")))
            await sync.ready()
            assert mode.calls == [(["10.96.0.1", "10.96.0.2"], [])]

            third = FakeSource("third")
            sync.follow(third)
            third.say(Change(objects=objects("web3")), None)
            await sync.ready()
            assert mode.calls[1:] == [(["10.96.0.3"], [])]

    run(test)


def test_what_arrives_during_an_update_is_one_batch() -> None:
    async def test() -> None:
        mode, source = FakeMode(), FakeSource()
        async with Sync(mode, NodeContext()) as sync:
            sync.follow(source)
            mode.open.clear()
            source.say(Change(objects=objects("web1")))
            await asyncio.to_thread(mode.entered.wait, DEADLINE)
            for name in ("web2", "web3", "web4"):
                source.say(Change(objects=objects(name)))
            while not source._queue.empty():
                await asyncio.sleep(0)
            mode.open.set()
            await sync.wait(1)
            assert mode.calls[1:] == [(["10.96.0.2", "10.96.0.3", "10.96.0.4"], [])]

    run(test)


def test_an_update_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        mode, source = FakeMode(), FakeSource()
        mode.failures = [ConfigError("no"), OSError("no room"), OSError("no room")]
        async with Sync(mode, NodeContext(), retry=RETRY) as sync:
            sync.follow(source)
            source.say(Change(objects=objects("web1")))
            await sync.ready()
            assert len(mode.calls) == 4
            assert len(mode.held) == 1
            assert sync.problems == []

            mode.failures = [OSError("no room")] * 3
            source.say(Change(deleted=(objects("web1")[0].key,)))
            while not sync.problems:
                await asyncio.sleep(0.001)
            assert "no room" in str(sync.problems[0])
            source.say(Change(objects=objects("web2")))
            await sync.wait(1)
            assert {key[0] for key in mode.held} == {"10.96.0.2"}

    with caplog.at_level(logging.INFO, "svcdp.sync"):
        run(test)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "update failed, will be tried again: no",
        "update failed, will be tried again: no room",
        "update failed, will be tried again: no room",
    ]


def test_the_end_waits_for_the_update_that_runs_and_for_no_retry() -> None:
    async def test() -> None:
        mode, source = FakeMode(), FakeSource()
        sync = Sync(mode, NodeContext(), retry=(1000.0, 1000.0))
        sync.follow(source)
        source.say(Change(objects=objects("web1")))
        mode.failures = [OSError("no")]
        async with sync:
            while not sync.problems:
                await asyncio.sleep(0.001)

        mode, source = FakeMode(), FakeSource()
        sync = Sync(mode, NodeContext())
        sync.follow(source)
        source.say(Change(objects=objects("web1")))
        mode.open.clear()
        async with sync:
            await asyncio.to_thread(mode.entered.wait, DEADLINE)
            asyncio.get_running_loop().call_later(0.05, mode.open.set)
        assert len(mode.calls) == 1
        with pytest.raises(ClosedError):
            await sync.ready()

    run(test)


def test_a_source_that_fails_at_first() -> None:
    async def test() -> None:
        for failure in (SourceError("gone"), ValueError("a bug"), None):
            source = FakeSource()
            source.say(failure)
            async with Sync(FakeMode(), NodeContext()) as sync:
                sync.follow(source)
                with pytest.raises(SourceError):
                    await sync.ready()
                assert len(sync.problems) == 1

    run(test)


def test_a_source_that_fails_later_is_asked_again() -> None:
    async def test() -> None:
        mode, source = FakeMode(), FakeSource()
        async with Sync(mode, NodeContext(), retry=RETRY) as sync:
            sync.follow(source)
            source.say(Change(objects=objects("web1")), SourceError("gone"))
            await sync.ready()
            while not sync.problems:
                await asyncio.sleep(0.001)
            assert [str(problem) for problem in sync.problems] == ["gone"]
            assert len(mode.held) == 1
            source.say(Change(objects=objects("web2"), replace=True))
            await sync.wait(1)
            assert sync.problems == []
            assert {key[0] for key in mode.held} == {"10.96.0.2"}

    run(test)


def test_problems_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        mode, source = FakeMode(), FakeSource()
        async with Sync(mode, NodeContext()) as sync:
            sync.follow(source)
            bad = ManifestError("is wrong", file="a.yaml", line=3, field="$.spec")
            source.errors = [bad]
            source.say(Change(objects=objects("web1", weights="?")))
            await sync.ready()
            assert sync.problems[0] is bad
            source.say_nothing_new()
            await sync.wait(1)
            source.errors = []
            source.say_nothing_new()
            await sync.wait(2)
            assert len(mode.calls) == 1

    with caplog.at_level(logging.INFO, "svcdp.sync"):
        run(test)
    first, second, third = [record.message for record in caplog.records]
    assert first == "a.yaml:3: $.spec: is wrong"
    assert second.startswith("Service default/web1: $.metadata.annotations['svcdp.io/weights']")
    assert third == "no longer so: a.yaml:3: $.spec: is wrong"


def test_what_there_is_can_be_read() -> None:
    async def test() -> None:
        source = FakeSource()
        async with Sync(FakeMode(), NodeContext()) as sync:
            sync.follow(source)
            source.say(Change(objects=objects("web2", "web1")))
            await sync.ready()
            assert sync.counts == Counts(services=2, slices=2, endpoints=4, specs=2, problems=0)
            first, second = sync.services()
            assert [each.service.metadata.name for each in (first, second)] == ["web1", "web2"]
            assert [spec.address for spec in first.specs] == ["10.96.0.1"]
            assert (first.endpoints, first.endpoints_ready) == (2, 1)
            assert sync.endpoints("elsewhere") == []
            ready, other = sync.endpoints("default")[:2]
            assert (ready.service, ready.address, ready.port) == ("web1", "10.1.0.1", 8080)
            assert (ready.port_name, ready.protocol) == ("http", "tcp")
            assert (ready.ready, ready.node, ready.target) == (True, "n1", "pod")
            assert (other.address, other.ready) == ("10.1.9.9", False)

    run(test)


def test_one_service_is_read_at_the_cost_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        source = FakeSource()
        async with Sync(FakeMode(), NodeContext()) as sync:
            sync.follow(source)
            source.say(Change(objects=objects("web3", "web1", "web2")))
            await sync.ready()
            looked: list[object] = []
            look = svcdp.sync.endpoints_by_port
            monkeypatch.setattr(
                svcdp.sync, "endpoints_by_port", lambda *args: looked.append(args) or look(*args)
            )
            assert [each.ref.name for each in sync.declared()] == ["web1", "web2", "web3"]
            assert sync.declared("elsewhere") == sync.declared("default", "web4") == []
            assert looked == []
            (status,) = sync.services("default", "web2")
            assert (status.service.ref.name, status.endpoints) == ("web2", 2)
            assert {each.service for each in sync.endpoints("default", "web2")} == {"web2"}
            assert len(looked) == 2

    run(test)


def test_an_error_of_its_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def test() -> None:
        source = FakeSource()
        async with Sync(FakeMode(), NodeContext()) as sync:
            sync.follow(source)
            monkeypatch.setattr(sync._tracker, "steps", broken)
            source.say(Change(objects=objects("web1")))
            with pytest.raises(ZeroDivisionError):
                await sync.ready()

    with pytest.raises(ZeroDivisionError):
        run(test)


def test_outside_of_its_context_it_is_closed() -> None:
    async def test() -> None:
        sync = Sync(FakeMode(), NodeContext())
        with pytest.raises(ClosedError):
            await sync.ready()
        async with sync:
            pass
        with pytest.raises(ClosedError):
            sync.follow(FakeSource())

    run(test)


def test_progress_says_what_waits() -> None:
    async def test() -> None:
        mode, source = FakeMode(), FakeSource()
        seen: list[Update] = []
        async with Sync(mode, NodeContext(), on_update=seen.append, retry=RETRY) as sync:
            assert sync.progress == Progress({}, {}, None, 0, 0, None, None)
            sync.follow(source)
            source.say(Change(objects=objects("web1", "web2")))
            await sync.ready()
            progress = sync.progress
            assert progress.changed == {"Service": 2, "EndpointSlice": 2}
            assert (progress.pending, progress.waiting_since) == ({}, None)
            assert progress.updated >= progress.queued > 0
            assert [each.error for each in seen] == [None]

            source.say(Change(objects=objects("web1", "web2")))
            await sync.wait(1)
            assert sync.progress.changed == progress.changed, "nothing is different"

            mode.open.clear()
            mode.entered.clear()
            mode.failures = [ConfigError("no")] * 2
            source.say(Change(objects=objects("web2", endpoint="10.1.0.2")))
            await asyncio.to_thread(mode.entered.wait, DEADLINE)
            waiting = sync.progress.waiting_since
            assert waiting is not None
            assert sync.progress.pending == {"EndpointSlice": 1}
            source.say(Change(objects=objects("web3"), deleted=(objects("web1")[0].key,)))
            while sync.progress.pending != {"EndpointSlice": 2, "Service": 2}:
                await asyncio.sleep(0)
            assert sync.progress.waiting_since == waiting, "of the oldest"
            mode.open.set()
            while sync.progress.failure is None:
                await asyncio.sleep(0)
            assert str(sync.progress.failure) == "no"
            while sync.progress.pending:
                await asyncio.sleep(0)
            assert (sync.progress.waiting_since, sync.progress.failure) == (None, None)
            assert [str(each.error) for each in seen] == ["None"] * 2 + ["no", "no", "None"]

    run(test)


def test_a_worker_that_died_is_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    def bug(changes: object) -> set[Any]:
        raise ZeroDivisionError

    async def test() -> None:
        source = FakeSource()
        async with Sync(FakeMode(), NodeContext(), retry=RETRY) as sync:
            sync.follow(source)
            source.say(Change())
            await sync.ready()
            sync._tracker.steps = bug  # type: ignore[method-assign,assignment]
            source.say(Change(objects=objects("web1")))
            while not isinstance(sync.progress.failure, ZeroDivisionError):
                await asyncio.sleep(0)

    with pytest.raises(ZeroDivisionError):
        run(test)
    assert "changes are no longer taken" in caplog.text


def test_a_source_that_cannot_be_read_is_known_since_when() -> None:
    async def test() -> None:
        source = FakeSource()
        async with Sync(FakeMode(), NodeContext(), retry=RETRY) as sync:
            sync.follow(source)
            source.say(Change())
            await sync.ready()
            source.errors = [ManifestError("a mistake in one object is none of the source")]
            assert sync.progress.unread_since is None
            source.errors = [SourceError("gone")]
            since = sync.progress.unread_since
            assert since is not None
            assert sync.progress.unread_since == since
            source.errors = []
            assert sync.progress.unread_since is None
            source.say(SourceError("lost"))
            while sync.progress.unread_since is None:
                await asyncio.sleep(0)
            source.say_nothing_new()
            while sync.progress.unread_since is not None:
                await asyncio.sleep(0)

    run(test)


def test_updates_say_what_changed_slices_say() -> None:
    """When what is in force now was changed, once for each change that made a difference."""

    def changed(at: str, endpoint: str) -> Change:
        [web, found] = objects("web1", endpoint=endpoint)
        note = {"endpoints.kubernetes.io/last-change-trigger-time": at}
        metadata = msgspec.structs.replace(found.metadata, annotations=note)
        return Change(objects=(web, msgspec.structs.replace(found, metadata=metadata)))

    async def test() -> None:
        mode, source = FakeMode(), FakeSource()
        seen: list[Update] = []
        async with Sync(mode, NodeContext(), on_update=seen.append, retry=RETRY) as sync:
            sync.follow(source)
            source.say(changed("1", "10.1.0.1"))
            await sync.ready()
            source.say(changed("1", "10.1.0.1"))
            await sync.wait(1)
            mode.failures = [ConfigError("no")]
            source.say(changed("2", "10.1.0.2"))
            await sync.wait(2)
            [*_, found] = objects("web1")
            source.say(Change(deleted=(found.key,)))
            await sync.wait(3)
        assert [each.triggers for each in seen] == [("1",), (), (), ("2",), ()]

    run(test)


def test_events_are_told_when_they_come_up() -> None:
    async def main() -> None:
        source, events = FakeSource(), []
        async with Sync(FakeMode(), NodeContext(), record=events.append) as sync:
            sync.follow(source)
            source.say(Change(objects=objects("web1", weights="bad")))
            await sync.ready()
            assert [event.reason for event in events] == ["InvalidAnnotation"]
            for number, weights in enumerate(("bad", "10.1.0.1=2", "bad"), start=1):
                generation = sync.generation
                source.say(Change(objects=objects("web1", "web2", weights=weights)))
                await sync.wait(generation)
                # Of web2 as of web1; those that are no news are not told again.
                assert len(events) == (2, 2, 4)[number - 1]

    run(main)


def test_events_of_a_source_are_told_too() -> None:
    lacking = Event(ObjectKey("Service", "default", "web1"), "ServiceCIDRFull", "no address")

    class Allocating(FakeSource):
        events = (lacking,)

    async def main() -> None:
        source, events = Allocating(), []
        async with Sync(FakeMode(), NodeContext(), record=events.append) as sync:
            sync.follow(source)
            source.say(Change(objects=objects("web1")))
            await sync.ready()
            assert events == [lacking]
            source.say(Change(objects=objects("web1", endpoint="10.1.0.2")))
            await sync.wait(1)
            assert events == [lacking]

    run(main)


def test_others_have_their_turn_while_many_services_are_resolved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("svcdp.sync._SLICE", -1)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def test() -> None:
        names = [f"web{i}" for i in range(1, 10)]
        source = FakeSource()
        async with Sync(FakeMode(), NodeContext()) as sync:
            sync.follow(source)
            source.say(Change(objects=objects(*names)))
            await asyncio.sleep(0)
            steps = sync._tracker.steps
            seen = []

            def watched(*args: Any) -> Any:
                for keys in steps(*args):
                    seen.append(turns)
                    yield keys

            monkeypatch.setattr(sync._tracker, "steps", watched)
            counting = asyncio.create_task(count())
            await sync.ready()
            counting.cancel()
            assert len(set(seen)) >= len(names)

    run(test)


def test_subscribers_hear_of_what_is_in_force(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        mode, source = FakeMode(), FakeSource()
        told: list[Sequence[ServiceChange]] = []

        def fail(changes: Sequence[ServiceChange]) -> None:
            raise ValueError("a bug")

        def hear(changes: Sequence[ServiceChange]) -> None:
            assert mode.calls  # the update is in force
            told.append(changes)

        async with Sync(mode, NodeContext(), retry=RETRY) as sync:
            sync.subscribe(fail)
            sync.subscribe(hear)
            sync.follow(source)
            web1, slice1, web2, slice2 = objects("web1", "web2")
            source.say(Change(objects=(web1, slice1, web2, slice2)))
            await sync.ready()
            assert told == [[(web1.ref, web1, [slice1]), (web2.ref, web2, [slice2])]]

            # What failed is told of once, with all that came since.
            mode.failures.append(SvcdpError("no"))
            [_, moved] = objects("web1", endpoint="10.1.0.2")
            source.say(Change(objects=(moved,)))
            await sync.wait(1)
            assert told[1:] == [[(web1.ref, web1, [moved])]]

            # The packets of a headless Service are nobody's: no update, and still a change.
            headless = msgspec.structs.replace(
                web2, spec=msgspec.structs.replace(web2.spec, cluster_ip="None")
            )
            source.say(Change(objects=(headless,)))
            await sync.wait(2)
            source.say(Change(deleted=(web2.key,)))
            await sync.wait(3)
            assert told[2:] == [
                [(web2.ref, headless, [slice2])],
                [(web2.ref, None, [slice2])],
            ]
            source.say_nothing_new()
            await sync.wait(4)
            assert len(told) == 4

    run(test)
    assert caplog.text.count("a subscriber failed") == 4
