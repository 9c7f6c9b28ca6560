"""Source rules with a mark, and with endpoints of their own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from bench import CLIENT, SECOND, VIRTUAL, Bench

import svcdp
from svcdp import DestinationSpec, ServiceSpec, SourceRule
from svcdp.abc import Scheduler
from svcdp.schedulers import BUILTIN

POD, OUTSIDER = "10.1.9.9", CLIENT[4]
A, B, C = (("10.1.0.1", 8080), ("10.1.0.2", 8080), ("10.1.0.3", 8080))
#: Pods are served by A and B, others by C.
RULES = (SourceRule(sources=("10.1.0.0/16",), endpoints=(A, B)), SourceRule(endpoints=(C,)))


class Clients:
    """Sends SYNs from one port after another."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.port = 1024

    def pick(self, client: str = POD, mark: int = 0) -> tuple[str, int] | None:
        self.port += 1
        return self.bench.send(client=client, port=self.port, mark=mark).destination

    def picks(self, count: int, client: str = POD) -> list[tuple[str, int] | None]:
        return [self.pick(client) for _ in range(count)]


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def clients(bench: Bench) -> Clients:
    return Clients(bench)


@pytest.mark.parametrize("scheduler", sorted(set(BUILTIN) - {"none"}))
def test_only_its_endpoints_serve_a_rule(bench: Bench, clients: Clients, scheduler: str) -> None:
    bench.serve((*A, 50), (*C, 50), (*B, 50), scheduler=scheduler, rules=RULES)
    assert set(clients.picks(20, POD)) <= {A, B}
    assert set(clients.picks(20, OUTSIDER)) == {C}


def test_a_scheduler_in_python_sees_only_its_endpoints(
    bench: Bench, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Last(Scheduler):
        def pick(self, flow: svcdp.Flow, destinations: object) -> int:
            assert isinstance(destinations, tuple)
            seen.append([(each.address, each.port) for each in destinations])
            return len(destinations) - 1

    monkeypatch.setattr(svcdp.schedulers, "new_scheduler", lambda _: Last())
    bench.serve(A, B, C, scheduler="last", rules=RULES)
    assert clients.pick(POD) == A
    assert clients.pick(OUTSIDER) == C
    assert seen == [[B, A], [C]]


def test_each_rule_has_its_own_round(bench: Bench, clients: Clients) -> None:
    both = (SourceRule(sources=("10.1.0.0/16",), endpoints=(A, B)), SourceRule(endpoints=(A, B, C)))
    bench.serve(A, B, C, rules=both)
    assert [clients.pick(each) for each in (POD, OUTSIDER, POD, OUTSIDER, POD, OUTSIDER)] == [
        B, C, A, B, B, A,
    ]  # fmt: skip


def test_a_round_goes_on_when_another_rule_changes(bench: Bench, clients: Clients) -> None:
    bench.serve(A, B, C, rules=RULES)
    assert clients.pick() == B
    bench.serve(A, B, C, rules=(RULES[0], replace(RULES[1], endpoints=(A,))))
    assert clients.picks(2) == [A, B]
    assert clients.pick(OUTSIDER) == A


def test_a_round_goes_on_when_an_endpoint_joins(bench: Bench, clients: Clients) -> None:
    bench.serve(A, B, C, rules=RULES)
    assert clients.pick() == B
    bench.serve(A, B, C, rules=(replace(RULES[0], endpoints=(C, A, B)), RULES[1]))
    assert clients.picks(4) == [A, C, B, A]


def test_weights_count_in_each_rule(bench: Bench, clients: Clients) -> None:
    rules = (RULES[0], SourceRule(endpoints=(A, C)))
    bench.serve((*A, 1), (*B, 3), (*C, 2), scheduler="wrr", rules=rules)
    assert Counter(clients.picks(40)) == {A: 10, B: 30}
    assert Counter(clients.picks(30, OUTSIDER)) == {A: 10, C: 20}
    bench.serve((*A, 1), (*B, 1), (*C, 0), scheduler="wrr", rules=rules)
    assert Counter(clients.picks(20)) == {A: 10, B: 10}
    assert set(clients.picks(3, OUTSIDER)) == {A}


def test_who_has_no_endpoint_is_turned_away(bench: Bench, clients: Clients) -> None:
    bench.serve(A, B, rules=(RULES[0], SourceRule(endpoints=(), on_empty="drop")))
    result = bench.send(client=OUTSIDER)
    assert (result.verdict, result.reason) == (
        svcdp.Verdict.DROP,
        svcdp.Reason.NO_DESTINATION,
    )
    assert clients.pick() == B


def test_an_affinity_to_another_rules_endpoint_does_not_count(bench: Bench) -> None:
    """Two services of one group, as a node port and a cluster IP are: what binds a client at one
    must be somebody who may serve it at the other (kube-proxy's applicable set).
    """
    inner = ServiceSpec(
        VIRTUAL[4], 80, "tcp", tuple(DestinationSpec(*each) for each in (A, B, C)),
        persistence=100, persistence_group="web",
    )  # fmt: skip
    outer = replace(inner, address="192.0.2.1", rules=(SourceRule(endpoints=(C,)),))
    bench.dp.apply([inner, outer])
    ports = iter(range(1024, 2000))

    def pick(address: str) -> tuple[str, int] | None:
        return bench.send(client=POD, port=next(ports), to=(address, 80)).destination

    assert [pick(VIRTUAL[4]) for _ in range(2)] == [C, C]
    bench.dp.apply([inner, replace(outer, rules=(SourceRule(endpoints=(A,)),))])
    assert pick("192.0.2.1") == A
    assert pick(VIRTUAL[4]) == A  # bound anew
    bench.now += 101 * SECOND
    assert pick("192.0.2.1") == A


def test_known_connections_stay(bench: Bench, clients: Clients) -> None:
    bench.serve(A, B, C, rules=RULES)
    assert bench.send(client=OUTSIDER).destination == C
    bench.serve(A, B, C, rules=(RULES[0], SourceRule(endpoints=(A,))))
    assert bench.send("A", client=OUTSIDER).destination == C
    assert clients.pick(OUTSIDER) == A


def test_a_mark_is_asked_for(bench: Bench, clients: Clients) -> None:
    rules = (SourceRule(mark=0x30, endpoints=(A,)), SourceRule(endpoints=(B,)))
    bench.serve(A, B, rules=rules)
    marks = {0: B, 0x10: B, 0x20: B, 0x30: A, 0x1034: A}
    assert {mark: clients.pick(mark=mark) for mark in marks} == marks


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (SourceRule(endpoints=(("10.1.0.9", 8080),)), "10.1.0.9 port 8080 is no destination"),
        (SourceRule(endpoints=(("10.1.0.1", 80),)), "10.1.0.1 port 80 is no destination"),
        (SourceRule(endpoints=(("x", 80),)), "'x' is no IP address"),
        (SourceRule(endpoints=(("10.1.0.1",),)), "is no tuple of"),  # type: ignore[arg-type]
        (SourceRule(endpoints=(("10.1.0.1", []),)), "port"),  # type: ignore[arg-type]
        (SourceRule(endpoints=7), "is no tuple of"),  # type: ignore[arg-type]
        (SourceRule(mark=-1), "mark -1"),
        (SourceRule(mark=1 << 32), "mark 4294967296"),
        ("any", "is no SourceRule"),
    ],
)
def test_what_is_refused(bench: Bench, rule: SourceRule, message: str) -> None:
    bench.serve(A)
    with pytest.raises(svcdp.ConfigError, match=message):
        bench.serve(A, rules=(rule,))
    assert bench.send().destination == A


