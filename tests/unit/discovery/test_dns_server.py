"""The server over real sockets on loopback; dnspython's client is the judge."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdataclass
import dns.rrset
import pytest
from dnslab import (
    DEADLINE,
    SVC,
    ZONE,
    FakeUpstream,
    answers,
    ask,
    names_of,
    records,
    run,
    serving,
    until,
)

from svcdp.discovery import dns as dns_module
from svcdp.discovery import names as names_module
from svcdp.discovery.dns import DnsServer
from svcdp.errors import PlatformError
from svcdp.kube.decode import decode_value
from svcdp.kube.model import ServiceRef


def service(name: str, cluster_ip: str, **more: Any) -> dict[str, Any]:
    ports = [{"name": "http", "port": 80}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": cluster_ip, "ports": ports, **more},
    }


def endpoints(name: str, count: int) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [f"10.1.{n >> 8}.{n & 255}"]} for n in range(1, count + 1)],
        "ports": [],
    }


WEB = f"web.shop.{SVC}"
OBJECTS = [
    service("web", "10.96.0.10"),
    service("few", "None"),
    endpoints("few", 40),
    service("many", "None"),
    endpoints("many", 300),
]


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
@pytest.mark.parametrize("where", ["127.0.0.1", "::1"])
def test_answers(where: str, tcp: bool) -> None:
    async def test() -> None:
        async with serving(names_of(OBJECTS)) as (server, port):
            found = await ask(port, "WeB.shop." + SVC, where=where, tcp=tcp)
            assert answers(found) == ["10.96.0.10"]
            assert found.answer[0].name.to_text() == "WeB.shop." + SVC
            assert found.flags & dns.flags.AA
            assert found.flags & dns.flags.RA
            missing = await ask(port, f"no.shop.{SVC}", where=where, tcp=tcp)
            assert missing.rcode() == dns.rcode.NXDOMAIN
            assert missing.authority[0].name.to_text() == ZONE
            assert server.queries == {"tcp" if tcp else "udp": 2}
            assert server.responses == {"NOERROR": 1, "NXDOMAIN": 1}

    run(test)


def test_the_same_question_again_is_answered_by_what_is_in_force() -> None:
    async def test() -> None:
        names = names_of(OBJECTS)
        async with serving(names) as (server, port):
            for _ in range(3):
                assert answers(await ask(port, WEB)) == ["10.96.0.10"]
            assert server.responses == {"NOERROR": 3}
            names.replace(ServiceRef("shop", "web"), None, [])
            assert (await ask(port, WEB)).rcode() == dns.rcode.NXDOMAIN
            # By TCP, and by those who may ask for more, other responses are the right ones.
            for where, tcp in (("127.0.0.1", False), ("127.0.0.1", True), ("::1", False)):
                for _ in range(2):
                    name = f"many.shop.{SVC}"
                    query = dns.message.make_query(name, "AAAA")
                    ways = dns.asyncquery.tcp if tcp else dns.asyncquery.udp
                    found = await ways(query, where, port=port, timeout=DEADLINE)
                    assert (found.id, found.rcode()) == (query.id, dns.rcode.NOERROR)

    run(test)


def test_what_is_too_long_for_a_datagram_is_asked_for_by_tcp() -> None:
    async def test() -> None:
        huge = [service("huge", "None"), endpoints("huge", 5000)]
        async with serving(names_of([*OBJECTS, *huge])) as (_, port):
            # 40 addresses are some 700 bytes: too long for a client that says nothing of EDNS.
            for name, payload, is_whole in (
                (f"few.shop.{SVC}", None, False),
                (f"few.shop.{SVC}", 1232, True),
                (f"many.shop.{SVC}", 65535, False),
            ):
                edns = {} if payload is None else {"use_edns": 0, "payload": payload}
                query = dns.message.make_query(name, "A", **edns)
                raw = await dns.asyncquery.udp(query, "127.0.0.1", port=port, timeout=DEADLINE)
                assert bool(raw.flags & dns.flags.TC) is not is_whole
                assert len(raw.to_wire()) <= (1232 if payload else 512)
                # Who cannot ask by TCP has some.
                whole = {"few": 40, "many": 300}[name.partition(".")[0]]
                room = (1232 if payload else 512) - len(query.to_wire())
                assert len(answers(raw)) == (whole if is_whole else room // 16)
            found = await ask(port, f"many.shop.{SVC}", tcp=True)
            assert len(answers(found)) == 300
            # More than a message holds: some of them, others each time.
            some = [answers(await ask(port, f"huge.shop.{SVC}", tcp=True)) for _ in range(2)]
            assert [len(each) for each in some] == [3072, 3072]
            assert set(some[0]) != set(some[1])

    run(test)


@pytest.mark.parametrize(
    ("kind", "more", "rcode"),
    [
        ("AXFR", {}, "REFUSED"),
        ("IXFR", {}, "REFUSED"),
        ("MAILB", {}, "NOTIMP"),
        ("TXT", {"rdclass": dns.rdataclass.CH}, "REFUSED"),
        ("A", {"use_edns": 1}, "BADVERS"),
    ],
)
def test_questions_that_are_refused(kind: str, more: dict[str, Any], rcode: str) -> None:
    async def test() -> None:
        async with serving(names_of(OBJECTS)) as (_, port):
            query = dns.message.make_query(WEB, "A", **more)
            query.question[0].rdtype = dns.rdatatype.from_text(kind)
            query.question[0].rdclass = more.get("rdclass", dns.rdataclass.IN)
            found = await dns.asyncquery.tcp(query, "127.0.0.1", port=port, timeout=DEADLINE)
            assert dns.rcode.to_text(found.rcode()) == rcode
            assert found.answer == []

    run(test)


def test_any_gets_something() -> None:
    """RFC 8482: some records of a name, as many as are useful, and of others' names that alone."""
    alias = service("alias", "", type="ExternalName", externalName=WEB)

    async def test() -> None:
        fake = FakeUpstream(lambda query: None)
        async with fake as upstream, serving(names_of([*OBJECTS, alias]), upstream) as (_, port):
            for name, kind, wanted in (
                (WEB, "A", ["10.96.0.10"]),
                (f"alias.shop.{SVC}", "CNAME", [WEB]),
                (f"_http._tcp.web.shop.{SVC}", "SRV", [f"0 1 80 {WEB}"]),
                (ZONE, "NS", [f"ns.dns.{ZONE}"]),
                ("www.example.", "HINFO", ['"RFC8482" ""']),
            ):
                found = await ask(port, name, "ANY")
                assert found.rcode() == dns.rcode.NOERROR
                assert [rrset.rdtype.name for rrset in found.answer] == [kind]
                assert answers(found) == wanted
                assert bool(found.flags & dns.flags.AA) is name.endswith(ZONE)
            for name, rcode in ((f"no.shop.{SVC}", "NXDOMAIN"), (f"shop.{SVC}", "NOERROR")):
                found = await ask(port, name, "ANY")
                assert (dns.rcode.to_text(found.rcode()), found.answer) == (rcode, [])
            assert fake.questions == []
        async with serving(names_of(OBJECTS), recursion=[]) as (_, port):
            assert (await ask(port, "www.example.", "ANY")).rcode() == dns.rcode.REFUSED

    run(test)


