"""A cluster's DNS server on loopback, and upstreams that say what a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import dns.asyncquery
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from svcdp.discovery.dns import DnsServer
from svcdp.discovery.names import Names
from svcdp.discovery.resolver import Resolver
from svcdp.discovery.upstream import Forwarder, Upstream
from svcdp.errors import PlatformError
from svcdp.kube.decode import decode_value
from svcdp.kube.state import Change, State

DEADLINE = 20.0
ZONE = "cluster.local."
SVC = f"svc.{ZONE}"

Script = Callable[[dns.message.Message], dns.message.Message | bytes | None]
"""What an upstream says to a question."""


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE):
            await test()

    asyncio.run(bounded())


def names_of(objects: list[dict[str, Any]], **more: Any) -> Names:
    """What a cluster with these objects knows."""
    names = Names(**more)
    state = State()
    records = tuple(found for each in objects for found in decode_value(each))
    for ref in sorted(state.apply(0, "", Change(objects=records))):
        names.replace(ref, state.services.get(ref), state.slices(ref))
    return names


@asynccontextmanager
async def serving(
    names: Names, *upstreams: Upstream, time: float = 4.5, try_time: float = 2.0, **more: Any
) -> AsyncIterator[tuple[DnsServer, int]]:
    """A server on 127.0.0.1 and ::1, and its port."""
    forwarder = Forwarder(upstreams, time=time, try_time=try_time)
    server = DnsServer(Resolver(names, forwarder), **more)
    try:
        yield server, await listen(server)
    finally:
        await server.close()


async def listen(server: DnsServer) -> int:
    """A port of both families and protocols: what is free for one, others may have."""
    while True:
        with suppress(PlatformError):
            port = await server.open("127.0.0.1", 0)
            return await server.open("::1", port)


async def ask(
    port: int,
    name: str,
    kind: str = "A",
    *,
    tcp: bool = False,
    where: str = "127.0.0.1",
    **more: Any,
) -> dns.message.Message:
    """What an independent client gets."""
    query = dns.message.make_query(name, kind, **more)
    if tcp:
        return await dns.asyncquery.tcp(query, where, port=port, timeout=DEADLINE)
    # Its port may have been the server's own a moment ago, and an upstream be late.
    return await dns.asyncquery.udp(
        query, where, port=port, timeout=DEADLINE, ignore_unexpected=True, ignore_errors=True
    )


async def until(reached: Callable[[], bool]) -> None:
    """Wait for something; `run` ends what never comes."""
    while not reached():
        await asyncio.sleep(0.002)


def answers(message: dns.message.Message) -> list[str]:
    """The data of all records, in order."""
    return [record.to_text() for rrset in message.answer for record in rrset]


class FakeUpstream(asyncio.DatagramProtocol):
    """Answers by a script, in datagrams and streams. ``questions`` are those that came."""

    def __init__(self, script: Script, stream: Script | None = None) -> None:
        self._script = script
        self._stream = stream or script
        self.questions: list[str] = []
        self.by_tcp = 0

    async def __aenter__(self) -> Upstream:
        loop = asyncio.get_running_loop()
        while True:
            self._transport, _ = await loop.create_datagram_endpoint(
                lambda: self, local_addr=("127.0.0.1", 0)
            )
            where = self._transport.get_extra_info("sockname")
            try:
                self._server = await asyncio.start_server(self._serve, *where)
            except OSError:  # somebody else has that port
                self._transport.close()
            else:
                return Upstream(*where)

    async def __aexit__(self, *_: object) -> None:
        self._transport.close()
        self._server.close()

    def datagram_received(self, data: bytes, address: Any) -> None:
        said = self._say(data, self._script)
        if said is not None:
            self._transport.sendto(said, address)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = int.from_bytes(await reader.readexactly(2))
        self.by_tcp += 1
        said = self._say(await reader.readexactly(length), self._stream)
        if said is not None:
            writer.write(len(said).to_bytes(2) + said)
        writer.close()

    def _say(self, data: bytes, script: Script) -> bytes | None:
        query = dns.message.from_wire(data)
        self.questions.append(query.question[0].to_text())
        said = script(query)
        return said.to_wire(max_size=65535) if isinstance(said, dns.message.Message) else said


def records(*lines: str, rcode: str = "NOERROR", flags: int = 0) -> Script:
    """An upstream with records ``name TTL IN type data``. SOA says for how long there is none."""

    def script(query: dns.message.Message) -> dns.message.Message:
        response = dns.message.make_response(query, recursion_available=True)
        response.set_rcode(dns.rcode.from_text(rcode))
        response.flags |= flags
        for line in lines:
            name, ttl, _, kind, data = line.split(None, 4)
            rrset = dns.rrset.from_text(name, int(ttl), "IN", kind, data)
            section = response.authority if kind == "SOA" else response.answer
            section.append(rrset)
        return response

    return script
