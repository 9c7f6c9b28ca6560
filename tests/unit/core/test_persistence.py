"""Persistence: who counts as one client, for which services, and for how long."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL, Bench

from svcdp import ConfigError, DestinationSpec, Reason, ServiceSpec

ONE, TWO, THREE = ("10.1.1.1", 8080), ("10.1.1.2", 8080), ("10.1.1.3", 8080)
MARK4 = {"address": "0.0.0.0", "protocol": "fwmark"}
PORTS = iter(range(1, 60000))


def went(bench: Bench, client: str, **fields: Any) -> tuple[str, int] | None:
    return bench.send(client=client, port=next(PORTS), **fields).destination


# -- one client ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 8, 24, 31, 32])
def test_netmask(bits: int) -> None:
    bench = Bench()
    bench.serve(ONE, TWO, persistence=100, persistence_netmask=bits)
    base = 0xC0000200
    for bit in range(32):
        other = base ^ 1 << 31 - bit
        address = ".".join(str(byte) for byte in other.to_bytes(4, "big"))
        before = bench.dp.stats().persistence_templates
        if before == 0:
            went(bench, "192.0.2.0")
            before = 1
        went(bench, address)
        is_other = bench.dp.stats().persistence_templates > before
        assert is_other == (bit < bits), (bit, address)


@pytest.mark.parametrize("bits", [1, 48, 64, 127, 128])
def test_prefix_of_ipv6(bits: int) -> None:
    bench = Bench()
    bench.serve(
        ("fd01::1", 80), ("fd01::2", 80), address=VIRTUAL[6], persistence=100,
        persistence_netmask=bits,
    )  # fmt: skip
    to = (VIRTUAL[6], 80)
    assert went(bench, "2001:db8::", to=to) is not None
    for client, differs_at in [("2001:db8::1", 127), ("2001:db8:1::", 47), ("a001:db8::", 0)]:
        before = bench.dp.stats().persistence_templates
        went(bench, client, to=to)
        assert (bench.dp.stats().persistence_templates > before) == (differs_at < bits)


def test_a_network_stays_together() -> None:
    bench = Bench()
    bench.serve(ONE, TWO, THREE, persistence=100, persistence_netmask=24)
    for network in range(6):
        assert len({went(bench, f"198.51.{network}.{n}") for n in range(1, 20)}) == 1
    assert bench.dp.stats().persistence_templates == 6


# -- groups of ports and services ------------------------------------------------------------------


def test_every_port_of_an_address_is_one_group() -> None:
    bench = Bench()
    bench.serve(("10.1.1.1", 0), ("10.1.1.2", 0), port=0, persistence=100)
    for number in range(6):
        client = f"192.0.2.{number}"
        assert len({went(bench, client, to=(VIRTUAL[4], p)) for p in (1, 80, 65535)}) == 1
    assert bench.dp.stats().persistence_templates == 6


def test_a_range_is_one_group() -> None:
    bench = Bench()
    bench.serve(("10.1.1.1", 0), ("10.1.1.2", 0), port=1000, last_port=1999, persistence=100)
    for number in range(6):
        client = f"192.0.2.{number}"
        assert len({went(bench, client, to=(VIRTUAL[4], p)) for p in (1000, 1500, 1999)}) == 1


def test_a_mark_is_one_group() -> None:
    """HTTP and HTTPS, and several addresses, of one site."""
    bench = Bench()
    bench.serve(("10.1.1.1", 0), ("10.1.1.2", 0), port=7, persistence=100, **MARK4)
    for number in range(6):
        client = f"192.0.2.{number}"
        ways = {
            went(bench, client, to=(address, port), protocol=protocol, mark=7)
            for address, port in ((VIRTUAL[4], 80), (VIRTUAL[4], 443), ("10.96.0.11", 80))
            for protocol in ("tcp", "udp")
        }
        assert len(ways) == 1
    assert bench.dp.stats().persistence_templates == 6


def test_services_of_a_group_share_who_has_the_same_destinations() -> None:
    bench = Bench()
    group = {"persistence": 100, "persistence_group": "site"}
    bench.serve(ONE, TWO, port=80, **group)
    bench.serve(TWO, THREE, port=443, **group)
    assert went(bench, CLIENT[4]) == TWO
    assert went(bench, CLIENT[4], to=(VIRTUAL[4], 443)) == TWO
    # One that the other service does not have cannot be shared: it is bound anew there.
    other = "192.0.2.5"
    assert went(bench, other) == ONE
    assert went(bench, other, to=(VIRTUAL[4], 443)) == THREE
    assert bench.dp.stats().persistence_templates == 2


def test_families_and_protocols_are_groups_of_their_own() -> None:
    bench = Bench()
    for protocol in ("tcp", "udp"):
        bench.serve(ONE, TWO, protocol=protocol, persistence=100)
    went(bench, CLIENT[4])
    went(bench, CLIENT[4], protocol="udp")
    assert bench.dp.stats().persistence_templates == 2


# -- how long --------------------------------------------------------------------------------------


def test_a_template_outlives_its_time_while_connections_hang_on_it() -> None:
    bench = Bench()
    bench.serve(ONE, TWO, persistence=10)
    first = bench.send(port=1).destination
    bench.send("A", port=1)
    for _ in range(40):
        bench.now += 20 * SECOND
        bench.send("A", port=1)
        bench.dp.sweep()
        assert bench.dp.stats().persistence_templates == 1
    assert bench.send(port=2).destination == first
    for port in (1, 2):
        bench.send("R", port=port)
    bench.now += 61 * SECOND
    for _ in range(3):
        bench.dp.sweep()
        bench.now += 61 * SECOND
    stats = bench.dp.stats()
    assert (stats.connections, stats.persistence_templates) == (0, 0)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_timed_one_has_its_time_only(protocol: str) -> None:
    """kube-proxy's rule: the time since the last new connection, whatever is still open."""
    bench = Bench()
    bench.serve(ONE, TWO, protocol=protocol, persistence=100, persistence_timed=True)
    first = bench.send(protocol=protocol, port=1).destination
    bench.send("A", protocol=protocol, port=1)
    bench.now += 99 * SECOND
    assert bench.send(protocol=protocol, port=2).destination == first, "and begins anew"
    bench.send("A", protocol=protocol, port=2)
    bench.now += 99 * SECOND
    bench.dp.sweep()
    assert bench.send("A", protocol=protocol, port=1).reason == Reason.ESTABLISHED
    bench.now += SECOND
    bench.dp.sweep()
    assert bench.dp.stats().persistence_templates == 0, "packets do not renew it"
    assert bench.send(protocol=protocol, port=3).destination != first
    assert bench.send("A", protocol=protocol, port=2).destination == first


