"""The HTTP server of probes and metrics: what it answers, and what hostile clients get."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from probing import DEADLINE, free_port, get, send

from svcdp.node import http
from svcdp.node.http import HttpServer, Request, Response

HOST = "127.0.0.1"


def echo(request: Request) -> Response:
    if request.path == "/broken":
        raise ZeroDivisionError
    text = f"{request.path}|{request.query}|{request.fields.get('accept', '')}"
    return Response(text.encode(), status=203, fields={"X-Extra": "1"})


@asynccontextmanager
async def serving(count: int = 1) -> AsyncIterator[list[tuple[str, int]]]:
    server = HttpServer(echo)
    places = []
    for _ in range(count):
        places.append((HOST, free_port()))
        await server.listen(places[-1])
    try:
        yield places
    finally:
        await server.close()


def test_an_answer() -> None:
    async def main() -> None:
        async with serving() as [place]:
            answer = await get(place, "/a/b?c=d&e")
            assert (answer.status, answer.body) == (203, b"/a/b|c=d&e|*/*")
            assert answer.fields["X-Extra"] == "1"
            assert answer.fields["Connection"] == "close"
            assert answer.fields["Content-Type"] == "text/plain; charset=utf-8"
            head = await get(place, "/a", "HEAD")
            assert (head.status, head.body, head.fields["Content-Length"]) == (203, b"", "7")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", 203),
        (b"GET / HTTP/1.1\r\nA:\r\nB: \xff\t x \r\nA: 2\r\n\r\n", 203),
        (b"GET / HTTP/1.1\r\n\r\nGET /second HTTP/1.1\r\n\r\n", 203),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"GET /broken HTTP/1.1\r\n\r\n", 500),
        (b"GET * HTTP/1.1\r\n\r\n", 400),
        (b"GET http://host/ HTTP/1.1\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET / HTTP/1.1 \r\n\r\n", 400),
        (b"GET /\xc3\xa4 HTTP/1.1\r\n\r\n", 400),
        (b"GET /\0 HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno field\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n folded: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: x\ny\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: " + b" " * 8000 + b"\0\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\0\r\n\r\n", 400),
        (b"GET /" + b"a" * http.MAX_HEAD, 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 2000 + b"\r\n", 431),
    ],
)
def test_requests(data: bytes, status: int) -> None:
    async def main() -> None:
        async with serving() as [place]:
            answer = await send(place, data)
            assert answer.startswith(b"HTTP/1.1 %d " % status)
            assert answer.count(b"HTTP/1.1") == 1
            assert b"Content-Length: " in answer

    asyncio.run(main())


@pytest.mark.parametrize("data", [b"", b"GET", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n\r"])
def test_requests_that_end_too_early(data: bytes) -> None:
    async def main() -> None:
        async with serving() as [place]:
            assert await send(place, data, eof=True) == b""
            assert (await get(place)).status == 203

    asyncio.run(main())


def test_who_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "READ_TIMEOUT", 0.05)

    async def main() -> None:
        async with serving() as [place]:
            assert await send(place, b"GET / HT") == b""

    asyncio.run(main())


def test_who_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "WRITE_TIMEOUT", 0.05)
    monkeypatch.setattr(HttpServer, "_answer", lambda *_: Response(bytes(64 << 20)))

    async def main() -> None:
        server = HttpServer(echo)
        place = (HOST, free_port())
        await server.listen(place)
        with socket.create_connection(place) as lazy:
            lazy.sendall(b"GET / HTTP/1.1\r\n\r\n")
            deadline = time.monotonic() + DEADLINE
            while not server._clients:
                await asyncio.sleep(0.01)
            while server._clients:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
        await server.close()

    asyncio.run(main())


def test_the_silent_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there may be say nothing, at either port; others are served all the same."""
    monkeypatch.setattr(http, "MAX_CLIENTS", 4)

    async def main() -> None:
        async with serving(2) as places:
            silent = [await asyncio.open_connection(*places[n % 2]) for n in range(8)]
            for n in range(8):
                assert (await get(places[n % 2], f"/{n}")).body == f"/{n}||*/*".encode()
            ended = [await asyncio.wait_for(reader.read(), DEADLINE) for reader, _ in silent[:5]]
            assert ended == [b""] * 5
            for _, writer in silent:
                writer.close()

    asyncio.run(main())


def test_many_at_once_are_no_more_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with serving() as [place]:
            monkeypatch.setattr(http, "MAX_CLIENTS", 4)
            monkeypatch.setattr(http, "READ_TIMEOUT", 10 * DEADLINE)
            crowd = [socket.create_connection(place) for _ in range(16)]  # the loop stands still
            assert (await get(place)).status == 203
            for each in crowd[:12]:
                each.setblocking(False)
                with suppress(ConnectionResetError):
                    assert await asyncio.wait_for(loop.sock_recv(each, 1), DEADLINE) == b""
            for each in crowd:
                each.close()

    asyncio.run(main())


def test_places_come_and_go() -> None:
    async def main() -> None:
        server = HttpServer(echo)
        one, other = (HOST, free_port()), ("::1", free_port("::1"))
        await server.listen(one)
        await server.listen(other)
        assert server.places == {one, other}
        assert (await get(other)).status == 203
        server.leave(one)
        with pytest.raises(ConnectionRefusedError):
            await get(one)
        assert (await get(other)).status == 203
        with pytest.raises(OSError, match="in use"):
            await HttpServer(echo).listen(other)
        await server.close()
        with pytest.raises(ConnectionRefusedError):
            await get(other)

    asyncio.run(main())
