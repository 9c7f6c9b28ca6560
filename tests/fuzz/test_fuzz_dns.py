"""Questions and upstreams' answers with anything in them: no crash, no lie, no long answer."""

from __future__ import annotations

import asyncio
import logging
import random
import socket

import dns.message
import dns.rcode
import pytest
from dnslab import SVC, FakeUpstream, answers, ask, names_of, records, run, serving

from svcdp.discovery.upstream import PAYLOAD

WEB = f"web.shop.{SVC}"
OBJECTS = [
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.10", "ports": [{"name": "http", "port": 80}]},
    }
]
QUESTIONS = [
    dns.message.make_query(WEB, "A").to_wire(),
    dns.message.make_query(f"_http._tcp.{WEB}", "SRV", use_edns=0, payload=4096).to_wire(),
    dns.message.make_query("example.", "TXT", want_dnssec=True).to_wire(),
]
ROUNDS = 4000


def mutated(wire: bytes, dice: random.Random) -> bytes:
    found = bytearray(wire)
    for _ in range(dice.randrange(1, 5)):
        at = dice.randrange(2, len(found) + 1)  # the number stays: by it answers are told
        match dice.randrange(4):
            case 0:
                found[at : at + dice.randrange(4)] = dice.randbytes(dice.randrange(4))
            case 1:
                found[at : at + 2] = bytes((0xC0 | dice.randrange(2), dice.randrange(64)))
            case 2:
                del found[at + dice.randrange(8) :]
            case _:
                found += found[dice.randrange(len(found)) :][:200]
    return bytes(found)


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_questions(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        dice = random.Random(seed)
        loop = asyncio.get_running_loop()
        async with (
            FakeUpstream(records("example. 60 IN TXT hello")) as upstream,
            serving(names_of(OBJECTS), upstream, rate=0) as (server, port),
        ):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.connect(("127.0.0.1", port))
                for _ in range(ROUNDS):
                    wire = mutated(dice.choice(QUESTIONS), dice)
                    await loop.sock_sendall(sock, wire)
                    silent = sum(server.dropped.values())
                    while sum(server.dropped.values()) == silent:
                        try:
                            found = sock.recv(65535)
                        except BlockingIOError:
                            await asyncio.sleep(0)
                            continue
                        assert found[:2] == wire[:2]
                        assert found[2] & 0x80
                        assert len(found) <= PAYLOAD
                        dns.message.from_wire(found)
                        break
                assert answers(await ask(port, WEB)) == ["10.96.0.10"]
                assert {"FORMERR", "NOERROR", "NOTIMP", "NXDOMAIN"} <= set(server.responses)

    run(test)
    assert [each for each in caplog.records if each.levelno >= logging.ERROR] == []


def test_mutated_answers_of_upstreams(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        dice = random.Random(3)

        def script(query: dns.message.Message) -> bytes:
            name = query.question[0].name.to_text()
            lines = (f"{name} 60 IN CNAME b.example.", "b.example. 60 IN A 192.0.2.1")
            return mutated(records(*lines)(query).to_wire(), dice)

        codes = set()
        async with (
            FakeUpstream(script) as upstream,
            serving(names_of(OBJECTS), upstream, rate=0, try_time=0.5) as (_, port),
        ):
            for start in range(0, 300, 100):
                asked = (ask(port, f"{start + n}.example.") for n in range(100))
                codes |= {found.rcode() for found in await asyncio.gather(*asked)}
            assert answers(await ask(port, WEB)) == ["10.96.0.10"]
        assert {dns.rcode.NOERROR, dns.rcode.SERVFAIL} <= codes

    run(test)
    assert [each for each in caplog.records if each.levelno >= logging.ERROR] == []
