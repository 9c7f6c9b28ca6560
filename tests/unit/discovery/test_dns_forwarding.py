"""Names of others: asked for, remembered, followed, and what upstreams may do wrong."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rrset
import pytest
from dns.rcode import Rcode
from dns.rdatatype import RdataType
from dnslab import SVC, FakeUpstream, Script, answers, ask, names_of, records, run, serving, until

from svcdp.discovery.cache import FAILURE, LONGEST_NEGATIVE, Cache, lifetime
from svcdp.discovery.names import Answer, key_of
from svcdp.discovery.upstream import FORGERIES, Upstream

EXAMPLE = "example. 60 IN A 192.0.2.1"


def external(name: str, target: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"type": "ExternalName", "externalName": target},
    }


OBJECTS = [
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.10", "ports": [{"port": 80}]},
    },
    external("remote", "www.example"),
    external("inner", f"web.shop.{SVC}"),
    external("ping", f"pong.shop.{SVC}"),
    external("pong", f"ping.shop.{SVC}"),
    external("back", "back.example"),
]


def dead_upstream() -> Upstream:
    """Nobody listens there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return Upstream(*sock.getsockname())


def test_answers_are_remembered_for_as_long_as_they_are_good() -> None:
    async def test() -> None:
        fake = FakeUpstream(records(EXAMPLE))
        async with fake as upstream, serving(names_of([]), upstream) as (server, port):
            found = await ask(port, "example.")
            assert answers(found) == ["192.0.2.1"]
            assert not found.flags & dns.flags.AA
            assert answers(await ask(port, "EXAMPLE.")) == ["192.0.2.1"]
            assert len(fake.questions) == 1
            assert server.resolver.forwarder.results == {(upstream, "answered"): 1}

    run(test)


def test_who_asks_for_the_same_waits_for_the_same() -> None:
    async def test() -> None:
        fake = FakeUpstream(lambda query: None)
        async with fake as upstream, serving(names_of([]), upstream, try_time=0.2) as (_, port):
            found = await asyncio.gather(*(ask(port, "example.") for _ in range(20)))
            assert {each.rcode() for each in found} == {dns.rcode.SERVFAIL}
            assert len(fake.questions) == 2  # rounds

    run(test)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(lambda query: None, id="silent"),
        pytest.param(records(rcode="SERVFAIL"), id="failing"),
        pytest.param(records(rcode="REFUSED"), id="refusing"),
        pytest.param(lambda query: b"nonsense", id="nonsense"),
        pytest.param(
            lambda query: dns.message.make_response(dns.message.make_query("other.", "A")),
            id="an answer to another question",
        ),
    ],
)
def test_another_upstream_is_asked_where_one_fails(bad: Script) -> None:
    async def test() -> None:
        failing, good = FakeUpstream(bad), FakeUpstream(records(EXAMPLE))
        async with (
            failing as first,
            good as second,
            serving(names_of([]), first, second, try_time=0.1) as (_, port),
        ):
            assert answers(await ask(port, "example.")) == ["192.0.2.1"]
            assert failing.questions
            # The good one comes first from now on.
            before = len(failing.questions)
            await ask(port, "other.example.")
            assert len(failing.questions) == before

    run(test)


def test_nobody_listens() -> None:
    async def test() -> None:
        async with serving(names_of(OBJECTS), dead_upstream()) as (server, port):
            assert (await ask(port, "example.")).rcode() == dns.rcode.SERVFAIL
            assert sum(server.resolver.forwarder.results.values()) == 2
            # RFC 9520: not asked again at once.
            assert (await ask(port, "example.")).rcode() == dns.rcode.SERVFAIL
            assert sum(server.resolver.forwarder.results.values()) == 2
            alias = await ask(port, f"remote.shop.{SVC}")
            assert alias.rcode() == dns.rcode.SERVFAIL
            assert answers(alias) == ["www.example."]

    run(test)


def test_no_upstream_at_all() -> None:
    async def test() -> None:
        async with serving(names_of([])) as (_, port):
            assert (await ask(port, "example.")).rcode() == dns.rcode.SERVFAIL

    run(test)


