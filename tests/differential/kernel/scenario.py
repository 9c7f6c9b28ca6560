"""A scenario: what is done to a director, as plain data, and how two of its results compare."""

from __future__ import annotations

import re
import struct
from bisect import insort
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from math import ceil
from typing import Any

import wire
from topology import MTU, SIDES, director

Packet = bytes | bytearray
Outcome = Any
#: [second, outcome] of each step.
Result = list[list[Any]]

GUE_PORT = 6080
GUE_PORT_BYTES = struct.pack("!H", GUE_PORT)
#: Sources of tunnels.
OWN = {ip_address(director(side, version)).packed for side in SIDES for version in (4, 6)}
FRAGMENT_HEADER = 44  # RFC 8200, 4.5
GRE = 47
#: The port of a persistence template that IPVS gave up but keeps until it expires.
GIVEN_UP = 0xFFFF
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
        self.differences: dict[int, tuple[Outcome, str, str]] = {}

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

    def send_pieces(self, *packets: Packet, side: str = "c") -> Scenario:
        """Let the fragments of one packet come in. The kernel makes one of them and then other
        fragments, svcdp forwards each; what counts is what their receiver makes of those.
        """
        return self._step("pieces", side, *(bytes(packet).hex() for packet in packets))

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

    def differs(self, ours: Outcome, why: str, until: str = "") -> Scenario:
        """In the step before, svcdp does this and not what the kernel does; or did, until a
        release mended it.
        """
        self.differences[len(self.steps) - 1] = (ours, why, until)
        return self

    def data(self) -> dict[str, Any]:
        """For the guest."""
        return {"name": self.name, "mtu": self.mtu, "steps": self.steps}


def assert_same(scenario: Scenario, kernel: Result, ours: Result, release: str = "") -> None:
    """Compare step by step, with a kernel of a release. What may differ: numbers that a packet's
    maker draws (`comparable_packet`), a second of a timeout, and what the scenario says.
    """
    slack = 1 + ceil(longest_step(scenario, kernel) - 0.5)
    for index, step in enumerate(scenario.steps):
        theirs, mine = comparable(step, kernel[index][1], ours[index][1], slack)
        where = f"{scenario}, step {index}: {' '.join(map(str, step))[:200]}"
        expected, why, until = scenario.differences.get(index, (None, "", ""))
        if why and (not until or numbers(release) < numbers(until)):
            wanted, got = comparable(step, expected, ours[index][1], slack)
            assert got == wanted, f"{where} ({why})"
            assert mine != theirs, f"{where}: no longer differs ({why})"
        else:
            assert mine == theirs, where


def numbers(release: str) -> list[int]:
    """Of the beginning of a release's name, which may go on with words."""
    return [int(number) for number in re.match(r"[\d.]*", release)[0].split(".") if number]


def longest_step(scenario: Scenario, kernel: Result) -> float:
    """Seconds, of the steps whose time counts. A packet came at some time of its step: that is
    milliseconds, or more where the guest itself had to wait for a processor.
    """
    starts = [second for second, _ in kernel]
    return max(
        (
            end - start
            for (kind, *_), start, end in zip(scenario.steps, starts, starts[1:], strict=False)
            if kind in ("send", "pieces", "connections")
        ),
        default=0.0,
    )


