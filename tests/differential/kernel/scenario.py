"""A scenario: what is done to a director, as plain data, and how two of its results compare."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import wire
from topology import MTU, SIDES

Packet = bytes | bytearray
Outcome = Any
#: [second, outcome] of each step.
Result = list[list[Any]]

TUNNELS = (4, 41, 47)
GUE_PORT = 6080
#: Of who makes an error: internetwork control (RFC 1812 4.3.2.5). Errors that pass keep theirs.
ICMP_ERROR_TOS = 0xC0


class Scenario:
    """Steps, in order. Each method adds one; ``differs`` is about the step before.

    ``mtu`` of the director's interfaces, by side. ``settings`` are svcdp's, where they are more
    than what its sysctls say.
    """

    def __init__(self, name: str, *, mtu: Mapping[str, int] | None = None, **settings: Any) -> None:
        self.name = name
        self.mtu = dict.fromkeys(SIDES, MTU) | dict(mtu or {})
        self.settings = settings
        self.steps: list[list[Any]] = []
        self.differences: dict[int, tuple[Outcome, str]] = {}

    def __str__(self) -> str:
        return self.name

    def _step(self, *words: Any) -> Scenario:
        self.steps.append([*words])
        return self

    def ipvs(self, *lines: str) -> Scenario:
        """Commands of ipvsadm."""
        return self._step("ipvs", *lines)

    def sysctl(self, name: str, value: object) -> Scenario:
        """One of net.ipv4.vs."""
        return self._step("sysctl", name, value)

    def marks(self) -> Scenario:
        """Packets to the marked networks have the firewall mark 1 from now on."""
        return self._step("marks")

    def send(self, *packets: Packet, side: str = "c") -> Scenario:
        """Let packets come in."""
        return self._step("send", side, *(bytes(packet).hex() for packet in packets))

    def wait(self, seconds: float) -> Scenario:
        return self._step("wait", seconds)

    def services(self) -> Scenario:
        """Observe schedulers, servers in their order, weights and connections."""
        return self._step("services")

    def connections(self) -> Scenario:
        """Observe connections, their states and timeouts."""
        return self._step("connections")

    def counters(self) -> Scenario:
        """Observe connections, packets and bytes. The kernel copies its numbers every 2 s."""
        return self.wait(2.1)._step("counters")

    def differs(self, ours: Outcome, why: str) -> Scenario:
        """In the step before, svcdp does this and not what the kernel does."""
        assert why
        self.differences[len(self.steps) - 1] = (ours, why)
        return self

    def data(self) -> dict[str, Any]:
        """For the guest."""
        return {"name": self.name, "mtu": self.mtu, "steps": self.steps}


def assert_same(scenario: Scenario, kernel: Result, ours: Result) -> None:
    """Compare step by step. What may differ: numbers that a packet's maker draws (`comparable`),
    a second of a timeout, and what the scenario says.
    """
    for index, step in enumerate(scenario.steps):
        theirs, mine = comparable(step[0], kernel[index][1], ours[index][1])
        where = f"{scenario}, step {index}: {' '.join(map(str, step))[:200]}"
        if index in scenario.differences:
            expected, why = scenario.differences[index]
            wanted, got = comparable(step[0], expected, ours[index][1])
            assert got == wanted, f"{where} ({why})"
            assert mine != theirs, f"{where}: no longer differs ({why})"
        else:
            assert mine == theirs, where


def comparable(kind: str, theirs: Outcome, mine: Outcome) -> tuple[Outcome, Outcome]:
    """Two outcomes of a step, without what may differ."""
    if kind == "send":
        pairs = [_comparable_packets(*pair) for pair in zip(theirs, mine, strict=True)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if kind == "connections":
        return sorted(theirs), sorted(_within_a_second(row, theirs) for row in mine)
    if kind == "services":
        return sorted(theirs), sorted(mine)
    return theirs, mine


def _comparable_packets(
    theirs: list[list[str]], mine: list[list[str]]
) -> tuple[list[list[str]], list[list[str]]]:
    """What came out for one packet.

    Where the director's own stack got it, that stack answers, and svcdp has either the same
    answer or leaves it to the host.
    """
    to_host = any(side == "host" for side, _ in mine)
    both = []
    for came in (theirs, mine):
        shown = [
            [side, data if side == "host" else comparable_packet(bytes.fromhex(data)).hex()]
            for side, data in came
        ]
        if any(side == "host" for side, _ in shown):
            shown = [out for out in shown if (out[0] == "host") == to_host]
        both.append(shown)
    return both[0], both[1]


def _within_a_second(row: list[Any], others: Iterable[list[Any]]) -> list[Any]:
    """The row of the others that says the same, give or take a second; or the row itself."""
    return next((o for o in others if o[:-1] == row[:-1] and abs(o[-1] - row[-1]) <= 1), row)


def comparable_packet(packet: bytes) -> bytes:
    """Without what is drawn by who makes a packet: the id of an IPv4 header, where it is a
    tunnel's or an ICMP error's (the kernel's has one, svcdp's has DF in its place: RFC 6864);
    the source port of GUE, with its checksum. Checksums are judged before they are masked.
    """
    if packet[0] >> 4 == 6:
        return _without_flow_port(packet, 40, packet[6])
    protocol = packet[9]
    error = protocol == wire.ICMP and packet[1] == ICMP_ERROR_TOS
    gue = protocol == wire.UDP and packet[22:24] == struct.pack("!H", GUE_PORT)
    if error or gue or protocol in TUNNELS:
        assert wire.internet_checksum(packet[:20]) == 0
        fragment = b"\0\0" if error else packet[6:8]
        packet = packet[:4] + bytes(2) + fragment + packet[8:10] + bytes(2) + packet[12:]
    return _without_flow_port(packet, 20, protocol)


def _without_flow_port(packet: bytes, at: int, protocol: int) -> bytes:
    if protocol != wire.UDP or packet[at + 2 : at + 4] != struct.pack("!H", GUE_PORT):
        return packet
    checksum = packet[at + 6 : at + 8]
    if checksum != b"\0\0":
        assert wire.is_intact(packet)
        checksum = b"\xff\xff"
    return packet[:at] + bytes(2) + packet[at + 2 : at + 6] + checksum + packet[at + 8 :]