def test_other_opcodes() -> None:
    async def test() -> None:
        async with serving(names_of(OBJECTS)) as (_, port):
            query = dns.message.make_query(WEB, "A")
            query.set_opcode(dns.opcode.NOTIFY)
            wire = await exchange(port, query.to_wire())
            assert wire is not None
            found = dns.message.from_wire(wire)
            assert (found.id, found.rcode()) == (query.id, dns.rcode.NOTIMP)
            assert found.opcode() == dns.opcode.NOTIFY

    run(test)


#: Two of each length: what is said of one is said of the other, but for names that share labels
#: with those of the SOA record.
DENIED = [
    *("a.svc", "a.dns", "b.svc", "b.DNS", "ab.svc", "AB.Svc", "ab.shop.svc", "ba.shop.svc"),
    *("hostmasteq", "hostmaster", "a.hostmasteq", "a.hostmaster", "longer-name.shop.svc"),
    *("web.shop.svc", "few.shop.svc", "dns.dns", "svc.dns", "dns.svc", "shop.svc"),
    *(f"{'a' * 63}.{'b' * 63}.svc", f"{'b' * 63}.{'a' * 63}.svc"),
]


@pytest.mark.parametrize("edns", [{}, {"use_edns": 0, "payload": 4096}], ids=["plain", "edns"])
@pytest.mark.parametrize("flags", [0, dns.flags.RD], ids=["iterative", "recursive"])
@pytest.mark.parametrize("recursion", [[], ["127.0.0.0/8"]], ids=["nobody", "somebody"])
def test_what_is_denied_is_rendered_as_dnspython_does(
    edns: dict[str, int], flags: int, recursion: list[str]
) -> None:
    async def test() -> None:
        names = names_of(OBJECTS)
        async with serving(names, recursion=recursion) as (_, port):
            first_said: dict[str, int] = {}
            for name in [*DENIED, *DENIED]:
                kind = "TXT" if len(name) % 2 else "AAAA"
                query = dns.message.make_query(f"{name}.{ZONE}", kind, flags=flags, **edns)
                wire = await exchange(port, query.to_wire())
                serial = first_said.setdefault(name, names.serial)  # it is kept
                said = f"ns.dns.{ZONE} hostmaster.{ZONE} {serial} 7200 1800 86400 5"
                wanted = dns.message.make_response(query, bool(recursion), 1232)
                wanted.flags |= dns.flags.AA
                exists = name.lower() in ("web.shop.svc", "few.shop.svc", "shop.svc")
                wanted.set_rcode(dns.rcode.NOERROR if exists else dns.rcode.NXDOMAIN)
                wanted.authority = [dns.rrset.from_text(ZONE, 5, "IN", "SOA", said)]
                assert wire == wanted.to_wire(), name
                if name == "ab.svc":
                    names.replace(ServiceRef("shop", "many"), None, [])

    run(test)


