"""Packets in fragments on their way through a dataplane, beside whole ones through another."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL
from pieces import cut, join

import svcdp
from svcdp import DestinationSpec, Reason, ServiceSpec, SourceRule, TunnelSpec, Verdict

SERVER = {4: "10.1.0.1", 6: "fd01::1"}
NODE = {4: "198.51.100.1", 6: "2001:db8:1::1"}
PORT = 40000
PAYLOAD = bytes(range(250))
HEADROOM = 64

families = pytest.mark.parametrize("family", [4, 6])
protocols = pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])


class Path:
    """A dataplane with one service, and its clock."""

    def __init__(self, family: int, protocol: str, real_port: int = 80, **fields: Any) -> None:
        self.now = 0
        self.dp = svcdp.Dataplane(64, 1, clock=lambda: self.now, masquerade_ports=(61000, 61003))
        method = {key: fields.pop(key) for key in ("method", "tunnel", "mark") if key in fields}
        real = DestinationSpec(SERVER[family], real_port, **method)
        self.dp.apply([ServiceSpec(VIRTUAL[family], 80, protocol, (real,), **fields)])

    def send(self, packet: bytes) -> tuple[Verdict, Reason, bytes]:
        result = self.dp.process(bytearray(HEADROOM) + packet, headroom=HEADROOM)
        return result.verdict, result.reason, bytes(result.packet or b"")


def request(family: int, protocol: str) -> bytes:
    payload = PAYLOAD if protocol != "sctp" else wire.INIT_CHUNK + PAYLOAD
    return bytes(wire.packet(protocol, CLIENT[family], PORT, VIRTUAL[family], 80, "S", payload))


def reply_to(sent: bytes, protocol: str) -> bytes:
    """The answer to a packet as the server got it."""
    flow = wire.read(sent)
    ends = (flow.destination, flow.destination_port, flow.source, flow.source_port)
    return bytes(wire.packet(protocol, *ends, "SA", wire.INIT_CHUNK + PAYLOAD))


def masquerading(family: int) -> dict[str, Any]:
    rules = (SourceRule(masquerade=True),)
    return {"rules": rules, "masquerade_address": NODE[family]}


@pytest.mark.parametrize("masquerade", [False, True])
@pytest.mark.parametrize("real_port", [80, 8080])
@protocols
@families
def test_as_a_whole_packet(family: int, protocol: str, real_port: int, masquerade: bool) -> None:
    """Both directions, the fragments behind the first in any order."""
    if protocol == "sctp" and (masquerade or real_port != 80):
        return  # see test_a_checksum_over_all_of_it
    fields = masquerading(family) if masquerade else {}
    pieces, whole = (Path(family, protocol, real_port, **fields) for _ in range(2))
    packet = request(family, protocol)
    draw = random.Random(1)
    for reason in (Reason.NEW, Reason.REPLY):
        sent = whole.send(packet)
        assert sent[1] == reason
        first, *others = cut(packet, 48)
        came = [pieces.send(first)]
        assert came[0][:2] == (Verdict.FORWARD, reason)
        following = Reason.ESTABLISHED if reason == Reason.NEW else reason
        later = {other: pieces.send(other) for other in draw.sample(others, len(others))}
        came += [later[other] for other in others]
        assert {(verdict, why) for verdict, why, _ in came[1:]} == {(Verdict.FORWARD, following)}
        assert join([data for _, _, data in came]) == sent[2]
        assert [len(data) for _, _, data in came] == [len(p) for p in (first, *others)]
        packet = reply_to(sent[2], protocol)


@families
def test_a_checksum_that_is_not_there(family: int) -> None:
    """UDP without one: NAT of a whole packet computes it, of a fragment it cannot."""
    path = Path(family, "udp", 8080)
    packet = bytearray(request(family, "udp"))
    at = wire.transport_at(bytes(packet)) + 6
    packet[at : at + 2] = bytes(2)
    first, *others = cut(bytes(packet), 48)
    came = [path.send(piece)[2] for piece in (first, *others)]
    joined = join(came)
    assert joined[at : at + 2] == bytes(2)
    assert wire.read(joined)[1:] == (CLIENT[family], PORT, SERVER[family], 8080)
    assert joined[at + 2 :] == packet[at + 2 :]


@families
def test_a_checksum_over_all_of_it(family: int) -> None:
    """SCTP's CRC has to be computed anew for another port, and not all that it covers is here."""
    path = Path(family, "sctp", 8080)
    first, *others = cut(request(family, "sctp"), 48)
    assert path.send(first)[:2] == (Verdict.DROP, Reason.FRAGMENT)
    for other in others:
        assert path.send(other) == (Verdict.PASS, Reason.FRAGMENT, other)