def test_an_ended_template_binds_nobody() -> None:
    bench = Bench()
    bench.serve(ONE, TWO, protocol="udp", persistence=400)
    first = bench.send(protocol="udp").destination
    bench.now += 301 * SECOND
    bench.dp.sweep()
    stats = bench.dp.stats()
    assert (stats.connections, stats.persistence_templates) == (0, 1)
    bench.now += 99 * SECOND
    assert bench.send(protocol="udp").destination != first


def test_an_edit_of_the_time_is_for_the_next_connection() -> None:
    bench = Bench()
    bench.serve(ONE, TWO, persistence=1000)
    first = bench.send(port=1).destination
    bench.serve(ONE, TWO, persistence=10)
    bench.send("A", port=1)
    bench.send("R", port=1)
    bench.now += 100 * SECOND
    bench.dp.sweep()
    assert bench.send(port=2).destination == first
    bench.send("A", port=2)
    bench.send("R", port=2)
    bench.now += 11 * SECOND
    bench.dp.sweep()
    bench.now += 61 * SECOND
    bench.dp.sweep()
    assert bench.dp.stats().persistence_templates == 0


# -- which destination -----------------------------------------------------------------------------


def test_an_address_with_two_ports_is_two_destinations() -> None:
    bench = Bench()
    two_ports = [("10.1.1.1", 8080), ("10.1.1.1", 8081)]
    bench.serve(*two_ports, persistence=100)
    for number in range(6):
        client = f"192.0.2.{number}"
        assert len({went(bench, client) for _ in range(3)}) == 1


@pytest.mark.parametrize("method", ["dr", "local"])
def test_direct_destinations(method: str) -> None:
    bench = Bench()
    members = [DestinationSpec(f"10.1.1.{n}", 80, method=method) for n in (1, 2, 3)]
    bench.serve(*members, persistence=100)
    for number in range(6):
        client = f"192.0.2.{number}"
        assert len({went(bench, client) for _ in range(3)}) == 1


def test_who_is_bound_stays_bound_when_the_other_is_chosen_more() -> None:
    bench = Bench()
    bench.serve(ONE, persistence=100)
    assert went(bench, CLIENT[4]) == ONE
    bench.serve((*ONE, 1), (*TWO, 1000), persistence=100, scheduler="wlc")
    assert went(bench, CLIENT[4]) == ONE
    assert went(bench, "192.0.2.9") == TWO


def test_a_destination_that_comes_back_has_its_clients() -> None:
    """As long as nobody bound them elsewhere."""
    bench = Bench()
    bench.serve(ONE, persistence=1000)
    went(bench, CLIENT[4])
    bench.serve(TWO, persistence=1000)
    bench.serve(ONE, TWO, persistence=1000)
    assert went(bench, CLIENT[4]) == ONE


def test_a_clashing_connection_leaves_the_template_as_it_was() -> None:
    """A refused connection does not hang on anything."""
    bench = Bench()
    bench.serve(ONE)
    bench.serve(ONE, port=81, persistence=10)
    bench.send(port=5)
    assert bench.send(port=5, to=(VIRTUAL[4], 81)).reason == Reason.NO_PORT
    bench.send("A", port=5)
    bench.send("R", port=5)
    bench.now += 11 * SECOND
    bench.dp.sweep()
    assert bench.dp.stats().persistence_templates == 0


def test_icmp_errors_bind_nobody() -> None:
    bench = Bench()
    bench.serve(ONE, TWO, persistence=100)
    sent = bytes(bench.send().packet)
    before = bench.dp.stats()
    server = wire.read(sent).destination
    assert bench.dp.process(wire.icmp_error(sent, server)).reason == Reason.RELATED
    assert bench.dp.stats().persistence_templates == before.persistence_templates


def test_groups_are_known_as_long_as_services_have_them() -> None:
    """Through changes that succeed and some that fail."""
    chance = random.Random(1)
    bench = Bench()
    for _ in range(500):
        specs = [
            ServiceSpec(
                f"10.96.0.{number}",
                80,
                persistence=chance.choice([None, 60]),
                persistence_group=chance.choice(["", "a", "b"]),
                masquerade_address=chance.choice([None] * 9 + ["::1"]),  # of the other family
            )
            for number in chance.sample(range(1, 8), chance.randint(0, 3))
        ]
        with suppress(ConfigError):
            bench.dp.update(specs, [(f"10.96.0.{chance.randint(1, 7)}", 80, "tcp")])
            sticky = [each.spec for each in bench.dp.services() if each.spec.persistence]
            groups = {each.persistence_group or f"{each.address} 80 tcp" for each in sticky}
            assert bench.dp._affinities.keys() == groups
