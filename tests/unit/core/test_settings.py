"""svcdp.Settings: each of IPVS's knobs does what IPVS does."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL, Bench

from svcdp import ConfigError, DestinationSpec, Reason, Settings, SourceRule, Verdict

ONE, TWO = ("10.1.1.1", 8080), ("10.1.1.2", 8080)
MARK4 = {"address": "0.0.0.0", "protocol": "fwmark"}
UNREACHABLE = (SourceRule(on_empty="unreachable"),)


def bench_of(**settings: Any) -> Bench:
    return Bench(settings=Settings(**settings))


def sctp(kind: int, *, back: tuple[str, int] | None = None) -> bytearray:
    chunk = bytes([kind, 0, 0, 4])
    if back:
        return wire.packet("sctp", *back, CLIENT[4], 40000, payload=chunk)
    return wire.packet("sctp", CLIENT[4], 40000, VIRTUAL[4], 80, payload=chunk)


# -- what is accepted ------------------------------------------------------------------------------


def test_settings_are_read_back_and_changed() -> None:
    bench = bench_of(sloppy_tcp=True)
    assert bench.dp.settings == Settings(sloppy_tcp=True)
    bench.dp.configure(Settings())
    assert bench.dp.settings == Settings()


BAD = [
    ("conn_reuse_mode", 4),
    ("conn_reuse_mode", "1"),
    ("drop_entry", -1),
    ("drop_entry", 4),
    ("drop_packet", 1.5),
    ("am_droprate", 0),
    ("am_droprate", None),
    ("answer_rate", -1),
    ("lblc_expiration", 0),
    ("lblcr_expiration", 1 << 31),
    *((f.name, 1) for f in fields(Settings) if isinstance(f.default, bool)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_bad_settings_are_named_and_change_nothing(name: str, value: Any) -> None:
    bench = bench_of(conn_reuse_mode=0)
    with pytest.raises(ConfigError, match=name):
        bench.dp.configure(replace(Settings(), **{name: value}))
    assert bench.dp.settings == Settings(conn_reuse_mode=0)
    with pytest.raises(ConfigError, match=name):
        bench_of(**{name: value})


def test_something_else_than_settings() -> None:
    with pytest.raises(ConfigError):
        Bench().dp.configure({"sloppy_tcp": True})


# -- a client port that is used again --------------------------------------------------------------


def end(bench: Bench, state: str) -> None:
    """Bring the connection of port 40000 to a state."""
    steps = {
        "CLOSE": ["A", "R"],
        "TIME_WAIT": ["A", "FA", "<FA"],
        "CLOSE_WAIT": ["A", "FA"],
        "ESTABLISHED": ["A"],
    }
    for flags in steps[state]:
        if flags[0] == "<":
            bench.reply(flags[1:], source=ONE)
        else:
            bench.send(flags)
    assert bench.connection().state == state


@pytest.mark.parametrize("state", ["CLOSE", "TIME_WAIT", "CLOSE_WAIT", "ESTABLISHED"])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_conn_reuse_mode(mode: int, state: str) -> None:
    bench = bench_of(conn_reuse_mode=mode)
    bench.serve(ONE)
    bench.send()
    end(bench, state)
    bench.serve((*ONE, 0), TWO)
    result = bench.send("S")
    is_new = mode != 0 and state in ("CLOSE", "TIME_WAIT")
    assert result.destination == (TWO if is_new else ONE)
    assert result.reason == (Reason.NEW if is_new else Reason.ESTABLISHED)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_conn_reuse_mode_of_who_sees_one_direction(mode: int) -> None:
    """Bit 2: FIN_WAIT is an end too, where nobody sees the other FIN."""
    bench = bench_of(conn_reuse_mode=mode)
    one, two = (DestinationSpec(f"10.1.1.{n}", 80, method="dr") for n in (1, 2))
    bench.serve(one)
    for flags in ("S", "A", "FA"):
        bench.send(flags)
    assert bench.connection().state == "FIN_WAIT"
    bench.serve(replace(one, weight=0), two)
    result = bench.send("S")
    assert result.next_hop == ("10.1.1.2" if mode & 2 else "10.1.1.1")


def test_persistent_connections_are_not_scheduled_anew() -> None:
    """ip_vs_core.c, is_new_conn_expected: not those of a template."""
    bench = Bench()
    bench.serve(ONE, persistence=100)
    bench.send()
    end(bench, "CLOSE")
    assert bench.send("S").reason == Reason.ESTABLISHED


def test_an_sctp_port_that_is_used_again() -> None:
    bench = Bench()
    bench.serve(ONE, protocol="sctp")
    assert bench.send(protocol="sctp").reason == Reason.NEW
    assert bench.dp.process(sctp(6)).reason == Reason.ESTABLISHED  # ABORT
    assert bench.connection().state == "SCTP_CLOSED"
    bench.serve((*ONE, 0), TWO, protocol="sctp")
    result = bench.send(protocol="sctp")
    assert (result.reason, result.destination) == (Reason.NEW, TWO)


# -- persistence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("expire", [False, True])
def test_expire_quiescent_template(expire: bool) -> None:
    bench = bench_of(expire_quiescent_template=expire)
    bench.serve(ONE, persistence=100)
    bench.send(port=1)
    bench.serve((*ONE, 0), TWO, persistence=100)
    assert bench.send(port=2).destination == (TWO if expire else ONE)
    bench.serve((*ONE, 5), (*TWO, 0), persistence=100)
    assert bench.send(port=3).destination == ONE
    assert bench.dp.stats().persistence_templates == 1


# -- connections that begin in the middle ----------------------------------------------------------


@pytest.mark.parametrize("flags", ["", "A", "FA", "SA", "PA", "R", "RA"])
@pytest.mark.parametrize("sloppy", [False, True])
def test_sloppy_tcp(sloppy: bool, flags: str) -> None:
    bench = bench_of(sloppy_tcp=sloppy)
    bench.serve(ONE)
    begins = "R" not in flags and (sloppy or "S" in flags)
    assert bench.send(flags).reason == (Reason.NEW if begins else Reason.NO_CONNECTION)
    assert len(bench.connections()) == begins


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 6, 7, 10, 14])
@pytest.mark.parametrize("sloppy", [False, True])
def test_sloppy_sctp(sloppy: bool, kind: int) -> None:
    bench = bench_of(sloppy_sctp=sloppy)
    bench.serve(ONE, protocol="sctp")
    begins = kind != 6 and (sloppy or kind == 1)
    result = bench.dp.process(sctp(kind))
    assert result.reason == (Reason.NEW if begins else Reason.NO_CONNECTION)


def test_sloppiness_is_of_one_protocol() -> None:
    bench = bench_of(sloppy_sctp=True)
    bench.serve(ONE)
    assert bench.send("A").reason == Reason.NO_CONNECTION
    bench = bench_of(sloppy_tcp=True)
    bench.serve(ONE, protocol="sctp")
    assert bench.dp.process(sctp(0)).reason == Reason.NO_CONNECTION


@pytest.mark.parametrize("secure", [False, True])
def test_secure_tcp(secure: bool) -> None:
    """With it, only a segment of the server after its SYN+ACK establishes a connection."""
    bench = bench_of(secure_tcp=secure)
    bench.serve(ONE)
    states = []
    for flags in ("S", "<SA", "A", "<A"):
        if flags[0] == "<":
            bench.reply(flags[1:], source=ONE)
        else:
            bench.send(flags)
        states.append(bench.connection().state)
    if secure:
        assert states == ["SYN_RECV", "SYNACK", "SYNACK", "ESTABLISHED"]
    else:
        assert states == ["SYN_RECV", "SYN_RECV", "ESTABLISHED", "ESTABLISHED"]


# -- ICMP errors without a connection --------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("schedule", [False, True])
def test_schedule_icmp(schedule: bool, family: int) -> None:
    """From a client, about a reply that another director sent him."""
    bench = bench_of(schedule_icmp=schedule)
    server = "10.1.1.1" if family == 4 else "fd01::1"
    bench.serve((server, 8080), address=VIRTUAL[family])
    reply = wire.packet("tcp", VIRTUAL[family], 80, CLIENT[family], 40000, "A")
    result = bench.dp.process(wire.icmp_error(reply, CLIENT[family]))
    if not schedule:
        assert (result.verdict, result.reason) == (Verdict.PASS, Reason.NO_SERVICE)
        assert not bench.connections()
        return
    assert result.verdict == Verdict.FORWARD
    packet = bytes(result.packet)
    assert wire.read(packet).destination == server
    at = wire.transport_at(packet) + 8
    assert wire.read(packet[at:])[1:] == (server, 8080, CLIENT[family], 40000)
    connection = bench.connection()
    assert (connection.client, connection.client_port) == (CLIENT[family], 40000)
    assert connection.state == "NONE"
    assert connection.expires_in == 3


def test_nobody_for_a_scheduled_icmp_error() -> None:
    """No error about an error."""
    bench = bench_of(schedule_icmp=True)
    bench.serve((*ONE, 0))
    reply = wire.packet("tcp", VIRTUAL[4], 80, CLIENT[4], 40000, "A")
    result = bench.dp.process(wire.icmp_error(reply, CLIENT[4]))
    assert (result.verdict, result.reason) == (Verdict.DROP, Reason.NO_DESTINATION)


# -- nobody to serve -------------------------------------------------------------------------------


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_cache_bypass(bypass: bool, protocol: str) -> None:
    """A transparent cache cluster that is down: to where the client meant."""
    bench = bench_of(cache_bypass=bypass)
    bench.serve((*ONE, 0), port=7, **MARK4)
    origin = ("203.0.113.9", 80)
    before = bytes(wire.packet(protocol, CLIENT[4], 40000, *origin))
    result = bench.dp.process(bytearray(before), mark=7)
    if not bypass:
        assert (result.verdict, result.reason) == (Verdict.REJECT, Reason.NO_DESTINATION)
        return
    assert (result.verdict, result.reason) == (Verdict.FORWARD, Reason.BYPASS)
    assert bytes(result.packet) == before
    assert (result.next_hop, result.destination) == (origin[0], None)
    connection = bench.connection()
    assert (connection.method, connection.destination) == ("bypass", origin[0])
    # It stays on its way when there are caches again.
    bench.serve(ONE, port=7, **MARK4)
    result = bench.send("A", to=origin, protocol=protocol, mark=7)
    assert (result.reason, result.next_hop) == (Reason.ESTABLISHED, origin[0])
    back = wire.packet(protocol, *origin, CLIENT[4], 40000, "SA")
    assert bench.dp.process(back).reason == Reason.REPLY
    assert wire.read(bench.send(port=2, to=origin, mark=7).packet)[3:] == ONE


def test_no_bypass_for_addresses_or_groups() -> None:
    bench = bench_of(cache_bypass=True)
    bench.serve((*ONE, 0))
    assert bench.send().verdict == Verdict.REJECT
    bench.serve((*ONE, 0), port=7, **MARK4)
    group = bench.send(to=("224.0.0.9", 80), protocol="udp", mark=7)
    assert group.verdict == Verdict.REJECT


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_unreachable(protocol: str, family: int) -> None:
    """ICMP port unreachable, for TCP too."""
    bench = Bench()
    bench.serve(address=VIRTUAL[family], protocol=protocol, rules=UNREACHABLE)
    packet = wire.packet(protocol, CLIENT[family], 40000, VIRTUAL[family], 80)
    before = bytes(packet)
    result = bench.dp.process(packet)
    assert (result.verdict, result.reason) == (Verdict.REJECT, Reason.NO_DESTINATION)
    answer = bytes(result.packet)
    assert wire.is_intact(answer)
    assert wire.read(answer)[1::2] == (VIRTUAL[family], CLIENT[family])
    at = wire.transport_at(answer)
    assert (answer[at], answer[at + 1]) == ((3, 3) if family == 4 else (1, 4))
    assert answer[at + 8 :] == before


def test_unreachable_is_for_who_finds_nobody() -> None:
    """A segment of a connection that is gone gets a reset in any case."""
    bench = Bench()
    bench.serve(ONE, rules=UNREACHABLE)
    result = bench.send("A")
    assert (result.verdict, result.reason) == (Verdict.REJECT, Reason.NO_CONNECTION)
    assert wire.read(result.packet).protocol == wire.TCP


# -- load ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1, 2, 3, 10])
def test_drop_packet_drops_the_first_of_every_rate(rate: int) -> None:
    bench = bench_of(drop_packet=3, am_droprate=rate)
    bench.serve(ONE, protocol="udp")
    reasons = [bench.send(port=port, protocol="udp").reason for port in range(1, 31)]
    expected = [Reason.NEW if i % rate else Reason.OVERLOAD for i in range(30)]
    assert reasons == expected
    for port, reason in zip(range(1, 31), expected, strict=True):
        if reason == Reason.NEW:  # what is known does not suffer
            assert bench.send(port=port, protocol="udp").reason == Reason.ESTABLISHED
    bench.dp.configure(Settings(am_droprate=rate))
    assert bench.send(port=99, protocol="udp").reason == Reason.NEW


def test_drop_packet_spares_what_would_not_be_scheduled() -> None:
    bench = bench_of(drop_packet=3, am_droprate=2)
    bench.serve(ONE)
    assert bench.send("A").reason == Reason.NO_CONNECTION
    assert bench.send(to=("10.9.9.9", 1)).reason == Reason.NO_SERVICE
    assert [bench.send(port=port).reason for port in (1, 2)] == [Reason.OVERLOAD, Reason.NEW]


def test_automatic_drop_packet() -> None:
    """While less than an eighth of the table is free; looked at each second."""
    bench = Bench(80, settings=Settings(drop_packet=1, am_droprate=2))
    bench.serve(ONE)
    assert {bench.send(port=port).reason for port in range(1, 72)} == {Reason.NEW}
    bench.now += SECOND
    reasons = [bench.send(port=port).reason for port in (101, 102, 103)]
    assert reasons == [Reason.OVERLOAD, Reason.NEW, Reason.OVERLOAD]
    bench.now += 60 * SECOND
    bench.dp.sweep()
    bench.now += SECOND
    assert {bench.send(port=port).reason for port in range(201, 205)} == {Reason.NEW}


def half_open(count: int, **settings: Any) -> Bench:
    bench = bench_of(**settings)
    bench.serve(ONE)
    for port in range(1, count + 1):
        bench.send(port=port)
    return bench


def test_drop_entry_forgets_half_open_connections() -> None:
    """A share of one in 32 each second."""
    bench = half_open(320)
    bench.send("S", port=1000)
    bench.send("A", port=1000)
    bench.dp.configure(Settings(drop_entry=3))
    left = []
    for _ in range(3):
        bench.now += SECOND
        bench.send("A", port=1000)
        left.append(bench.dp.stats().connections)
    assert left == sorted(left, reverse=True)
    assert 321 - 3 * 12 <= left[-1] < 321 - 11
    assert bench.send("A", port=1000).reason == Reason.ESTABLISHED
    (destination,) = bench.dp.services()[0].destinations
    assert (destination.active, destination.inactive) == (left[-1], 0)


def test_drop_entry_is_repeatable() -> None:
    def left(seed: int) -> set[int]:
        bench = Bench(seed=seed, settings=Settings(drop_entry=3))
        bench.serve(ONE)
        for port in range(1, 201):
            bench.send(port=port)
        for _ in range(3):
            bench.now += SECOND
            bench.send(to=("10.9.9.9", 1))
        return {c.client_port for c in bench.connections()}

    assert left(1) == left(1) != left(2)
    assert 0 < len(left(1)) < 200


def test_drop_entry_spares_what_matters() -> None:
    """Busy connections, ended ones, and templates of established ones."""
    bench = bench_of(drop_entry=0)
    bench.serve(ONE)
    bench.serve(ONE, port=81, persistence=10_000)
    for port in range(1, 101):
        bench.send(port=port)
        for _ in range(9):
            bench.send("A", port=port)
    client = "192.0.2.200"
    bench.send(client=client, port=1000, to=(VIRTUAL[4], 81))
    bench.send("A", client=client, port=1000, to=(VIRTUAL[4], 81))
    bench.dp.configure(Settings(drop_entry=3))
    for _ in range(100):
        bench.now += SECOND
        bench.send(to=("10.9.9.9", 1))
    stats = bench.dp.stats()
    assert stats.connections >= 100
    assert stats.persistence_templates == 1


ESTABLISHED = {
    "tcp": [("S", False), ("SA", True), ("A", False)],
    "sctp": [(1, False), (2, True), (10, False), (11, True)],  # INIT to COOKIE ACK
    "sloppy_tcp": [("A", False)],
    "sloppy_sctp": [(0, False)],  # DATA
}


@pytest.mark.parametrize("how", ESTABLISHED)
def test_drop_entry_spares_templates_of_what_was_established(how: str) -> None:
    bench = bench_of(**{name: True for name in ("sloppy_tcp", "sloppy_sctp") if name == how})
    bench.serve(ONE, protocol=how.removeprefix("sloppy_"), persistence=10_000)
    for what, is_reply in ESTABLISHED[how]:
        if isinstance(what, int):
            bench.dp.process(sctp(what, back=ONE if is_reply else None))
        elif is_reply:
            bench.reply(what, source=ONE)
        else:
            bench.send(what)
    assert bench.connection().state.endswith("ESTABLISHED")
    (template,) = (each for each in bench.dp.export_connections() if each.is_template)
    assert template.state == "ASSURED"


def test_drop_entry_forgets_idle_connections_of_few_packets() -> None:
    bench = bench_of(drop_entry=0)
    bench.serve(ONE, protocol="udp")
    for port in range(1, 101):
        bench.send(port=port, protocol="udp")
    bench.now += 50 * SECOND
    bench.dp.configure(Settings(drop_entry=3))
    bench.send(to=("10.9.9.9", 1))
    assert bench.dp.stats().connections == 100, "less than a minute idle"
    for _ in range(100):
        bench.now += SECOND
        bench.send(to=("10.9.9.9", 1))
    assert bench.dp.stats().connections < 50


def test_drop_entry_spares_what_the_server_opened() -> None:
    """SYN_SENT counts as active, but is neither half-open nor established."""
    bench = bench_of(drop_entry=0)
    bench.serve(ONE)
    for port in range(1, 101):
        bench.send(port=port)
        bench.send("F", port=port)
        bench.reply("S", source=ONE, port=port)
    assert {c.state for c in bench.connections()} == {"SYN_SENT"}
    bench.now += 61 * SECOND
    bench.dp.configure(Settings(drop_entry=3))
    for _ in range(50):
        bench.now += SECOND
        bench.send(to=("10.9.9.9", 1))
    assert bench.dp.stats().connections == 100


def test_drop_entry_forgets_templates_that_nothing_came_of() -> None:
    bench = half_open(0)
    bench.serve(ONE, persistence=10_000)
    for number in range(1, 101):
        bench.send(client=f"198.51.100.{number}")
    bench.now += 61 * SECOND
    bench.dp.sweep()
    stats = bench.dp.stats()
    assert (stats.connections, stats.persistence_templates) == (0, 100)
    bench.dp.configure(Settings(drop_entry=3))
    for _ in range(50):
        bench.now += SECOND
        bench.send(to=("10.9.9.9", 1))
    assert bench.dp.stats().persistence_templates < 50


def test_answers_are_bounded() -> None:
    """ICMP errors; resets spare their receivers retransmissions."""
    bench = bench_of(answer_rate=10)
    bench.serve(protocol="udp")
    bench.serve(port=81)
    verdicts = [bench.send(protocol="udp").verdict for _ in range(100)]
    assert verdicts == [Verdict.REJECT] * 50 + [Verdict.DROP] * 50
    resets = {bench.send(to=(VIRTUAL[4], 81)).verdict for _ in range(100)}
    assert resets == {Verdict.REJECT}
    bench.now += SECOND
    verdicts = [bench.send(protocol="udp").verdict for _ in range(20)]
    assert verdicts.count(Verdict.REJECT) == 10