@protocols
@families
def test_through_a_tunnel(family: int, protocol: str) -> None:
    path = Path(family, protocol, method="tunnel", tunnel=TunnelSpec("ipip", NODE[family]), mark=0)
    for piece in cut(request(family, protocol), 48):
        verdict, _, sent = path.send(piece)
        assert verdict == Verdict.FORWARD
        outer = 20 if family == 4 else 40
        assert len(sent) == outer + len(piece)
        hops = (8, 10, 11) if family == 4 else (7,)
        inside = bytearray(sent[outer:])
        for at in hops:
            inside[at] = piece[at]
        assert inside == piece


@families
def test_to_a_router(family: int) -> None:
    path = Path(family, "udp", method="dr", mark=5)
    for piece in cut(request(family, "udp"), 48):
        result = path.dp.process(bytearray(piece))
        assert result.verdict == Verdict.FORWARD
        assert (result.next_hop, result.mark) == (SERVER[family], 5)
        assert bytes(result.packet or b"") == piece


@protocols
@families
def test_without_the_first(family: int, protocol: str) -> None:
    """Nobody knows their ports."""
    path = Path(family, protocol)
    first, *others = cut(request(family, protocol), 48)
    for other in others:
        assert path.send(other) == (Verdict.PASS, Reason.FRAGMENT, other)
    path.send(first)
    path.now = 30 * SECOND
    for other in others:
        assert path.send(other) == (Verdict.PASS, Reason.FRAGMENT, other)


@families
def test_of_no_service(family: int) -> None:
    path = Path(family, "udp")
    packet = wire.packet("udp", CLIENT[family], 1, VIRTUAL[family], 81, payload=PAYLOAD)
    first, *others = cut(bytes(packet), 48)
    assert path.send(first) == (Verdict.PASS, Reason.NO_SERVICE, first)
    assert path.send(others[0]) == (Verdict.PASS, Reason.FRAGMENT, others[0])


@families
def test_they_are_counted(family: int) -> None:
    path = Path(family, "udp")
    pieces = cut(request(family, "udp"), 48)
    for piece in pieces:
        path.send(piece)
    (destination,) = path.dp.services()[0].destinations
    assert destination.connections_total == 1
    assert destination.packets_in == len(pieces)
    assert destination.bytes_in == sum(map(len, pieces))


def test_many_packets_at_once() -> None:
    """Fragments of many packets, mixed, find each its own way."""
    path = Path(4, "udp", 8080)
    whole = Path(4, "udp", 8080)
    packets = {
        number: bytes(
            wire.packet("udp", CLIENT[4], number, VIRTUAL[4], 80, payload=PAYLOAD + bytes([number]))
        )
        for number in range(1, 40)
    }
    pieces = {number: cut(packet, 96, number) for number, packet in packets.items()}
    came: dict[int, list[bytes]] = {number: [] for number in packets}
    for index, number in product(range(3), packets):
        came[number].append(path.send(pieces[number][index])[2])
    for number, packet in packets.items():
        assert join(came[number]) == whole.send(packet)[2]
