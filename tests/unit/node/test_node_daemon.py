"""The daemon's order of events, with kernel and queues played."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from probing import free_port, get

from svcdp.dataplane import Dataplane
from svcdp.errors import ConfigError, ConflictError, PlatformError, RulesError, SourceError
from svcdp.modes.nfqueue import NfqueueMode
from svcdp.node import daemon
from svcdp.node.client import AdminClient
from svcdp.node.config import NodeConfig, load
from svcdp.node.values import Address, Bind, Cidr
from svcdp.rules.plan import Element

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {{name: web}}
spec: {{clusterIP: {address}, ports: [{{port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: web, labels: {{kubernetes.io/service-name: web}}}}
addressType: IPv4
ports: [{{name: "", port: 8080}}]
endpoints: [{{addresses: [10.1.0.1]}}]
"""


class Stage:
    """What happened, and what is to go wrong."""

    def __init__(self, folder: Path) -> None:
        self.events: list[str] = []
        self.fail_at = ""
        self.signal_at = ""
        self.dead_worker: BaseException | None = None
        self.web = ""
        self.settings: dict[str, Any] = {"addresses": (Address("192.0.2.1"),)}
        (folder / "manifests").mkdir()
        self.folder = folder
        self.serve("10.96.0.10")

    def serve(self, address: str) -> None:
        (self.folder / "manifests" / "web.yaml").write_text(SERVICE.format(address=address))

    def event(self, name: str) -> None:
        self.events.append(name)
        if name == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if name == self.fail_at:
            raise RulesError("it went wrong")

    @property
    def config(self) -> NodeConfig:
        return NodeConfig(
            manifests=str(self.folder / "manifests"),
            **self.settings,
            run_dir=str(self.folder / "run"),
            max_connections=1000,
            healthz_bind_address=Bind(self.web),
            metrics_bind_address=Bind(""),
        )


class Workers:
    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def bind(self) -> None:
        self._stage.event("bind")

    def start(self) -> None:
        self._stage.event("serve")

    def stop(self) -> None:
        self._stage.event("unbind")

    def check(self) -> None:
        if self._stage.dead_worker:
            raise self._stage.dead_worker

    def stats(self) -> dict[int, Any]:
        return {100: SimpleNamespace(waiting=0)}


def _virtual(items: Any) -> str:
    elements = (item for item in items if isinstance(item, Element))
    return " ".join(sorted({item.address for item in elements if item.kind == "virtual"}))


class Backend:
    name = "played"

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def apply(self, plan: Any) -> None:
        routes = "".join(f", {cidr} from {plan.source_of(cidr)}" for cidr in plan.service_cidrs)
        self._stage.event(f"apply {_virtual(plan.items)}{routes}")

    def reroute(self, plan: Any) -> None:
        self._stage.event("".join(f"{plan.source_of(cidr)} " for cidr in plan.service_cidrs))

    def update(self, plan: Any, added: Any, removed: Any) -> None:
        self._stage.event(f"add {_virtual(added)}")

    def fault(self) -> str:
        return ""

    def remove(self) -> None:
        self._stage.event("remove")


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage(tmp_path)
    monkeypatch.setattr(daemon, "QueueWorkers", lambda *_, **__: Workers(stage))
    monkeypatch.setattr(daemon, "choose_backend", lambda config: Backend(stage))
    monkeypatch.setattr(daemon, "TICK", 0.01)
    return stage


@contextmanager
def systemd(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Plays systemd; calling it waits for the next word of the daemon."""
    path = str(stage.folder / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.settimeout(10)
        yield lambda: sock.recv(4096).decode()


@contextmanager
def default_signals() -> Iterator[None]:
    """Signal handlers are afterwards what they were."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run_with(
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
    script: Callable[[Callable[[], str]], None],
    reread: Callable[[], NodeConfig] | None = None,
) -> None:
    """Run the daemon here; ``script`` runs beside it, then it gets a SIGTERM."""

    def beside(heard: Callable[[], str]) -> None:
        try:
            assert heard() == "READY=1"
            script(heard)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    async def main() -> None:
        serving = asyncio.create_task(daemon._Daemon(stage.config, reread).main())
        with systemd(stage, monkeypatch) as heard:
            helper = asyncio.create_task(asyncio.to_thread(beside, heard))
            await asyncio.gather(serving, helper)

    with default_signals():
        asyncio.run(main())


