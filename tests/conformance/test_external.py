"""External addresses and those of load balancers: who is served there and who is not."""

from __future__ import annotations

from typing import Any

import pytest
from kube_objects import case, endpoints, port, service, summary

from svcdp import Dataplane
from svcdp.kube import NodeContext, resolve, resolve_all
from svcdp.types import SourceRule

A = "10.1.0.1"
WEB = "tcp 10.96.0.10:80"
NODE = NodeContext(
    name="n1",
    addresses=["192.0.2.1", "2001:db8::1", "10.1.9.1"],  # the last one is that of Pods' bridge
    pod_cidrs=["10.1.0.0/16"],
)


def balanced(*ingress: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A Service with a load balancer."""
    web = service(type="LoadBalancer", **more)
    return {**web, "status": {"loadBalancer": {"ingress": list(ingress)}}}


def at(*addresses: str) -> dict[str, list[str]]:
    return {WEB: [f"{A}:8080"], **{f"tcp {address}:80": [f"{A}:8080"] for address in addresses}}


ADDRESSES = [
    case("external", service(externalIPs=["198.51.100.1"]), ["198.51.100.1"]),
    case(
        "two",
        service(externalIPs=["198.51.100.1", "198.51.100.2"]),
        ["198.51.100.1", "198.51.100.2"],
    ),
    case("leading zeros are decimal", service(externalIPs=["198.51.100.010"]), ["198.51.100.10"]),
    case("of another family", service(externalIPs=["2001:db8::99"]), []),
    case("load balancer", balanced({"ip": "198.51.100.1"}), ["198.51.100.1"]),
    case("ipMode VIP", balanced({"ip": "198.51.100.1", "ipMode": "VIP"}), ["198.51.100.1"]),
    case("ipMode Proxy is not captured", balanced({"ip": "198.51.100.1", "ipMode": "Proxy"}), []),
    case("a name only", balanced({"hostname": "lb.example"}), []),
    case(
        "both the same",
        balanced({"ip": "198.51.100.1"}, externalIPs=["198.51.100.1"]),
        ["198.51.100.1"],
    ),
    case("no load balancer yet", balanced(), []),
    case("null", service(externalIPs=None), []),
]


@pytest.mark.parametrize(("web", "expected"), ADDRESSES)
def test_addresses(web: dict[str, Any], expected: list[str]) -> None:
    resolution = resolve_all([web, endpoints(A)], NODE)
    assert resolution.problems == []
    assert summary(resolution.specs) == at(*expected)
    rules = {spec.address: spec.rules for spec in resolution.specs if spec.address in expected}
    assert all(rule == (SourceRule(masquerade=True),) for rule in rules.values())


def test_each_family_has_its_own() -> None:
    web = service("web", "10.96.0.10", "fd00::10", externalIPs=["198.51.100.1", "2001:db8::99"])
    specs = resolve([web, endpoints(A), endpoints("fd01::1", name="web-6")], NODE)
    assert summary(specs)["tcp [2001:db8::99]:80"] == ["[fd01::1]:8080"]
    assert summary(specs)["tcp 198.51.100.1:80"] == [f"{A}:8080"]


def test_one_that_is_an_address_of_the_node_comes_before_node_ports() -> None:
    first = service("old", "10.96.0.11", type="NodePort", created="2024-01-01T00:00:00Z",
                    ports=[port(nodePort=30080)])  # fmt: skip
    second = service("new", externalIPs=["192.0.2.1"], created="2025-01-01T00:00:00Z",
                     ports=[port(30080)])  # fmt: skip
    found = {spec.key: spec.name for spec in resolve([first, second], NODE)}
    assert found["192.0.2.1", 30080, "tcp"] == "shop/new:http"


BAD = [
    case("external", service(externalIPs=["x", "198.51.100.1"]), "$.spec.externalIPs"),
    case(
        "load balancer",
        balanced({"ip": "224.0.0.1"}, {"ip": "198.51.100.1"}),
        "$.status.loadBalancer.ingress",
    ),
    case(
        "range",
        balanced({"ip": "198.51.100.1"}, loadBalancerSourceRanges=["203.0.113.0"]),
        "$.spec.loadBalancerSourceRanges",
    ),
]


@pytest.mark.parametrize(("web", "field"), BAD)
def test_what_is_wrong_is_left_out(web: dict[str, Any], field: str) -> None:
    resolution = resolve_all([web, endpoints(A)], NODE)
    assert summary(resolution.specs) == at("198.51.100.1")
    (problem,) = resolution.problems
    assert problem.field == field  # type: ignore[attr-defined]


LB = {"ip": "198.51.100.1"}
RANGES = [
    # ranges, (client, what it gets at the load balancer's address)
    case("none", None, {"203.0.113.9": "forward"}),
    case(
        "one",
        ["203.0.113.0/24"],
        {"203.0.113.9": "forward", "203.0.114.9": "drop", "10.1.0.9": "drop", "192.0.2.1": "drop"},
    ),
    case("blanks", [" 203.0.113.0/24 "], {"203.0.113.9": "forward", "203.0.114.9": "drop"}),
    case("zeros", ["203.0.113.064/026"], {"203.0.113.65": "forward", "203.0.113.9": "drop"}),
    case("of the other family: open", ["2001:db8::/32"], {"203.0.113.9": "forward"}),
    case(
        "with the node in it, what the node sends from the address itself",
        ["192.0.2.0/24"],
        {"192.0.2.1": "forward", "198.51.100.1": "forward", "203.0.113.9": "drop"},
    ),
    case("without", ["192.0.3.0/24"], {"198.51.100.1": "drop"}),
    case(
        "with another of the node's addresses: its own IP is one of each family",
        ["10.1.0.0/16"],
        {"10.1.0.9": "forward", "198.51.100.1": "drop"},
    ),
]


@pytest.mark.parametrize("served", [True, False], ids=["served", "nobody serves"])
@pytest.mark.parametrize(("ranges", "expected"), RANGES)
def test_source_ranges(ranges: list[str] | None, expected: dict[str, str], served: bool) -> None:
    """They come before everything else, and bind only the load balancer's address."""
    web = balanced(
        LB,
        loadBalancerSourceRanges=ranges,
        externalIPs=["198.51.100.7"],
        ports=[port(nodePort=30080)],
    )
    dataplane = Dataplane(64, seed=1)
    dataplane.apply(resolve([web, *([endpoints(A)] if served else [])], NODE))
    for client, action in expected.items():
        wanted = "reject" if action == "forward" and not served else action
        assert dataplane.explain(f"tcp {client}:4000 -> 198.51.100.1:80").action == wanted
    free = "forward" if served else "reject"
    for target in ("10.96.0.10:80", "198.51.100.7:80", "192.0.2.1:30080"):
        assert dataplane.explain(f"tcp 203.0.114.9:4000 -> {target}").action == free
