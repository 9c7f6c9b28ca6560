"""A TCP relay on loopback that can be slow, silent and cut, as networks are."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TypeVar

CHUNK = 65536

Result = TypeVar("Result")


class Relay:
    """Relays to a port of loopback, from a thread of its own, while the context lasts.

    ``listener``: a bound socket to listen at, which may be of another network namespace.
    """

    def __init__(self, target: int, listener: socket.socket | None = None) -> None:
        self._target = target
        self._listener = listener
        self._rate = 0
        self._connections: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._flows.set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        place = {"sock": self._listener} if self._listener else {"host": "127.0.0.1", "port": 0}
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, **place), self._loop
        ).result()
        #: Where to connect to.
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return self._call(lambda: len(self._tasks))

    def cut(self) -> None:
        """Reset all connections; new ones are welcome."""
        self._call(self._abort)

    def pause(self) -> None:
        """Let nothing through, and tell nobody: connections stay, also new ones."""
        self._call(self._flows.clear)

    def resume(self) -> None:
        """Let everything through again, what came in the meantime included."""
        self._call(self._flows.set)

    def slow(self, rate: int) -> None:
        """Let through no more than ``rate`` bytes a second of each connection; 0: no limit."""
        self._rate = rate

    def _call(self, function: Callable[[], Result]) -> Result:
        """In the relay's thread."""
        done: Future[Result] = Future()
        self._loop.call_soon_threadsafe(lambda: done.set_result(function()))
        return done.result()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [writer]
        self._connections.add(writer)
        try:
            there, onward = await asyncio.open_connection("127.0.0.1", self._target)
            ends.append(onward)
            self._connections.add(onward)
            await asyncio.gather(self._pump(reader, onward), self._pump(there, writer))
        except OSError:  # either end is gone, and the other must learn of it
            pass
        finally:
            for end in ends:
                end.transport.abort()
                self._connections.discard(end)
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK if not self._rate else max(1, self._rate // 10)):
            if self._rate:
                await asyncio.sleep(len(data) / self._rate)
            await self._flows.wait()
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    def _abort(self) -> None:
        for end in self._connections:
            # Without lingering a close is a reset.
            plug: socket.socket = end.get_extra_info("socket")
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.transport.abort()

    async def _close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
