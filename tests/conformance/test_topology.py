"""Which endpoints a node sends to: readiness, termination, hints, traffic policy; a row each."""

from __future__ import annotations

from typing import Any

import pytest
from kube_objects import case, endpoint, endpoints, port, service, summary

from svcdp import Dataplane
from svcdp.kube import NodeContext, resolve

WEB, NODE_PORT = "tcp 10.96.0.10:80", "tcp 192.0.2.1:30080"
A, B, C = "10.1.0.1", "10.1.0.2", "10.1.0.3"
READY = ("ready", "serving", "-terminating")
ENDING = ("-ready", "serving", "terminating")
GONE = ("-ready", "-serving", "terminating")
UNREADY = ("-ready", "serving", "-terminating")


def hinted(address: str, *, zones: str = "", nodes: str = "", **more: Any) -> dict[str, Any]:
    """A ready endpoint for the clients of these zones and nodes."""
    hints = {
        key: [{"name": name} for name in names.split()]
        for key, names in (("forZones", zones), ("forNodes", nodes))
        if names
    }
    return {**endpoint(address, *READY, **more), "hints": hints}


def ports(*addresses: str) -> list[str]:
    return [f"{address}:8080" for address in addresses]


HINTS = [
    case("none", [A, B], [A, B]),
    case("zone", [hinted(A, zones="a"), hinted(B, zones="b")], [A]),
    case("several zones", [hinted(A, zones="b a"), hinted(B, zones="b")], [A]),
    case("no endpoint for this zone", [hinted(A, zones="b"), hinted(B, zones="c")], [A, B]),
    case("one ready endpoint without a hint", [hinted(A, zones="a"), hinted(B), C], [A, B, C]),
    case(
        "one that is not ready has no say",
        [hinted(A, zones="a"), hinted(B, zones="b"), endpoint(C, *ENDING)],
        [A],
    ),
    case("node", [hinted(A, nodes="n1"), hinted(B, nodes="n2")], [A]),
    case(
        "node before zone",
        [hinted(A, zones="a", nodes="n1"), hinted(B, zones="a", nodes="n2")],
        [A],
    ),
    case(
        "no endpoint for this node: the zone",
        [hinted(A, zones="a", nodes="n3"), hinted(B, zones="b", nodes="n2")],
        [A],
    ),
    case(
        "one without a node hint: the zone",
        [hinted(A, zones="a", nodes="n1"), hinted(B, zones="a"), hinted(C, zones="b")],
        [A, B],
    ),
    case("no fallback within a mode", [hinted(A, zones="a", node="n2"), hinted(B, zones="b")], [A]),
    case(
        "none ready: those that terminate, wherever they are for",
        [
            {**endpoint(A, *ENDING), "hints": {"forZones": [{"name": "b"}]}},
            {**endpoint(B, *ENDING), "hints": {"forZones": [{"name": "a"}]}},
        ],
        [A, B],
    ),
]


@pytest.mark.parametrize(("found", "expected"), HINTS)
def test_hints(found: list[Any], expected: list[str]) -> None:
    node = NodeContext(name="n1", zone="a", addresses=["192.0.2.1"])
    web = service(type="NodePort", ports=[port(nodePort=30080)])
    served = summary(resolve([web, endpoints(*found)], node))
    assert served == {WEB: ports(*expected), NODE_PORT: ports(*expected)}


def test_zone_hints_need_a_zone_of_the_node() -> None:
    found = endpoints(hinted(A, zones="a"), hinted(B, zones="b"))
    assert summary(resolve([service(), found], NodeContext(name="n1"))) == {WEB: ports(A, B)}


HERE, THERE = {"node": "n1"}, {"node": "n2"}
INSIDE = [
    # endpoints; who serves the cluster IP; what a client gets; who serves the node port
    case(
        "local ones",
        [endpoint(A, *READY, **HERE), endpoint(B, *READY, **THERE)],
        [A],
        "forward",
        [A, B],
    ),
    case("elsewhere only", [endpoint(B, *READY, **THERE)], [], "drop", [B]),
    case("no node named", [endpoint(B, *READY)], [], "drop", [B]),
    case("nowhere", [], [], "reject", []),
    case("nowhere in use", [endpoint(A, *GONE, **HERE)], [], "reject", []),
    case("neither ready nor terminating", [endpoint(A, *UNREADY, **HERE)], [], "reject", []),
    case(
        "terminating here, ready elsewhere: each set falls back by itself",
        [endpoint(A, *ENDING, **HERE), endpoint(B, *READY, **THERE)],
        [A],
        "forward",
        [B],
    ),
    case(
        "ready here before terminating here",
        [endpoint(A, *ENDING, **HERE), endpoint(B, *READY, **HERE)],
        [B],
        "forward",
        [B],
    ),
    case("terminating elsewhere only", [endpoint(B, *ENDING, **THERE)], [], "drop", [B]),
    case(
        "hints do not matter here",
        [hinted(A, zones="b", **HERE), hinted(B, zones="a", **THERE)],
        [A],
        "forward",
        [B],
    ),
]


@pytest.mark.parametrize(("found", "expected", "action", "outside"), INSIDE)
def test_internal_traffic_policy(
    found: list[Any], expected: list[str], action: str, outside: list[str]
) -> None:
    node = NodeContext(name="n1", zone="a", addresses=["192.0.2.1"], pod_cidrs=["10.1.0.0/16"])
    web = service(type="NodePort", internalTrafficPolicy="Local", ports=[port(nodePort=30080)])
    specs = resolve([web, endpoints(*found, addressType="IPv4")], node)
    assert summary(specs) == {WEB: ports(*expected), NODE_PORT: ports(*outside)}
    dataplane = Dataplane(64, seed=1)
    dataplane.apply(specs)
    for client in ("10.1.9.9", "192.0.2.1", "203.0.113.9"):
        explanation = dataplane.explain(f"tcp {client}:40000 -> 10.96.0.10:80")
        assert explanation.action == action
        assert all(d.masquerade == (client != "10.1.9.9") for d in explanation.destinations)
