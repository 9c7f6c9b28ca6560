"""explain() says what process() then does, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL, Bench
from hypothesis import given, settings
from hypothesis import strategies as st

from svcdp import ConfigError, Dataplane, DestinationSpec, Flow, Reason, ServiceSpec, SourceRule

ACTIONS = {"FORWARD": "forward", "PASS": "pass", "DROP": "drop", "REJECT": "reject"}
REALS = [f"10.1.1.{n}" for n in range(1, 5)]
CLIENTS = ["192.0.2.4", "203.0.113.5", *REALS[:2]]
NODE = "198.51.100.1"

SOURCES = [(), ("192.0.2.0/24",), ("10.0.0.0/8", "203.0.113.5/32"), ("::/0",)]
RULES = st.lists(
    st.builds(
        SourceRule,
        sources=st.sampled_from(
            [(), ("192.0.2.0/24",), ("10.0.0.0/8", "203.0.113.5/32"), ("::/0",)]
        ),
        masquerade=st.booleans(),
        on_empty=st.sampled_from(["reject", "drop"]),
    ),
    max_size=3,
).map(tuple)
SERVICES = st.builds(
    ServiceSpec,
    address=st.sampled_from([VIRTUAL[4], "10.96.0.11"]),
    port=st.sampled_from([80, 81]),
    protocol=st.sampled_from(["tcp", "udp"]),
    destinations=st.lists(
        st.builds(
            DestinationSpec,
            address=st.sampled_from(REALS),
            port=st.sampled_from([80, 8080]),
            weight=st.integers(0, 2),
        ),
        max_size=4,
        unique_by=lambda d: (d.address, d.port),
    ).map(tuple),
    scheduler=st.sampled_from(["rr", "wrr", "random"]),
    persistence=st.sampled_from([None, None, 30]),
    rules=RULES,
    masquerade_address=st.sampled_from([None, NODE]),
)
FLOWS = st.builds(
    Flow,
    protocol=st.sampled_from(["tcp", "udp"]),
    source=st.sampled_from(CLIENTS),
    source_port=st.integers(1, 6),
    destination=st.sampled_from([VIRTUAL[4], "10.96.0.11", "10.96.0.12"]),
    destination_port=st.sampled_from([80, 81]),
)
PACKETS = st.tuples(FLOWS, st.sampled_from("SSSR"), st.integers(0, 40))


def observable(bench: Bench) -> Any:
    return bench.dp.stats(), bench.dp.services(), bench.connections()


@pytest.mark.parametrize(
    "scheduler", ["lc", "wlc", "sed", "nq", "fo", "ovf", "dh", "sh", "mh", "lblc", "lblcr"]
)
def test_the_one_that_is_picked(scheduler: str) -> None:
    bench = Bench()
    bench.serve(*((real, 8080, n) for n, real in enumerate(REALS)), scheduler=scheduler)
    picked = set()
    for number in range(1, 40):
        client = f"192.0.2.{number}"
        said = bench.dp.explain(Flow("tcp", client, 5, VIRTUAL[4], 80))
        result = bench.send(client=client, port=5)
        assert said.action == ACTIONS[result.verdict.name]
        if result.destination is None:
            assert said.picked is None
            assert f"scheduler {scheduler} has none for this flow" in str(said)
            continue
        assert said.picked is not None
        assert (said.picked.address, said.picked.port) == result.destination
        assert f"it picks {said.picked.address} port 8080 now" in str(said)
        assert len(said.destinations) == 3, "one has no weight"
        picked.add(said.picked)
        known = bench.dp.explain(Flow("tcp", client, 5, VIRTUAL[4], 80))
        assert (known.picked,) == known.destinations
    assert len(picked) == 1 if scheduler in ("fo", "dh") else len(picked) > 1


@pytest.mark.parametrize("scheduler", ["rr", "wrr", "random", "twos"])
def test_what_cannot_be_told_before(scheduler: str) -> None:
    bench = Bench()
    bench.serve(*((real, 8080) for real in REALS), scheduler=scheduler)
    said = bench.dp.explain(Flow("tcp", CLIENT[4], 5, VIRTUAL[4], 80))
    assert (said.picked, len(said.destinations)) == (None, 4)


@pytest.mark.parametrize("on_removal", ["drain", "expire", "drop", "reset"])
@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_a_known_connection_to_a_server_without_weight(protocol: str, on_removal: str) -> None:
    """Where connections end with their server, a SYN or an INIT begins a new one; a datagram does
    not.
    """
    bench = Bench()
    fields = {"protocol": protocol, "on_removal": on_removal}
    bench.serve((REALS[0], 80), **fields)
    bench.send(port=5, protocol=protocol)
    bench.serve((REALS[0], 80, 0), (REALS[1], 80), **fields)
    (said,) = bench.dp.explain(Flow(protocol, CLIENT[4], 5, VIRTUAL[4], 80)).destinations
    result = bench.send(port=5, protocol=protocol)
    assert (said.address, said.port) == result.destination
    moves = on_removal == "expire" and protocol != "udp"
    assert result.destination == (REALS[moves], 80)


def test_the_one_that_a_client_is_bound_to() -> None:
    bench = Bench()
    bench.serve(*((real, 8080) for real in REALS), persistence=60)
    destination = bench.send(port=1).destination
    picked = bench.dp.explain(Flow("tcp", CLIENT[4], 2, VIRTUAL[4], 80)).picked
    assert picked is not None
    assert (picked.address, picked.port) == destination


def test_masquerade_is_for_nat_only() -> None:
    bench = Bench()
    rules = (SourceRule(masquerade=True),)
    bench.serve(DestinationSpec("10.1.1.1", 80, method="dr"), rules=rules)
    assert bench.dp.explain(Flow("tcp", CLIENT[4], 2, VIRTUAL[4], 80)).action == "forward"
    assert bench.send(port=2).verdict.name == "FORWARD"


def test_a_pick_that_has_no_address_for_its_masquerade() -> None:
    """rr goes through both: one is served, the other is not."""
    bench = Bench()
    rules = (SourceRule(masquerade=True),)
    direct = DestinationSpec("10.1.1.2", 80, method="dr")
    bench.serve(DestinationSpec("10.1.1.1", 80), direct, scheduler="rr", rules=rules)
    said = bench.dp.explain(Flow("tcp", CLIENT[4], 2, VIRTUAL[4], 80))
    assert said.action == "forward"
    assert "dropped instead if the pick is 10.1.1.1 port 80" in str(said)
    verdicts = {bench.send(port=port).verdict.name for port in (2, 3)}
    assert verdicts == {"FORWARD", "DROP"}


def test_a_call_is_not_part_of_a_flow() -> None:
    bench = Bench()
    service = {"protocol": "udp", "port": 5060, "persistence": 60, "persistence_engine": "sip"}
    bench.serve(("10.1.1.1", 5060), **service)
    said = bench.dp.explain(Flow("udp", CLIENT[4], 2, VIRTUAL[4], 5060))
    assert "a packet of a known call (Call-ID) goes where the call is" in str(said)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.lists(SERVICES, max_size=5, unique_by=lambda s: s.key),
    st.lists(
        st.tuples(FLOWS, st.sampled_from(["S", "S", "S", "R"]), st.integers(0, 40)), max_size=12
    ),
)
def test_explain_agrees_with_process(
    services: list[ServiceSpec], history: list[tuple[Flow, str, int]]
) -> None:
    bench = Bench()
    bench.dp.apply(services)
    for flow, flags, seconds in history:
        bench.now += seconds * SECOND
        before = observable(bench)
        said = bench.dp.explain(flow)
        assert observable(bench) == before
        assert bench.dp.explain(str(flow)) == said
        result = bench.send(
            port=flow.source_port,
            client=flow.source,
            to=(flow.destination, flow.destination_port),
            protocol=flow.protocol,
        )
        if result.reason != Reason.NO_PORT:
            # That two replies would look alike is seen only when a connection is made.
            assert ACTIONS[result.verdict.name] == said.action
            possible = {(d.address, d.port) for d in said.destinations}
            if result.destination is None:
                assert not possible
            else:
                assert result.destination in possible
                (picked,) = (
                    d for d in said.destinations if (d.address, d.port) == result.destination
                )
                connection = next(
                    c
                    for c in bench.dp.connections()
                    if (c.protocol, c.client, c.client_port, c.virtual, c.virtual_port)
                    == (
                        flow.protocol,
                        flow.source,
                        flow.source_port,
                        flow.destination,
                        flow.destination_port,
                    )
                )
                assert picked.masquerade == (connection.source == NODE)
        if flags == "R" and flow.protocol == "tcp":
            bench.send(
                "F",
                port=flow.source_port,
                client=flow.source,
                to=(flow.destination, flow.destination_port),
            )
            if result.destination is not None:
                bench.send(
                    "R",
                    port=flow.source_port,
                    client=flow.source,
                    to=(flow.destination, flow.destination_port),
                )


def test_words() -> None:
    bench = Bench()
    bench.serve(("10.1.1.1", 8080, 3), name="default/web:http", persistence=60)
    said = bench.dp.explain("tcp 192.0.2.4:40000 -> 10.96.0.10:80")
    assert (said.action, said.service) == ("forward", bench.dp.services()[0].spec)
    assert "default/web:http" in str(said)
    assert said.flow == Flow("tcp", "192.0.2.4", 40000, "10.96.0.10", 80)
    bench.send(port=1)
    assert "persistent to 10.1.1.1" in str(bench.dp.explain(said.flow))
    bench.send()
    assert "known connection" in str(bench.dp.explain(said.flow))
    reply = bench.dp.explain("tcp 10.1.1.1:8080 -> 192.0.2.4:40000")
    assert reply.action == "forward"
    assert "reply" in str(reply)
    assert bench.dp.explain("udp 192.0.2.4:1 -> 10.96.0.10:80").action == "pass"


def test_ipv6_is_written_in_brackets() -> None:
    bench = Bench()
    bench.serve(("fd01::1", 80), address=VIRTUAL[6])
    text = f"tcp [{CLIENT[6]}]:5 -> [{VIRTUAL[6]}]:80"
    assert bench.dp.explain(text).action == "forward"
    assert str(bench.dp.explain(text).flow) == text


@pytest.mark.parametrize(
    "flow",
    [
        "",
        "tcp",
        "tcp 1.2.3.4 -> 10.96.0.10:80",
        "icmp 1.2.3.4:1 -> 10.96.0.10:80",
        "tcp 1.2.3.4:1 -> 10.96.0.10:65536",
        "tcp 1.2.3.4:0 -> 10.96.0.10:80",
        "tcp 1.2.3.456:1 -> 10.96.0.10:80",
        "tcp [::1]:1 -> 10.96.0.10:80",
        "tcp [fe80::1%eth0]:1 -> [fd96::10]:80",
        Flow("tcp", "::1", 1, "10.96.0.10", 80),
        Flow("TCP", "1.2.3.4", 1, "10.96.0.10", 80),
        Flow("tcp", "1.2.3.4", "1", "10.96.0.10", 80),  # type: ignore[arg-type]
    ],
)
def test_flows_that_are_none(flow: str | Flow) -> None:
    with pytest.raises(ConfigError):
        Bench().dp.explain(flow)


def test_a_destination_that_is_overloaded_meanwhile() -> None:
    """Packets come between the look into the tables and what is said of it."""

    class Busy(Dataplane):
        def inspect(self, *arguments: Any) -> Any:
            found = super().inspect(*arguments)
            self.process(wire.packet("tcp", CLIENT[4], 1, VIRTUAL[4], 80))
            return found

    dp = Busy(64, 1)
    one, two = DestinationSpec(REALS[0], 80), DestinationSpec(REALS[1], 80, upper=1)
    dp.apply([ServiceSpec(VIRTUAL[4], 80, "tcp", (one, two), scheduler="lc")])
    explained = dp.explain(f"tcp {CLIENT[4]}:2 -> {VIRTUAL[4]}:80")
    assert explained.action == "forward"
    assert [each.address for each in explained.destinations] == [REALS[0]]
    assert explained.picked is None
