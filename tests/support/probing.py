"""Asking HTTP servers of this process, as clients of any kind would."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from typing import Any

DEADLINE = 10.0


@dataclass
class Answer:
    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def free_port(host: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


async def send(place: tuple[str, int], data: bytes, *, eof: bool = False) -> bytes:
    """Everything that comes back until the server closes."""
    async with asyncio.timeout(DEADLINE):
        reader, writer = await asyncio.open_connection(*place)
        try:
            writer.write(data)
            if eof:
                writer.write_eof()
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()


async def get(place: tuple[str, int], path: str = "/", method: str = "GET") -> Answer:
    """The answer to a request as curl would make it."""
    host = f"[{place[0]}]" if ":" in place[0] else place[0]
    request = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: test\r\nAccept: */*\r\n\r\n"
    head, _, body = (await send(place, request.encode())).partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    version, status, _ = line.split(" ", 2)
    assert version == "HTTP/1.1"
    fields = dict(each.split(": ", 1) for each in lines)
    assert method == "HEAD" or int(fields["Content-Length"]) == len(body)
    return Answer(int(status), fields, body)
