"""Changes of services: all of them or none, only what differs, and what a bad spec says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import wire
from bench import CLIENT, VIRTUAL, Bench

import svcdp
from svcdp import (
    CapacityError,
    ConfigError,
    ConflictError,
    Dataplane,
    DestinationSpec,
    NotFoundError,
    Reason,
    ServiceSpec,
    SourceRule,
)

ONE, TWO, THREE = ("10.1.1.1", 8080), ("10.1.1.2", 8080), ("10.1.1.3", 8080)
SERVICE = ServiceSpec(VIRTUAL[4], 80, destinations=(DestinationSpec(*ONE), DestinationSpec(*TWO)))


def specs(dp: Dataplane) -> list[ServiceSpec]:
    return [status.spec for status in dp.services()]


def test_a_transaction_takes_effect_at_its_end() -> None:
    bench = Bench()
    with bench.dp.transaction() as tx:
        service = tx.service(VIRTUAL[4], 80, scheduler="wrr", name="web")
        service.add(*ONE, weight=3)
        service.add(*TWO)
        service.update(*ONE, weight=5)
        service.add(*THREE)
        service.remove(*THREE)
        assert bench.send().reason == Reason.NO_SERVICE
        assert not bench.dp.services()
    assert specs(bench.dp) == [
        ServiceSpec(
            VIRTUAL[4],
            80,
            destinations=(DestinationSpec(*ONE, weight=5), DestinationSpec(*TWO)),
            scheduler="wrr",
            name="web",
        )
    ]


def test_an_exception_changes_nothing() -> None:
    bench = Bench()
    bench.dp.apply([SERVICE])

    def fail() -> None:
        with bench.dp.transaction() as tx:
            tx.remove_service(VIRTUAL[4], 80)
            tx.service(VIRTUAL[4], 81).add(*ONE)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert specs(bench.dp) == [SERVICE]


def test_editing_keeps_what_is_not_named() -> None:
    dp = Bench().dp
    dp.apply([replace(SERVICE, scheduler="wrr", persistence=5, name="web")])
    with dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, persistence=None)
    assert specs(dp) == [replace(SERVICE, scheduler="wrr", name="web")]
    with dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, destinations=(DestinationSpec(*TWO, 7),))
    assert specs(dp)[0].destinations == (DestinationSpec(*TWO, 7),)


def test_removed_and_made_again_in_one_transaction() -> None:
    bench = Bench()
    bench.dp.apply([SERVICE])
    bench.send()
    with bench.dp.transaction() as tx:
        tx.remove_service(VIRTUAL[4], 80)
        tx.service(VIRTUAL[4], 80).add(*TWO)
    assert specs(bench.dp) == [replace(SERVICE, destinations=(DestinationSpec(*TWO),))]
    assert bench.send("A").reason == Reason.ESTABLISHED
    assert bench.dp.services()[0].destinations[0].connections_total == 1


def test_a_destination_removed_and_added_keeps_its_counters() -> None:
    bench = Bench()
    bench.dp.apply([SERVICE])
    bench.send()
    with bench.dp.transaction() as tx:
        service = tx.service(VIRTUAL[4], 80)
        service.remove(*TWO)
        service.add(*TWO, weight=9)
    status = bench.dp.services()[0].destinations[1]
    assert (status.address, status.weight, status.connections_total) == (TWO[0], 9, 1)
    assert not bench.dp.draining().real


@pytest.mark.parametrize("change", [
    lambda tx: tx.remove_service(VIRTUAL[4], 81),
    lambda tx: tx.remove_service(VIRTUAL[4], 80, "udp"),
    lambda tx: tx.service(VIRTUAL[4], 80).remove(*THREE),
    lambda tx: tx.service(VIRTUAL[4], 80).update(*THREE, weight=1),
    lambda tx: (tx.remove_service(VIRTUAL[4], 80), tx.remove_service(VIRTUAL[4], 80)),
])  # fmt: skip
def test_what_is_not_there(change: Any) -> None:
    dp = Bench().dp
    dp.apply([SERVICE])
    with pytest.raises(NotFoundError), dp.transaction() as tx:
        change(tx)
    assert specs(dp) == [SERVICE]


def test_what_is_there_twice() -> None:
    dp = Bench().dp
    dp.apply([SERVICE])
    with pytest.raises(ConflictError, match=TWO[0]), dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80).add(*TWO)
    for twice in (
        [SERVICE, replace(SERVICE, name="again")],
        [replace(SERVICE, destinations=SERVICE.destinations * 2)],
    ):
        with pytest.raises(ConflictError):
            dp.apply(twice)
    assert specs(dp) == [SERVICE]


def test_the_second_of_two_transactions_fails() -> None:
    dp = Bench().dp
    dp.apply([SERVICE])

    def race() -> None:
        with dp.transaction() as late:
            late.service(VIRTUAL[4], 80).add(*THREE)
            late.service(VIRTUAL[4], 81).add(*THREE)
            with dp.transaction() as early:
                early.service(VIRTUAL[4], 80).remove(*ONE)

    with pytest.raises(ConflictError, match="another"):
        race()
    assert specs(dp) == [replace(SERVICE, destinations=SERVICE.destinations[1:])]
    with dp.transaction() as one, dp.transaction() as other:
        one.service(VIRTUAL[4], 82)
        other.service(VIRTUAL[4], 83)
    assert len(specs(dp)) == 3


def test_apply_is_exact_and_update_is_partial() -> None:
    dp = Bench().dp
    others = [replace(SERVICE, port=port) for port in (81, 82)]
    dp.apply([SERVICE, *others])
    assert specs(dp) == [SERVICE, *others]
    dp.update(
        [replace(others[0], scheduler="wrr")], [(VIRTUAL[4], 82, "tcp"), ("10.0.0.1", 1, "udp")]
    )
    assert specs(dp) == [SERVICE, replace(others[0], scheduler="wrr")]
    dp.apply([others[1]])
    assert specs(dp) == [others[1]]
    dp.apply([])
    assert specs(dp) == []


def test_what_does_not_differ_is_not_touched() -> None:
    """Round robin goes on where it was, whatever happens elsewhere or comes again."""
    bench = Bench()
    bench.dp.apply([SERVICE])
    picks = [bench.send(port=1).destination]
    for port, wanted in enumerate(
        (
            [SERVICE],
            [SERVICE, replace(SERVICE, port=81)],
            [replace(SERVICE, destinations=SERVICE.destinations[::-1])],
            [replace(SERVICE, address="10.96.0.11"), SERVICE],
        ),
        2,
    ):
        bench.dp.apply(wanted)
        picks.append(bench.send(port=port).destination)
    assert picks == [TWO, ONE, TWO, ONE, TWO]


def test_addresses_are_normalised() -> None:
    dp = Bench().dp
    dp.apply([ServiceSpec("FD00:0::0001", 80, destinations=(DestinationSpec("fd00:0:0::2", 80),))])
    (spec,) = specs(dp)
    assert (spec.address, spec.destinations[0].address) == ("fd00::1", "fd00::2")
    with dp.transaction() as tx:
        tx.service("fd00:0::1", 80).update("fd00::0:2", 80, weight=3)
    assert specs(dp)[0].destinations[0].weight == 3


BAD: list[dict[str, Any]] = [
    {"address": "10.0.0.256"},
    {"address": "fe80::1%eth0"},
    {"address": 5},
    {"address": b"\1\1\1\1"},
    {"address": None},
    {"port": -1},
    {"port": 65536},
    {"port": "80"},
    {"protocol": "TCP"},
    {"protocol": "icmp"},
    {"protocol": None},
    {"scheduler": "nobody"},
    {"scheduler": None},
    {"scheduler": []},
    {"persistence": 0},
    {"persistence": 1.5},
    {"persistence": "10"},
    {"persistence": 1 << 31},
    {"masquerade_address": "x"},
    {"masquerade_address": 5},
    {"masquerade_address": "::1"},
    {"rules": None},
    {"rules": ("any",)},
    {"rules": (SourceRule(("10.0.0.1/8",)),)},
    {"rules": (SourceRule(5),)},  # type: ignore[arg-type]
    {"rules": (SourceRule((None,)),)},  # type: ignore[arg-type]
    {"rules": (SourceRule(on_empty="ignore"),)},  # type: ignore[arg-type]
    {"rules": (SourceRule(masquerade="yes"),)},  # type: ignore[arg-type]
    {"destinations": None},
    {"destinations": ("10.0.0.1:80",)},
    {"destinations": (DestinationSpec("10.0.0.1", 0),)},
    {"destinations": (DestinationSpec("10.0.0.1", "80"),)},  # type: ignore[arg-type]
    {"destinations": (DestinationSpec("::1", 80),)},
    {"destinations": (DestinationSpec(7, 80),)},  # type: ignore[arg-type]
    {"destinations": (DestinationSpec("10.0.0.1", 80, -1),)},
    {"destinations": (DestinationSpec("10.0.0.1", 80, 1 << 31),)},
    {"destinations": (DestinationSpec("10.0.0.1", 80, 0.5),)},  # type: ignore[arg-type]
    {"destinations": (DestinationSpec("10.0.0.1", 80, 1, "route"),)},
]


@pytest.mark.parametrize("fields", BAD, ids=str)
def test_a_bad_spec_changes_nothing(fields: dict[str, Any]) -> None:
    bench = Bench()
    bench.dp.apply([SERVICE])
    bad = ServiceSpec(**{"address": "10.96.0.99", "port": 99, **fields})
    wanted = [replace(SERVICE, scheduler="wrr"), ServiceSpec("10.96.0.12", 1), bad]
    for order in (wanted, wanted[::-1]):
        for call in (bench.dp.apply, bench.dp.update):
            with pytest.raises(ConfigError):
                call(order)
            assert specs(bench.dp) == [SERVICE]

    def transact() -> None:
        with bench.dp.transaction() as tx:
            tx.service("10.96.0.12", 1)
            named = {k: v for k, v in fields.items() if k not in ("address", "port", "protocol")}
            tx.service(bad.address, bad.port, bad.protocol, **named)

    with pytest.raises(ConfigError):
        transact()
    assert specs(bench.dp) == [SERVICE]
    assert [bench.send(port=port).destination for port in (1, 2)] == [TWO, ONE]


def test_unknown_fields() -> None:
    dp = Bench().dp
    with pytest.raises(ConfigError, match="colour"), dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, colour="red")
    assert not dp.services()


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_connections": 0},
        {"max_connections": (1 << 28) + 1},
        {"masquerade_ports": (0, 1)},
        {"masquerade_ports": (2, 1)},
        {"masquerade_ports": (1, 65536)},
        {"timeouts": {"established": 0}},
        {"timeouts": {"established": float("nan")}},
        {"timeouts": {"established": 1 << 31}},
        {"timeouts": {"forever": 1}},
    ],
    ids=str,
)
def test_bad_dataplanes(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Dataplane(**arguments)


def test_thousands_of_services_come_and_go() -> None:
    """The service table grows, and every one is found."""
    bench = Bench(8192)
    many = [
        ServiceSpec(f"10.{96 + n // 65536}.{n // 256 % 256}.{n % 256}", 80,
                    destinations=(DestinationSpec("10.1.1.1", 1 + n),))
        for n in range(3000)
    ]  # fmt: skip
    bench.dp.apply(many)
    bench.dp.update([], [spec.key for spec in many[::3]])
    for n, spec in enumerate(many):
        result = bench.send(to=(spec.address, 80))
        if n % 3:
            assert result.destination == ("10.1.1.1", 1 + n)
        else:
            assert result.reason == Reason.NO_SERVICE
    bench.dp.apply([])
    assert bench.dp.captures().virtual == {
        (s.protocol, s.address, s.port) for n, s in enumerate(many) if n % 3
    }


def test_a_family_and_protocol_are_kept_apart() -> None:
    bench = Bench()
    bench.dp.apply([SERVICE, replace(SERVICE, protocol="udp", destinations=())])
    assert bench.send().reason == Reason.NEW
    assert bench.send(protocol="udp").reason == Reason.NO_DESTINATION
    assert bench.send(protocol="sctp").reason == Reason.NO_SERVICE
    mapped = "::ffff:" + VIRTUAL[4]
    assert bench.send(client=CLIENT[6], to=(mapped, 80)).reason == Reason.NO_SERVICE


def test_a_commit_may_be_observed_by_what_it_frees() -> None:
    """A scheduler's end comes with the commit that replaces it; it may look at the dataplane."""
    seen = []

    @svcdp.register_scheduler("test-observer")
    class Observer(svcdp.abc.Scheduler):
        def __init__(self) -> None:
            seen.append(len(bench.dp.services()))

        def pick(self, flow: object, destinations: object) -> int:
            return 0

        def __del__(self) -> None:
            seen.append(len(bench.dp.services()))

    bench = Bench()
    bench.serve(ONE, scheduler="test-observer")
    bench.send()
    bench.serve(ONE, scheduler="rr")
    bench.serve(ONE, TWO, scheduler="rr")
    assert seen == [0, 1]


