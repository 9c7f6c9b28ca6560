"""What the daemon keeps of connections, and how its settings make a sync daemon."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from bench import Bench

from svcdp.dataplane import Dataplane
from svcdp.errors import ConfigError
from svcdp.ipvs.saved import load, save
from svcdp.node.config import NodeConfig
from svcdp.node.config import load as load_config
from svcdp.node.state import ConnectionStore
from svcdp.node.syncing import peers, sync_daemon

REAL = ("10.1.0.7", 8080)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "connections"


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.serve(REAL)
    return bench


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records]


def test_what_was_saved_is_restored(
    file: Path, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def live(bench: Bench) -> None:
        store = ConnectionStore(bench.dp, str(file), 60)
        await store.open()
        bench.send(port=40000 + len(bench.connections()))
        await store.close()

    asyncio.run(live(bench))
    assert messages(caplog) == []  # no file is no error
    assert len(load(file)) == 1
    other = Bench()
    other.serve(REAL)
    asyncio.run(live(other))
    assert [(r.message, r.outcomes) for r in caplog.records] == [  # type: ignore[attr-defined]
        ("connections restored", "1 created")
    ]
    assert len(load(file)) == 2


def test_it_is_saved_now_and_then(file: Path, bench: Bench) -> None:
    async def live() -> None:
        store = ConnectionStore(bench.dp, str(file), 0.01)
        await store.open()
        bench.send()
        while not file.exists() or not len(load(file)):
            await asyncio.sleep(0.01)
        file.unlink()
        await store.close()

    asyncio.run(asyncio.wait_for(live(), 10))
    assert len(load(file)) == 1


def test_a_start_that_failed_keeps_the_file(file: Path, bench: Bench) -> None:
    bench.send()
    save(file, bench.dp.export_connections())
    asyncio.run(ConnectionStore(Bench().dp, str(file), 60).close())
    assert len(load(file)) == 1


def test_what_goes_wrong_is_logged(
    file: Path, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async def live(path: Path) -> None:
        store = ConnectionStore(bench.dp, str(path), 60)
        await store.open()
        await store.close()

    file.write_text("nothing of ours")
    asyncio.run(live(file))
    asyncio.run(live(file / "of no folder"))
    assert messages(caplog) == [
        "connections are not restored",
        "connections are not restored",
        "connections are not saved",
    ]
    assert len(load(file)) == 0
    assert file.with_name("connections.unreadable").read_text() == "nothing of ours"


def test_a_save_that_fails_is_not_the_last(
    file: Path, bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Dataplane) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError

    async def live() -> None:
        store = ConnectionStore(bench.dp, str(file), 0.01)
        await store.open()
        while not file.exists():
            await asyncio.sleep(0.01)
        await store.close()

    monkeypatch.setattr(Dataplane, "export_connections", fails)
    asyncio.run(asyncio.wait_for(live(), 10))
    assert messages(caplog) == ["connections are not saved"]


def test_what_cannot_be_saved_is_counted(
    file: Path, bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.send()
    states = [*bench.dp.export_connections()]
    bad = [replace(states[0], state="DREAMING"), *states]
    monkeypatch.setattr(Dataplane, "export_connections", lambda self: iter(bad))

    async def live() -> None:
        store = ConnectionStore(bench.dp, str(file), 60)
        await store.open()
        await store.close()

    asyncio.run(live())
    assert [(r.message, vars(r)["count"]) for r in caplog.records] == [
        ("connections that cannot be saved", 1)
    ]
    assert [*load(file)] == states


def test_without_a_file_nothing_is_done(bench: Bench, tmp_path: Path) -> None:
    async def live() -> None:
        store = ConnectionStore(bench.dp, "", 0.01)
        await store.open()
        await store.close()

    asyncio.run(live())
    assert list(tmp_path.iterdir()) == []


def test_settings_of_the_sync_protocol(bench: Bench) -> None:
    assert sync_daemon(bench.dp, NodeConfig()) is None
    assert list(peers(None)) == []
    flags = {"sync_role": "both", "sync_group": "192.0.2.7", "sync_id": "9", "sync_port": "1"}
    flags |= {"sync_ttl": "2", "sync_version": "0", "sync_maxlen": "1000"}
    flags |= {"sync_threshold": "5", "sync_period": "0"}
    config = load_config(environ={}, flags=flags).config
    daemon = sync_daemon(bench.dp, config)
    assert daemon is not None
    assert (daemon.config.role, daemon.config.group) == ("both", "192.0.2.7")
    assert (daemon.config.syncid, daemon.config.port) == (9, 1)
    assert (daemon.config.ttl, daemon.config.version, daemon.config.length_max) == (2, 0, 1000)
    assert (daemon.config.threshold, daemon.config.period) == (5, 0)
    (item,) = peers(daemon)
    assert item["sent"]["entries"] == item["received"]["messages"] == 0


def test_settings_that_do_not_fit_together(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"sync group 224\.0\.0\.81 needs an interface"):
        sync_daemon(bench.dp, NodeConfig(sync_role="master"))
    with pytest.raises(ConfigError, match="syncRole: 'all' is none of none, master, backup, both"):
        load_config(environ={}, flags={"sync_role": "all"})
    with pytest.raises(ConfigError, match="syncVersion: '2' is none of 0, 1"):
        load_config(environ={}, flags={"sync_version": "2"})
    with pytest.raises(ConfigError, match="syncID"):
        load_config(environ={}, flags={"sync_id": "256"})
