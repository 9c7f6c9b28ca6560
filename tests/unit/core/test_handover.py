"""Connections that another dataplane goes on with: exported, imported, watched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL, Bench

import svcdp
from svcdp import ConfigError, DestinationSpec, Reason, SourceRule, TunnelSpec, Verdict
from svcdp.dataplane import ConnectionState

ONE, TWO = DestinationSpec("10.1.1.1", 8080), DestinationSpec("10.1.1.2", 8080)
NODE = "198.51.100.1"
MASQUERADE = {"masquerade_address": NODE, "rules": (SourceRule(masquerade=True),)}
MARK4 = {"address": "0.0.0.0", "port": 7, "protocol": "fwmark"}

#: Destination, fields of the service.
KINDS: dict[str, tuple[DestinationSpec, dict[str, Any]]] = {
    "nat": (ONE, {}),
    "masquerade": (ONE, MASQUERADE),
    "udp": (ONE, {"protocol": "udp"}),
    "sctp": (ONE, {"protocol": "sctp"}),
    "range": (replace(ONE, port=0), {"port": 50, "last_port": 100}),
    "every port": (replace(ONE, port=0), {"port": 0}),
    "mark": (replace(ONE, port=0), MARK4),
    "direct": (replace(ONE, port=80, method="dr"), {}),
    "local": (replace(ONE, port=80, method="local"), {}),
    "direct, of a mark": (replace(ONE, port=0, method="dr"), MARK4),
    "tunnel": (replace(ONE, port=80, method="tunnel", tunnel=TunnelSpec(source=NODE)), {}),
    "persistent": (ONE, {"persistence": 100}),
    "own timeouts": (ONE, {"timeouts": (("established", 50),)}),
}


def mark_of(fields: dict[str, Any]) -> int:
    return 7 if fields.get("protocol") == "fwmark" else 0


def protocol_of(fields: dict[str, Any]) -> str:
    return "tcp" if mark_of(fields) else fields.get("protocol", "tcp")


def send(bench: Bench, fields: dict[str, Any], flags: str) -> svcdp.Result:
    """A packet of the client, with room for a tunnel's header."""
    packet = wire.packet(protocol_of(fields), CLIENT[4], 40000, VIRTUAL[4], 80, flags)
    return bench.dp.process(bytearray(64) + packet, headroom=64, mark=mark_of(fields))


def running(kind: str) -> Bench:
    """With one connection, as established as it gets."""
    destination, fields = KINDS[kind]
    bench = Bench()
    bench.serve(destination, **fields)
    for flags in ("S", "A"):
        assert send(bench, fields, flags).verdict == Verdict.FORWARD
    return bench


def standby(kind: str) -> Bench:
    destination, fields = KINDS[kind]
    bench = Bench(seed=2)
    bench.now = 1000 * SECOND
    bench.serve(destination, **fields)
    return bench


def essence(bench: Bench) -> list[Any]:
    return sorted(map(str, bench.connections()))


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_elsewhere(kind: str) -> None:
    fields = KINDS[kind][1]
    first, second = running(kind), standby(kind)
    states = list(first.dp.export_connections())
    outcomes = [second.dp.import_connection(state) for state in states]
    assert outcomes == ["created"] * len(states)
    assert len(states) == (2 if kind == "persistent" else 1)
    assert essence(first) == essence(second)
    assert list(second.dp.export_connections()) == states
    # The same packets come out.
    for flags in ("A", "FA"):
        # A tunnel's header has an id of its own.
        start = 20 if kind == "tunnel" else 0
        one, other = (bytes(send(bench, fields, flags).packet)[start:] for bench in (first, second))
        assert one == other
        answer = wire.answer_to(one, "A")
        replies = [bench.dp.process(bytearray(answer)) for bench in (first, second)]
        assert {r.reason for r in replies} == {Reason.REPLY}
        assert replies[0].packet == replies[1].packet
    # And it is counted, and forgotten, as any other.
    (status,) = second.dp.services()[0].destinations
    assert status.active + status.inactive == 1
    second.now += 2000 * SECOND
    second.dp.sweep()
    second.now += 200 * SECOND
    second.dp.sweep()
    (status,) = second.dp.services()[0].destinations
    stats = second.dp.stats()
    assert (status.active, status.inactive) == (0, 0)
    assert (stats.connections, stats.persistence_templates) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_twice_is_once(kind: str) -> None:
    first, second = running(kind), standby(kind)
    states = list(first.dp.export_connections())
    for state in states:
        second.dp.import_connection(state)
    again = [second.dp.import_connection(state) for state in states]
    assert set(again) <= {"updated", "created"}
    assert essence(first) == essence(second)
    (status,) = second.dp.services()[0].destinations
    assert status.active + status.inactive == 1


