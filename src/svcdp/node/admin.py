"""The daemon's admin socket: JSON lines over a Unix socket that only its owner may open.

A request is one line, ``{"get": "services"}`` and what else the handler wants. The answer
is a line ``{"item": ...}`` for each item and then ``{"end": true}``; or ``{"error": "..."}``.
A connection may ask again and again. Clients are bounded in number, in what they send and
in the time they take to read; the daemon itself never waits for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from svcdp.errors import ConfigError, ConflictError, SvcdpError

__all__ = ["AdminServer", "Handler"]

log = logging.getLogger(__name__)

Items = Iterable[Mapping[str, Any]]
Handler = Callable[[Mapping[str, Any]], Items | Awaitable[Items]]

MAX_CLIENTS = 32
LONG_REQUEST = 1 << 16  # bytes; such are taken one at a time, for what memory they need in all
MAX_REQUEST = 1 << 24  # bytes; ipvsadm's lines of many services come as one
IDLE_TIMEOUT = 60.0  # seconds without a request
WRITE_TIMEOUT = 10.0  # seconds in which a client must take what was written
CHUNK = 256  # items written before others get a turn


class AdminServer:
    """Serves ``handlers``, by the name of what they get, on the socket at ``path``."""

    def __init__(self, path: str, handlers: Mapping[str, Handler]) -> None:
        self._path = path
        self._handlers = handlers
        self._clients: set[asyncio.Task[None]] = set()
        self._long_request = asyncio.Lock()
        self._server: asyncio.Server | None = None

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._clients)

    @property
    def is_busy(self) -> bool:
        """Whether it is at a long request."""
        return self._long_request.locked()

    async def start(self) -> None:
        """Listen. Replaces what a dead daemon left.

        Raises :class:`svcdp.ConflictError` when a living one listens there,
        :class:`svcdp.ConfigError` when the path cannot be used.
        """
        sock = _listen(self._path)
        self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=LONG_REQUEST)

    async def close(self) -> None:
        """Stop listening, cut clients off and remove the socket."""
        if self._server is None:
            return
        self._server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        self._server = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            if len(self._clients) > MAX_CLIENTS:
                await _write(writer, {"error": "too many clients: try again later"})
                return
            going_on = True
            while going_on:
                async with contextlib.AsyncExitStack() as turn:
                    going_on = await self._serve_one(reader, writer, turn)
        except OSError:
            pass  # the client went away, or stopped reading
        finally:
            self._clients.discard(task)
            writer.transport.abort()

    async def _serve_one(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        turn: contextlib.AsyncExitStack,
    ) -> bool:
        """Answer one request. False: this client is done."""
        try:
            async with asyncio.timeout(IDLE_TIMEOUT):
                line = await self._read(reader, turn)
        except ValueError:
            await _write(writer, {"error": f"a request has at most {MAX_REQUEST} bytes"})
            return False
        except asyncio.IncompleteReadError:
            return False
        try:
            items = await self._answer(line)
            for number, item in enumerate(items, start=1):
                writer.write(_line({"item": item}))
                if number % CHUNK == 0:
                    await _drain(writer)
            await _write(writer, {"end": True})
        except SvcdpError as error:
            await _write(writer, {"error": str(error)})
        except OSError:
            raise
        except Exception:
            log.exception("an admin request failed")
            await _write(writer, {"error": "internal error: see the daemon's log"})
        return True

    async def _read(self, reader: asyncio.StreamReader, turn: contextlib.AsyncExitStack) -> bytes:
        """A line; if it is long, when it is its ``turn``. ValueError: it is too long."""
        parts: list[bytes] = []
        while sum(map(len, parts)) <= MAX_REQUEST:
            try:
                return b"".join((*parts, await reader.readuntil()))
            except asyncio.LimitOverrunError as overrun:
                if not parts:
                    await turn.enter_async_context(self._long_request)
                parts.append(await reader.readexactly(overrun.consumed))
        raise ValueError

    async def _answer(self, line: bytes) -> Items:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            raise ConfigError('not JSON: send a line such as {"get": "services"}') from None
        name = request.get("get") if isinstance(request, dict) else None
        handler = self._handlers.get(name) if isinstance(name, str) else None
        if handler is None:
            raise ConfigError(f"unknown request: get one of {', '.join(self._handlers)}")
        items = handler(request)
        return await items if isinstance(items, Awaitable) else items


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


async def _write(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    writer.write(_line(message))
    await _drain(writer)


async def _drain(writer: asyncio.StreamWriter) -> None:
    async with asyncio.timeout(WRITE_TIMEOUT):
        await writer.drain()
    await asyncio.sleep(0)  # drain() returns at once while the buffer is small


def _listen(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.makedirs(os.path.dirname(path) or ".", mode=0o755, exist_ok=True)
        _remove_stale(path)
        # The mode is right from the first moment: a chmod afterwards would come too late.
        mask = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        sock.listen(MAX_CLIENTS)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen at adminSocket {path}: {error}") from None
    except SvcdpError:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"adminSocket {path} exists and is no socket: choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        result = probe.connect_ex(path)
    if result not in (errno.ECONNREFUSED, errno.ENOENT):
        raise ConflictError(f"another daemon listens at {path}: stop it, or set adminSocket")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
