"""The life of connections: persistence, masquerade, removals, expiry, and a table that is full."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL, Bench

import svcdp
from svcdp import Captures, Reason, SourceRule, Verdict

ONE, TWO, THREE = ("10.1.1.1", 8080), ("10.1.1.2", 8080), ("10.1.1.3", 8080)
NODE = "198.51.100.1"
MASQUERADE = (SourceRule(masquerade=True),)

# -- persistence -----------------------------------------------------------------------------------


def test_a_client_stays_with_its_destination() -> None:
    bench = Bench()
    bench.serve(ONE, TWO, THREE, persistence=10)
    firsts = {}
    for number in range(6):
        client = f"192.0.2.{number}"
        firsts[client] = bench.send(client=client).destination
    assert Counter(firsts.values()) == {ONE: 2, TWO: 2, THREE: 2}
    for port in (1, 2, 3):
        for client, destination in firsts.items():
            assert bench.send(client=client, port=port).destination == destination
    assert bench.dp.stats().persistence_templates == 6
    assert bench.dp.stats().connections == 24


def test_persistence_of_masqueraded_clients() -> None:
    """By the address that the client has, not by the one that it is given."""
    bench = Bench()
    bench.serve(
        ONE,
        TWO,
        THREE,
        persistence=10,
        rules=(SourceRule(masquerade=True),),
        masquerade_address="198.51.100.1",
    )
    clients = [f"192.0.2.{number}" for number in range(1, 7)]
    first = [bench.send(client=client).destination for client in clients]
    assert set(first) == {ONE, TWO, THREE}
    again = [bench.send(client=client, port=40001).destination for client in clients]
    assert again == first
    assert bench.dp.stats().persistence_templates == len(clients)


def test_persistence_takes_half_of_the_table_at_most() -> None:
    bench = Bench(100)
    bench.serve(ONE, persistence=10_000)
    for number in range(200):
        bench.send(client=f"198.51.100.{number}")
        bench.now += 2 * SECOND
    bench.now += 60 * SECOND
    bench.dp.sweep()
    stats = bench.dp.stats()
    assert (stats.connections, stats.persistence_templates) == (0, 50)
    assert bench.send().reason == Reason.NEW


def test_a_packet_that_changes_while_it_is_processed_harms_only_itself() -> None:
    """One buffer twice in a batch: the second is parsed before the first is rewritten."""
    bench = Bench()
    bench.serve(ONE, TWO)
    packet = wire.packet("tcp", CLIENT[4], 40000, VIRTUAL[4], 80, "S")
    bench.dp.process_batch([packet, packet])
    bench.now += 1000 * SECOND
    bench.dp.sweep()
    assert bench.dp.stats().connections == 0
    assert bench.send().reason == Reason.NEW


def test_persistence_restarts_with_each_new_connection_only() -> None:
    bench = Bench()
    bench.serve(ONE, TWO, persistence=10)
    first = bench.send(port=1).destination
    bench.now = 9 * SECOND
    assert bench.send(port=2).destination == first
    bench.now = 18 * SECOND
    bench.send("A", port=2)  # an old connection does not count
    bench.now = 19 * SECOND - 1
    assert bench.send(port=3).destination == first
    # IPVS: it stays as long as connections hang on it, and up to a minute longer.
    bench.now += 10 * SECOND
    assert bench.send(port=4).destination == first
    for port in (1, 2, 3, 4):
        bench.send("R", port=port)
    bench.now += 61 * SECOND
    bench.dp.sweep()
    bench.now += 61 * SECOND
    assert bench.send(port=5).destination != first


def test_persistence_ends_with_the_destination() -> None:
    bench = Bench()
    bench.serve(ONE, TWO, persistence=100)
    first = bench.send(port=1).destination
    other = TWO if first == ONE else ONE
    bench.serve(other, persistence=100)
    assert bench.send(port=2).destination == other
    bench.serve(ONE, TWO, persistence=100)
    assert bench.send(port=3).destination == other


def test_a_quiesced_destination_keeps_its_clients() -> None:
    """IPVS without expire_quiescent_template."""
    bench = Bench()
    bench.serve(ONE, persistence=100)
    bench.send(port=1)
    bench.serve((*ONE, 0), TWO, persistence=100)
    assert bench.send(port=2).destination == ONE
    assert bench.send(port=2, client="192.0.2.9").destination == TWO


@pytest.mark.parametrize("shared", [True, False])
def test_persistence_groups(shared: bool) -> None:
    bench = Bench()
    bench.serve(ONE, TWO, THREE, persistence=100, persistence_group="web")
    bench.serve(
        THREE, TWO, ONE, port=81, persistence=100, persistence_group="web" if shared else "other"
    )
    here = [bench.send(client=f"192.0.2.{n}", port=1).destination for n in range(30)]
    there = [
        bench.send(client=f"192.0.2.{n}", port=2, to=(VIRTUAL[4], 81)).destination
        for n in range(30)
    ]
    assert (here == there) == shared
    assert bench.dp.stats().persistence_templates == (30 if shared else 60)


def test_persistence_off_and_on_again() -> None:
    bench = Bench()
    bench.serve(ONE, TWO, persistence=100)
    first = bench.send(port=1).destination
    bench.serve(ONE, TWO)
    assert {bench.send(port=port).destination for port in range(2, 6)} == {ONE, TWO}
    bench.serve(ONE, TWO, persistence=100)
    assert first in (ONE, TWO)
    second = bench.send(port=10).destination
    assert {bench.send(port=port).destination for port in range(11, 15)} == {second}


# -- masquerade ------------------------------------------------------------------------------------


def test_masquerade_ports_are_unique_per_destination() -> None:
    bench = Bench(masquerade_ports=(61000, 61019))
    bench.serve(ONE, TWO, masquerade_address=NODE, rules=MASQUERADE)
    for port in range(1, 41):
        assert bench.send(port=port).reason == Reason.NEW
    used = Counter((c.destination, c.source, c.source_port) for c in bench.dp.connections())
    assert set(used.values()) == {1}
    assert {port for _, _, port in used} == set(range(61000, 61020))
    result = bench.send(port=41)
    assert (result.verdict, result.reason) == (Verdict.DROP, Reason.NO_PORT)
    assert bench.dp.stats().packets[Verdict.DROP, Reason.NO_PORT] == 1
    assert bench.dp.stats().connections == 40
    assert bench.send("A", port=40).reason == Reason.ESTABLISHED
    bench.now += 60 * SECOND
    assert bench.send(port=41).reason == Reason.NEW


def test_masquerade_ports_per_protocol_and_address() -> None:
    bench = Bench(masquerade_ports=(61000, 61000))
    for protocol in ("tcp", "udp", "sctp"):
        for number, node in enumerate((NODE, "198.51.100.2")):
            bench.serve(
                ONE, protocol=protocol, port=80 + number, masquerade_address=node, rules=MASQUERADE
            )
            result = bench.send(protocol=protocol, to=(VIRTUAL[4], 80 + number))
            assert result.reason == Reason.NEW


def test_the_port_range_is_used_up_before_it_fails() -> None:
    """Random ports, but no false alarm: of a crowded range each port is found."""
    bench = Bench(8192, masquerade_ports=(60000, 61999))
    bench.serve(ONE, masquerade_address=NODE, rules=MASQUERADE)
    reasons = Counter(bench.send(port=port).reason for port in range(1, 1801))
    assert reasons == {Reason.NEW: 1800}, "nine tenths of the ports are taken without trouble"


def test_the_port_of_a_closed_connection_is_taken_when_no_other_is_free() -> None:
    bench = Bench(masquerade_ports=(61000, 61000))
    bench.serve(ONE, masquerade_address=NODE, rules=MASQUERADE)
    assert bench.send(port=1).reason == Reason.NEW
    assert bench.reply("SA", source=ONE, client=NODE, port=61000).reason == Reason.REPLY
    assert bench.send("A", port=1).reason == Reason.ESTABLISHED
    assert bench.send(port=2).reason == Reason.NO_PORT
    assert bench.send("R", port=1).reason == Reason.ESTABLISHED
    assert bench.connection().state == "CLOSE"
    assert bench.send(port=2).reason == Reason.NEW
    assert bench.connection().client_port == 2
    assert bench.send("A", port=1).reason == Reason.NO_CONNECTION


def test_two_connections_whose_replies_look_alike_are_not_made() -> None:
    """One client port to two services of one destination: the second finds another or nobody."""
    bench = Bench()
    bench.serve(ONE)
    bench.serve(ONE, port=81)
    bench.serve(ONE, TWO, port=82)
    assert bench.send().destination == ONE
    assert bench.send(to=(VIRTUAL[4], 81)).reason == Reason.NO_PORT
    assert bench.send(to=(VIRTUAL[4], 82)).destination == TWO
    assert bench.reply(source=ONE).reason == Reason.REPLY
    assert wire.read(bench.reply(source=ONE).packet).source_port == 80


def test_both_directions_of_one_connection_must_differ() -> None:
    bench = Bench(masquerade_ports=(30080, 30080))
    bench.serve(ONE, address=NODE, port=30080, masquerade_address=NODE)
    result = bench.send(client=ONE[0], port=ONE[1], to=(NODE, 30080))
    assert result.reason == Reason.NO_PORT


def test_a_destination_as_client_is_masqueraded_when_it_would_reach_itself() -> None:
    bench = Bench()
    bench.serve(ONE, TWO, masquerade_address=NODE)
    sources = {}
    for port in (1, 2):
        result = bench.send(client=ONE[0], port=port)
        sources[result.destination] = wire.read(result.packet).source
    assert sources == {ONE: NODE, TWO: ONE[0]}


# -- removals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["destination", "service"])
def test_tcp_drains_and_udp_leaves(whole: bool) -> None:
    bench = Bench()
    for protocol in ("tcp", "udp", "sctp"):
        bench.serve(ONE, protocol=protocol)
        bench.send(protocol=protocol)
        if whole:
            bench.dp.update([], [(VIRTUAL[4], 80, protocol)])
        else:
            bench.serve(TWO, protocol=protocol)
        result = bench.send("A", protocol=protocol)
        if protocol != "udp":
            assert (result.reason, result.destination) == (Reason.ESTABLISHED, ONE)
        elif whole:
            assert result.reason == Reason.NO_SERVICE
        else:
            assert (result.reason, result.destination) == (Reason.NEW, TWO)
        assert bench.reply(source=ONE, protocol=protocol).reason == (
            Reason.REPLY if protocol != "udp" else Reason.NO_SERVICE
        )


def test_a_sweep_takes_udp_connections_of_removed_destinations() -> None:
    bench = Bench()
    bench.serve(ONE, protocol="udp")
    bench.send(protocol="udp")
    bench.serve(TWO, protocol="udp")
    bench.dp.sweep()
    assert not bench.connections()
    assert bench.dp.draining() == Captures()


def test_a_destination_that_returns_has_its_connections_and_counters() -> None:
    bench = Bench()
    bench.serve(ONE, TWO)
    bench.serve(ONE, TWO, protocol="udp")
    for port in range(1, 5):
        bench.send(port=port)
        bench.send(port=port, protocol="udp")
    before = [service.destinations for service in bench.dp.services()]
    bench.serve(TWO)
    bench.serve(TWO, protocol="udp")
    bench.serve(TWO, ONE)
    bench.serve(TWO, ONE, protocol="udp")
    after = [service.destinations for service in bench.dp.services()]
    assert [sorted(d, key=str) for d in after] == [sorted(d, key=str) for d in before]
    reasons = {bench.send("A", port=p, protocol=x).reason for p in (1, 2) for x in ("tcp", "udp")}
    assert reasons == {Reason.ESTABLISHED}


def test_captures_hold_what_drains() -> None:
    bench = Bench()
    bench.serve(ONE, TWO)
    bench.send()  # to TWO, the newest
    virtual = ("tcp", VIRTUAL[4], 80)
    one, two = ("tcp", *ONE), ("tcp", *TWO)
    assert bench.dp.captures() == Captures(frozenset({virtual}), frozenset({one, two}))
    assert bench.dp.draining() == Captures()
    bench.dp.apply([])
    assert bench.dp.captures() == Captures(frozenset({virtual}), frozenset({two}))
    assert bench.dp.draining() == bench.dp.captures()
    bench.now += 60 * SECOND
    bench.dp.sweep()
    assert bench.dp.captures() == Captures()


def test_connections_do_not_follow_to_another_service_of_the_address() -> None:
    """A service removed and made again takes its destination back, another one does not."""
    bench = Bench()
    bench.serve(ONE)
    bench.send()
    bench.dp.apply([])
    bench.serve(ONE, port=81)
    services = bench.dp.services()
    assert services[0].destinations[0].connections_total == 0
    bench.serve(ONE)
    assert bench.dp.services()[0].destinations[0].connections_total == 1


def test_ids_of_destinations_are_not_shared() -> None:
    """A destination that comes in the place of one that drains keeps it apart."""
    bench = Bench()
    for round_ in range(20):
        bench.serve(*((f"10.2.{round_}.{n}", 1) for n in range(10)))
        for port in range(10):
            bench.send(port=1000 * round_ + port + 1)
        if round_ % 3 == 0:
            bench.now += 100 * SECOND
            bench.dp.sweep()
        for connection in bench.dp.connections():
            result = bench.send("A", port=connection.client_port)
            assert result.destination == (connection.destination, connection.destination_port)


# -- expiry ----------------------------------------------------------------------------------------


def test_expiry_by_sweep_is_bounded_and_complete() -> None:
    bench = Bench()
    bench.serve(ONE)
    bench.serve(("fd01::1", 8080), address=VIRTUAL[6])
    for port in range(1, 101):
        bench.send(port=port)
        bench.send(port=port, client=CLIENT[6], to=(VIRTUAL[6], 80))
    bench.now += 60 * SECOND
    assert not bench.connections()
    left = bench.dp.stats().connections
    bench.dp.sweep(limit=10)
    assert bench.dp.stats().connections == left - 20
    bench.dp.sweep()
    stats = bench.dp.stats()
    assert (stats.connections, stats.connections_created) == (0, 200)
    assert stats.connections_expired == 200
    destinations = [d for service in bench.dp.services() for d in service.destinations]
    assert all((d.active, d.inactive) == (0, 0) for d in destinations)


def test_sweeps_of_any_size_leave_nothing_out() -> None:
    bench = Bench(20_000)
    bench.serve(ONE)
    for port in range(1, 9391):
        bench.send(port=port)
    bench.now += 60 * SECOND
    bench.dp.sweep()
    assert bench.dp.stats().connections == 0
    bench = Bench(20_000)
    bench.serve(ONE)
    for port in range(1, 101):
        bench.send(port=port)
    bench.now += 60 * SECOND
    for limit in (1, 9) * 10:
        bench.dp.sweep(limit=limit)
    assert bench.dp.stats().connections == 0


def test_traffic_alone_sweeps() -> None:
    bench = Bench()
    bench.serve(ONE)
    for port in range(1, 101):
        bench.send(port=port)
    bench.now += 60 * SECOND
    for _ in range(100):
        bench.send("A", port=9999)
    assert bench.dp.stats().connections == 0


# -- a full table ----------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_full_table_refuses_new_connections_and_serves_the_rest() -> None:
    bench = Bench(1000)
    dp = bench.dp
    bench.serve(ONE, TWO)
    for port in range(1, 501):
        bench.send(port=port)
        bench.send("A", port=port)
    batch = svcdp.PacketBatch(64)
    offered = wire.packet("tcp", "0.0.0.0", 7, VIRTUAL[4], 80)
    established = [
        wire.packet("tcp", CLIENT[4], port, VIRTUAL[4], 80, "A") for port in range(1, 501)
    ]
    memory = 0
    for number in range(100_000):
        offered[12:16] = (0x0B000000 + number).to_bytes(4, "big")
        batch.append(offered)
        if number % 1000 == 999:
            assert set(dp.process_batch([p[:] for p in established])) == {Verdict.FORWARD}
        if len(batch) == 64:
            dp.process_batch(batch)
            batch.clear()
        if number == 10_000:
            gc.collect()
            memory = resident()
    dp.process_batch(batch)
    gc.collect()
    assert resident() - memory < 1 << 20
    stats = dp.stats()
    assert stats.connections == stats.connections_max == 1000
    assert stats.packets[Verdict.FORWARD, Reason.NEW] == 1000
    assert stats.packets[Verdict.DROP, Reason.TABLE_FULL] == 100_000 - 500
    assert stats.packets[Verdict.FORWARD, Reason.ESTABLISHED] == 500 + 100 * 500
    # The half-open ones expire; then there is room again.
    bench.now += 61 * SECOND
    assert bench.send(port=50_000).reason == Reason.NEW


@pytest.mark.parametrize("limit", [1, 2, 3, 15, 16, 17, 1000, 1024, 1025])
def test_the_limit_is_exact(limit: int) -> None:
    bench = Bench(limit)
    bench.serve(ONE)
    reasons = [bench.send(port=port).reason for port in range(1, limit + 3)]
    assert reasons == [Reason.NEW] * limit + [Reason.TABLE_FULL] * 2
    assert bench.dp.stats().connections == limit


def test_a_full_table_and_a_port_used_again() -> None:
    bench = Bench(1)
    bench.serve(ONE)
    bench.send()
    bench.send("R")
    bench.reply("R", source=ONE)
    bench.send("F")
    assert bench.connection().state in ("CLOSE", "SYN_RECV")


def test_persistence_gives_way_to_connections() -> None:
    bench = Bench(2)
    bench.serve(ONE, TWO, persistence=1)
    assert bench.send(port=1).reason == Reason.NEW
    assert (bench.dp.stats().connections, bench.dp.stats().persistence_templates) == (1, 1)
    bench.now += SECOND
    assert bench.send(port=2).reason == Reason.TABLE_FULL  # a connection hangs on it
    bench.now += 120 * SECOND
    assert bench.send(port=2).reason == Reason.NEW


def test_both_families_share_the_limit() -> None:
    bench = Bench(10)
    bench.serve(ONE)
    bench.serve(("fd01::1", 8080), address=VIRTUAL[6])
    for port in range(1, 6):
        assert bench.send(port=port).reason == Reason.NEW
        assert bench.send(port=port, client=CLIENT[6], to=(VIRTUAL[6], 80)).reason == Reason.NEW
    assert bench.send(port=7).reason == Reason.TABLE_FULL
    assert bench.send(port=7, client=CLIENT[6], to=(VIRTUAL[6], 80)).reason == Reason.TABLE_FULL


# -- repeatable ------------------------------------------------------------------------------------


def test_same_packets_same_times_same_seed_same_bytes() -> None:
    def history(seed: int) -> tuple[list[bytes], list[object]]:
        bench = Bench(64, seed)
        bench.serve(
            (*ONE, 3), TWO, masquerade_address=NODE, rules=MASQUERADE, scheduler="random",
            persistence=5,
        )  # fmt: skip
        out = []
        for number in range(300):
            bench.now += SECOND
            packet = wire.packet("tcp", f"192.0.2.{number % 7}", 1 + number % 50, VIRTUAL[4], 80)
            bench.dp.process(packet)
            out.append(bytes(packet))
        return out, bench.connections()

    assert history(1) == history(1)
    assert history(1) != history(2)


def test_dataplanes_are_freed() -> None:
    """Also with a scheduler in Python, which the core holds on to."""

    @svcdp.register_scheduler("test-freed")
    class First(svcdp.abc.Scheduler):
        def pick(self, flow: object, destinations: object) -> int:
            return 0

    def use(scheduler: str) -> None:
        bench = Bench(16)
        bench.serve(ONE, scheduler=scheduler)
        bench.send()

    for scheduler in ("rr", "test-freed"):
        for _ in range(50):
            use(scheduler)
        gc.collect()
        memory = resident()
        for _ in range(200):
            use(scheduler)
        gc.collect()
        assert resident() - memory < 2 << 20, scheduler


def test_memory_is_taken_when_asked_for() -> None:
    dp = svcdp.Dataplane(1 << 16)

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) << 10

    before = resident()
    dp.populate()
    assert resident() - before > 4 << 20
    assert dp.stats().connections == 0
    assert list(dp.connections()) == []