def test_a_state_that_changes() -> None:
    first, second = running("nat"), standby("nat")
    (state,) = first.dp.export_connections()
    second.dp.import_connection(state)
    first.send("FA")
    (state,) = first.dp.export_connections()
    assert second.dp.import_connection(state) == "updated"
    assert second.connection().state == "CLOSE_WAIT"
    (status,) = second.dp.services()[0].destinations
    assert (status.active, status.inactive) == (0, 1)


def test_one_that_went_elsewhere_moves() -> None:
    first, second = running("nat"), Bench()
    second.serve(ONE, TWO)
    second.send()
    assert second.connection().destination == TWO.address
    (state,) = first.dp.export_connections()
    assert second.dp.import_connection(state) == "created"
    assert second.send("A").destination == (ONE.address, ONE.port)
    assert [d.active for d in second.dp.services()[0].destinations] == [1, 0]


def test_what_has_no_place() -> None:
    (state,) = running("nat").dp.export_connections()
    bench = Bench()
    assert bench.dp.import_connection(state) == "no_service"
    assert not bench.dp.can_import(state)
    bench.serve(TWO)
    assert bench.dp.import_connection(state) == "no_destination"
    assert not bench.dp.can_import(state)
    bench = Bench(1)
    bench.serve(ONE)
    assert bench.dp.can_import(state)
    assert bench.dp.import_connection(state) == "created"
    assert bench.dp.import_connection(replace(state, client_port=5)) == "full"
    assert bench.dp.stats().connections == 1
    bench = Bench()
    bench.serve(ONE)
    bench.serve(ONE, port=81)
    bench.send(to=(VIRTUAL[4], 81))
    assert bench.dp.import_connection(state) == "refused", "another one has these replies"
    assert bench.dp.stats().connections == 1


KEPT = {"protocol": "udp", "on_removal": "expire", "kept": ((ONE.address, ONE.port),)}


@pytest.mark.parametrize("fields", [{}, MASQUERADE], ids=["", "masquerade"])
def test_a_flow_of_a_kept_server_goes_on(fields: dict[str, Any]) -> None:
    """Of a server that is no destination any more, and never was one elsewhere."""
    bench, other = Bench(), Bench(seed=2)
    bench.serve(ONE, protocol="udp", **fields)
    flows = {bench.send(port=port, protocol="udp").destination for port in (1, 2, 3)}
    assert flows == {(ONE.address, ONE.port)}
    bench.serve(TWO, **KEPT, **fields)
    other.serve(TWO, **KEPT, **fields)
    (before,) = other.dp.services()
    for state in bench.dp.export_connections():
        assert other.dp.can_import(state)
        assert other.dp.import_connection(state) == "created"
        assert other.dp.import_connection(state) == "updated"
    assert other.dp.services() == [before]
    assert ("udp", ONE.address, ONE.port) in other.dp.captures().real
    for port in (1, 2, 3):
        result = other.send(port=port, protocol="udp")
        assert (result.reason, result.destination) == (Reason.ESTABLISHED, (ONE.address, ONE.port))
        sent = wire.read(bytes(result.packet))
        reply = wire.packet("udp", ONE.address, ONE.port, sent.source, sent.source_port)
        assert other.dp.process(reply).next_hop == CLIENT[4]
        assert other.dp.explain(f"udp {CLIENT[4]}:{port} -> {VIRTUAL[4]}:80").picked is not None
    assert other.send(port=4, protocol="udp").destination == (TWO.address, TWO.port)
    # Named no more: as if it had been a destination here.
    other.serve(TWO, protocol="udp", **fields)
    result = other.send(port=1, protocol="udp")
    assert (result.reason, result.destination) == (Reason.NEW, (TWO.address, TWO.port))
    other.dp.sweep()
    assert ("udp", ONE.address, ONE.port) not in other.dp.captures().real