def test_the_order_of_a_life(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(heard: Callable[[], str]) -> None:
        stage.event("ready")

    run_with(stage, monkeypatch, script)
    assert stage.events == ["bind", "serve", "apply 10.96.0.10", "ready", "remove", "unbind"]
    assert not (stage.folder / "run" / "admin.sock").exists()


def test_it_takes_the_descriptors_that_it_may_have(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(main: Coroutine[Any, Any, None]) -> None:
        main.close()
        found.append(resource.getrlimit(resource.RLIMIT_NOFILE))

    found: list[tuple[int, int]] = []
    monkeypatch.setattr(daemon.asyncio, "run", run)
    monkeypatch.setattr(daemon.gc, "set_threshold", lambda *_: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))
    try:
        daemon.run(stage.config)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == [(hard, hard)]


def test_a_signal_during_the_start(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.signal_at = "bind"
    with systemd(stage, monkeypatch) as heard, default_signals():
        daemon.run(stage.config)
        assert heard() == "STOPPING=1"
    assert stage.events == ["bind", "unbind"]


def test_it_follows_the_manifests(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(heard: Callable[[], str]) -> None:
        with AdminClient(stage.config.admin_path) as client:
            (service,) = client.get("services")
            assert service["clusterIPs"] == ["10.96.0.10"]
            stage.serve("10.96.0.11")
            os.kill(os.getpid(), signal.SIGHUP)
            deadline = time.monotonic() + 10
            while [item["virtual"] for item in client.get("endpoints")] != ["10.96.0.11"]:
                assert time.monotonic() < deadline

    run_with(stage, monkeypatch, script)
    assert stage.events[:4] == ["bind", "serve", "apply 10.96.0.10", "add 10.96.0.11"]


def test_the_event_loop_goes_on_while_endpoints_are_looked_at(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    class Slow(Dataplane):
        def services(self) -> Any:
            threads.append(threading.current_thread())
            return super().services()

    def script(heard: Callable[[], str]) -> None:
        threads.clear()
        with AdminClient(stage.config.admin_path) as client:
            assert len(list(client.get("endpoints"))) == 1
            (item,) = client.get("description", namespace="default", name="web")
            assert len(item["destinations"]) == 1

    monkeypatch.setattr(daemon, "Dataplane", Slow)
    run_with(stage, monkeypatch, script)
    assert len(threads) == 2
    assert threading.main_thread() not in threads


def test_it_follows_the_addresses_of_the_node(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes later than the daemon, and is not seen at the first look."""
    stage.settings = {"service_cidrs": (Cidr("fd00:96::/112"), Cidr("10.96.0.0/16"))}
    seen: list[tuple[str, ...] | None] = [("192.0.2.1",), None, ("192.0.2.1", "2001:db8::1")]
    turns = iter([None])

    def look() -> tuple[str, ...]:
        found = seen.pop(0) if len(seen) > 1 else seen[0]
        if found is None:
            raise OSError("no descriptors")
        return found

    class Watch(contextlib.nullcontext[None]):
        async def wait(self, settle: float) -> None:
            if next(turns, self) is self:
                await asyncio.Event().wait()

        def __enter__(self) -> Any:
            return self

    def script(heard: Callable[[], str]) -> None:
        deadline = time.monotonic() + 10
        while stage.events[-1] != "2001:db8::1 192.0.2.1 ":
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(daemon, "NetworkWatch", Watch)
    monkeypatch.setattr(daemon, "discover_addresses", look)
    run_with(stage, monkeypatch, script)
    assert stage.events[2] == "apply 10.96.0.10, 10.96.0.0/16 from 192.0.2.1"


def test_health_tells_the_truth(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of updates and rules that fail, and of a source that is gone."""
    place = ("127.0.0.1", free_port())
    stage.web = f"127.0.0.1:{place[1]}"
    monkeypatch.setattr(daemon, "TRIM_ROUNDS", 1)

    def statuses() -> list[int]:
        return [asyncio.run(get(place, path)).status for path in ("/livez", "/healthz", "/readyz")]

    def becomes(*expected: int) -> None:
        deadline = time.monotonic() + 10
        while statuses() != [*expected]:
            assert time.monotonic() < deadline, statuses()

    def script(heard: Callable[[], str]) -> None:
        becomes(200, 200, 200)
        stage.fail_at = "add 10.96.0.11"
        stage.serve("10.96.0.11")
        os.kill(os.getpid(), signal.SIGHUP)
        becomes(503, 503, 503)
        stage.fail_at = ""
        becomes(200, 200, 200)

        monkeypatch.setattr(NfqueueMode, "trim", lambda self: stage.event("trim"))
        stage.fail_at = "trim"
        becomes(503, 503, 503)
        stage.fail_at = ""
        becomes(200, 200, 200)

        os.rename(stage.folder / "manifests", stage.folder / "elsewhere")
        os.kill(os.getpid(), signal.SIGHUP)
        becomes(200, 200, 503)

    run_with(stage, monkeypatch, script)


def test_reload_says_what_needs_a_restart(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def script(heard: Callable[[], str]) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        assert heard().startswith("RELOADING=1\nMONOTONIC_USEC=")
        assert heard() == "READY=1"

    def reread() -> NodeConfig:
        return load(None, environ={}, flags={"queues": "5", "manifests": "/elsewhere"}).config

    with caplog.at_level("WARNING", "svcdp"):
        run_with(stage, monkeypatch, script, reread)
    (record,) = [r for r in caplog.records if r.message == "settings need a restart"]
    assert "manifests" in vars(record)["settings"]
    assert "queues" in vars(record)["settings"]


def test_the_watchdog_is_fed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    run_with(stage, monkeypatch, lambda heard: [heard(), heard()] == ["WATCHDOG=1"] * 2 or None)


@pytest.mark.parametrize(
    ("fail_at", "events"),
    [
        ("bind", ["bind", "unbind"]),
        ("apply 10.96.0.10", ["bind", "serve", "apply 10.96.0.10", "remove", "unbind"]),
    ],
)
def test_a_failed_start_is_undone(stage: Stage, fail_at: str, events: list[str]) -> None:
    stage.fail_at = fail_at
    with pytest.raises(RulesError, match="it went wrong"):
        daemon.run(stage.config)
    assert stage.events == events
    assert not (stage.folder / "run" / "admin.sock").exists()


def test_a_dead_worker_ends_it(stage: Stage) -> None:
    stage.dead_worker = PlatformError("queue 100: gone")
    with pytest.raises(PlatformError, match="queue 100: gone"):
        daemon.run(stage.config)
    assert stage.events == ["bind", "serve", "apply 10.96.0.10", "remove", "unbind"]


def test_two_daemons_exclude_each_other(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(heard: Callable[[], str]) -> None:
        other = daemon._Daemon(stage.config, None)
        with pytest.raises(ConflictError, match="another svcdp serves this network namespace"):
            asyncio.run(other._serve())

    run_with(stage, monkeypatch, script)
    assert stage.events == ["bind", "serve", "apply 10.96.0.10", "remove", "unbind"]


def test_no_manifests(stage: Stage) -> None:
    with pytest.raises(ConfigError, match="give a folder with -f"):
        daemon.run(NodeConfig())
    (stage.folder / "manifests" / "web.yaml").unlink()
    (stage.folder / "manifests").rmdir()
    with pytest.raises(SourceError, match="cannot be read"):
        daemon.run(stage.config)
    assert stage.events == ["bind", "unbind"]
