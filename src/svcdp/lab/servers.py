"""``python -m svcdp.lab.servers --name a --http 8080 --udp 5353``: servers that say who they are.

All listen on IPv4 and IPv6, and ``READY`` is printed when they do.

- HTTP/1.1 with keep-alive. Any path answers ``{"server": "a", "client": ["192.0.2.10", 40000]}``,
  and to a request with a body also its ``"length"`` and ``"sha256"``. ``/bytes/N`` answers the
  first N bytes of ``PATTERN``, repeated.
- UDP answers the name, a blank, and what came.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import ipaddress
import json
import random
import re
import signal
import socket
from collections.abc import Sequence
from typing import Any, cast

__all__ = ["PATTERN", "main"]

BACKLOG = 4096
BLOCK = 1 << 18  # bytes of a body that are read at a time

#: Its length is prime: what is lost, doubled or moved shows, whatever the segments' size.
PATTERN = random.Random(1).randbytes(1048573)

Address = tuple[str, int]


class EchoProtocol(asyncio.DatagramProtocol):
    """The UDP server."""

    def __init__(self, name: str) -> None:
        self.prefix = name.encode() + b" "

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        self.transport.sendto(self.prefix + data, addr)


class HttpServer:
    """As much of HTTP/1.1 as clients in tests need. A bad request ends its connection."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """All requests of one connection."""
        host, port = writer.get_extra_info("peername")[:2]
        client = (plain(host), port)
        try:
            while await self._answer(client, reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, client: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """One request. False: it was the last."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request = re.match(r"[A-Z]+ (\S+) HTTP/1\.([01])\r\n", head)
        if not request:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            return False
        length = re.search(r"\r\ncontent-length: *(\d{1,15})\r\n", head, re.I)
        body = await self._read_body(int(length[1]), reader) if length else {}
        if count := re.fullmatch(r"/bytes/(\d{1,15})", request[1]):
            await self._write_pattern(int(count[1]), writer)
        else:
            text = json.dumps({"server": self.name, "client": client} | body)
            self._write_head(len(text), "application/json", writer)
            writer.write(text.encode())
        await writer.drain()
        return request[2] == "1" and not re.search(r"\r\nconnection: *close\r\n", head, re.I)

    async def _read_body(self, length: int, reader: asyncio.StreamReader) -> dict[str, Any]:
        digest = hashlib.sha256()
        left = length
        while left:
            block = await reader.read(min(left, BLOCK))
            if not block:
                raise asyncio.IncompleteReadError(b"", left)
            digest.update(block)
            left -= len(block)
        return {"length": length, "sha256": digest.hexdigest()}

    def _write_head(self, length: int, kind: str, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
        writer.write(head.encode())

    async def _write_pattern(self, length: int, writer: asyncio.StreamWriter) -> None:
        self._write_head(length, "application/octet-stream", writer)
        view = memoryview(PATTERN)
        for start in range(0, length, len(view)):
            writer.write(view[: length - start])
            await writer.drain()


def plain(host: str) -> str:
    """An IPv4 address as such, also when it comes from a socket of both families."""
    address = ipaddress.IPv6Address(host.partition("%")[0])
    return str(address.ipv4_mapped or address)


def bind(port: int, kind: socket.SocketKind) -> socket.socket:
    """A socket of both families."""
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    if kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("::", port))
    return sock


async def serve(name: str, http: Sequence[int], udp: Sequence[int]) -> None:
    """For ever."""
    loop = asyncio.get_running_loop()
    for port in http:
        sock = bind(port, socket.SOCK_STREAM)
        await asyncio.start_server(HttpServer(name).serve, sock=sock, backlog=BACKLOG)
    for port in udp:
        sock = bind(port, socket.SOCK_DGRAM)
        await loop.create_datagram_endpoint(lambda: EchoProtocol(name), sock=sock)
    print("READY", flush=True)
    await loop.create_future()


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to clean up
    parser = argparse.ArgumentParser(prog="python -m svcdp.lab.servers")
    parser.add_argument("--name", required=True, help="what all answers begin with")
    for kind in ("http", "udp"):
        parser.add_argument(
            f"--{kind}", type=int, action="append", default=[], metavar="PORT", help="may repeat"
        )
    arguments = parser.parse_args(argv)
    asyncio.run(serve(arguments.name, arguments.http, arguments.udp))


if __name__ == "__main__":
    main()
