"""Whose packets must come to the dataplane, and what it says of flows, of all kinds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from bench import CLIENT, SECOND, VIRTUAL, Bench

import svcdp
from svcdp import (
    Captures,
    ConfigError,
    DestinationSpec,
    Flow,
    Settings,
    SourceRule,
    TunnelSpec,
)
from svcdp.abc import Scheduler

VIP = VIRTUAL[4]
ONE, TWO = DestinationSpec("10.1.1.1", 80), DestinationSpec("10.1.1.2", 80)
ANY = DestinationSpec("10.1.1.1", 0)
TUNNEL = replace(ONE, method="tunnel", tunnel=TunnelSpec(source="192.0.2.1"))
MARK4 = {"address": "0.0.0.0", "port": 7, "protocol": "fwmark"}


def captures(**kinds: set[Any]) -> Captures:
    return Captures(**{kind: frozenset(entries) for kind, entries in kinds.items()})


CASES: dict[str, tuple[DestinationSpec, dict[str, Any], Captures]] = {
    "nat": (ONE, {}, captures(virtual={("tcp", VIP, 80)}, real={("tcp", "10.1.1.1", 80)})),
    "range": (
        ANY,
        {"port": 1000, "last_port": 1999},
        captures(ranges={("tcp", VIP, 1000, 1999)}, real={("tcp", "10.1.1.1", 0)}),
    ),
    "range of one": (
        ONE,
        {"last_port": 80},
        captures(virtual={("tcp", VIP, 80)}, real={("tcp", "10.1.1.1", 80)}),
    ),
    "every port": (
        ANY,
        {"port": 0, "protocol": "udp"},
        captures(virtual={("udp", VIP, 0)}, real={("udp", "10.1.1.1", 0)}),
    ),
    "mark": (
        ONE,
        MARK4,
        captures(marks={(7, 4)}, real={(p, "10.1.1.1", 80) for p in ("tcp", "udp", "sctp")}),
    ),
    "mark of IPv6": (
        DestinationSpec("fd01::1", 0),
        {**MARK4, "address": "::"},
        captures(marks={(7, 6)}, real={(p, "fd01::1", 0) for p in ("tcp", "udp", "sctp")}),
    ),
    "direct": (
        replace(ONE, method="dr"),
        {},
        captures(virtual={("tcp", VIP, 80)}, real={("tcp", VIP, 80)}),
    ),
    "direct by mark": (
        replace(ONE, method="dr", mark=0x10),
        {},
        captures(virtual={("tcp", VIP, 80)}, real={("tcp", VIP, 80)}, hops={(0x10, "10.1.1.1")}),
    ),
    "direct range": (
        replace(ANY, method="dr"),
        {"port": 1000, "last_port": 1999},
        captures(ranges={("tcp", VIP, 1000, 1999)}, real={("tcp", VIP, 0)}),
    ),
    "direct, of a mark": (replace(ANY, method="dr"), MARK4, captures(marks={(7, 4)})),
    "local": (
        replace(ONE, method="local"),
        {},
        captures(virtual={("tcp", VIP, 80)}, real={("tcp", VIP, 80)}),
    ),
    "tunnel": (
        TUNNEL,
        {},
        captures(virtual={("tcp", VIP, 80)}, real={("tcp", VIP, 80)}, tunnels={(VIP, 80, "tcp")}),
    ),
    "ftp helper": (
        replace(ONE, port=21),
        {"port": 21, "helper": "ftp"},
        captures(virtual={("tcp", VIP, 0)}, real={("tcp", "10.1.1.1", 0)}),
    ),
    "ftp of persistent clients": (
        replace(ONE, port=21),
        {"port": 21, "persistence": 300},
        captures(virtual={("tcp", VIP, 0)}, real={("tcp", "10.1.1.1", 0)}),
    ),
    "direct ftp": (
        replace(ONE, port=21, method="dr"),
        {"port": 21, "persistence": 300},
        captures(virtual={("tcp", VIP, 0)}, real={("tcp", VIP, 0)}),
    ),
    "ftp without its data": (
        replace(ONE, port=21),
        {"port": 21},
        captures(virtual={("tcp", VIP, 21)}, real={("tcp", "10.1.1.1", 21)}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_captures(case: str) -> None:
    destination, fields, expected = CASES[case]
    bench = Bench()
    bench.serve(destination, **fields)
    assert bench.dp.captures() == expected
    assert bench.dp.draining() == Captures()
    # Without a connection nothing is left of it; with one, all.
    bench.dp.apply([])
    assert bench.dp.captures() == Captures()
    bench.serve(destination, **fields)
    family = 6 if ":" in destination.address else 4
    protocol = fields.get("protocol", "tcp")
    bench.send(
        client=CLIENT[family],
        to=(VIRTUAL[family], fields.get("port", 80) or 99),
        protocol="tcp" if protocol == "fwmark" else protocol,
        mark=7 if protocol == "fwmark" else 0,
    )
    assert len(bench.connections()) == 1
    bench.dp.apply([])
    if protocol != "udp":
        assert bench.dp.captures() == bench.dp.draining() == expected
    bench.now += 1000 * SECOND
    bench.dp.sweep()
    assert bench.dp.captures() == Captures()


EDITS: dict[str, tuple[DestinationSpec, dict[str, Any], DestinationSpec, dict[str, Any]]] = {
    "method": (ONE, {}, replace(ONE, method="dr"), {}),
    "method back": (replace(ONE, method="dr", mark=5), {}, ONE, {}),
    "range": (
        ANY,
        {"port": 50, "last_port": 100},
        ANY,
        {"port": 50, "last_port": 60},
    ),
    "tunnel": (TUNNEL, {}, replace(ONE, method="dr"), {}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_connections_made_before_an_edit(edit: str) -> None:
    """They go on as they began."""
    one, fields, other, edited = EDITS[edit]
    bench = Bench()
    bench.serve(one, **fields)
    before = bench.dp.captures()
    bench.serve(other, **edited)
    after = bench.dp.captures()
    assert bench.dp.draining() == Captures()
    bench.serve(one, **fields)
    bench.send()
    bench.serve(other, **edited)
    assert bench.dp.captures() == before | after
    assert bench.dp.draining() == before
    bench.now += 1000 * SECOND
    bench.dp.sweep()
    assert bench.dp.captures() == after
    assert bench.dp.draining() == Captures()


def test_a_service_without_destinations_is_captured_too() -> None:
    """To be rejected."""
    bench = Bench()
    bench.serve()
    assert bench.dp.captures() == captures(virtual={("tcp", VIP, 80)})


# -- explain ---------------------------------------------------------------------------------------


def explained(bench: Bench, port: int = 80, mark: int = 0, source_port: int = 5) -> Any:
    return bench.dp.explain(Flow("tcp", CLIENT[4], source_port, VIP, port), mark)


def where(said: Any) -> list[tuple[str, int]]:
    assert said.action == "forward"
    return [(d.address, d.port) for d in said.destinations]


def test_ranges_and_every_port() -> None:
    bench = Bench()
    bench.serve(ANY, port=1000, last_port=1999, name="range")
    bench.serve(replace(TWO, port=8080), port=0, name="all")
    assert explained(bench, 1500).service.name == "range"
    assert where(explained(bench, 1500)) == [("10.1.1.1", 1500)]
    assert explained(bench, 2000).service.name == "all"
    assert where(explained(bench, 2000)) == [("10.1.1.2", 8080)]


def test_marks() -> None:
    bench = Bench()
    bench.serve(ANY, **MARK4)
    assert explained(bench).action == "pass"
    said = explained(bench, mark=7)
    assert where(said) == [("10.1.1.1", 80)]
    assert said.service.protocol == "fwmark"
    assert "fwmark 7" in str(said)
    bench.send(port=5, mark=7)
    known = explained(bench)
    assert where(known) == [("10.1.1.1", 80)]


@pytest.mark.parametrize("member", [ANY, replace(ONE, method="dr"), replace(ANY, method="local")])
def test_known_connections_have_their_destinations_weight(member: DestinationSpec) -> None:
    bench = Bench()
    bench.serve(replace(member, weight=3), port=80, last_port=90)
    before = explained(bench, 85).destinations
    bench.send(port=5, to=(VIP, 85))
    known = explained(bench, 85)
    assert known.destinations == before
    assert known.destinations[0].weight == 3
    assert known.destinations[0].method == member.method
    reply = bench.dp.explain(
        Flow("tcp", VIP if member.method != "masq" else "10.1.1.1", 85, CLIENT[4], 5)
    )
    assert "reply" in str(reply)


def test_overloaded_and_quiesced_destinations_are_left_out() -> None:
    bench = Bench()
    bench.serve(replace(ONE, upper=1), TWO, replace(ONE, address="10.1.1.3", weight=0))
    assert len(where(explained(bench))) == 2
    for port in (1, 2):
        bench.send(port=port)
    assert where(explained(bench)) == [("10.1.1.2", 80)]
    bench.serve(replace(ONE, upper=1))
    said = explained(bench)
    assert (said.action, said.destinations) == ("reject", ())
    assert "overloaded" in str(said)
    assert bench.send(port=5).verdict.name == "REJECT"


def test_a_python_scheduler_is_not_shown_who_is_overloaded() -> None:
    seen = []

    @svcdp.register_scheduler("captures-widest")
    class Widest(Scheduler):
        def pick(self, flow: Flow, destinations: Any) -> int:
            seen.append([d.address for d in destinations])
            return 0

    bench = Bench()
    bench.serve(replace(ONE, upper=2), TWO, scheduler="captures-widest")
    for port in range(1, 4):
        bench.send(port=port)
    bench.serve(replace(ONE, upper=2), replace(TWO, upper=1), scheduler="captures-widest")
    bench.send(port=4)
    assert seen[0] == ["10.1.1.2", "10.1.1.1"]
    assert seen[-1] == ["10.1.1.1"]
    bench.send(port=5)
    assert bench.send(port=6).verdict.name == "REJECT"


@pytest.mark.parametrize("on_removal", ["drain", "expire", "drop"])
def test_removed_destinations(on_removal: str) -> None:
    bench = Bench()
    bench.serve(ONE, on_removal=on_removal)
    bench.send(port=5)
    bench.serve(TWO, on_removal=on_removal)
    said = explained(bench)
    if on_removal == "drain":
        assert where(said) == [("10.1.1.1", 80)]
    elif on_removal == "expire":
        assert where(said) == [("10.1.1.2", 80)]
    else:
        assert (said.action, said.destinations) == ("drop", ())
    assert bench.send(port=5).verdict.name.lower() == said.action


def test_ftp() -> None:
    bench = Bench()
    bench.serve(replace(ONE, port=21), port=21)
    assert explained(bench, 21).action == "forward"
    assert explained(bench, 5000).action == "pass"
    bench.serve(replace(ONE, port=21), port=21, persistence=300)
    assert where(explained(bench, 5000)) == [("10.1.1.1", 5000)]
    assert explained(bench, 21, source_port=20).action == "pass"
    assert bench.send(port=20, to=(VIP, 21)).verdict.name == "PASS"
    bench.serve(replace(ONE, port=21, weight=0), port=21, persistence=300)
    assert explained(bench, 5000).action == "pass"
    assert explained(bench, 21).action == "reject"


def test_bypass_and_nobody() -> None:
    bench = Bench(settings=Settings(cache_bypass=True))
    bench.serve(replace(ONE, weight=0), **MARK4)
    said = explained(bench, mark=7)
    assert (said.action, said.destinations) == ("forward", ())
    assert "cache_bypass" in str(said)
    bench.serve(ONE, scheduler="none", rules=(SourceRule(on_empty="unreachable"),))
    assert explained(bench).action == "reject"
    bench.serve(ONE, scheduler="none", rules=(SourceRule(on_empty="drop"),))
    assert explained(bench).action == "drop"


def test_no_flow_has_the_protocol_fwmark() -> None:
    bench = Bench()
    bench.serve(ONE, **MARK4)
    with pytest.raises(ConfigError):
        bench.dp.explain("fwmark 192.0.2.4:5 -> 0.0.0.0:7")


def test_sctp() -> None:
    bench = Bench()
    bench.serve(ONE, protocol="sctp")
    flow = Flow("sctp", CLIENT[4], 5, VIP, 80)
    assert bench.dp.explain(flow).action == "forward"
    bench.send(port=5, protocol="sctp")
    assert "SCTP_INIT1" in str(bench.dp.explain(flow))