class Interrupted(Dataplane):
    """Somebody presses Ctrl-C while the core commits: CPython raises when that call returns."""

    armed = False

    def commit(self, *arguments: Any) -> None:
        super().commit(*arguments)
        if self.armed:
            raise KeyboardInterrupt


def test_an_interrupted_commit_is_whole() -> None:
    dp = Interrupted(4096, 1, clock=lambda: 0)
    other = replace(SERVICE, address="10.96.0.11", persistence=300)
    dp.apply([SERVICE, other])
    drained = ("10.1.1.1", 8080)
    new = ServiceSpec("10.96.0.12", 80, destinations=(DestinationSpec("10.7.7.7", 80),))
    for port in (40000, 40001):
        dp.process(wire.packet("tcp", CLIENT[4], port, VIRTUAL[4], 80))
    smaller = replace(SERVICE, destinations=SERVICE.destinations[1:])
    dp.armed = True
    with pytest.raises(KeyboardInterrupt):
        dp.apply([smaller, new])
    dp.armed = False
    assert specs(dp) == [smaller, new]
    assert ("tcp", *drained) in dp.draining().real
    # No id was given away: the next destination is nobody else's.
    dp.update([ServiceSpec("10.96.0.13", 80, destinations=(DestinationSpec("10.8.8.8", 80),))])
    first = dp.process(wire.packet("tcp", CLIENT[4], 40000, "10.96.0.12", 80))
    assert first.destination == ("10.7.7.7", 80)
    dp.apply([SERVICE])
    assert ("tcp", *drained) not in dp.draining().real


def test_what_failed_costs_no_ids() -> None:
    class Failing(Dataplane):
        def commit(self, *arguments: Any) -> None:
            raise MemoryError("none left")

    working = Dataplane(4096, 1)
    failing = Failing(4096, 1)
    for _ in range(3):
        with pytest.raises(CapacityError, match="none left"):
            failing.apply([SERVICE])
        working.apply([SERVICE])
    for dp in (failing, working):
        with pytest.raises(IndexError):
            dp.traffic(3)