async def exchange(port: int, wire: bytes) -> bytes | None:
    """What comes back, before the answer to a good question that is sent behind it."""
    loop = asyncio.get_running_loop()
    behind = dns.message.make_query(WEB, "A")
    behind.id = int.from_bytes(wire[:2].ljust(2, b"\0")) ^ 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(("127.0.0.1", port))
        await loop.sock_sendall(sock, wire)
        await loop.sock_sendall(sock, behind.to_wire())
        found = await loop.sock_recv(sock, 65535)
        return None if int.from_bytes(found[:2]) == behind.id else found


QUERY = dns.message.make_query(WEB, "A").to_wire()
FORMERR = [
    ("no question", bytes.fromhex("1234 0100 0000 0000 0000 0000")),
    ("two questions", bytes.fromhex("1234 0100 0002 0000 0000 0000") + QUERY[12:] * 2),
    ("an answer", bytes.fromhex("1234 0100 0001 0001 0000 0000") + QUERY[12:]),
    ("three additional records", bytes.fromhex("1234 0100 0001 0000 0000 0003") + QUERY[12:]),
    ("an end in the name", QUERY[:20]),
    ("a name that points to itself", QUERY[:12] + bytes.fromhex("c00c 0001 0001")),
    ("one that points ahead", QUERY[:12] + bytes.fromhex("c010 0001 0001 00")),
    ("two that point to each other", QUERY[:12] + bytes.fromhex("c00e c00c 0001 0001")),
    ("a label of a kind that is none", QUERY[:12] + bytes.fromhex("8001 00 0001 0001")),
    ("a name that is too long", QUERY[:12] + (b"\x3f" + b"a" * 63) * 5 + bytes(5)),
    ("something behind it", QUERY + b"more"),
]


@pytest.mark.parametrize(("wire"), [wire for _, wire in FORMERR], ids=[name for name, _ in FORMERR])
def test_what_is_malformed_gets_a_header(wire: bytes) -> None:
    async def test() -> None:
        async with serving(names_of(OBJECTS)) as (_, port):
            found = await exchange(port, wire)
            assert found is not None
            assert len(found) == 12
            assert found[:2] == wire[:2]
            assert dns.message.from_wire(found).rcode() == dns.rcode.FORMERR

    run(test)


@pytest.mark.parametrize(
    ("reason", "wire"),
    [("malformed", b""), ("malformed", QUERY[:11]), ("response", QUERY[:2] + b"\x81" + QUERY[3:])],
)
def test_silence(reason: str, wire: bytes) -> None:
    async def test() -> None:
        async with serving(names_of(OBJECTS)) as (server, port):
            assert await exchange(port, wire) is None
            assert server.dropped == {reason: 1}

    run(test)


