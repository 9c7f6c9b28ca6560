"""The callback for NetfilterQueue's users: one verdict for each packet, whatever happens."""

from __future__ import annotations

import logging

import pytest
from scapy.layers.inet import IP, TCP

from svcdp import Dataplane
from svcdp.io.netfilterqueue import handler


class FakePacket:
    """What the NetfilterQueue package hands over, keeping account of what it is told."""

    def __init__(self, packet) -> None:
        self.payload = bytes(packet)
        self.verdicts: list[str] = []

    def get_payload(self) -> bytes:
        return self.payload

    def set_payload(self, payload: bytes) -> None:
        self.payload = payload

    def accept(self) -> None:
        self.verdicts.append("accept")

    def drop(self) -> None:
        self.verdicts.append("drop")

    def repeat(self) -> None:
        self.verdicts.append("repeat")


def packet(address: str) -> FakePacket:
    return FakePacket(IP(src="192.0.2.4", dst=address) / TCP(sport=1024, dport=80, flags="S"))


@pytest.fixture
def dataplane() -> Dataplane:
    dp = Dataplane(seed=1)
    with dp.transaction() as tx:
        tx.service("10.96.0.10", 80).add("10.1.1.7", 8080)
        tx.service("10.96.0.11", 80, rules=())
    return dp


def test_forwards_the_rewritten_packet(dataplane):
    given = packet("10.96.0.10")
    handler(dataplane)(given)
    assert given.verdicts == ["accept"]
    assert IP(given.payload).dst == "10.1.1.7"


def test_drops(dataplane):
    given = packet("10.96.0.11")
    handler(dataplane)(given)
    assert given.verdicts == ["drop"]


def test_accepts_what_is_no_service(dataplane):
    given = packet("192.0.2.5")
    before = given.payload
    handler(dataplane)(given)
    assert given.verdicts == ["accept"]
    assert given.payload == before


@pytest.mark.parametrize("verdict", ["accept", "drop", "repeat"])
def test_on_pass_gives_the_verdict(dataplane, verdict):
    given = packet("192.0.2.5")
    handler(dataplane, on_pass=lambda each: getattr(each, verdict)())(given)
    assert given.verdicts == [verdict]


def test_on_pass_that_gives_none_or_several(dataplane):
    given = packet("192.0.2.5")
    handler(dataplane, on_pass=lambda each: None)(given)
    assert given.verdicts == ["accept"]
    given = packet("192.0.2.5")
    handler(dataplane, on_pass=lambda each: (each.drop(), each.accept()))(given)
    assert given.verdicts == ["drop"]


def test_on_pass_that_asks_for_a_verdict_that_there_is_not(dataplane):
    class OldPacket(FakePacket):
        def repeat(self) -> None:
            raise RuntimeError("no such verdict")

    given = OldPacket(packet("192.0.2.5").payload)
    handler(dataplane, on_pass=lambda each: each.repeat())(given)
    assert given.verdicts == ["accept"]


def test_on_pass_that_raises_is_logged_once(dataplane, caplog):
    def fail(each) -> None:
        raise RuntimeError("broken filter")

    callback = handler(dataplane, on_pass=fail)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            given = packet("192.0.2.5")
            callback(given)
            assert given.verdicts == ["accept"]
    assert callback.errors == 3
    assert [record.message for record in caplog.records].count(
        "on_pass failed; the packet is accepted"
    ) == 1


def test_a_payload_that_cannot_be_had_is_accepted(dataplane, caplog):
    class Broken(FakePacket):
        def get_payload(self) -> bytes:
            raise OSError("no payload")

    given = Broken(b"")
    handler(dataplane)(given)
    assert given.verdicts == ["accept"]


def test_an_interrupt_goes_on_after_the_verdict(dataplane):
    class Interrupted(FakePacket):
        def get_payload(self) -> bytes:
            raise KeyboardInterrupt

    given = Interrupted(b"")
    with pytest.raises(KeyboardInterrupt):
        handler(dataplane)(given)
    assert given.verdicts == ["accept"]