def comparable(
    step: list[Any], theirs: Outcome, mine: Outcome, slack: int = 1
) -> tuple[Outcome, Outcome]:
    """Two outcomes of a step, without what may differ: timeouts, by ``slack`` seconds."""
    if step[0] == "send":
        pairs = [_packets(step[1], *pair) for pair in zip(theirs, mine, strict=True)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if step[0] == "pieces":
        return whole(theirs), whole(mine)
    if step[0] == "connections":
        theirs = [row for row in theirs if row[4] != GIVEN_UP]
        mine = [_near(row, theirs, slack) for row in mine]
        return sorted(_lasting(theirs, mine, slack)), sorted(_lasting(mine, theirs, slack))
    if step[0] in ("services", "counters"):
        return sorted(theirs), sorted(mine)
    return theirs, mine


def _packets(side: str, *outcomes: list[list[str]]) -> list[list[list[str]]]:
    """What came out for one packet from a side.

    Where the director's own stack got it, that stack answers. svcdp leaves it to that stack, or
    has the same answer itself.
    """
    shown = [
        [
            (where, data if where == "host" else comparable_packet(bytes.fromhex(data)).hex())
            for where, data in came
        ]
        for came in outcomes
    ]
    places = {where for where, _ in shown[1]}
    if "host" in places:
        return [[out for out in came if out[0] == "host"] for came in shown]
    if places <= {side}:
        return [[out for out in came if out[0] != "host"] for came in shown]
    return shown


def whole(came: list[list[str]]) -> list[list[str]]:
    """The packets that their receivers have in the end, out of fragments, tunnels and the
    fragments in these, sorted. Fragments of what did not become whole stay as they are.
    """
    joined = _joined([(side, bytes.fromhex(data)) for side, data in came])
    return sorted([side, data.hex()] for side, data in _joined(map(_unwrapped, joined)))


def _joined(came: Iterable[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """What these fragments are of, in headers that do not tell fragments from each other."""
    packets: dict[tuple[str, bytes, bytes], list[tuple[int, bool, bytes]]] = {}
    done: list[tuple[str, bytes]] = []
    for side, data in came:
        if side == "host":
            done.append((side, data))
            continue
        offset, more, start, number = 0, False, 40, b""
        if data[0] >> 4 == 4:
            position, number = int.from_bytes(data[6:8], "big"), data[4:6]
            offset, more, start = (position & 0x1FFF) * 8, bool(position & 0x2000), 20
            # DF is not theirs any more.
            header = data[:2] + bytes(6) + data[8:10] + bytes(2) + data[12:20]
        elif data[6] == FRAGMENT_HEADER:
            position, number = int.from_bytes(data[42:44], "big"), data[44:48]
            offset, more, start = position & 0xFFF8, bool(position & 1), 48
            header = data[:4] + bytes(2) + data[40:41] + data[7:40]
        else:
            header = data[:4] + bytes(2) + data[6:40]
        pieces = packets.setdefault((side, header, number), [])
        if (piece := (offset, more, data[start:])) not in pieces:
            insort(pieces, piece)
        if _is_complete(pieces):
            body = b"".join(piece for _, _, piece in packets.pop((side, header, number)))
            done.append((side, header + body))
    left = (
        (side, header + offset.to_bytes(2, "big") + piece)
        for (side, header, _), pieces in packets.items()
        for offset, _, piece in pieces
    )
    return [*done, *left]


def _is_complete(pieces: list[tuple[int, bool, bytes]]) -> bool:
    ends = [0, *(offset + len(piece) for offset, _, piece in pieces)]
    return not pieces[-1][1] and all(map(int.__eq__, ends, (offset for offset, _, _ in pieces)))


def _unwrapped(came: tuple[str, bytes]) -> tuple[str, bytes]:
    """What is in a tunnel of the director."""
    side, data = came
    at, protocol, source = 40, data[6], data[8:24]
    if data[0] >> 4 == 4:
        at, protocol, source = 20, data[9], data[12:16]
    if side == "host" or source not in OWN:
        return came
    if protocol == GRE:
        at += 8 if data[at] & 0x80 else 4
    elif protocol == wire.UDP:
        at += 12
    return side, data[at:]


def _near(row: list[Any], others: Iterable[list[Any]], slack: int) -> list[Any]:
    """The row of the others that says the same, give or take seconds; or the row itself."""
    return next((o for o in others if o[:-1] == row[:-1] and abs(o[-1] - row[-1]) <= slack), row)


def _lasting(rows: list[list[Any]], others: list[list[Any]], slack: int) -> list[list[Any]]:
    """Without what ends at this time, and has ended for the others."""
    return [row for row in rows if row[-1] > slack or row in others]


def comparable_packet(packet: bytes) -> bytes:
    """Without what is drawn by who makes a packet: the id of the IPv4 header of a tunnel or an
    ICMP error (the kernel's errors have one, svcdp's have DF in its place: RFC 6864); the source
    port of GUE, with its checksum. Checksums are judged before they are masked.
    """
    made = bytearray(packet)
    at, protocol, source = 40, packet[6], packet[8:24]
    if packet[0] >> 4 == 4:
        at, protocol, source = 20, packet[9], packet[12:16]
        error = protocol == wire.ICMP and packet[1] == ICMP_ERROR_TOS
        if error or source in OWN:
            assert wire.internet_checksum(packet[:20]) == 0
            made[4:6] = made[10:12] = bytes(2)
        if error:
            made[6:8] = bytes(2)
    if source in OWN and protocol == wire.UDP and packet[at + 2 : at + 4] == GUE_PORT_BYTES:
        made[at : at + 2] = bytes(2)
        is_whole = at == 40 or not packet[6] & 0x20
        if packet[at + 6 : at + 8] != b"\0\0" and is_whole:
            assert wire.is_intact(packet)
            made[at + 6 : at + 8] = b"\xff\xff"
    return bytes(made)