def test_one_client_cannot_starve_another() -> None:
    """Fifty times as many questions as one may ask; somebody else's are answered all the same."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with serving(names_of(OBJECTS), rate=100) as (server, port):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as flood:
                flood.bind(("127.0.0.2", 0))
                flood.connect(("127.0.0.1", port))
                for number in range(10_000):
                    name = f"{number:x}.shop.{SVC}"
                    await loop.sock_sendall(flood, dns.message.make_query(name, "A").to_wire())
                    if number % 100 == 0:
                        assert answers(await ask(port, WEB)) == ["10.96.0.10"]
            assert server.responses["NOERROR"] == 100
            assert server.dropped["limited"] > 5_000

    run(test)


def test_what_takes_longer_counts_for_more() -> None:
    """Or one client who asks for all of a large Service would take what others need."""

    async def test() -> None:
        async with serving(names_of(OBJECTS), rate=1) as (server, port):
            assert len(answers(await ask(port, f"many.shop.{SVC}", tcp=True))) == 300
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(dns.message.make_query(WEB, "A").to_wire(), ("127.0.0.1", port))
                await until(lambda: server.dropped["limited"] == 1)
            assert answers(await ask(port, WEB, where="::1")) == ["10.96.0.10"]

    run(test)


@contextmanager
def lookups(server: DnsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names that are looked up: none for what is kept."""
    looked: list[str] = []
    look = server.resolver.look

    def counted(name: Any, *args: Any, **more: Any) -> Any:
        looked.append(str(name))
        return look(name, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(server.resolver, "look", counted)
        yield looked


def test_a_change_costs_what_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {**endpoints("one", 1), "ports": [{"name": "http", "port": 80}]}
    one["endpoints"][0]["hostname"] = "host"
    moved = {**one, "endpoints": [{"addresses": ["10.1.9.9"], "hostname": "host"}]}
    alias = service("alias", "", type="ExternalName", externalName=f"host.one.shop.{SVC}")
    objects = [*OBJECTS, service("one", "None"), one, alias]
    srv, host = f"_http._tcp.one.shop.{SVC}", f"host.one.shop.{SVC}"
    questions = [
        *((WEB, "A"), (srv, "SRV"), (host, "A"), (f"alias.shop.{SVC}", "A")),
        *((f"new.shop.{SVC}", "A"), (f"x.new.shop.{SVC}", "A"), (f"nobody.shop.{SVC}", "A")),
    ]

    async def test() -> None:
        names = names_of(objects)
        async with serving(names) as (server, port):

            async def again(*changed: str) -> None:
                """Only these are looked up, and all is as by a server that knows nothing else."""
                with lookups(server, monkeypatch) as looked:
                    found = [await ask(port, name, kind) for name, kind in questions]
                assert looked == [name for name, _ in questions if name in changed]
                async with serving(names) as (_, other):
                    for (name, kind), each in zip(questions, found, strict=True):
                        fresh = await ask(other, name, kind)
                        assert each.rcode() == fresh.rcode()
                        assert each.answer == fresh.answer
                        assert each.additional == fresh.additional

            for name, kind in questions:
                await ask(port, name, kind)
            await again()
            for (name, kind), more in (
                (("db", "10.96.0.50"), ()),
                (("new", "10.96.0.51"), (f"new.shop.{SVC}",)),
            ):
                [made] = decode_value(service(name, kind))
                names.replace(made.ref, made, [])
                await again(*more)
            [headless], [slice_] = decode_value(service("one", "None")), decode_value(moved)
            serial = names.serial
            names.replace(headless.ref, headless, [slice_])
            assert names.serial == serial + 1
            # By its name, by what names it, and by what is an alias of it.
            await again(srv, host, f"alias.shop.{SVC}")
            # Nothing is another name.
            names.replace(headless.ref, headless, [slice_])
            assert names.serial == serial + 1
            await again()

    run(test)


def test_of_too_many_changes_not_all_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_module, "CHANGED_MAX", 8)
    names = names_of(OBJECTS)
    since = names.changes
    key = names_module.key_of(dns.name.from_text(WEB))
    assert names.holds([key], since)
    for number in range(20):
        [made] = decode_value(service(f"n{number}", "10.96.0.50"))
        names.replace(made.ref, made, [])
        assert names.holds([key], names.changes)
    assert not names.holds([key], since)