def test_what_was_cut_off_is_asked_for_by_tcp() -> None:
    async def test() -> None:
        lines = [f"example. 60 IN TXT {n:0200}" for n in range(20)]
        fake = FakeUpstream(records(flags=dns.flags.TC), records(*lines))
        async with fake as upstream, serving(names_of([]), upstream) as (_, port):
            assert len(answers(await ask(port, "example.", "TXT", tcp=True))) == 20
            assert fake.by_tcp == 1

    run(test)


def test_guesses_lead_to_tcp() -> None:
    """Somebody sends answers with other numbers; what counts comes by a way he is not on."""

    async def test() -> None:
        def forged(query: dns.message.Message) -> None:
            for _ in range(FORGERIES):
                lie = records("example. 60 IN A 192.0.2.66")(query)
                lie.id ^= 1
                fake._transport.sendto(lie.to_wire(), fake.last)

        class Forging(FakeUpstream):
            last: Any = None

            def datagram_received(self, data: bytes, address: Any) -> None:
                self.last = address
                super().datagram_received(data, address)

        fake = Forging(forged, records(EXAMPLE))
        async with fake as upstream, serving(names_of([]), upstream) as (_, port):
            assert answers(await ask(port, "example.")) == ["192.0.2.1"]
            assert fake.by_tcp == 1

    run(test)


ALIASES = [
    ("remote", "A", ["www.example.", "edge.example.", "192.0.2.7"], "NOERROR"),
    ("remote", "CNAME", ["www.example."], "NOERROR"),
    ("inner", "A", [f"web.shop.{SVC}", "10.96.0.10"], "NOERROR"),
    ("inner", "AAAA", [f"web.shop.{SVC}"], "NOERROR"),
    ("ping", "A", [], "SERVFAIL"),
    ("back", "A", ["back.example.", f"web.shop.{SVC}", "10.96.0.10"], "NOERROR"),
]


@pytest.mark.parametrize(("name", "kind", "expected", "rcode"), ALIASES)
def test_aliases_are_followed(name: str, kind: str, expected: list[str], rcode: str) -> None:
    world = {
        "www.example.": records(
            "www.example. 60 IN CNAME edge.example.", "edge.example. 60 IN A 192.0.2.7"
        ),
        # What an upstream says of the cluster's names does not count.
        "back.example.": records(
            f"back.example. 60 IN CNAME web.shop.{SVC}", f"web.shop.{SVC} 60 IN A 192.0.2.66"
        ),
    }

    async def test() -> None:
        fake = FakeUpstream(lambda query: world[query.question[0].name.to_text()](query))
        async with fake as upstream, serving(names_of(OBJECTS), upstream) as (_, port):
            found = await ask(port, f"{name}.shop.{SVC}", kind)
            assert (answers(found), dns.rcode.to_text(found.rcode())) == (expected, rcode)

    run(test)


def test_an_alias_into_the_cluster_grows_old() -> None:
    """What follows is the cluster's own; the alias is not, and ends with its time to live."""

    async def test() -> None:
        clock = [0.0]
        alias = f"www.example. 7 IN CNAME web.shop.{SVC}"
        soa = ". 60 IN SOA a. b. 1 2 3 4 60"
        fake = FakeUpstream(records(alias, soa, rcode="NXDOMAIN"))
        async with fake as upstream, serving(names_of(OBJECTS), upstream) as (server, port):
            server.resolver.cache = Cache(clock=lambda: clock[0])
            for seconds, left, asked in ((0, 7, 1), (3, 4, 1), (5, 2, 1), (8, 7, 2)):
                clock[0] = seconds
                found = await ask(port, "www.example.")
                assert answers(found) == [f"web.shop.{SVC}", "10.96.0.10"]
                assert not found.flags & dns.flags.AA
                assert (found.answer[0].ttl, len(fake.questions)) == (left, asked)

    run(test)


def test_an_alias_into_nowhere() -> None:
    async def test() -> None:
        soa = "example. 30 IN SOA a. b. 1 2 3 4 5"
        fake = FakeUpstream(records(soa, rcode="NXDOMAIN"))
        async with fake as upstream, serving(names_of(OBJECTS), upstream) as (_, port):
            for _ in range(2):
                found = await ask(port, f"remote.shop.{SVC}")
                assert (found.rcode(), answers(found)) == (dns.rcode.NXDOMAIN, ["www.example."])
                assert found.authority[0].name.to_text() == "example."
            assert len(fake.questions) == 1

    run(test)