def test_a_destination_that_a_rule_names_cannot_go_alone(bench: Bench) -> None:
    bench.serve(A, B, rules=(SourceRule(endpoints=(B,)),))
    with (
        pytest.raises(svcdp.ConfigError, match="is no destination"),
        bench.dp.transaction() as tx,
    ):
        tx.service(VIRTUAL[4], 80).remove(*B)
    with bench.dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, rules=(SourceRule(),)).remove(*B)
    assert bench.send().destination == A


def test_explain(bench: Bench) -> None:
    bench.serve(A, C, B, scheduler="lc", rules=RULES)
    found = bench.dp.explain(f"tcp {POD}:4000 -> {VIRTUAL[4]}:80")
    assert {(each.address, each.port) for each in found.destinations} == {A, B}
    assert "source rule 1 (in 10.1.0.0/16)" in str(found)
    assert "2 of the destinations serve it" in str(found)
    assert found.picked is not None
    sent = bench.send(client=POD, port=4000).destination
    assert (found.picked.address, found.picked.port) == sent
    other = bench.dp.explain(f"tcp {OUTSIDER}:4000 -> {VIRTUAL[4]}:80")
    assert [(each.address, each.port) for each in other.destinations] == [C]
    assert other.picked == other.destinations[0]


def test_explain_says_whom_a_client_is_bound_to(bench: Bench) -> None:
    bench.serve(A, B, C, persistence=60, rules=RULES)
    first = bench.send(client=POD).destination
    bound = bench.dp.explain(f"tcp {POD}:4000 -> {VIRTUAL[4]}:80")
    assert bound.picked is not None
    assert (bound.picked.address, bound.picked.port) == first