def test_a_server_that_two_services_keep() -> None:
    """What the one knows of it is not the other's."""
    bench, other = Bench(), Bench(seed=2)
    for port in (80, 81):
        bench.serve(ONE, port=port, protocol="udp")
        bench.send(port=port, to=(VIRTUAL[4], port), protocol="udp")
        other.serve(TWO, port=port, **KEPT)
    for state in bench.dp.export_connections():
        assert other.dp.import_connection(state) == "created"
    # Named no more by one of them: the other's flow goes on.
    other.serve(TWO, port=80, protocol="udp")
    for port, reason in ((80, Reason.NEW), (81, Reason.ESTABLISHED)):
        result = other.send(port=port, to=(VIRTUAL[4], port), protocol="udp")
        assert result.reason == reason


def test_nobody_is_bound_to_a_kept_server() -> None:
    """It is chosen no more."""
    bench, other = Bench(), Bench(seed=2)
    bench.serve(ONE, protocol="udp", persistence=100)
    bench.send(protocol="udp")
    other.serve(TWO, **KEPT, persistence=100)
    outcomes = {
        state.is_template: other.dp.import_connection(state)
        for state in bench.dp.export_connections()
    }
    assert outcomes == {True: "no_destination", False: "created"}


def test_a_kept_server_of_a_range() -> None:
    bench, other = Bench(), Bench(seed=2)
    one, two = replace(ONE, port=0), replace(TWO, port=0)
    ports = {"protocol": "udp", "port": 50, "last_port": 100}
    bench.serve(one, **ports)
    bench.send(protocol="udp")
    other.serve(two, **ports, kept=((ONE.address, 0),))
    (state,) = bench.dp.export_connections()
    assert other.dp.import_connection(state) == "created"
    result = other.send(protocol="udp")
    assert (result.reason, result.next_hop) == (Reason.ESTABLISHED, ONE.address)


@pytest.mark.parametrize("kind", ["direct", "tunnel"])
def test_a_kept_server_that_is_reached_otherwise(kind: str) -> None:
    """How, only a destination says."""
    destination, fields = KINDS[kind]
    bench, other = Bench(), Bench(seed=2)
    fields = {**fields, "protocol": "udp"}
    bench.serve(destination, **fields)
    send(bench, fields, "")
    (state,) = bench.dp.export_connections()
    other.serve(**fields, kept=((destination.address, 80),))
    assert not other.dp.can_import(state)
    assert other.dp.import_connection(state) == "no_destination"


def test_a_bound_client_stays_bound() -> None:
    first, second = running("persistent"), Bench()
    second.serve(ONE, TWO, persistence=100)
    for state in first.dp.export_connections():
        assert second.dp.import_connection(state) == "created"
    for port in range(1, 5):
        assert second.send(port=port).destination == (ONE.address, ONE.port)
    assert second.dp.stats().persistence_templates == 1


@pytest.mark.parametrize("timed", [False, True])
def test_a_binding_keeps_its_time(timed: bool) -> None:
    first, second = Bench(), Bench()
    for bench in (first, second):
        bench.serve(ONE, TWO, persistence=600, persistence_timed=timed)
    server = first.send().destination
    first.now += 300 * 10**9
    (template,) = [state for state in first.dp.export_connections() if state.is_template]
    assert template.expires_in == 300
    assert second.dp.import_connection(template) == "created"
    (there,) = second.dp.export_connections()
    assert there == template
    assert second.send(port=2).destination == server


@pytest.mark.parametrize("port", [0, 21])
def test_a_client_of_ftp_is_bound_at_every_port(port: int) -> None:
    """As IPVS tells of it, and as it was saved before."""
    ftp = {"port": 21, "persistence": 100}
    one, two = (replace(spec, port=21, method="dr") for spec in (ONE, TWO))
    first, second = Bench(), Bench()
    first.serve(one, **ftp)
    second.serve(one, two, **ftp)
    first.send("S", to=(VIRTUAL[4], 21))
    template = next(state for state in first.dp.export_connections() if state.is_template)
    assert (template.virtual_port, template.destination_port) == (0, 0)
    told = replace(template, virtual_port=port, destination_port=port)
    assert second.dp.import_connection(told) == "created"
    for number, to in enumerate((21, 30000, 40000), 1):
        assert second.send("S", port=number, to=(VIRTUAL[4], to)).destination == (one.address, 21)
    unknown = replace(told, destination="10.9.9.9")
    assert second.dp.import_connection(unknown) == "no_destination"
    assert first.dp.import_connection(replace(told, virtual="10.9.9.9")) == "no_service"


