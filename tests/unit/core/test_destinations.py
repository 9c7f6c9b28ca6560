"""Destinations that change: weights, methods, thresholds, marks; that go, and that come back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL, Bench

import svcdp
from svcdp import DestinationSpec, Reason, Verdict

ONE, TWO, THREE = ("10.1.1.1", 80), ("10.1.1.2", 80), ("10.1.1.3", 80)
D1, D2, D3 = DestinationSpec(*ONE), DestinationSpec(*TWO), DestinationSpec(*THREE)


def picks(bench: Bench, count: int, first: int = 1) -> list[str]:
    results = [bench.send(port=port) for port in range(first, first + count)]
    return [r.destination[0][-1] if r.destination else "-" for r in results]


# -- edits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edit",
    [
        {"weight": 5},
        {"upper": 100, "lower": 10},
        {"mark": 7},
        {"mtu": 1500},
        {"method": "dr"},
        {"method": "local"},
    ],
    ids=str,
)
def test_an_edit_keeps_place_connections_and_counters(edit: dict[str, Any]) -> None:
    bench = Bench()
    bench.serve(D1, D2, D3)
    assert picks(bench, 4) == ["3", "2", "1", "3"], "newest first"
    before = bench.dp.services()[0].destinations[1]
    with bench.dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80).update(*TWO, **edit)
    assert picks(bench, 3, 10) == ["2", "1", "3"], "the round goes on"
    after = bench.dp.services()[0].destinations[1]
    assert after.connections_total == before.connections_total + 1
    for port, owner in zip((1, 2, 3, 4), "3213", strict=True):
        result = bench.send("A", port=port)
        assert (result.reason, result.destination[0][-1]) == (Reason.ESTABLISHED, owner)


def test_known_connections_keep_their_method() -> None:
    bench = Bench()
    bench.serve(D1)
    assert wire.read(bench.send(port=1).packet).destination == ONE[0]
    bench.serve(replace(D1, method="dr"))
    assert wire.read(bench.send(port=2).packet).destination == VIRTUAL[4]
    assert wire.read(bench.send("A", port=1).packet).destination == ONE[0]
    assert wire.read(bench.reply("A", source=ONE, port=1).packet).source == VIRTUAL[4]
    bench.serve(D1)
    assert wire.read(bench.send("A", port=2).packet).destination == VIRTUAL[4]
    assert wire.read(bench.send(port=3).packet).destination == ONE[0]
    assert {c.client_port: c.method for c in bench.connections()} == {
        1: "masq",
        2: "dr",
        3: "masq",
    }


def test_marks_and_mtus_change_for_new_connections_at_least() -> None:
    bench = Bench()
    bench.serve(replace(D1, method="dr", mark=1))
    assert bench.send(port=1).mark == 1
    bench.serve(replace(D1, method="dr", mark=2))
    assert bench.send(port=2).mark == 2
    assert bench.send("A", port=1).mark == 2


def test_weight_0_gets_no_new_connections() -> None:
    bench = Bench()
    bench.serve(D1, D2)
    assert picks(bench, 2) == ["2", "1"]
    bench.serve(replace(D1, weight=0), D2)
    assert set(picks(bench, 4, 10)) == {"2"}
    assert bench.send("A", port=2).destination == ONE
    bench.serve(D1, D2)
    assert set(picks(bench, 4, 20)) == {"1", "2"}


def test_a_wish_that_is_in_force_changes_nothing() -> None:
    bench = Bench()
    bench.serve(replace(D1, upper=5, mark=3), D2)
    before = bench.dp.services()
    bench.serve(replace(D1, upper=5, mark=3), D2)
    assert bench.dp.services() == before


# -- thresholds ------------------------------------------------------------------------------------


def close(bench: Bench, *ports: int) -> None:
    for port in ports:
        for flags in ("A", "R"):
            assert bench.send(flags, port=port).reason == Reason.ESTABLISHED
    bench.now += 11 * SECOND
    bench.dp.sweep()


def test_overloaded_at_the_upper_threshold() -> None:
    bench = Bench()
    bench.serve(replace(D1, upper=4))
    assert picks(bench, 6) == ["1"] * 4 + ["-"] * 2
    assert bench.send(port=9).verdict == Verdict.REJECT
    assert bench.send("A", port=1).reason == Reason.ESTABLISHED
    # Without a lower threshold three quarters are one: there must be less.
    close(bench, 1)
    assert picks(bench, 1, 10) == ["-"]
    close(bench, 2)
    assert picks(bench, 3, 20) == ["1", "1", "-"]


def test_the_lower_threshold() -> None:
    bench = Bench()
    bench.serve(replace(D1, upper=4, lower=2))
    assert picks(bench, 5) == ["1"] * 4 + ["-"]
    close(bench, 1, 2)
    assert picks(bench, 1, 10) == ["-"]
    close(bench, 3)
    assert picks(bench, 4, 20) == ["1"] * 3 + ["-"]


def test_who_is_overloaded_is_passed_over() -> None:
    bench = Bench()
    bench.serve(replace(D1, upper=2), D2)
    assert picks(bench, 8) == ["2", "1", "2", "1", "2", "2", "2", "2"]


def test_thresholds_that_change() -> None:
    bench = Bench()
    bench.serve(replace(D1, upper=2))
    assert picks(bench, 3) == ["1", "1", "-"]
    bench.serve(replace(D1, upper=3))
    assert picks(bench, 1, 10) == ["1"], "2 is below three quarters of 3"
    bench.serve(replace(D1, upper=4))
    assert picks(bench, 1, 20) == ["-"], "3 is not below three quarters of 4"
    bench.serve(replace(D1, upper=5))
    assert picks(bench, 3, 30) == ["1", "1", "-"]
    bench.serve(D1)
    assert picks(bench, 2, 40) == ["1", "1"]
    bench.serve(replace(D1, upper=3))
    assert picks(bench, 1, 50) == ["-"], "at once"


def test_inactive_connections_count_and_templates_do_not() -> None:
    bench = Bench()
    bench.serve(replace(D1, upper=3), protocol="udp", persistence=600)
    sent = [bench.send(client=f"192.0.2.{n}", protocol="udp").verdict for n in range(1, 5)]
    assert sent == [Verdict.FORWARD] * 3 + [Verdict.REJECT]
    bench.now += 300 * SECOND
    bench.dp.sweep()
    stats = bench.dp.stats()
    assert (stats.connections, stats.persistence_templates) == (0, 3)
    assert bench.send(client="192.0.2.5", protocol="udp").verdict == Verdict.FORWARD


def test_persistent_clients_come_to_an_overloaded_server() -> None:
    """ip_vs_core.c, ip_vs_sched_persist: the template is not asked how loaded it is."""
    bench = Bench()
    bench.serve(replace(D1, upper=1), persistence=600)
    assert picks(bench, 3) == ["1"] * 3
    assert bench.send(client="192.0.2.9").verdict == Verdict.REJECT


# -- removal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_drain(protocol: str) -> None:
    bench = Bench()
    bench.serve(D1, protocol=protocol)
    bench.send(protocol=protocol)
    bench.serve(D2, protocol=protocol)
    result = bench.send("A", protocol=protocol)
    if protocol == "tcp":
        assert (result.reason, result.destination) == (Reason.ESTABLISHED, ONE)
        assert bench.reply("A", source=ONE).reason == Reason.REPLY
    else:
        assert (result.reason, result.destination) == (Reason.NEW, TWO)


@pytest.mark.parametrize("flags", ["A", "S"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_expire(protocol: str, flags: str) -> None:
    bench = Bench()
    bench.serve(D1, protocol=protocol, on_removal="expire")
    bench.send(protocol=protocol)
    bench.serve(D2, protocol=protocol, on_removal="expire")
    result = bench.send(flags, protocol=protocol)
    if protocol == "tcp" and flags == "A":
        assert (result.verdict, result.reason) == (Verdict.REJECT, Reason.NO_CONNECTION)
        assert not bench.connections()
    else:
        assert (result.reason, result.destination) == (Reason.NEW, TWO)
    assert bench.reply(source=ONE, protocol=protocol).verdict == Verdict.PASS


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_expire_by_sweep(protocol: str) -> None:
    bench = Bench()
    bench.serve(D1, D2, protocol=protocol, on_removal="expire")
    for port in range(1, 9):
        bench.send(port=port, protocol=protocol)
    bench.serve(D2, protocol=protocol, on_removal="expire")
    bench.dp.sweep()
    assert {c.destination for c in bench.connections()} == {TWO[0]}
    assert bench.dp.draining().real == frozenset()


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_drop(protocol: str) -> None:
    """IPVS without expire_nodest_conn."""
    bench = Bench()
    bench.serve(D1, protocol=protocol, on_removal="drop")
    bench.send(protocol=protocol)
    bench.serve(D2, protocol=protocol, on_removal="drop")
    for flags in ("A", "S"):
        result = bench.send(flags, protocol=protocol)
        assert (result.verdict, result.reason) == (Verdict.DROP, Reason.DESTINATION_GONE)
    # Its replies pass, rewritten.
    answer = bench.reply("A", source=ONE, protocol=protocol)
    assert answer.reason == Reason.REPLY
    assert wire.read(answer.packet).source == VIRTUAL[4]
    # Dropped packets do not keep it: it ends with its time.
    bench.now += 901 * SECOND
    assert bench.send(protocol=protocol).destination == TWO


@pytest.mark.parametrize("grace", [0, 30])
@pytest.mark.parametrize("then", ["other", "nobody", "no service"])
def test_reset(grace: int, then: str) -> None:
    """Both ends hear of it when they next send, once their time is over."""
    bench = Bench()
    fields: dict[str, Any] = {"on_removal": "reset", "removal_grace": grace}
    bench.serve(D1, **fields)
    bench.send()
    bench.reply(source=ONE)
    bench.send("A")
    if then == "no service":
        bench.dp.apply([])
    else:
        bench.serve(*([D2] if then == "other" else []), **fields)
    if grace:
        for _ in range(2):
            assert bench.send("A").reason == Reason.ESTABLISHED
            assert bench.reply("A", source=ONE).reason == Reason.REPLY
            bench.now += 15 * SECOND
    for packet, sender in [
        (wire.packet("tcp", CLIENT[4], 40000, VIRTUAL[4], 80, "A"), VIRTUAL[4]),
        (wire.packet("tcp", *ONE, CLIENT[4], 40000, "A"), CLIENT[4]),
    ]:
        result = bench.dp.process(bytearray(packet))
        assert (result.verdict, result.reason) == (Verdict.REJECT, Reason.DESTINATION_GONE)
        reset = wire.read(result.packet)
        assert (reset.source, reset.protocol) == (sender, 6)
        assert bytes(result.packet)[33] & 4, "RST"
        assert wire.is_intact(result.packet)
    assert bench.send("R").packet is None, "no reset of a reset"
    result = bench.send("S")
    expected = {"other": Reason.NEW, "nobody": Reason.NO_DESTINATION}
    assert result.reason == expected.get(then, Reason.NO_SERVICE)


def test_the_time_until_a_reset_begins_with_a_look_and_ends_with_a_return() -> None:
    bench = Bench()
    bench.serve(D1, on_removal="reset", removal_grace=10)
    bench.send()
    bench.serve(D2, on_removal="reset", removal_grace=10)
    bench.dp.sweep()
    bench.now += 9 * SECOND
    assert bench.send("A").reason == Reason.ESTABLISHED
    bench.serve(D1, D2, on_removal="reset", removal_grace=10)
    bench.now += 9 * SECOND
    assert bench.send("A").reason == Reason.ESTABLISHED
    bench.serve(D2, on_removal="reset", removal_grace=10)
    assert bench.send("A").reason == Reason.ESTABLISHED
    bench.now += 10 * SECOND
    assert bench.send("A").verdict == Verdict.REJECT


def test_explain_does_not_start_the_time_until_a_reset() -> None:
    bench = Bench()
    bench.serve(D1, on_removal="reset", removal_grace=10)
    bench.send()
    bench.serve(D2, on_removal="reset", removal_grace=10)
    said = bench.dp.explain(f"tcp {CLIENT[4]}:40000 -> {VIRTUAL[4]}:80")
    assert [each.address for each in said.destinations] == [ONE[0]]
    bench.now += 20 * SECOND
    assert bench.send("A").reason == Reason.ESTABLISHED, "it begins now"
    bench.now += 11 * SECOND
    # A SYN would open a new connection; a reply is answered by a reset.
    assert bench.dp.explain(f"tcp {CLIENT[4]}:40000 -> {VIRTUAL[4]}:80").action == "forward"
    said = bench.dp.explain(f"tcp {ONE[0]}:{ONE[1]} -> {CLIENT[4]}:40000")
    assert (said.action, said.destinations) == ("reject", ())
    assert bench.reply("A", source=ONE).verdict == Verdict.REJECT


def test_a_reset_is_nothing_to_udp_which_goes_elsewhere_at_once() -> None:
    bench = Bench()
    bench.serve(D1, protocol="udp", on_removal="reset", removal_grace=10)
    bench.send(protocol="udp")
    bench.serve(D2, protocol="udp", on_removal="reset", removal_grace=10)
    assert bench.send(protocol="udp").destination == TWO


# What becomes of connections whose destination was removed: of TCP, and of UDP.
REMOVED = {
    ("drain", "tcp"): (Reason.ESTABLISHED, ONE),
    ("drain", "udp"): (Reason.NEW, TWO),
    ("expire", "tcp"): (Reason.NO_CONNECTION, None),
    ("expire", "udp"): (Reason.NEW, TWO),
    ("drop", "tcp"): (Reason.DESTINATION_GONE, None),
    ("drop", "udp"): (Reason.DESTINATION_GONE, None),
    ("reset", "tcp"): (Reason.DESTINATION_GONE, None),
    ("reset", "udp"): (Reason.NEW, TWO),
}


@pytest.mark.parametrize(("on_removal", "protocol"), REMOVED)
def test_kept(on_removal: str, protocol: str) -> None:
    """Removed as far as new connections are concerned, and for others when it is kept no more."""
    bench = Bench()
    fields: dict[str, Any] = {"protocol": protocol, "on_removal": on_removal}
    bench.serve(D1, **fields)
    bench.send(protocol=protocol)
    for number, kept in enumerate(([ONE], (THREE, ONE), (ONE, ONE))):
        bench.serve(D2, **fields, kept=kept)
        assert bench.send(port=1 + number, protocol=protocol).destination == TWO
        bench.dp.sweep()
        known = bench.send("A", protocol=protocol)
        assert (known.reason, known.destination) == (Reason.ESTABLISHED, ONE)
        assert bench.reply("A", source=ONE, protocol=protocol).reason == Reason.REPLY
    bench.serve(D2, **fields, kept=(THREE,))
    gone = bench.send("A", protocol=protocol)
    assert (gone.reason, gone.destination) == REMOVED[on_removal, protocol]


@pytest.mark.parametrize("back", [False, True])
def test_kept_until_the_service_goes(back: bool) -> None:
    bench = Bench()
    fields: dict[str, Any] = {"protocol": "udp", "kept": (ONE,)}
    bench.serve(D1, **fields)
    bench.send(protocol="udp")
    bench.serve(D2, **fields)
    assert bench.send(protocol="udp").destination == ONE
    bench.dp.apply([])
    if back:
        # It was gone in between: as of a destination that comes back, nothing is known of it.
        bench.serve(D2, **fields)
    result = bench.send(protocol="udp")
    assert (result.reason, result.destination) == (
        (Reason.NEW, TWO) if back else (Reason.NO_SERVICE, None)
    )


def test_kept_and_back() -> None:
    bench = Bench()
    bench.serve(D1, protocol="udp")
    bench.send(protocol="udp")
    (before,) = bench.dp.services()[0].destinations
    for _ in range(3):
        bench.serve(D2, protocol="udp", kept=(ONE,))
        bench.serve(D1, D2, protocol="udp")
        known = bench.send(protocol="udp")
        assert (known.reason, known.destination) == (Reason.ESTABLISHED, ONE)
    counts = {each.address: each.packets_in for each in bench.dp.services()[0].destinations}
    assert counts[ONE[0]] == before.packets_in + 3
    bench.serve(D2, protocol="udp")
    assert bench.send(protocol="udp").destination == TWO


def test_kept_by_a_transaction() -> None:
    bench = Bench()
    bench.serve(D2, D1, protocol="udp")
    assert bench.send(protocol="udp").destination == ONE
    with bench.dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, "udp", kept=(ONE,)).remove(*ONE)
    assert bench.send(protocol="udp").destination == ONE
    with bench.dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, "udp", scheduler="wlc")
    assert bench.send(protocol="udp").destination == ONE
    with bench.dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, "udp", kept=())
    assert bench.send(protocol="udp").destination == TWO


def test_to_keep_who_never_was_there_is_nothing() -> None:
    bench = Bench()
    bench.serve(D2, kept=(ONE, TWO))
    assert bench.send().destination == TWO
    assert ("tcp", *ONE) not in bench.dp.captures().real
    bench.serve(kept=(ONE,))
    assert bench.send(port=2).reason == Reason.NO_DESTINATION


@pytest.mark.parametrize("on_removal", ["drain", "expire", "drop"])
def test_a_removed_service_is_like_removed_destinations(on_removal: str) -> None:
    bench = Bench()
    bench.serve(D1, on_removal=on_removal)
    bench.send()
    bench.dp.apply([])
    result = bench.send("A")
    assert (result.verdict, result.reason) == {
        "drain": (Verdict.FORWARD, Reason.ESTABLISHED),
        "expire": (Verdict.PASS, Reason.NO_SERVICE),
        "drop": (Verdict.DROP, Reason.DESTINATION_GONE),
    }[on_removal]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("on_removal", ["expire", "drop"])
def test_another_way_of_removal_is_for_known_connections_too(
    on_removal: str, together: bool
) -> None:
    bench = Bench()
    bench.serve(D1)
    bench.send()
    if not together:
        bench.serve(D1, on_removal=on_removal)
        assert bench.send("A").reason == Reason.ESTABLISHED
    bench.serve(D2, on_removal=on_removal)
    result = bench.send("A")
    assert (result.verdict, result.reason) == {
        "expire": (Verdict.REJECT, Reason.NO_CONNECTION),
        "drop": (Verdict.DROP, Reason.DESTINATION_GONE),
    }[on_removal]


def test_a_way_of_removal_that_is_taken_back() -> None:
    bench = Bench()
    for on_removal in ("drain", "expire", "drain"):
        bench.serve(D1, on_removal=on_removal)
        bench.send()
    bench.serve(D2)
    assert bench.send("A").reason == Reason.ESTABLISHED


def test_a_way_of_removal_that_comes_with_a_return() -> None:
    bench = Bench()
    bench.serve(D1)
    bench.send()
    bench.dp.apply([])
    bench.serve(D1, on_removal="expire")
    assert bench.send("A").reason == Reason.ESTABLISHED
    bench.serve(D2, on_removal="expire")
    assert bench.send("A").reason == Reason.NO_CONNECTION


def test_a_way_of_removal_that_changes_while_a_connection_is_made() -> None:
    @svcdp.register_scheduler("test-changes-removal")
    class Meddler(svcdp.abc.Scheduler):
        def pick(self, flow: object, destinations: object) -> int:
            bench.serve(D1, scheduler="test-changes-removal", on_removal="expire")
            return 0

    bench = Bench()
    bench.serve(D1, scheduler="test-changes-removal")
    assert bench.send().reason == Reason.NEW
    bench.serve(D2, on_removal="expire")
    assert bench.send("A").reason == Reason.NO_CONNECTION


@pytest.mark.parametrize("on_removal", ["drain", "expire", "drop"])
def test_a_destination_that_returns_has_its_connections(on_removal: str) -> None:
    bench = Bench()
    bench.serve(D1, on_removal=on_removal)
    bench.send(port=1)
    bench.send(port=2)
    bench.serve(D2, on_removal=on_removal)
    if on_removal == "drop":
        assert bench.send("A", port=1).reason == Reason.DESTINATION_GONE
    bench.serve(D2, D1, on_removal=on_removal)
    result = bench.send("A", port=2)
    assert (result.reason, result.destination) == (Reason.ESTABLISHED, ONE)
    one = bench.dp.services()[0].destinations[1]
    assert (one.address, one.connections_total, one.active) == (ONE[0], 2, 2)
    assert bench.dp.draining().real == frozenset()


def test_it_returns_with_another_method_and_threshold() -> None:
    bench = Bench()
    bench.serve(D1)
    bench.send(port=1)
    bench.serve(D2)
    bench.serve(replace(D1, method="dr", upper=1))
    result = bench.send("A", port=1)
    assert wire.read(result.packet).destination == ONE[0]
    assert bench.send(port=2).verdict == Verdict.REJECT, "one connection is all it takes"


def test_expire_leaves_a_quiesced_server_with_a_new_syn() -> None:
    """ip_vs_core.c: expire_nodest_conn, and a weight of 0."""
    bench = Bench()
    bench.serve(D2, D1, on_removal="expire")
    assert bench.send(port=1).destination == ONE
    bench.serve(replace(D1, weight=0), D2, on_removal="expire")
    assert bench.send("A", port=1).destination == ONE
    assert bench.send("S", port=1).destination == TWO
    assert bench.send("A", port=1).destination == TWO


def test_drain_keeps_a_quiesced_server() -> None:
    bench = Bench()
    bench.serve(D2, D1)
    assert bench.send(port=1).destination == ONE
    bench.serve(replace(D1, weight=0), D2)
    assert bench.send("S", port=1).destination == ONE


def test_what_is_remembered_of_an_id_is_void_when_it_is_given_again() -> None:
    """Connections that were noted for another node, and captures of before an edit."""
    bench = Bench()
    server = DestinationSpec("10.1.1.1", 80, method="dr", mark=5)
    bench.serve(server, protocol="udp")
    watch = bench.dp.watch_connections(threshold=1)
    bench.send(protocol="udp")
    bench.serve(replace(server, mark=6), protocol="udp")
    assert bench.dp.draining().hops == {(5, "10.1.1.1")}
    bench.dp.apply([])
    bench.dp.sweep()
    assert bench.dp.draining() == svcdp.Captures()
    bench.serve(replace(server, address="10.1.1.9", port=81, mark=7), protocol="udp", port=81)
    bench.send(protocol="udp", to=(VIRTUAL[4], 81))
    assert bench.dp.draining() == svcdp.Captures()
    assert [(told.virtual_port, told.destination) for told in watch.read()] == [(81, "10.1.1.9")]
    watch.close()


def test_counters_of_what_is_gone_do_not_come_back() -> None:
    """A destination without connections is forgotten with its counters."""
    bench = Bench()
    bench.serve(D1)
    bench.send(port=1)
    bench.now += 1000 * SECOND
    bench.serve(D2)
    bench.dp.sweep()
    bench.serve(D1)
    assert bench.dp.services()[0].destinations[0].connections_total == 0
