"""The admin socket: answers, refuses, survives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from svcdp.errors import ConfigError, ConflictError, SourceError
from svcdp.node import admin
from svcdp.node.admin import AdminServer
from svcdp.node.client import AdminClient


def things(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for number in range(request.get("count", 3)):
        yield {"number": number}


def broken(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"number": 0}
    raise RuntimeError("a bug")


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[AdminServer]:
    server = AdminServer(str(path), {"things": things, "broken": broken})
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def ask(path: Path, data: bytes) -> list[Any]:
    """Send bytes and read answers until one ends the request."""
    reader, writer = await asyncio.open_unix_connection(str(path), limit=1 << 20)
    try:
        writer.write(data)
        answers = []
        async with asyncio.timeout(10):
            while line := await reader.readline():
                answers.append(json.loads(line))
                if "item" not in answers[-1]:
                    break
        return answers
    finally:
        writer.close()
        await writer.wait_closed()


def test_answer_has_items_and_an_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path / "s"):
            assert await ask(tmp_path / "s", b'{"get": "things", "count": 2}\n') == [
                {"item": {"number": 0}},
                {"item": {"number": 1}},
                {"end": True},
            ]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("request_line", "message"),
    [
        (b"hello\n", "not JSON"),
        (b"\xff\n", "not JSON"),
        (b"[" * 60000 + b"\n", "not JSON"),
        (b"[]\n", "unknown request: get one of things, broken"),
        (b'{"get": ["x"]}\n', "unknown request"),
        (b'{"get": "nothing"}\n', "unknown request"),
        (b"x" * (admin.MAX_REQUEST + 1), f"a request has at most {admin.MAX_REQUEST} bytes"),
        (b'{"get": "broken"}\n', "internal error"),
        (b'{"get": "things", "count": "x"}\n', "internal error"),
    ],
)
def test_bad_requests_get_an_error(tmp_path: Path, request_line: bytes, message: str) -> None:
    async def main() -> None:
        async with serving(tmp_path / "s"):
            answers = await ask(tmp_path / "s", request_line)
            assert message in answers[-1]["error"]
            assert (await ask(tmp_path / "s", b'{"get": "things"}\n'))[-1] == {"end": True}

    asyncio.run(main())


def test_a_client_that_does_not_read_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "WRITE_TIMEOUT", 0.05)

    async def main() -> None:
        async with serving(tmp_path / "s") as server, asyncio.timeout(10):
            with socket.socket(socket.AF_UNIX) as lazy:
                lazy.connect(str(tmp_path / "s"))
                lazy.setblocking(False)
                lazy.sendall(b'{"get": "things", "count": 1000000}\n')
                assert len(await ask(tmp_path / "s", b'{"get": "things"}\n')) == 4
                while server.clients:
                    await asyncio.sleep(0.01)

    asyncio.run(main())


def test_long_requests_come_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "IDLE_TIMEOUT", 0.5)
    filler = b'{"pad": "' + b"x" * (3 * admin.LONG_REQUEST)
    rest = b'", "get": "things"}\n'

    async def main() -> None:
        async with serving(tmp_path / "s") as server, asyncio.timeout(10):
            # It has begun, and says no more.
            _, slow = await asyncio.open_unix_connection(str(tmp_path / "s"))
            slow.write(filler)
            while not server.is_busy:
                await asyncio.sleep(0.01)
            waiting = asyncio.create_task(ask(tmp_path / "s", (filler + rest) * 2))
            assert len(await ask(tmp_path / "s", b'{"get": "things"}\n')) == 4, "short ones go on"
            assert len(await waiting) in (0, 4)
            slow.close()
            await slow.wait_closed()
            assert len(await ask(tmp_path / "s", filler + rest)) == 4

    asyncio.run(main())


def test_too_many_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "MAX_CLIENTS", 1)

    async def main() -> None:
        async with serving(tmp_path / "s"):
            _, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
            answers = await ask(tmp_path / "s", b'{"get": "things"}\n')
            assert "too many clients" in answers[0]["error"]
            writer.close()
            await writer.wait_closed()

    asyncio.run(main())


def test_the_socket_is_private_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "run" / "s"

    async def main() -> None:
        async with serving(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600

    before = os.umask(0)
    try:
        asyncio.run(main())
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert not path.exists()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))

    async def main() -> None:
        async with serving(path):
            assert (await ask(path, b'{"get": "things"}\n'))[-1] == {"end": True}

    asyncio.run(main())


def test_a_living_daemon_is_left_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path / "s"):
            with pytest.raises(ConflictError, match="another daemon listens"):
                await AdminServer(str(tmp_path / "s"), {}).start()
            assert (await ask(tmp_path / "s", b'{"get": "things"}\n'))[-1] == {"end": True}

    asyncio.run(main())


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        asyncio.run(AdminServer(str(tmp_path / "s"), {}).start())
    assert (tmp_path / "s").read_text() == "precious"


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot listen at adminSocket"):
        asyncio.run(AdminServer(str(tmp_path / ("x" * 200)), {}).start())


def test_client(tmp_path: Path) -> None:
    def talk() -> None:
        with AdminClient(str(tmp_path / "s")) as client:
            assert [item["number"] for item in client.get("things", count=2)] == [0, 1]
            assert len(list(client.get("things"))) == 3
            with pytest.raises(SourceError, match="unknown request"):
                list(client.get("nothing"))

    async def main() -> None:
        async with serving(tmp_path / "s"):
            await asyncio.to_thread(talk)

    asyncio.run(main())


def test_client_without_a_daemon(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no daemon listens at .*/s .*svcdp run"):
        AdminClient(str(tmp_path / "s"))
