"""Answers of an API server, or of what is in front of it, that break off or ask for too much."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path

import pytest

from svcdp.kube.client import Client
from svcdp.kube.reflector import ApiError

NOT_GZIP = b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello"


def ask(answer: bytes, folder: Path, *, watch: bool) -> ApiError:
    """What a request for which the server says only this is told."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        writer.close()

    async def main() -> ApiError:
        server = await asyncio.start_server(say, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        file = folder / "config"
        named = {
            "clusters": {"cluster": {"server": f"http://127.0.0.1:{port}"}},
            "users": {"user": {"token": "x"}},
            "contexts": {"context": {"cluster": "a", "user": "a"}},
        }
        config = {key: [{"name": "a", **value}] for key, value in named.items()}
        file.write_text(json.dumps({"current-context": "a", **config}))
        client = Client(file)
        try:
            if watch:
                async for _ in client.watch("/x", {}, 20.0):
                    pass
            else:
                await client.get("/x", {})
        except ApiError as error:
            return error
        finally:
            await client.close()
            server.close()
        pytest.fail("that was no error")

    return asyncio.run(main())


@pytest.mark.parametrize("watch", [False, True])
def test_a_refusal_that_breaks_off(tmp_path: Path, watch: bool) -> None:
    error = ask(b"HTTP/1.1 503 No\r\nContent-Length: 100\r\n\r\nshort", tmp_path, watch=watch)
    assert error.status == 503
    assert ask(b"HTTP/1.1 403 No\r\n" + NOT_GZIP, tmp_path, watch=watch).status == 403


@pytest.mark.parametrize("watch", [False, True])
def test_a_body_that_is_not_what_it_says(tmp_path: Path, watch: bool) -> None:
    assert "DecodingError" in str(ask(b"HTTP/1.1 200 OK\r\n" + NOT_GZIP, tmp_path, watch=watch))


@pytest.mark.parametrize(("asked", "waits"), [("7", 7.0), ("9" * 400, 60.0), ("soon", 0.0)])
def test_no_server_sends_its_clients_away_for_ever(
    tmp_path: Path, asked: str, waits: float
) -> None:
    head = f"HTTP/1.1 429 No\r\nRetry-After: {asked}\r\nContent-Length: 0\r\n\r\n"
    assert ask(head.encode(), tmp_path, watch=False).retry_after == waits
