"""explain() says what process() then does: all kinds of services, while they change."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import wire
from bench import SECOND, Bench
from hypothesis import given, settings
from hypothesis import strategies as st

from svcdp import (
    ConflictError,
    DestinationSpec,
    Flow,
    Reason,
    ServiceSpec,
    Settings,
    SourceRule,
    Verdict,
)

VIPS = ["10.96.0.10", "10.96.0.11"]
CLIENTS = ["192.0.2.4", "203.0.113.5"]
PORTS = [20, 21, 80, 81, 90, 2000]
MARKS = [0, 7]

#: Whose picks are known before.
FORESEEN = ["lc", "wlc", "sed", "nq", "fo", "ovf", "dh", "sh", "mh", "lblc", "lblcr"]
SCHEDULERS = ["rr", "random", "none", *FORESEEN]

DESTINATIONS = st.lists(
    st.builds(
        DestinationSpec,
        address=st.sampled_from(["10.1.1.1", "10.1.1.2", "10.1.1.3"]),
        port=st.sampled_from([0, 8080]),
        weight=st.integers(0, 2),
        method=st.sampled_from(["masq", "masq", "dr", "local"]),
        upper=st.sampled_from([0, 0, 1, 3]),
    ),
    max_size=3,
    unique_by=lambda member: member.address,
)


@st.composite
def services(draw: st.DrawFn) -> ServiceSpec:
    protocol = draw(st.sampled_from(["tcp", "tcp", "udp", "fwmark"]))
    port = 7 if protocol == "fwmark" else draw(st.sampled_from([0, 21, 80, 81]))
    last_port = draw(st.sampled_from([0, 0, 90])) if port and protocol != "fwmark" else 0
    one_port = port and not last_port and protocol != "fwmark"
    members = []
    for member in draw(DESTINATIONS):
        if member.method != "masq":
            member = replace(member, port=0)
        elif one_port:
            member = replace(member, port=8080)
        members.append(member)
    on_removal = draw(st.sampled_from(["drain", "expire", "drop", "reset"]))
    return ServiceSpec(
        "0.0.0.0" if protocol == "fwmark" else draw(st.sampled_from(VIPS)),
        port,
        protocol,
        tuple(members),
        last_port=last_port,
        scheduler=draw(st.sampled_from(SCHEDULERS)),
        persistence=draw(st.sampled_from([None, None, 30])),
        rules=(
            SourceRule(
                masquerade=draw(st.sampled_from([False, False, False, True])),
                on_empty=draw(st.sampled_from(["reject", "unreachable", "drop"])),
            ),
        ),
        masquerade_address=draw(st.sampled_from([None, "198.51.100.1"])),
        on_removal=on_removal,
        removal_grace=draw(st.sampled_from([0, 30])) if on_removal == "reset" else 0,
    )


SERVICES = st.lists(services(), max_size=4, unique_by=lambda spec: spec.key)
FLOWS = st.builds(
    Flow,
    protocol=st.sampled_from(["tcp", "udp"]),
    source=st.sampled_from(CLIENTS),
    source_port=st.sampled_from([5, 6, 20]),
    destination=st.sampled_from(VIPS),
    destination_port=st.sampled_from(PORTS),
)
STEPS = st.one_of(
    SERVICES,
    st.tuples(FLOWS, st.sampled_from(MARKS), st.integers(0, 40)),
    st.tuples(FLOWS, st.sampled_from(MARKS), st.integers(0, 40)),
)


def check(bench: Bench, flow: Flow, mark: int) -> None:
    said = bench.dp.explain(flow, mark)
    result = bench.send(
        port=flow.source_port,
        client=flow.source,
        to=(flow.destination, flow.destination_port),
        protocol=flow.protocol,
        mark=mark,
    )
    if result.reason == Reason.NO_PORT:
        return  # seen only when a connection is made: two replies would look alike
    assert result.verdict.name.lower() == said.action, (said, result)
    if result.verdict != Verdict.FORWARD:
        assert not said.destinations
        return
    if said.picked:
        assert said.picked in said.destinations
        picked = said.picked.address
        assert picked == (result.destination[0] if result.destination else flow.destination)
    packet = wire.read(result.packet)
    possible = {(d.address, d.port, d.method) for d in said.destinations}
    if result.reason == Reason.BYPASS or result.destination is None:
        assert possible <= {(flow.destination, flow.destination_port, "bypass")}
    elif packet.destination == flow.destination:
        address, port = result.destination[0], flow.destination_port
        assert {(address, port, "dr"), (address, port, "local")} & possible
    else:
        assert (packet.destination, packet.destination_port, "masq") in possible


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SERVICES, st.lists(STEPS, max_size=20), st.booleans())
def test_explain_agrees_with_process(
    first: list[ServiceSpec],
    steps: list[list[ServiceSpec] | tuple[Flow, int, int]],
    bypass: bool,
) -> None:
    bench = Bench(settings=Settings(cache_bypass=bypass))
    for step in [first, *steps]:
        if isinstance(step, list):
            with suppress(ConflictError):  # ranges that overlap
                bench.dp.apply(step)
            continue
        flow, mark, seconds = step
        bench.now += seconds * SECOND
        check(bench, flow, mark)
    bench.now += 5000 * SECOND
    for _ in range(2):
        bench.dp.sweep()
        bench.now += 61 * SECOND
    assert bench.dp.stats().connections == 0
    for service in bench.dp.services():
        assert all((d.active, d.inactive) == (0, 0) for d in service.destinations)
    assert not bench.dp.draining().virtual
