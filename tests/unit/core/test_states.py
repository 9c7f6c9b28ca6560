"""The state machines of TCP and SCTP, every state, event and machine, against `ipvs_states`."""

from __future__ import annotations

import struct
from itertools import product

import inlines
import ipvs_states as ipvs
import pytest
import wire
from hypothesis import given
from hypothesis import strategies as st
from ipvs_states import SCTP, TCP, UDP

from svcdp._core.engine import STATES
from svcdp.dataplane import TIMEOUTS

core = inlines.load()

MACHINES = ("in", "out", "in only")
#: Flags of packets, and the event that they are: RST before SYN before FIN before ACK.
FLAGS = {
    "S": "S", "SA": "S", "SF": "S", "F": "F", "FA": "F", "A": "A", "PA": "A", "R": "R", "RA": "R",
    "RS": "R", "RF": "R", "P": "", "": "",
}  # fmt: skip
#: Chunk types (RFC 9260, 3.2).
CHUNKS = {
    "data": 0, "init": 1, "init ack": 2, "abort": 6, "shutdown": 7, "shutdown ack": 8, "error": 9,
    "cookie echo": 10, "cookie ack": 11, "shutdown complete": 14,
}  # fmt: skip
#: SACK, HEARTBEAT and its answer, ECNE, CWR, AUTH, I-DATA, FORWARD-TSN, and no type at all.
LIKE_DATA = (3, 4, 5, 12, 13, 15, 64, 192, 255)
NO_EVENT = 255


def number(protocol: int, state: str) -> int:
    return STATES.index(ipvs.NAMES[protocol][state])


def machine_number(machine: str) -> int:
    direction, secure = machine.removeprefix("secure "), machine.startswith("secure ")
    result = core.machine(1 if direction == "out" else 0, direction == "in only", secure)
    assert isinstance(result, int)
    return result


def tcp_event(flags: str) -> int:
    packet = bytes(wire.packet("tcp", "192.0.2.4", 1, "10.96.0.1", 2, flags))
    return int(core.event(packet))


def chunk(kind: int, value: bytes = bytes(4), length: int | None = None) -> bytes:
    return struct.pack("!BBH", kind, 0, 4 + len(value) if length is None else length) + value


def sctp(*chunks: bytes) -> bytes:
    header = struct.pack("!HHII", 1, 2, 7, 0)
    return bytes(wire.ip("192.0.2.4", "10.96.0.1", wire.SCTP, header + b"".join(chunks)))


@pytest.mark.parametrize("machine", [*MACHINES, *(f"secure {m}" for m in MACHINES)])
def test_tcp(machine: str) -> None:
    for state, (flags, event) in product(ipvs.NAMES[TCP], FLAGS.items()):
        after = core.step(TCP, number(TCP, state), machine_number(machine), tcp_event(flags))
        assert STATES[after] == ipvs.NAMES[TCP][ipvs.tcp_next(machine, state, event)], (
            state,
            flags,
        )


@pytest.mark.parametrize("machine", MACHINES)
def test_sctp(machine: str) -> None:
    for state, (event, kind) in product(ipvs.NAMES[SCTP], CHUNKS.items()):
        expected = ipvs.NAMES[SCTP][ipvs.sctp_next(machine, state, event)]
        for machine_name in (machine, f"secure {machine}"):
            after = core.step(
                SCTP,
                number(SCTP, state),
                machine_number(machine_name),
                core.event(sctp(chunk(kind))),
            )
            assert STATES[after] == expected, (state, event)


def test_replies_end_the_in_only_machine_of_no_other_direction() -> None:
    assert machine_number("out") == core.machine(1, True, False)
    assert len({machine_number(m) for m in (*MACHINES, *(f"secure {m}" for m in MACHINES))}) == 6


def test_names_and_timeouts() -> None:
    names = [name for states in ipvs.NAMES.values() for name in states.values()]
    assert sorted(names) == sorted(STATES)
    for protocol, states in ipvs.NAMES.items():
        for state, name in states.items():
            assert TIMEOUTS[name.lower()] == ipvs.TIMEOUTS[protocol][state]
    assert len(TIMEOUTS) == len(STATES)


