"""Asking the resolvers that know the rest of the world."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import dns.exception
import dns.flags
import dns.message
from dns.message import Message
from dns.name import Name
from dns.rcode import Rcode
from dns.rdatatype import RdataType

from svcdp.discovery.names import Answer

__all__ = ["Forwarder", "Upstream"]

PAYLOAD = 1232  #: bytes of a datagram that is never fragmented (DNS Flag Day 2020)
TRY_TIME = 2.0  # seconds for one server
TIME = 4.5  # seconds for all of them: clients give up after 5
ROUNDS = 2
FORGERIES = 8  # answers to other questions, after which the one by TCP is waited for

#: What another server may know better.
_FAILED = (Rcode.SERVFAIL, Rcode.REFUSED, Rcode.NOTIMP, Rcode.FORMERR)


class Upstream(NamedTuple):
    """A resolver that asks for us."""

    address: str
    port: int = 53

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self[0]}:{self[1]}"


class Forwarder:
    """Asks one upstream after the other, the one that answered last first.

    ``results`` counts what became of questions: ``answered``, or ``failed`` without an answer.
    """

    def __init__(
        self, upstreams: Sequence[Upstream], *, try_time: float = TRY_TIME, time: float = TIME
    ) -> None:
        self.upstreams = tuple(upstreams)
        self._order = list(upstreams)
        self._try_time = try_time
        self._time = time
        self._avoided: set[Upstream] = set()
        self.results: Counter[tuple[Upstream, str]] = Counter()

    def avoid(self, upstream: Upstream, *, yes: bool) -> None:
        """Whether not to ask an upstream: it asks us."""
        if yes:
            self._avoided.add(upstream)
        else:
            self._avoided.discard(upstream)

    def is_avoided(self, upstream: Upstream) -> bool:
        """Whether it is not asked."""
        return upstream in self._avoided

    async def ask(self, name: Name, rdtype: RdataType) -> tuple[Answer, int]:
        """An answer, SERVFAIL if there was none, and the bytes it came in."""
        said = Answer(Rcode.SERVFAIL), 0
        waiting = [each for each in self._order if each not in self._avoided]
        try:
            async with asyncio.timeout(self._time):
                for upstream in waiting * ROUNDS:
                    if upstream not in waiting:
                        continue  # it has said what it knows
                    found = await self.ask_one(upstream, name, rdtype)
                    if found is not None:
                        said = found
                        if found[0].rcode not in _FAILED:
                            break
                        waiting.remove(upstream)
                    self._order.remove(upstream)
                    self._order.append(upstream)
        except TimeoutError:
            pass
        return said

    async def ask_one(
        self, upstream: Upstream, name: Name, rdtype: RdataType
    ) -> tuple[Answer, int] | None:
        """What one upstream says; None: nothing."""
        query = dns.message.make_query(name, rdtype, use_edns=0, payload=PAYLOAD)
        try:
            async with asyncio.timeout(self._try_time):
                wire = await _exchange(upstream, query)
                reply = dns.message.from_wire(wire)
        except (OSError, EOFError, dns.exception.DNSException, ValueError):
            self.results[upstream, "failed"] += 1
            return None
        self.results[upstream, "answered"] += 1
        # Other sections are of no use to stub resolvers, but for the record that says for how
        # long there is no answer.
        authority = [each for each in reply.authority if each.rdtype == RdataType.SOA]
        return Answer(reply.rcode(), tuple(reply.answer), tuple(authority)), len(wire)


async def _exchange(upstream: Upstream, query: Message) -> bytes:
    """The response. Raises OSError (also TimeoutError) and EOFError."""
    wire = query.to_wire()
    reply = await _by_udp(upstream, query, wire)
    return reply if reply is not None else await _by_tcp(upstream, query, wire)


async def _by_udp(upstream: Upstream, query: Message, wire: bytes) -> bytes | None:
    """None: it is too long, or somebody guesses (RFC 5452)."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in upstream.address else socket.AF_INET
    # Connected, so the kernel picks a port at random and takes what this upstream sends only.
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(upstream)
        await loop.sock_sendall(sock, wire)
        for _ in range(FORGERIES):
            data = await loop.sock_recv(sock, 0xFFFF)
            if _answers(data, query):
                is_whole = not struct.unpack_from("!H", data, 2)[0] & dns.flags.TC
                return data if is_whole else None
    return None


async def _by_tcp(upstream: Upstream, query: Message, wire: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*upstream)
    try:
        writer.write(struct.pack("!H", len(wire)) + wire)
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        data = await reader.readexactly(length)
    finally:
        writer.transport.abort()
    if not _answers(data, query):
        raise ConnectionError("an answer to another question")
    return data


def _answers(data: bytes, query: Message) -> bool:
    """Whether a message has the question's number and the question."""
    try:
        reply = dns.message.from_wire(data, question_only=True, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError):
        return False
    return query.is_response(reply)
