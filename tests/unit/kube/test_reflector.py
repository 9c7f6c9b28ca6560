"""The reflector against a server that says what a test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

import pytest

from svcdp.errors import SourceError
from svcdp.kube import ApiServerSource, Change, reflector
from svcdp.kube.reflector import ApiError

DEADLINE = 20.0
GONE = ApiError("too old", status=410)


def service(name: str, version: int = 1, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default", "resourceVersion": str(version)}
    return {"metadata": metadata, "spec": spec}


def listed(version: int, *items: Any, more: str = "") -> dict[str, Any]:
    return {"metadata": {"resourceVersion": str(version), "continue": more}, "items": items}


def event(kind: str, item: Any) -> dict[str, Any]:
    return {"type": kind, "object": item}


class FakeServer:
    """Has Services alone. Each list and each watch takes the next answer; without one a watch is
    silent."""

    url = "https://fake"

    def __init__(self) -> None:
        self.lists: list[Any] = []
        self.watches: list[list[Any]] = []
        #: The parameters that Services were asked for with.
        self.asked: list[Mapping[str, str]] = []

    async def get(self, path: str, params: Mapping[str, str]) -> bytes:
        if not path.endswith("/services"):
            return json.dumps(listed(1)).encode()
        self.asked.append(dict(params))
        return self._said(self.lists.pop(0))

    async def watch(
        self, path: str, params: Mapping[str, str], silence: float
    ) -> AsyncGenerator[bytes, None]:
        if path.endswith("/services"):
            self.asked.append(dict(params))
            if self.watches:
                yield b""
                for said in self.watches.pop(0):
                    yield self._said(said)
                return
        yield b""
        await asyncio.Event().wait()

    def _said(self, said: Any) -> bytes:
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, bytes) else json.dumps(said).encode()


def follow(
    server: FakeServer,
    reached: Callable[[dict[str, Any], ApiServerSource], bool],
    silence: float = reflector.SILENCE,
    **more: Any,
) -> list[list[Change]]:
    """All batches until what they make up is what was expected."""

    async def main() -> list[list[Change]]:
        times: dict[str, Any] = {"min_period": 0.0, "retry": (0.001, 0.002), "silence": silence}
        source = ApiServerSource(server, **times, **more)
        held: dict[str, Any] = {}
        batches: list[list[Change]] = []

        async def read() -> None:
            async for batch in source.changes():
                batches.append(batch)
                for change in batch:
                    for key in change.deleted:
                        held.pop(key.name, None)
                    held.update((found.metadata.name, found) for found in change.objects)

        task = asyncio.create_task(read())
        async with asyncio.timeout(DEADLINE):
            while not reached(held, source):
                assert not task.done(), task.exception()
                await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return batches

    run: Coroutine[Any, Any, list[list[Change]]] = main()
    return asyncio.run(run)


def test_lists_first_and_then_takes_changes_from_that_version() -> None:
    server = FakeServer()
    server.lists = [listed(7, service("a"), service("b"))]
    server.watches = [[event("ADDED", service("c", 8)), event("DELETED", service("a", 9))]]
    follow(server, lambda held, _: set(held) == {"b", "c"})
    first, then = server.asked[:2]
    assert "resourceVersion" not in first
    assert then["resourceVersion"] == "7"
    assert then["allowWatchBookmarks"] == "true"
    assert 300 <= int(then["timeoutSeconds"]) <= 600
    selector = "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless"
    assert first["labelSelector"] == then["labelSelector"] == selector


def test_hidden_ones_too() -> None:
    server = FakeServer()
    server.lists = [listed(7, service("a"))]
    follow(server, lambda held, _: set(held) == {"a"}, hidden=True)
    assert all("labelSelector" not in asked for asked in server.asked)


def test_goes_on_from_a_bookmark_and_lists_only_once() -> None:
    server = FakeServer()
    server.lists = [listed(7, service("a"))]
    server.watches = [
        [event("BOOKMARK", {"metadata": {"resourceVersion": "90", "name": ""}})],
        [event("ADDED", service("b", 91))],
    ]
    follow(server, lambda held, _: set(held) == {"a", "b"} and len(server.asked) > 3)
    assert [each.get("resourceVersion") for each in server.asked[:4]] == [None, "7", "90", "91"]


def test_after_410_a_list_replaces_everything() -> None:
    for gone in (GONE, event("ERROR", {"code": 410, "message": "too old resource version"})):
        server = FakeServer()
        server.lists = [listed(7, service("a"), service("b")), listed(50, service("b", 40))]
        server.watches = [[gone]]
        batches = follow(server, lambda held, _: set(held) == {"b"})
        assert not any(change.replace for batch in batches for change in batch)


def test_after_an_error_within_a_watch_it_lists_again() -> None:
    server = FakeServer()
    server.lists = [listed(7, service("a")), listed(50, service("b", 40))]
    server.watches = [[event("ERROR", {"code": 500, "message": "cannot convert an object"})]]
    follow(server, lambda held, source: set(held) == {"b"} and not source.errors)


def test_pages_are_of_one_version_and_come_at_once() -> None:
    server = FakeServer()
    server.lists = [
        listed(7, service("a"), more="x"),
        GONE,  # this took too long
        listed(9, service("b"), service("c")),
    ]
    batches = follow(server, lambda held, _: set(held) == {"b", "c"})
    assert len(batches) == 1
    assert [each.get("continue") for each in server.asked[:3]] == [None, "x", None]
    assert [each.get("limit") for each in server.asked[:3]] == ["500", "500", None]


def test_errors_are_told_and_over_when_it_goes_on() -> None:
    server = FakeServer()
    deep = b'{"x":' + b"[" * 100_000
    server.lists = [ApiError("no route"), b"<html>", deep, listed(7, service("a"))]
    server.watches = [[ApiError("reset", status=500)], [event("ADDED", service("b", 8))]]
    batches = follow(server, lambda held, source: set(held) == {"a", "b"} and not source.errors)
    assert batches[0]  # nothing before everything was listed


def test_a_watch_in_which_nothing_happened_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        if seconds:
            pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(reflector, "SHORT", 0.0)
    monkeypatch.setattr(asyncio, "sleep", noted)
    server = FakeServer()
    server.lists = [listed(7, service("a"))]
    server.watches = [[], [], [event("ADDED", service("b", 8))]]
    follow(server, lambda held, _: set(held) == {"a", "b"})
    assert not pauses


@pytest.mark.parametrize(("short", "silence"), [(1e9, 1e9), (0.0, 0.0)])
def test_where_watches_say_nothing_lists_do(
    monkeypatch: pytest.MonkeyPatch, short: float, silence: float
) -> None:
    """They end as soon as they are granted, or none of their bytes comes through."""
    monkeypatch.setattr(reflector, "SHORT", short)
    server = FakeServer()
    server.lists = [listed(7, service("a")), listed(8, service("b")), listed(9, service("c"))]
    server.watches = [[], [], [], []]
    message = "watches of services end without a word"
    follow(
        server,
        lambda held, source: set(held) == {"c"} and message in " ".join(map(str, source.errors)),
        silence,
    )
    asked = ["list" if "watch" not in each else "watch" for each in server.asked]
    assert asked[:8] == ["list", "watch", "watch", "watch", "list", "watch", "list", "watch"]

    server = FakeServer()
    server.lists = [listed(7, service("a")), listed(8, service("b"))]
    server.watches = [[], [], [], [event("ADDED", service("c", 9))]]
    follow(server, lambda held, source: set(held) == {"b", "c"} and not source.errors, silence)


def test_an_object_that_cannot_be_read_counts_as_before() -> None:
    server = FakeServer()
    bad = service("a", 8, ports=[{"port": 70000}])
    server.lists = [listed(7, service("a"), service("b")), listed(60, bad)]
    server.watches = [[event("MODIFIED", bad)], [GONE]]
    follow(server, lambda held, source: set(held) == {"a"} and bool(source.errors))

    server.lists = [listed(7, bad)]
    server.watches = [[event("MODIFIED", service("a", 9))]]
    follow(server, lambda held, source: set(held) == {"a"} and not source.errors)


def test_a_change_and_its_opposite_cancel_out() -> None:
    server = FakeServer()
    server.lists = [listed(7)]
    server.watches = [
        [event("ADDED", service("a", 8)), event("DELETED", service("a", 9))],
        [event("ADDED", service("b", 10))],
    ]
    follow(server, lambda held, _: set(held) == {"b"})


def test_a_version_that_the_server_has_not_reached_is_listed_again() -> None:
    server = FakeServer()
    server.lists = [listed(70, service("a")), listed(30, service("b"))]
    server.watches = [[ApiError("Too large resource version: 70, current: 30", status=504)]]
    follow(server, lambda held, _: set(held) == {"b"})


def test_what_is_optional_stays_known_when_it_is_refused() -> None:
    class Revoked(FakeServer):
        async def watch(
            self, path: str, params: Mapping[str, str], silence: float
        ) -> AsyncGenerator[bytes, None]:
            if path.endswith("/servicecidrs"):
                raise ApiError("no more", status=403)
            async for line in super().watch(path, params, silence):
                yield line

        async def get(self, path: str, params: Mapping[str, str]) -> bytes:
            if path.endswith("/servicecidrs"):
                return json.dumps(listed(5, {"metadata": {"name": "kubernetes"}})).encode()
            return await super().get(path, params)

    server = Revoked()
    server.lists = [listed(7, service("a"))]
    told = follow(server, lambda held, source: len(held) == 2 and bool(source.errors))
    assert not any(change.deleted for batch in told for change in batch)


@pytest.mark.parametrize(("status", "problems"), [(404, 0), (403, 1)])
def test_what_is_optional_may_be_missing(status: int, problems: int) -> None:
    class OldServer(FakeServer):
        async def get(self, path: str, params: Mapping[str, str]) -> bytes:
            if path.endswith("/servicecidrs"):
                raise ApiError("no", status=status)
            return await super().get(path, params)

    server = OldServer()
    server.lists = [listed(7, service("a"))]
    sources: list[ApiServerSource] = []

    def reached(held: dict[str, Any], source: ApiServerSource) -> bool:
        sources[:] = [source]
        return set(held) == {"a"}

    follow(server, reached)
    errors = sources[0].errors
    assert len(errors) == problems
    # Nobody takes the node for one that does not know its Services.
    assert not any(isinstance(error, SourceError) for error in errors)
    assert all("grant the verbs list and watch on servicecidrs" in str(e) for e in errors)


def test_what_is_missing_is_no_error_after_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "ABSENT_RETRY", 0.0)
    absent = ApiError("no", status=404)
    answers = [absent, ApiError("no route"), absent]

    class OldServer(FakeServer):
        async def get(self, path: str, params: Mapping[str, str]) -> bytes:
            if path.endswith("/servicecidrs"):
                if not answers:
                    await asyncio.Event().wait()
                raise answers.pop(0)
            return await super().get(path, params)

    server = OldServer()
    server.lists = [listed(7, service("a"))]
    follow(server, lambda held, source: bool(held and not answers and not source.errors))
