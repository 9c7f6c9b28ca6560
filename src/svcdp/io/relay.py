"""TCP connections relayed in user space, each to the first of several servers that accepts it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress

__all__ = ["Pick", "Place", "TcpRelay"]

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024  # of all places
CONNECT_TIMEOUT = 3.0  # seconds for one server: a lost SYN is sent again twice
CONNECT_DEADLINE = 30.0  # seconds for all that a client is tried with
ACCEPT_PAUSE = 0.1  # seconds, while there are no descriptors
BUFFER = 1 << 16  # bytes that wait for a slow receiver, in each direction
KEEPALIVE = (  # a peer that is gone is noticed after 60 + 3 * 10 s of silence
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)

Place = tuple[str, int]
"""An address and a port."""

Pick = Callable[[Place, Place], AbstractContextManager[Iterable[Place]]]
"""Who may serve a client, in the order of trying: called with the place that the client asked and
with its own address. The block lasts as long as the connection."""


class TcpRelay:
    """Listens at any number of places, and relays each connection to a server that ``pick`` names.

    A server that refuses, or is silent for ``connect_timeout`` seconds, is passed over for the next
    one; a client whose servers all do, or all that are asked in ``connect_deadline`` seconds, is
    reset. Each direction ends by itself (half-close), and a
    reset of one side is one for the other. A sender waits while its receiver is slow. At
    ``limit`` connections new ones wait in the kernel's backlog. For the event loop's thread.
    """

    def __init__(
        self,
        pick: Pick,
        *,
        limit: int = MAX_CONNECTIONS,
        connect_timeout: float = CONNECT_TIMEOUT,
        connect_deadline: float = CONNECT_DEADLINE,
    ) -> None:
        self._pick = pick
        self._limit = limit
        self._connect_timeout = connect_timeout
        self._connect_deadline = connect_deadline
        self._listeners: dict[Place, socket.socket] = {}
        # Those with clients for whom there is no room, the first to be asked first.
        self._waiting: dict[Place, None] = {}
        self._clients: set[asyncio.Task[None]] = set()

    @property
    def places(self) -> frozenset[Place]:
        """Where it listens."""
        return frozenset(self._listeners)

    @property
    def connections(self) -> int:
        """How many are relayed now."""
        return len(self._clients)

    def listen(self, place: Place) -> None:
        """Listen there too. OSError."""
        family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        listener = socket.create_server(place, family=family, backlog=MAX_CONNECTIONS)
        listener.setblocking(False)
        self._listeners[place] = listener
        self._resume(place)

    def leave(self, place: Place) -> None:
        """Listen there no more. Connections go on."""
        self._pause(place)
        self._waiting.pop(place, None)
        self._listeners.pop(place).close()

    async def close(self, drain: float = 0.0) -> None:
        """Listen nowhere; reset the connections that are left after ``drain`` seconds."""
        for place in self.places:
            self.leave(place)
        if self._clients and drain:
            await asyncio.wait(self._clients, timeout=drain)
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    def _pause(self, place: Place) -> None:
        asyncio.get_running_loop().remove_reader(self._listeners[place])

    def _resume(self, place: Place) -> None:
        if place in self._listeners:
            loop = asyncio.get_running_loop()
            loop.add_reader(self._listeners[place], self._accept, place)

    def _accept(self, place: Place) -> None:
        """A client waits there."""
        if len(self._clients) >= self._limit:
            self._pause(place)
            self._waiting[place] = None
            return
        try:
            client, address = self._listeners[place].accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # gone already
            return
        except OSError as error:  # out of descriptors
            log.warning("cannot accept", extra={"place": place, "error": str(error)})
            self._pause(place)
            asyncio.get_running_loop().call_later(ACCEPT_PAUSE, self._resume, place)
            return
        client.setblocking(False)
        task = asyncio.create_task(self._serve(client, place, address[:2]))
        self._clients.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._clients.discard(task)
        if self._waiting:
            place = next(iter(self._waiting))
            del self._waiting[place]
            self._resume(place)
        if not task.cancelled() and (error := task.exception()):
            log.error("a connection could not be relayed", exc_info=error)

    async def _serve(self, client: socket.socket, place: Place, address: Place) -> None:
        with client:
            _set_options(client)
            try:
                with self._pick(place, address) as servers:
                    server = await self._connect(servers)
                    if server is None:
                        _reset(client)
                        return
                    with server:
                        await _relay(client, server)
            except BaseException:  # the end of all, or a bug
                _reset(client)
                raise

    async def _connect(self, servers: Iterable[Place]) -> socket.socket | None:
        """To the first that accepts."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._connect_deadline
        for place in servers:
            try:
                async with asyncio.timeout_at(min(loop.time() + self._connect_timeout, deadline)):
                    return await _dial(place)
            except OSError as error:  # TimeoutError is one
                log.debug("no answer", extra={"server": place, "error": str(error) or "timeout"})
            if loop.time() >= deadline:
                break
        return None


async def _dial(place: Place) -> socket.socket:
    family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setblocking(False)
        _set_options(server)
        await asyncio.get_running_loop().sock_connect(server, place)
    except BaseException:
        server.close()
        raise
    return server


async def _relay(one: socket.socket, other: socket.socket) -> None:
    """Until both directions have ended, or one was cut: then both are."""
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(_copy(one, other))
            both.create_task(_copy(other, one))
    except BaseException as error:
        for each in (one, other):
            _reset(each)
        if not isinstance(error, ExceptionGroup) or error.split(OSError)[1] is not None:
            raise


async def _copy(source: socket.socket, target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, BUFFER):
        await loop.sock_sendall(target, data)
    with suppress(OSError):  # it hears no more of us already
        target.shutdown(socket.SHUT_WR)


def _set_options(sock: socket.socket) -> None:
    for option in (*KEEPALIVE, (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)):
        sock.setsockopt(*option)


def _reset(sock: socket.socket) -> None:
    """Have it closed by a reset: the peer is not to believe that it has heard all."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