def test_what_states_mean() -> None:
    half_open = {"SYN_RECV", "SYNACK", "SCTP_INIT1", "SCTP_INIT"}
    closed = {"TIME_WAIT", "CLOSE", "SCTP_CLOSED"}
    active = {ipvs.NAMES[p][state] for p, states in ipvs.ACTIVE.items() for state in states}
    for index, name in enumerate(STATES):
        assert core.kind_of(index) == (name in active, name in half_open, name in closed)


def test_the_kernels_order() -> None:
    """In which the sync protocol numbers states, from 0 in each protocol."""
    orders = {TCP: STATES[:11], UDP: STATES[11:12], SCTP: STATES[12:]}
    for protocol, names in orders.items():
        assert names == tuple(ipvs.NAMES[protocol].values())
        assert STATES[core.first(protocol)] == names[0]


@pytest.mark.parametrize("kind", LIKE_DATA)
def test_other_chunks_are_like_data(kind: int) -> None:
    assert core.event(sctp(chunk(kind))) == core.event(sctp(chunk(0)))


def test_an_abort_behind_a_cookie_is_what_counts() -> None:
    abort = core.event(sctp(chunk(6)))
    for kind in (10, 11):
        for value in (b"", bytes(4), bytes(6), bytes(7)):
            padding = bytes(-len(value) % 4)
            assert core.event(sctp(chunk(kind, value), padding, chunk(6))) == abort
            assert core.event(sctp(chunk(kind, value), padding, chunk(7))) != abort
            # An abort whose header is not all there, or is behind another chunk.
            assert core.event(sctp(chunk(kind, value), padding, chunk(6)[:3])) != abort
            assert core.event(sctp(chunk(kind, value), padding, chunk(0), chunk(6))) != abort
        for length in (0, 3, 0xFFFC, 0xFFFF):
            assert core.event(sctp(chunk(kind, chunk(6), length))) != abort
    assert core.event(sctp(chunk(0, b""), chunk(6))) != abort


def test_without_a_chunk_nothing_happens() -> None:
    for rest in (b"", b"\6", b"\6\0\0"):
        packet = sctp(rest)
        assert core.event(packet) == NO_EVENT
        assert not core.begins(packet, True)
        assert not core.opens_again(packet)
    for state in ipvs.NAMES[SCTP]:
        assert core.step(SCTP, number(SCTP, state), 0, NO_EVENT) == number(SCTP, state)
    packet = bytes(wire.packet("udp", "192.0.2.4", 1, "10.96.0.1", 2))
    assert core.event(packet) == NO_EVENT


@given(rest=st.binary(max_size=40))
def test_any_chunks(rest: bytes) -> None:
    """Read where they are, and no further: the arena ends behind the packet."""
    first = next((name for name, kind in CHUNKS.items() if rest[:1] == bytes([kind])), "data")
    expected = NO_EVENT
    if len(rest) >= 4:
        length = int.from_bytes(rest[2:4], "big")
        second = rest[length + -length % 4 :]
        if first.startswith("cookie") and length >= 4 and len(second) >= 4 and second[0] == 6:
            first = "abort"
        expected = core.event(sctp(chunk(CHUNKS[first])))
    assert core.event(sctp(rest)) == expected


@pytest.mark.parametrize("flags", FLAGS)
def test_what_begins_a_tcp_connection(flags: str) -> None:
    packet = bytes(wire.packet("tcp", "192.0.2.4", 1, "10.96.0.1", 2, flags))
    assert core.begins(packet, False) == ("S" in flags and "R" not in flags)
    assert core.begins(packet, True) == ("R" not in flags)
    assert core.opens_again(packet) == ("S" in flags)


@pytest.mark.parametrize("kind", [*CHUNKS.values(), *LIKE_DATA])
def test_what_begins_an_sctp_association(kind: int) -> None:
    packet = sctp(chunk(kind))
    assert core.begins(packet, False) == core.opens_again(packet) == (kind == 1)
    assert core.begins(packet, True) == (kind != 6)


def test_errors_change_no_state() -> None:
    about = bytes(wire.packet("tcp", "10.96.0.1", 2, "192.0.2.4", 1, "R"))
    assert core.event(bytes(wire.icmp_error(about, "192.0.2.4"))) == NO_EVENT