def test_one_packet_connections_are_no_state() -> None:
    bench = Bench()
    bench.serve(ONE, protocol="udp", one_packet=True)
    bench.send(protocol="udp")
    assert list(bench.dp.export_connections()) == []


def test_thresholds_count_what_was_imported() -> None:
    (state,) = running("nat").dp.export_connections()
    bench = Bench()
    bench.serve(replace(ONE, upper=1))
    assert bench.dp.import_connection(state) == "created"
    assert bench.send(port=9).verdict == Verdict.REJECT
    assert bench.send("A").reason == Reason.ESTABLISHED


GOOD = ConnectionState(
    "tcp", CLIENT[4], 40000, VIRTUAL[4], 80, ONE.address, ONE.port, CLIENT[4], 40000,
    "ESTABLISHED", 900, 900,
)  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"protocol": "icmp"},
        {"protocol": None},
        {"client": "x"},
        {"client": "::1"},
        {"client_port": -1},
        {"client_port": 65536},
        {"virtual": "::1"},
        {"virtual_port": 1 << 16},
        {"destination": 5},
        {"source": "fd00::1"},
        {"source_port": "1"},
        {"state": "UDP"},
        {"state": "SCTP_ESTABLISHED"},
        {"state": "ASSURED"},
        {"state": "established"},
        {"expires_in": 0},
        {"expires_in": float("nan")},
        {"expires_in": 1 << 31},
        {"expires_in": "1"},
        {"flags": -1},
        {"flags": 1 << 32},
        {"fwmark": 1 << 32},
        {"packets": 1 << 32},
        {"packets": 1.5},
        {"flags": 0x1000},
    ],
    ids=str,
)
def test_states_that_contradict_themselves(wrong: dict[str, Any]) -> None:
    bench = Bench()
    bench.serve(ONE)
    with pytest.raises(ConfigError):
        bench.dp.import_connection(replace(GOOD, **wrong))
    assert not bench.connections()
    assert bench.dp.import_connection(GOOD) == "created"


# -- watch -----------------------------------------------------------------------------------------


def test_a_watch_tells_by_packets_and_states() -> None:
    bench = Bench()
    bench.serve(ONE)
    watch = bench.dp.watch_connections(threshold=3, period=5)
    told = []
    for number in range(14):
        bench.send("S" if number == 0 else "A")
        told += [(state.packets, state.state) for state in watch.read()]
    assert told == [(3, "ESTABLISHED"), (8, "ESTABLISHED"), (13, "ESTABLISHED")]
    bench.reply("FA", source=(ONE.address, ONE.port))
    assert [state.state for state in watch.read()] == ["FIN_WAIT"]
    bench.send("FA")
    assert [state.state for state in watch.read()] == ["TIME_WAIT"]
    watch.close()
    bench.send("S")
    again = bench.dp.watch_connections()
    assert again.read() == []
    with pytest.raises(ConfigError):
        bench.dp.watch_connections()
    again.close()


def test_a_watch_loses_what_nobody_reads() -> None:
    bench = Bench()
    bench.serve(ONE, protocol="udp")
    watch = bench.dp.watch_connections(4, threshold=1)
    for port in range(1, 11):
        bench.send(port=port, protocol="udp")
    assert [state.client_port for state in watch.read()] == [1, 2, 3, 4]
    assert watch.lost == 6
    bench.send(port=11, protocol="udp")
    assert [state.client_port for state in watch.read()] == [11]
    watch.close()


def test_a_watch_tells_of_the_template_too() -> None:
    bench = Bench()
    bench.serve(ONE, persistence=100)
    watch = bench.dp.watch_connections(threshold=2)
    bench.send("S")
    bench.send("A")
    connection, template = watch.read()
    assert (connection.is_template, template.is_template) == (False, True)
    assert (template.client, template.state) == (CLIENT[4], "ASSURED")
    assert template.timeout == 100
    watch.close()
