"""Connections in a file: what comes back, and what a file that is not in order does."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bench import CLIENT, VIRTUAL, Bench
from hypothesis import given, settings
from hypothesis import strategies as st

from svcdp import PlatformError, Reason, SourceRule, Verdict
from svcdp.errors import StateError
from svcdp.ipvs.saved import DIGEST_SIZE, HEADER, VERSION, load, restore, save
from svcdp.status import IN_SEQ, OUT_SEQ, TEMPLATE, ConnectionState, SequenceShift

REAL = ("10.1.0.7", 8080)
REAL6 = ("fd01::7", 8080)

WEB = ConnectionState(
    protocol="tcp",
    client="192.0.2.4",
    client_port=40000,
    virtual="10.96.0.10",
    virtual_port=80,
    destination="10.1.0.7",
    destination_port=8080,
    source="198.51.100.1",
    source_port=1024,
    state="ESTABLISHED",
    timeout=900.0,
    expires_in=899.5,
    flags=0x20,
    fwmark=7,
    packets=1234,
)


def at(moment: float) -> Callable[[], float]:
    return lambda: moment


def served() -> Bench:
    bench = Bench()
    bench.serve(REAL)
    bench.serve(REAL6, address=VIRTUAL[6])
    bench.serve(("10.1.0.7", 5353), port=53, protocol="udp")
    return bench


def establish(bench: Bench, port: int, family: int = 4) -> None:
    there = {"port": port, "client": CLIENT[family], "to": (VIRTUAL[family], 80)}
    bench.send("S", **there)  # type: ignore[arg-type]
    bench.reply("SA", source=REAL if family == 4 else REAL6, port=port, client=CLIENT[family])
    bench.send("A", **there)  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "connections"


def test_connections_go_on_in_another_dataplane(file: Path) -> None:
    old = served()
    establish(old, 40000)
    establish(old, 40001, family=6)
    old.send(port=40002, to=(VIRTUAL[4], 53), protocol="udp")
    assert save(file, old.dp.export_connections(), clock=at(1000.0)) == (3, 0)

    new = served()
    assert restore(new.dp, file, clock=at(1010.0)) == {"created": 3}
    assert new.send("A", port=40000).reason == Reason.ESTABLISHED
    answer = new.reply("A", source=REAL, port=40000)
    assert (answer.verdict, answer.reason) == (Verdict.FORWARD, Reason.REPLY)
    assert new.send("A", port=40001, client=CLIENT[6], to=(VIRTUAL[6], 80)).destination == REAL6
    assert new.send(port=40002, to=(VIRTUAL[4], 53), protocol="udp").reason == Reason.ESTABLISHED
    assert new.send("A", port=40003).reason == Reason.NO_CONNECTION


def test_masquerade_ports_stay(file: Path) -> None:
    def bench() -> Bench:
        bench = Bench()
        bench.serve(REAL, masquerade_address="198.51.100.1", rules=(SourceRule(masquerade=True),))
        return bench

    old = bench()
    old.send()
    source = (old.connection().source, old.connection().source_port)
    assert source[0] == "198.51.100.1"
    save(file, old.dp.export_connections())
    new = bench()
    restore(new.dp, file)
    assert (new.connection().source, new.connection().source_port) == source
    answer = new.reply(source=REAL, client=source[0], port=source[1])
    assert answer.next_hop == CLIENT[4]


def test_clients_stay_bound(file: Path) -> None:
    reals = [(f"10.1.0.{i}", 8080) for i in range(1, 9)]
    old, new = Bench(seed=1), Bench(seed=2)
    for bench in (old, new):
        bench.serve(*reals, persistence=600, scheduler="rr")
    for client in range(1, 9):
        old.send(client=f"192.0.2.{client}")
    bound = {c.client: c.destination for c in old.connections()}
    templates = [state for state in old.dp.export_connections() if state.flags & TEMPLATE]
    save(file, templates)
    assert restore(new.dp, file) == {"created": 8}
    for client in reversed(bound):
        new.send(client=client, port=50000)
    assert {c.client: c.destination for c in new.connections()} == bound


def test_shifted_sequence_numbers_stay(file: Path) -> None:
    shifts = (SequenceShift(2**32 - 1, 5, -5), SequenceShift(0, -(2**31), 2**31 - 1))
    states = [WEB, replace(WEB, sequences=shifts), WEB]
    save(file, states)
    assert [*load(file)] == states


def test_the_time_in_between_has_passed(file: Path) -> None:
    old = served()
    establish(old, 40000)
    old.send(port=40001)
    save(file, old.dp.export_connections(), clock=at(1000.0))
    new = served()
    assert restore(new.dp, file, clock=at(1100.0)) == {"created": 1, "expired": 1}
    assert new.connection().expires_in == pytest.approx(800)


def test_a_clock_that_went_back_changes_nothing(file: Path) -> None:
    old = served()
    establish(old, 40000)
    save(file, old.dp.export_connections(), clock=at(1000.0))
    new = served()
    assert restore(new.dp, file, clock=at(0.0)) == {"created": 1}
    assert new.connection().expires_in == pytest.approx(900)


def test_what_is_no_longer_served_is_left_out(file: Path) -> None:
    old = served()
    establish(old, 40000)
    establish(old, 40001, family=6)
    old.send(port=40002, to=(VIRTUAL[4], 53), protocol="udp")
    save(file, old.dp.export_connections())
    new = Bench()
    new.serve(("10.1.0.8", 8080))
    new.serve(REAL6, address=VIRTUAL[6])
    assert restore(new.dp, file) == {"created": 1, "no_destination": 1, "no_service": 1}
    assert restore(new.dp, file) == {"updated": 1, "no_destination": 1, "no_service": 1}


def test_a_table_that_is_too_small(file: Path) -> None:
    old = served()
    for port in range(40000, 40010):
        establish(old, port)
    save(file, old.dp.export_connections())
    new = Bench(max_connections=4)
    new.serve(REAL)
    assert restore(new.dp, file) == {"created": 4, "full": 6}


# -- the file ------------------------------------------------------------------------------------


def test_a_file_is_private_and_replaced_at_once(file: Path) -> None:
    save(file, [WEB])
    first = file.stat()
    assert first.st_mode & 0o777 == 0o600

    def failing() -> object:
        yield WEB
        raise RuntimeError

    with pytest.raises(RuntimeError):
        save(file, failing())  # type: ignore[arg-type]
    assert file.stat().st_ino == first.st_ino
    save(file, [])
    assert list(load(file)) == []
    assert [entry.name for entry in file.parent.iterdir()] == ["connections"]


def test_what_is_in_the_place_of_the_draft_is_not_followed(file: Path) -> None:
    """Whoever may write to the folder must not have another file overwritten, or read ours."""
    draft = file.with_name(f".{file.name}.new")
    other = file.with_name("other")
    other.write_text("mine")
    draft.symlink_to(other)
    save(file, [WEB])
    assert other.read_text() == "mine"
    assert not file.is_symlink()
    draft.write_text("left by a crash")
    draft.chmod(0o644)
    save(file, [WEB])
    assert file.stat().st_mode & 0o777 == 0o600
    assert [*load(file)] == [WEB]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match=r"cannot save connections to .*: No such file") as info:
        save(tmp_path / "missing" / "connections", [])
    assert info.value.errno == errno.ENOENT


def test_a_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(PlatformError, match="cannot read connections from") as info:
        load(file)
    assert info.value.errno == errno.ENOENT


def test_what_cannot_be_saved_keeps_no_other_from_it(file: Path) -> None:
    changes = ({"protocol": "icmp"}, {"state": "OPEN"}, {"client": "me"}, {"packets": -1})
    assert save(file, [WEB, *(replace(WEB, **change) for change in changes), WEB]) == (2, 4)
    assert [*load(file)] == [WEB, WEB]


def test_what_is_no_such_file(file: Path) -> None:
    for data in (b"", b"svcdp", b"something else entirely, and long enough to be a header"):
        file.write_bytes(data)
        with pytest.raises(StateError, match="has no connections of svcdp"):
            load(file)


def test_a_file_of_a_later_version_says_so(file: Path) -> None:
    save(file, [WEB])
    data = bytearray(file.read_bytes())
    data[8:12] = (VERSION + 1).to_bytes(4, "big")
    file.write_bytes(data)
    with pytest.raises(StateError, match="format 3 of saved connections; this svcdp has 2"):
        load(file)


def test_a_file_that_was_cut_off(file: Path) -> None:
    save(file, [WEB, WEB])
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(StateError, match=str(file)):
            load(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(StateError, match="bytes instead of"):
        load(file)


def test_a_flipped_bit_is_seen_and_nothing_is_taken(file: Path) -> None:
    old = served()
    establish(old, 40000)
    save(file, old.dp.export_connections())
    data = file.read_bytes()
    new = served()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(StateError):
            restore(new.dp, file)
    assert new.connections() == []


def forge(file: Path, count: int, records: bytes) -> None:
    """A file whose checksum is right, of the year 1970."""
    save(file, [], clock=at(0))
    magic, version, _, _, saved_at = HEADER.unpack_from(file.read_bytes())
    header = HEADER.pack(magic, version, count, len(records), saved_at)
    digest = hashlib.sha256(records + header).digest()
    file.write_bytes(header + digest + records)


def test_nonsense_with_a_right_checksum_is_seen_too(file: Path) -> None:
    save(file, [WEB])
    record = file.read_bytes()[HEADER.size + DIGEST_SIZE :]
    for count, records in (
        (2, record),
        (0, record),
        (1, record[:-1]),
        (1, record[:10]),
        (1, b"\5" + record[1:]),
        (1, record[:1] + b"\0" + record[2:]),
        (1, record[:2] + b"\1" + record[3:]),
        (1, record[:3] + b"\xff" + record[4:]),
        (1 << 63, record),
    ):
        forge(file, count, records)
        with pytest.raises(StateError):
            load(file)


def test_random_records_never_hurt(file: Path) -> None:
    """Damage behind a right checksum gets as far as the connection table."""
    draw = random.Random(1)
    old, bench = served(), served()
    for each in (old, bench):
        each.serve(REAL, port=81, persistence=600)
    establish(old, 40000)
    establish(old, 40001, family=6)
    old.send(port=40002, to=(VIRTUAL[4], 53), protocol="udp")
    old.send(to=(VIRTUAL[4], 81))
    # And one that a helper has shifted, where nobody helps.
    shifts = (SequenceShift(1, 2, 3), SequenceShift(4, 5, 6))
    states = [*old.dp.export_connections(), replace(WEB, fwmark=0, sequences=shifts)]
    count = save(file, states).written
    records = file.read_bytes()[HEADER.size + DIGEST_SIZE :]
    outcomes: Counter[str] = Counter()
    for _ in range(500):
        damaged = bytearray(records)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        forge(file, count, bytes(damaged))
        try:
            outcomes += restore(bench.dp, file, clock=at(draw.choice((0, 400))))
        except StateError:
            outcomes["error"] += 1
    kinds = {"created", "updated", "no_service", "no_destination", "refused", "expired", "error"}
    assert {*outcomes} == kinds
    assert len(bench.connections()) <= outcomes["created"]
    assert bench.send("A", port=40000).reason == Reason.ESTABLISHED


U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFFFFFF)
I32 = st.integers(-(1 << 31), (1 << 31) - 1)
SHIFT = st.builds(SequenceShift, U32, I32, I32)
SECONDS = st.integers(0, 1 << 40).map(lambda ms: ms / 1000)


def connections(version: int) -> st.SearchStrategy[ConnectionState]:
    addresses = st.ip_addresses(v=version).map(str)
    return st.builds(
        ConnectionState,
        protocol=st.just("tcp"),
        client=addresses,
        client_port=U16,
        virtual=addresses,
        virtual_port=U16,
        destination=st.ip_addresses().map(str),
        destination_port=U16,
        source=addresses,
        source_port=U16,
        state=st.sampled_from(["ESTABLISHED", "SYN_RECV", "NONE"]),
        timeout=SECONDS,
        expires_in=SECONDS,
        flags=U32.map(lambda flags: flags & ~(TEMPLATE | IN_SEQ | OUT_SEQ)),
        fwmark=U32,
        packets=U32,
        sequences=st.none() | st.tuples(SHIFT, SHIFT),
    )


@settings(max_examples=50)
@given(st.lists(connections(4) | connections(6), max_size=20), st.integers(0, 1 << 42))
def test_any_connections_survive(
    tmp_path_factory: pytest.TempPathFactory, states: list[ConnectionState], ms: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "any"
    assert save(file, states, clock=at(ms / 1000)).written == len(states)
    saved = load(file)
    assert (list(saved), len(saved), saved.saved_at) == (states, len(states), ms / 1000)
    os.unlink(file)
