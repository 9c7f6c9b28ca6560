"""A small HTTP/1.1 server for probes and metrics: GET and HEAD, one request a connection.

Whoever reaches the port may send anything: a request is bounded in bytes and in time, and
clients are bounded in number. One too many ends the one that has taken longest, so that those
who say nothing keep nobody out. (RFC 9110, RFC 9112)
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus

__all__ = ["Handler", "HttpServer", "Place", "Request", "Response", "report", "routed"]

log = logging.getLogger(__name__)

MAX_HEAD = 8192  # bytes of the request line and all fields
MAX_CLIENTS = 256  # of all ports of a server
READ_TIMEOUT = 5.0  # seconds for the whole request
WRITE_TIMEOUT = 10.0  # seconds in which a client must take the answer

Place = tuple[str, int]
"""An address to listen at, and a port."""

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) (/[\x21-\x7e]*) HTTP/1\.[0-9]")
_FIELD = re.compile(rf"({_TOKEN}):([\t\x20-\x7e\x80-\xff]*)")


@dataclass(frozen=True, slots=True)
class Request:
    """``fields`` are those of the header, by names in lower case. ``place``: who was asked."""

    path: str
    query: str
    fields: Mapping[str, str]
    place: Place


@dataclass(frozen=True, slots=True)
class Response:
    """An answer."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = HTTPStatus.OK
    fields: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Request], Response]
"""Answers a request, at once. What it raises is logged, and an error of status 500."""


def routed(routes: Mapping[str, Handler]) -> Handler:
    """Answers by path, and no others."""

    def handler(request: Request) -> Response:
        route = routes.get(request.path)
        return _error(HTTPStatus.NOT_FOUND) if route is None else route(request)

    return handler


def report(checks: Mapping[str, bool], request: Request) -> Response:
    """Whether all pass, and which do not; with ``?verbose`` all. By names alone: the reasons are
    for the log, not for whoever can reach the port.
    """
    failed = [name for name, passes in checks.items() if not passes]
    lines = [f"not ready: {', '.join(failed)}" if failed else "ok"]
    if "verbose" in request.query.split("&"):
        lines[:0] = [f"[{'+' if passes else '-'}] {name}" for name, passes in checks.items()]
    status = HTTPStatus.SERVICE_UNAVAILABLE if failed else HTTPStatus.OK
    return Response("".join(f"{line}\n" for line in lines).encode(), status=status)


class HttpServer:
    """Has ``handler`` answer at any number of places. It is called in the event loop's thread."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._servers: dict[Place, asyncio.Server] = {}
        self._clients: dict[asyncio.Task[None], None] = {}  # the oldest first

    @property
    def places(self) -> frozenset[Place]:
        """Where it listens."""
        return frozenset(self._servers)

    async def listen(self, place: Place) -> None:
        """Answer there too. OSError."""
        host, port = place
        self._servers[place] = await asyncio.start_server(
            self._serve, host, port, limit=MAX_HEAD, backlog=MAX_CLIENTS
        )

    def leave(self, place: Place) -> None:
        """Listen there no more. Clients that are being answered are."""
        self._servers.pop(place).close()

    async def close(self) -> None:
        """Listen nowhere, and cut clients off."""
        for place in self.places:
            self.leave(place)
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        while len(self._clients) >= MAX_CLIENTS:  # many come before one that is told to go is gone
            oldest = next(iter(self._clients))
            del self._clients[oldest]
            oldest.cancel()
        self._clients[task] = None
        try:
            await self._converse(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # it went away, or dawdled, or had to give way
        finally:
            self._clients.pop(task, None)
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, response = "GET", _error(HTTPStatus.BAD_REQUEST)
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            response = _error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        else:
            place = writer.get_extra_info("sockname")[:2]
            if parsed := _parse(head, place):
                method, request = parsed
                response = self._answer(method, request)
        writer.write(_message(response, with_body=method != "HEAD"))
        async with asyncio.timeout(WRITE_TIMEOUT):
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    def _answer(self, method: str, request: Request) -> Response:
        if method not in ("GET", "HEAD"):
            return _error(HTTPStatus.METHOD_NOT_ALLOWED, Allow="GET, HEAD")
        try:
            return self._handler(request)
        except Exception:
            log.exception("an HTTP request failed")
            return _error(HTTPStatus.INTERNAL_SERVER_ERROR)


def _parse(head: bytes, place: Place) -> tuple[str, Request] | None:
    """Method and request; None: it is no HTTP/1 request for a path."""
    line, *lines = head[:-4].decode("latin-1").split("\r\n")
    start = _REQUEST_LINE.fullmatch(line)
    fields = [_FIELD.fullmatch(each) for each in lines]
    if start is None or None in fields:
        return None
    path, _, query = start[2].partition("?")
    named = {found[1].lower(): found[2].strip() for found in fields if found}
    return start[1], Request(path, query, named, place)


def _error(status: HTTPStatus, **fields: str) -> Response:
    return Response(f"{status.phrase}\n".encode(), status=status, fields=fields)


def _message(response: Response, *, with_body: bool) -> bytes:
    fields = {
        "Date": formatdate(usegmt=True),
        "Content-Type": response.content_type,
        "Content-Length": str(len(response.body)),
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
        **response.fields,
    }
    head = f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{head}\r\n".encode("latin-1") + (response.body if with_body else b"")
