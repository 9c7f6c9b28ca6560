"""A plan that cannot be made true is refused before anything happens."""

from __future__ import annotations

from typing import Any

import pytest

from svcdp import DestinationSpec, ServiceSpec, TunnelSpec
from svcdp.dataplane import captures_of
from svcdp.errors import ConfigError
from svcdp.rules import CapturePlan
from svcdp.rules.plan import Element, Hop, Mark, Network, items_of


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"queues": (5, 4)}, "queues 5-4"),
        ({"queues": (-1, 4)}, "queues -1-4"),
        ({"queues": (0, 65536)}, "queues 0-65536"),
        ({"forward_mark": 0}, "forward_mark 0x0"),
        ({"forward_mark": 3}, "forward_mark 0x3"),
        ({"pass_mark": 1 << 32}, "pass_mark 0x100000000"),
        ({"pass_mark": -1}, "pass_mark -0x1"),
        ({"forward_mark": 4, "pass_mark": 4}, "are both 0x4"),
        ({"tunnel_queues": (5, 4)}, "tunnel queues 5-4"),
        ({"tunnel_queues": (103, 104)}, "queues and tunnel_queues overlap"),
        ({"hop_marks": 0}, "hop_marks 0x0"),
        ({"hop_marks": 0x5}, "hop_marks 0x5: not a row of bits"),
        ({"hop_marks": 0xFFF00000}, "hop_marks 0xfff00000 hold forward_mark or pass_mark"),
        ({"items": frozenset({Mark(0x100001, 4)})}, "fwmark 0x100001 holds forward_mark"),
        ({"items": frozenset({Mark(0x400001, 4)})}, "fwmark 0x400001 holds bits of hop_marks"),
        ({"pod_interface": "veth+", "pod_mark": 0x100000}, "forward_mark and pod_mark are both"),
        ({"pod_interface": "veth+", "pod_mark": 0x400000}, "hold forward_mark or pass_mark or pod"),
        ({"pod_interface": "veth+", "pod_mark": 6}, "pod_mark 0x6: not one bit"),
        ({"pod_interface": "a b"}, "'a b' is no name of interfaces"),
        ({"pod_interface": "+"}, "is no name of interfaces"),
        ({"pod_interface": "sixteencharacte+"}, "is no name of interfaces"),
        ({"service_cidrs": ("10.96.0.1/12",)}, "10.96.0.1/12 has host bits set"),
        ({"addresses": ("node",)}, "'node'"),
    ],
)
def test_bad_plan(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CapturePlan(**fields)


def test_source_of_a_route_is_the_first_address_of_its_family() -> None:
    plan = CapturePlan(addresses=("2001:db8::1", "192.0.2.1", "192.0.2.2", "2001:db8::2"))
    assert plan.source_of("10.96.0.0/12") == "192.0.2.1"
    assert plan.source_of("fd00:10:96::/112") == "2001:db8::1"
    assert CapturePlan(addresses=("192.0.2.1",)).source_of("fd00:10:96::/112") is None


VIP, SERVER = "10.96.0.10", "10.1.1.11"
TUNNEL = DestinationSpec(SERVER, 80, method="tunnel", tunnel=TunnelSpec(source="192.0.2.1"))


@pytest.mark.parametrize(
    ("service", "items"),
    [
        (ServiceSpec("10.96.0.0/12", 0, "any"), {Network("10.96.0.0/12")}),
        (ServiceSpec(VIP, 0, "any"), {Element("virtual", VIP)}),
        (
            ServiceSpec(VIP, 80, destinations=(DestinationSpec(SERVER, 8080),)),
            {Element("virtual", VIP, "tcp", 80), Element("real", SERVER, "tcp", 8080)},
        ),
        (ServiceSpec(VIP, 53, "udp"), {Element("virtual", VIP, "udp", 53)}),
        (
            # Replies have the address that clients dial.
            ServiceSpec(VIP, 80, destinations=(TUNNEL,)),
            {Element("tunnel", VIP, "tcp", 80), Element("real", VIP, "tcp", 80)},
        ),
        (
            ServiceSpec(
                VIP, 80, destinations=(DestinationSpec(SERVER, 80, method="dr", mark=0x400000),)
            ),
            {
                Element("virtual", VIP, "tcp", 80),
                Element("real", VIP, "tcp", 80),
                Hop(0x400000, SERVER),
            },
        ),
        (
            ServiceSpec(VIP, 0, "udp", destinations=(DestinationSpec(SERVER, 0),)),
            {Element("virtual", VIP), Element("real", SERVER)},
        ),
        (
            ServiceSpec(VIP, 5000, last_port=5009, destinations=(DestinationSpec(SERVER, 70),)),
            {Element("virtual", VIP), Element("real", SERVER, "tcp", 70)},
        ),
        (
            ServiceSpec(VIP, 21, helper="ftp", destinations=(DestinationSpec(SERVER, 21),)),
            {Element("virtual", VIP), Element("real", SERVER)},
        ),
        (
            ServiceSpec("::", 7, "fwmark", destinations=(DestinationSpec("fd00::1", 80),)),
            {Mark(7, 6), *(Element("real", "fd00::1", p, 80) for p in ("tcp", "udp", "sctp"))},
        ),
        (
            ServiceSpec("0.0.0.0", 7, "fwmark", destinations=(TUNNEL,)),
            {Mark(7, 4, "tunnel")},
        ),
    ],
    ids=[
        "network",
        "whole address",
        "masq",
        "nobody",
        "tunnel",
        "dr",
        "all ports",
        "range",
        "ftp",
        "fwmark",
        "fwmark tunnel",
    ],
)
def test_what_is_captured_for_a_service(
    service: ServiceSpec, items: set[Element | Mark | Hop]
) -> None:
    assert items_of(captures_of([service])) == items
