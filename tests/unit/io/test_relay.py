"""TCP relayed in user space: real sockets on loopback."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from svcdp.io.relay import Place, TcpRelay

DEADLINE = 20.0  # seconds
Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def free_place(address: str = "127.0.0.1") -> Place:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as sock:
        place: Place = sock.getsockname()[:2]
        return place


@contextmanager
def silent_place() -> Iterator[Place]:
    """Whose backlog is full: it answers no SYN."""
    with socket.socket() as listener, socket.socket() as one, socket.socket() as other:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for each in (one, other):
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        yield listener.getsockname()


@asynccontextmanager
async def serving(serve: Serve, address: str = "127.0.0.1") -> AsyncIterator[Place]:
    async def serve_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve_and_close, address, 0)
    async with server:
        yield server.sockets[0].getsockname()[:2]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


class Bench:
    """A relay to ``servers``; ``ended`` counts the connections that are over."""

    def __init__(self, *servers: Place, address: str = "127.0.0.1", **fields: Any) -> None:
        self.servers = list(servers)
        self.place = free_place(address)
        self.ended = 0
        self.clients: list[Place] = []
        self.relay = TcpRelay(self._pick, **fields)

    @contextmanager
    def _pick(self, place: Place, client: Place) -> Iterator[list[Place]]:
        assert place == self.place
        self.clients.append(client)
        try:
            yield self.servers
        finally:
            self.ended += 1

    async def __aenter__(self) -> Bench:
        self.relay.listen(self.place)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.relay.close()
        assert self.relay.connections == 0

    async def connect(self) -> Client:
        return await asyncio.open_connection(*self.place)

    async def until_ended(self, count: int) -> None:
        while self.ended < count:
            await asyncio.sleep(0.005)


def run(test: Awaitable[None]) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(DEADLINE):
            await test

    asyncio.run(within_time())


def said(caplog: pytest.LogCaptureFixture) -> set[str]:
    """What the relay logged."""
    return {each.message for each in caplog.records if each.name == "svcdp.io.relay"}


def reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_both_directions_and_the_end(address: str) -> None:
    async def test() -> None:
        async with serving(echo, address) as server, Bench(server, address=address) as bench:
            reader, writer = await bench.connect()
            me = writer.get_extra_info("sockname")[:2]
            data = bytes(range(256)) * 4096
            writer.write(data)
            writer.write_eof()
            assert await reader.read(-1) == data
            await bench.until_ended(1)
            assert bench.clients == [me]
            writer.close()

    run(test())


def test_a_half_that_ends_leaves_the_other() -> None:
    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read(-1) == b"question"
        writer.write(b"answer")

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"greeting")
        writer.write_eof()
        heard.append(await reader.read(-1))

    heard: list[bytes] = []

    async def test() -> None:
        async with serving(late) as one, serving(early) as two, Bench(one) as bench:
            reader, writer = await bench.connect()
            writer.write(b"question")
            writer.write_eof()
            assert await reader.read(-1) == b"answer"
            writer.close()
            bench.servers = [two]
            reader, writer = await bench.connect()
            assert await reader.read(-1) == b"greeting"
            writer.write(b"and this")
            writer.write_eof()
            await bench.until_ended(2)
            writer.close()

    run(test())
    assert heard == [b"and this"]


def test_who_refuses_or_is_silent_is_passed_over() -> None:
    async def test() -> None:
        with silent_place() as silent:
            async with (
                serving(echo) as server,
                Bench(free_place(), silent, server, connect_timeout=0.1) as bench,
            ):
                reader, writer = await bench.connect()
                writer.write(b"hello")
                writer.write_eof()
                assert await reader.read(-1) == b"hello"
                writer.close()

    run(test())


@pytest.mark.parametrize("servers", [[], [free_place()]], ids=["nobody", "refused"])
def test_a_client_without_a_server_is_reset(servers: list[Place]) -> None:
    async def test() -> None:
        async with Bench(*servers) as bench:
            reader, writer = await bench.connect()
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
            await bench.until_ended(1)
            writer.close()

    run(test())


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_is_one_for_the_other_side(who: str) -> None:
    met: list[bool] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if who == "server":
            await reader.read(1)
            reset(writer)
            return
        try:
            await reader.read(-1)
        except ConnectionResetError:
            met.append(True)

    async def test() -> None:
        async with serving(serve) as server, Bench(server) as bench:
            reader, writer = await bench.connect()
            writer.write(b"x")
            await writer.drain()
            if who == "client":
                while not bench.clients:
                    await asyncio.sleep(0.005)
                reset(writer)
            else:
                with pytest.raises(ConnectionResetError):
                    await reader.read(1)
                met.append(True)
            await bench.until_ended(1)
            while not met:
                await asyncio.sleep(0.005)
            writer.close()

    run(test())


def test_a_slow_receiver_slows_its_sender() -> None:
    """What waits is bounded, by what sockets hold."""
    go = asyncio.Event()
    got = 0

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        await go.wait()
        while data := await reader.read(1 << 20):
            got += len(data)

    total = 256 << 20

    async def test() -> None:
        async with serving(slow) as server, Bench(server) as bench:
            _, writer = await bench.connect()
            sock = writer.get_extra_info("socket")
            sent = 0
            block = bytes(1 << 20)
            idle = 0
            while idle < 10:  # until nothing moves
                before = len_of(writer)
                if before < 1 << 20 and sent < total:
                    writer.write(block)
                    sent += len(block)
                await asyncio.sleep(0.01)
                idle = idle + 1 if len_of(writer) == before > 0 else 0
            assert sent < total
            assert sock.fileno() >= 0
            go.set()
            writer.write_eof()
            await bench.until_ended(1)
            assert got == sent
            writer.close()

    def len_of(writer: asyncio.StreamWriter) -> int:
        transport: Any = writer.transport
        return int(transport.get_write_buffer_size())

    run(test())


def test_connections_are_bounded_and_others_wait() -> None:
    async def test() -> None:
        async with serving(echo) as server, Bench(server, limit=2) as bench:
            clients = [await bench.connect() for _ in range(3)]
            for _, writer in clients:
                writer.write(b"x")
            for reader, _ in clients[:2]:
                assert await reader.read(1) == b"x"
            third = asyncio.create_task(clients[2][0].read(1))
            await asyncio.sleep(0.05)
            assert not third.done()
            assert bench.relay.connections == 2
            clients[0][1].close()
            assert await third == b"x"
            for _, writer in clients:
                writer.close()

    run(test())


def test_places_come_and_go_and_connections_stay() -> None:
    async def test() -> None:
        async with serving(echo) as server, Bench(server) as bench:
            reader, writer = await bench.connect()
            writer.write(b"a")
            assert await reader.read(1) == b"a"
            bench.relay.leave(bench.place)
            assert bench.relay.places == set()
            with pytest.raises(ConnectionRefusedError):
                await bench.connect()
            writer.write(b"b")
            assert await reader.read(1) == b"b"
            with socket.create_server(bench.place):
                with pytest.raises(OSError, match="in use"):
                    bench.relay.listen(bench.place)
                assert bench.relay.places == set()
            bench.relay.listen(bench.place)
            (await bench.connect())[1].close()
            writer.close()

    run(test())


def test_idle_places_take_nothing_from_the_limit() -> None:
    async def test() -> None:
        async with serving(echo) as server:

            @contextmanager
            def pick(place: Place, client: Place) -> Iterator[list[Place]]:
                yield [server]

            relay = TcpRelay(pick, limit=2)
            places = [free_place() for _ in range(8)]
            for place in places:
                relay.listen(place)
            reader, writer = await asyncio.open_connection(*places[-1])
            writer.write(b"y")
            assert await reader.read(1) == b"y"
            writer.close()
            clients = [await asyncio.open_connection(*place) for place in places]
            for _, writer in clients:  # two at a time
                writer.write(b"x")
                writer.write_eof()
            for reader, writer in clients:
                assert await reader.read(-1) == b"x"
                writer.close()
            await relay.close()

    run(test())


def test_who_comes_while_a_place_is_left_does_not_wait() -> None:
    async def test() -> None:
        async with serving(echo) as server, Bench(server) as bench:
            with socket.create_connection(bench.place) as early:
                early.setblocking(False)
                bench.relay.leave(bench.place)
                bench.relay.listen(bench.place)
                with pytest.raises(ConnectionResetError):
                    await asyncio.get_running_loop().sock_recv(early, 1)
            reader, writer = await bench.connect()
            writer.write(b"x")
            assert await reader.read(1) == b"x"
            writer.close()

    run(test())


def test_many_dead_servers_do_not_hold_a_client() -> None:
    async def test() -> None:
        with silent_place() as silent:
            async with Bench(
                *[silent] * 50, connect_timeout=DEADLINE, connect_deadline=0.2
            ) as bench:
                reader, writer = await bench.connect()
                with pytest.raises(ConnectionResetError):
                    await reader.read(1)
                writer.close()

    run(test())


def test_no_descriptor_for_a_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    @contextmanager
    def pick(place: Place, client: Place) -> Iterator[list[Place]]:
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socket", none_left)
            yield [("127.0.0.1", 1)]

    async def test() -> None:
        relay = TcpRelay(pick)
        place = free_place()
        relay.listen(place)
        reader, writer = await asyncio.open_connection(*place)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        await relay.close()

    run(test())
    assert said(caplog) == set()


def test_no_descriptor_for_a_client(caplog: pytest.LogCaptureFixture) -> None:
    """It waits, and so do those behind it."""

    async def test() -> None:
        async with serving(echo) as server, Bench(server) as bench:
            reader, writer = await bench.connect()
            writer.write(b"x")
            assert await reader.read(1) == b"x"
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            with socket.socket() as late:
                late.setblocking(False)
                loop = asyncio.get_running_loop()
                resource.setrlimit(resource.RLIMIT_NOFILE, (late.fileno(), hard))
                try:
                    await loop.sock_connect(late, bench.place)
                    while not said(caplog):
                        await asyncio.sleep(0.005)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                await loop.sock_sendall(late, b"y")
                assert await loop.sock_recv(late, 1) == b"y"
            writer.close()

    run(test())
    assert said(caplog) == {"cannot accept"}


def test_the_end_waits_and_then_resets() -> None:
    async def test() -> None:
        async with serving(echo) as server, Bench(server) as bench:
            (short, short_writer), (long, long_writer) = [await bench.connect() for _ in range(2)]
            for writer in (short_writer, long_writer):
                writer.write(b"x")
            assert (await short.read(1), await long.read(1)) == (b"x", b"x")
            end = asyncio.create_task(bench.relay.close(drain=0.2))
            await asyncio.sleep(0)
            short_writer.write_eof()
            assert await short.read(-1) == b""
            await end
            with pytest.raises(ConnectionResetError):
                await long.read(1)
            for writer in (short_writer, long_writer):
                writer.close()

    run(test())