def test_an_upstream_that_asks_us_is_found_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()

        class Relay(asyncio.DatagramProtocol):
            """Another resolver on this host, whose own upstream we are."""

            def connection_made(self, transport: Any) -> None:
                self.transport = transport

            def datagram_received(self, data: bytes, address: Any) -> None:
                task = loop.create_task(self.relay(data, address))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

            async def relay(self, data: bytes, address: Any) -> None:
                query = dns.message.from_wire(data)
                again = dns.message.make_query(query.question[0].name, query.question[0].rdtype)
                found = await dns.asyncquery.udp(again, "127.0.0.1", port=port)
                found.id = query.id
                self.transport.sendto(found.to_wire(), address)

        tasks: set[asyncio.Task[None]] = set()
        relay, _ = await loop.create_datagram_endpoint(Relay, local_addr=("127.0.0.1", 0))
        looping = Upstream(*relay.get_extra_info("sockname"))
        good = FakeUpstream(records(EXAMPLE))
        async with (
            good as other,
            serving(names_of([]), looping, other) as (server, port),
        ):
            watching = asyncio.create_task(server.resolver.watch())
            await until(lambda: server.resolver.forwarder.is_avoided(looping))
            assert answers(await ask(port, "example.")) == ["192.0.2.1"]
            watching.cancel()
            await asyncio.gather(watching, *tasks, return_exceptions=True)
        relay.close()

    run(test)
    assert [each.message for each in caplog.records] == ["this upstream asks us: it is not asked"]


def answer(*lines: str, rcode: Rcode = Rcode.NOERROR) -> Answer:
    rrsets = [
        dns.rrset.from_text(*(name, int(ttl), "IN", kind, data))
        for name, ttl, kind, data in (line.split(None, 3) for line in lines)
    ]
    soa = tuple(each for each in rrsets if each.rdtype == RdataType.SOA)
    return Answer(rcode, tuple(each for each in rrsets if each not in soa), soa)


SOA = "example. 60 SOA a. b. 1 2 3 4 "
LIFETIMES = [
    (answer("a. 60 A 192.0.2.1"), 60),
    (answer("a. 60 CNAME b.", "b. 30 A 192.0.2.1"), 30),
    (answer("a. 99999 A 192.0.2.1"), 3600),
    (answer("a. 0 A 192.0.2.1"), 0),
    (answer(f"{SOA} 20"), 20),
    (answer(f"{SOA} 90", rcode=Rcode.NXDOMAIN), 60),
    (answer("example. 9999 SOA a. b. 1 2 3 4 9999"), LONGEST_NEGATIVE),
    (answer("a. 10 CNAME b.", f"{SOA} 20"), 10),
    (answer(), 0),
    (answer(rcode=Rcode.SERVFAIL), FAILURE),
]


@pytest.mark.parametrize(("found", "seconds"), LIFETIMES)
def test_lifetimes(found: Answer, seconds: int) -> None:
    assert lifetime(found) == seconds


def question(name: str) -> Any:
    return key_of(dns.name.from_text(name)), RdataType.A


def test_time_to_live_counts_down() -> None:
    now = 100.0
    cache = Cache(clock=lambda: now)
    cache.put(question("a."), answer("a. 60 A 192.0.2.1"), 50)
    now = 130.5
    found = cache.get(question("A."))
    assert found is not None
    assert found.answer[0].ttl == 30
    now = 160.0
    assert cache.get(question("a.")) is None
    assert (len(cache), cache.hits) == (0, 1)


def test_the_cache_is_bounded() -> None:
    cache = Cache(limit=10_000, clock=lambda: 0.0)
    for number in range(1000):
        cache.put(question(f"{number}."), answer("a. 60 A 192.0.2.1"), 72)
        assert cache.get(question("0.")) is not None  # asked for again and again: it stays
    assert len(cache) == 50
    assert cache.get(question("999.")) is not None
    assert cache.get(question("900.")) is None
    cache.put(question("huge."), answer("a. 60 A 192.0.2.1"), 10_000)
    assert cache.get(question("huge.")) is None
    assert len(cache) == 50
