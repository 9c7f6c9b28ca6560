"""The server: questions in datagrams and streams, answers from a resolver.

Packets come from enemies: whatever they hold, they get an answer or silence, and one client
cannot take what others need. Everything that waits is bounded, in all and for each client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.opcode
from dns.message import Message
from dns.opcode import Opcode
from dns.rcode import Rcode
from dns.rdataclass import RdataClass
from dns.rdatatype import RdataType
from dns.rrset import RRset

from svcdp.discovery.limits import LOCAL_NETWORKS, RateLimiter, is_within
from svcdp.discovery.names import RECORD_HEAD, Answer, Key
from svcdp.discovery.resolver import Resolver
from svcdp.discovery.upstream import PAYLOAD
from svcdp.errors import PlatformError

__all__ = ["RATE", "DnsServer"]

log = logging.getLogger(__name__)

RATE = 1000.0  #: questions a second and client
# Each that waits has a file open, of which a process may have 1,024.
WAITING = 400  # questions by datagram that wait for upstreams
CLIENT_WAITING = 100  # of one client
STREAMS = 200  # TCP connections
CLIENT_STREAMS = 32  # of one client
IDLE_TIME = 10.0  # seconds without a question by TCP (RFC 7766, 6.2.3)
MESSAGE_TIME = 5.0  # seconds for a message to come or to be taken
BATCH = 32  # datagrams taken before others have their turn
BUFFER = 1 << 20  # bytes of datagrams that the kernel keeps for us
READY = 16384  # responses of ours that are kept as they went out
READY_MAX = 512  # bytes of each
RECORDS = 8  # take as long as another question
SHORTEST = 16  # bytes of the shortest record of an address, its name compressed
UDP_MIN = 512  # bytes that every client takes (RFC 1035, 4.2.1)
TCP_MAX = 0xFFFF
TRUNCATED = dns.flags.TC >> 8  # in the third byte of a message

_HEADER = struct.Struct("!6H")
_QUESTION = struct.Struct("!2H")  # what follows its name
_ANCILLARY = socket.CMSG_SPACE(20)  # struct in6_pktinfo, the longer one
# linux/in.h and linux/in6.h, where Python's socket does not have them.
_IP_PKTINFO, _IP_FREEBIND, _IPV6_FREEBIND = 8, 15, 78
_META = range(RdataType.TKEY, RdataType.ANY)  # types of questions, not of records


class DnsServer:
    """Answers at any number of addresses, by UDP and TCP.

    ``recursion``: networks whose hosts may ask for names of others. ``rate``: questions a second
    that one client may ask, 0: any number; what is too much is not answered. ``log_queries``
    logs each question. For the thread of one event loop.

    ``queries`` counts questions by protocol, ``responses`` by code, ``dropped`` what got none, by
    reason.
    """

    def __init__(
        self,
        resolver: Resolver,
        *,
        recursion: Iterable[str] = LOCAL_NETWORKS,
        rate: float = RATE,
        log_queries: bool = False,
    ) -> None:
        self.resolver = resolver
        self._may_recurse = is_within(recursion)
        self._limiter = RateLimiter(rate)
        self._log_queries = log_queries
        self._datagrams: list[socket.socket] = []
        self._servers: list[asyncio.Server] = []
        self._waiting: dict[asyncio.Task[None], str] = {}
        self._waiting_of: Counter[str] = Counter()
        self._streams: dict[asyncio.Task[None], str] = {}
        self._streams_of: Counter[str] = Counter()
        self._ready: dict[tuple[bytes, str, bool], _Ready] = {}
        self._denials: dict[tuple[object, ...], tuple[bytes, bytes]] = {}
        self._denials_of = 0  # how many changes of names there had been
        self.queries: Counter[str] = Counter()
        self.responses: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    async def open(self, address: str, port: int, *, freebind: bool = False) -> int:
        """Listen at an address, which with ``freebind`` need not be the host's yet. Returns the
        port: that which was free, if it is 0.

        Raises :class:`svcdp.PlatformError`.
        """
        try:
            datagrams = _bound(socket.SOCK_DGRAM, address, port, freebind)
            self._datagrams.append(datagrams)
            port = datagrams.getsockname()[1]
            streams = _bound(socket.SOCK_STREAM, address, port, freebind)
        except OSError as error:
            raise PlatformError(error.errno, f"{address}, port {port}: {error.strerror}") from None
        self._servers.append(await asyncio.start_server(self._serve, sock=streams))
        asyncio.get_running_loop().add_reader(datagrams, self._receive, datagrams)
        return port

    async def close(self) -> None:
        """Stop listening, and leave all who wait without an answer."""
        for sock in self._datagrams:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        for server in self._servers:
            server.close()
        tasks = [*self._waiting, *self._streams]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.resolver.close()
        self._datagrams, self._servers = [], []

    def _receive(self, sock: socket.socket) -> None:
        """Datagrams have come."""
        for _ in range(BATCH):
            try:
                wire, ancillary, _, client = sock.recvmsg(TCP_MAX, _ANCILLARY)
            except OSError:  # none is left
                return
            reply = _Reply(sock, client, [_from(*each) for each in ancillary])
            said = self._handle(wire, client[0], "udp")
            if isinstance(said, bytes):
                reply.send(said)
            elif said is not None:
                self._wait(client[0], reply, said)

    def _wait(self, client: str, reply: _Reply, said: Callable[[], Awaitable[bytes]]) -> None:
        async def answer() -> None:
            reply.send(await said())

        task = asyncio.create_task(answer())
        self._waiting[task] = client
        self._waiting_of[client] += 1
        task.add_done_callback(self._waited)

    def _waited(self, task: asyncio.Task[None]) -> None:
        _release(self._waiting_of, self._waiting.pop(task))
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a question was not answered", exc_info=error)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One TCP connection: question by question."""
        task = asyncio.current_task()
        peer = writer.get_extra_info("peername")
        assert task is not None
        client = peer[0] if peer else ""
        self._streams[task] = client
        self._streams_of[client] += 1
        try:
            if len(self._streams) > STREAMS or self._streams_of[client] > CLIENT_STREAMS:
                self.dropped["busy"] += 1
                return
            # It went away, or is too slow; or we are closing, which asyncio would log as an error.
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                while await self._serve_one(reader, writer, client):
                    pass
        finally:
            _release(self._streams_of, self._streams.pop(task))
            writer.transport.abort()

    async def _serve_one(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: str
    ) -> bool:
        async with asyncio.timeout(IDLE_TIME):
            length = int.from_bytes(await reader.readexactly(2))
        async with asyncio.timeout(MESSAGE_TIME):
            wire = await reader.readexactly(length)
        said = self._handle(wire, client, "tcp")
        if said is None:
            return False
        response = said if isinstance(said, bytes) else await said()
        writer.write(len(response).to_bytes(2) + response)
        async with asyncio.timeout(MESSAGE_TIME):
            await writer.drain()
        return True

    def _handle(
        self, wire: bytes, client: str, protocol: str
    ) -> bytes | Callable[[], Awaitable[bytes]] | None:
        """The response; or how to wait for it; None: there will be none."""
        self.queries[protocol] += 1
        if not self._limiter.admit(client):
            self.dropped["limited"] += 1
            return None
        if len(wire) < _HEADER.size:
            self.dropped["malformed"] += 1
            return None
        _, flags, questions, *others = _HEADER.unpack_from(wire)
        if (ready := self._known(wire, client, protocol)) is not None:
            return ready
        if flags & dns.flags.QR:
            self.dropped["response"] += 1  # answered, two servers would never end
            return None
        if dns.opcode.from_flags(flags) != Opcode.QUERY:
            return self._refuse(wire, Rcode.NOTIMP)
        # Besides the question EDNS and a signature, at most: all else costs time and says nothing.
        if questions != 1 or others[:2] != [0, 0] or others[2] > 2:
            return self._refuse(wire, Rcode.FORMERR)
        try:
            query = dns.message.from_wire(wire)
        except (dns.exception.DNSException, ValueError):
            return self._refuse(wire, Rcode.FORMERR)
        return self._answer(query, wire, client, protocol)

    def _known(self, wire: bytes, client: str, protocol: str) -> bytes | None:
        """The response to the same question, byte by byte but for its number, if it still holds:
        Pods ask for the same again and again.
        """
        key = wire[2:], protocol, self._may_recurse(client)
        found = self._ready.get(key)
        if found is None:
            return None
        names = self.resolver.names
        if found.since != names.changes and not names.holds(found.about, found.since):
            del self._ready[key]
            return None
        self.responses[found.rcode.name] += 1
        return wire[:2] + found.response

    def _answer(
        self, query: Message, wire: bytes, client: str, protocol: str
    ) -> bytes | Callable[[], Awaitable[bytes]]:
        [question] = query.question
        name, rdtype = question.name, question.rdtype
        can_recurse = self._may_recurse(client)

        def respond(answer: Answer) -> bytes:
            told = sum(map(len, (*answer.answer, *answer.additional)))
            self._limiter.charge(client, told // RECORDS)
            if self._log_queries:
                log.info(
                    "query",
                    extra={
                        "question": f"{name} {rdtype.name}",
                        "client": client,
                        "protocol": protocol,
                        "code": answer.rcode.name,
                    },
                )
            return self._encode(query, answer, protocol, can_recurse)

        refused = _refusal(query)
        if refused is not None:
            return respond(Answer(refused))
        recurse = can_recurse and bool(query.flags & dns.flags.RD)
        found = self.resolver.look(name, rdtype, recurse=recurse)
        if isinstance(found, Answer):
            response = respond(found)
            # Of several records each client gets another one first; a log is of every question.
            is_one = max(map(len, found.answer), default=0) <= 1
            is_short = max(len(wire), len(response)) <= READY_MAX
            if found.is_own and is_one and is_short and not self._log_queries:
                self._ready[wire[2:], protocol, can_recurse] = _Ready(
                    found.rcode, response[2:], found.told_of(name), self.resolver.names.changes
                )
                if len(self._ready) > READY:
                    del self._ready[next(iter(self._ready))]
            return response
        if protocol == "udp" and (
            len(self._waiting) >= WAITING or self._waiting_of[client] >= CLIENT_WAITING
        ):
            return respond(Answer(Rcode.SERVFAIL))

        async def wait() -> bytes:
            return respond(await self.resolver.resolve(name, rdtype))

        return wait

    def _encode(self, query: Message, answer: Answer, protocol: str, can_recurse: bool) -> bytes:
        self.responses[answer.rcode.name] += 1
        if not answer.is_denial or answer.answer:
            return self._render(query, answer, protocol, can_recurse)
        # Most that nobody asked lately are names that search lists make. dnspython renders one of
        # each length; all its names point into the question, at the zone, or are none of it.
        [question] = query.question
        asked = (question.name.to_wire() or b"") + _QUESTION.pack(question.rdtype, question.rdclass)
        flags = query.flags & dns.flags.RD, query.edns >= 0, can_recurse
        shape = answer.rcode, len(asked), flags
        if self._denials_of != self.resolver.names.changes:
            self._denials.clear()  # they tell the zone's serial
            self._denials_of = self.resolver.names.changes
        if (denial := self._denials.get(shape)) is None:
            wire = self._render(query, answer, protocol, can_recurse)
            denial = wire[2 : _HEADER.size], wire[_HEADER.size + len(asked) :]
            self._denials[shape] = denial
        head, tail = denial
        return query.id.to_bytes(2) + head + asked + tail

    def _render(self, query: Message, answer: Answer, protocol: str, can_recurse: bool) -> bytes:
        response = dns.message.make_response(query, can_recurse, PAYLOAD)
        response.set_rcode(answer.rcode)
        if answer.is_own:
            response.flags |= dns.flags.AA
        limit = TCP_MAX
        if protocol == "udp":
            limit = min(max(query.payload, UDP_MIN), PAYLOAD) if query.edns >= 0 else UDP_MIN
        # No time is lost on finding out that far too many records do not fit.
        if sum(map(len, answer.answer)) * SHORTEST <= limit:
            response.answer = [*answer.answer]
            response.authority = [*answer.authority]
            response.additional = [*answer.additional]
            wire = response.to_wire(max_size=limit, prefer_truncation=True)
            if not wire[2] & TRUNCATED:
                return wire
        response.flags |= dns.flags.TC
        response.answer = _fitting(answer.answer, limit - len(query.to_wire()))
        response.authority = response.additional = []
        return response.to_wire(max_size=limit, prefer_truncation=True)

    def _refuse(self, wire: bytes, rcode: Rcode) -> bytes:
        """A header alone: what follows it in the question cannot be understood."""
        self.responses[rcode.name] += 1
        number, flags, *_ = _HEADER.unpack_from(wire)
        kept = flags & (0x7800 | dns.flags.RD)  # the opcode (RFC 1035, 4.1.1)
        return _HEADER.pack(number, dns.flags.QR | kept | rcode, 0, 0, 0, 0)


class _Ready(NamedTuple):
    """A response that went out, without its number. ``about`` and ``since`` as of
    :meth:`svcdp.discovery.names.Names.holds`.
    """

    rcode: Rcode
    response: bytes
    about: frozenset[Key]
    since: int


def _fitting(rrsets: Iterable[RRset], room: int) -> list[RRset]:
    """As many records as ``room`` bytes hold: who cannot ask by TCP lives on those, as programs
    with a musl before 1.2.4.
    """
    found = []
    for rrset in rrsets:
        part = RRset(rrset.name, rrset.rdclass, rrset.rdtype)
        part.ttl = rrset.ttl
        for record in rrset:
            room -= RECORD_HEAD + len(record.to_wire() or b"")
            if room < 0:
                break
            part.items[record] = None
        if part:
            found.append(part)
        if room < 0:
            break
    return found


class _Reply:
    """Where the response to a datagram goes, and from which of our addresses it comes."""

    __slots__ = ("_ancillary", "_client", "_sock")

    def __init__(
        self,
        sock: socket.socket,
        client: tuple[str, int],
        ancillary: list[tuple[int, int, bytes]],
    ) -> None:
        self._sock = sock
        self._client = client
        self._ancillary = ancillary

    def send(self, wire: bytes) -> None:
        # It cannot be reached, or its buffer is full: it will ask again.
        with contextlib.suppress(OSError):
            self._sock.sendmsg([wire], self._ancillary, 0, self._client)


def _from(level: int, kind: int, info: bytes) -> tuple[int, int, bytes]:
    """The address to which a datagram came, as the one to send from; the route says by where."""
    if level == socket.IPPROTO_IPV6:
        return level, kind, info[:16] + bytes(4)  # struct in6_pktinfo
    return level, kind, bytes(4) + info[4:8] + bytes(4)  # struct in_pktinfo


def _bound(kind: socket.SocketKind, address: str, port: int, freebind: bool) -> socket.socket:
    is_v6 = ":" in address
    sock = socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, kind | socket.SOCK_NONBLOCK)
    try:
        if is_v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if freebind and is_v6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        elif freebind:
            sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            if is_v6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        sock.bind((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _refusal(query: Message) -> Rcode | None:
    """What to say to a question that is none for us."""
    [question] = query.question
    if query.edns > 0:
        return Rcode.BADVERS
    if question.rdclass != RdataClass.IN or question.rdtype in (RdataType.AXFR, RdataType.IXFR):
        return Rcode.REFUSED
    if question.rdtype in _META or question.rdtype == RdataType.OPT:
        return Rcode.NOTIMP  # RFC 8906, 3.1.2
    return None


def _release(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