def test_short_responses_alone_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """By TCP they may be a hundred times as long, and many are kept."""
    twins = endpoints("twins", 40)
    twins["ports"] = [{"name": "http", "port": 80}]
    for each in twins["endpoints"]:
        each["hostname"] = "one"

    async def test() -> None:
        names = names_of([*OBJECTS, service("twins", "None"), twins])
        async with serving(names) as (server, port):
            with lookups(server, monkeypatch) as looked:
                for name, kind in ((WEB, "A"), (f"_http._tcp.twins.shop.{SVC}", "SRV")):
                    for _ in range(2):
                        assert len(answers(await ask(port, name, kind, tcp=True))) == 1
            assert looked == [WEB, *[f"_http._tcp.twins.shop.{SVC}"] * 2]

    run(test)


def test_who_waits_for_upstreams_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_module, "CLIENT_WAITING", 3)

    async def test() -> None:
        silent = FakeUpstream(lambda query: None)
        async with (
            silent as upstream,
            serving(names_of(OBJECTS), upstream, time=60, try_time=60) as (_, port),
        ):
            waiting = [asyncio.create_task(ask(port, f"{n}.example.")) for n in range(3)]
            await until(lambda: len(silent.questions) == 3)
            assert (await ask(port, "more.example.")).rcode() == dns.rcode.SERVFAIL
            assert answers(await ask(port, WEB)) == ["10.96.0.10"]
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    run(test)


def test_tcp_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_module, "CLIENT_STREAMS", 2)

    async def test() -> None:
        async with serving(names_of(OBJECTS)) as (server, port):
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            query = dns.message.make_query(WEB, "A").to_wire()
            for reader, writer in held:  # both are served, question by question
                for _ in range(2):
                    writer.write(len(query).to_bytes(2) + query)
                    await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
            reader, third = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b""
            assert server.dropped["busy"] == 1
            # Others have room.
            assert answers(await ask(port, WEB, where="::1", tcp=True)) == ["10.96.0.10"]
            for writer in (third, *(each for _, each in held)):
                writer.close()

    run(test)


def test_an_idle_tcp_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_module, "IDLE_TIME", 0.05)

    async def test() -> None:
        async with serving(names_of(OBJECTS)) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b""
            writer.close()

    run(test)


def test_a_tcp_client_that_sends_too_slowly_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_module, "MESSAGE_TIME", 0.05)

    async def test() -> None:
        async with serving(names_of(OBJECTS)) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write((512).to_bytes(2) + QUERY)  # the rest of it never comes
            assert await reader.read() == b""
            writer.close()

    run(test)


def test_names_of_others_are_for_those_who_may_ask() -> None:
    async def test() -> None:
        async with (
            FakeUpstream(records("example. 60 IN A 192.0.2.1")) as upstream,
            serving(names_of(OBJECTS), upstream, recursion=["127.0.0.0/8"]) as (_, port),
        ):
            assert answers(await ask(port, "example.")) == ["192.0.2.1"]
            refused = await ask(port, "example.", where="::1")
            assert refused.rcode() == dns.rcode.REFUSED
            assert not refused.flags & dns.flags.RA
            assert answers(await ask(port, WEB, where="::1")) == ["10.96.0.10"]
            undesired = await ask(port, "example.", flags=0)
            assert undesired.rcode() == dns.rcode.REFUSED

    run(test)


def test_the_answer_comes_from_the_address_that_was_asked() -> None:
    async def test() -> None:
        async with serving(names_of(OBJECTS)) as (server, _):
            port = await server.open("0.0.0.0", 0)
            # dnspython refuses an answer from elsewhere.
            assert answers(await ask(port, WEB, where="127.0.0.3")) == ["10.96.0.10"]
            port = await server.open("::", 0)
            assert answers(await ask(port, WEB, where="::1")) == ["10.96.0.10"]

    run(test)


def test_queries_are_logged_on_request(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving(names_of(OBJECTS), log_queries=True) as (_, port):
            await ask(port, WEB)

    caplog.set_level("INFO")
    run(test)
    [record] = [each for each in caplog.records if each.message == "query"]
    said = (record.question, record.client, record.protocol, record.code)
    assert said == (f"{WEB} A", "127.0.0.1", "udp", "NOERROR")


def test_an_address_that_is_not_ours() -> None:
    async def test() -> None:
        async with serving(names_of(OBJECTS)) as (server, port):
            with pytest.raises(PlatformError, match=r"192\.0\.2\.1, port 0"):
                await server.open("192.0.2.1", 0)
            with pytest.raises(PlatformError, match=f"port {port}"):
                await server.open("127.0.0.1", port)
            await server.open("192.0.2.1", 0, freebind=True)
            await server.open("2001:db8::1", 0, freebind=True)

    run(test)
