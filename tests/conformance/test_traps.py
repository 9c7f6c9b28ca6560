"""The traps at the end of kube-proxy.md, each sprung twice: by `explain`, and by packets.

The second and third are in test_traffic_policy.py (the short-circuit, source ranges), the tenth in
test_udp_endpoints.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import wire
from judged import DROP, PASS, REJECT, Judge, Outcome, forward
from kube_objects import case, endpoint, endpoints, port, service

from svcdp import Dataplane
from svcdp.kube import Change, NodeContext, resolve
from svcdp.kube.decode import decode_value
from svcdp.kube.tracker import Tracker

SECOND = 10**9
A, B, C = "10.1.1.1", "10.1.2.1", "10.1.3.1"
A6, B6 = "fd01::1", "fd01::2"
CLUSTER_IP, VIP, OWN, OWN6 = "10.96.0.10", "203.0.113.1", "192.0.2.1", "2001:db8::1"
OTHER_OWN = "192.0.2.2"
POD, OUTSIDER, OUTSIDER6 = "10.1.1.9", "198.18.0.9", "2001:db8:9::9"
NODE = NodeContext(
    name="n1",
    zone="a",
    addresses=[OWN, OTHER_OWN, OWN6],
    pod_cidrs=["10.1.0.0/16", "fd01::/48"],
)
READY = ("ready", "serving", "-terminating")
LEAVES = ("-ready", "serving", "terminating")
UNREADY = ("-ready", "serving", "-terminating")
GONE = ("-ready", "-serving", "terminating")
LOCAL = {"externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local"}


def web(*cluster_ips: str, ingress: tuple[str, ...] = (VIP,), **more: Any) -> dict[str, Any]:
    """A Service with a node port and a load balancer."""
    given = {"type": "LoadBalancer", "ports": [port(nodePort=30080)], **more}
    status = {"loadBalancer": {"ingress": [{"ip": address} for address in ingress]}}
    return {**service("web", *cluster_ips, **given), "status": status}


# -- 1: drop versus reject turns on whether a usable endpoint is anywhere --------------------------

ANYWHERE = [
    case("ready elsewhere", [endpoint(B, *READY, node="n2")], DROP),
    case("ready on a node that nobody names", [endpoint(B, *READY)], DROP),
    case("terminates elsewhere", [endpoint(B, *LEAVES, node="n2")], DROP),
    case("neither ready nor terminating", [endpoint(B, *UNREADY, node="n2")], REJECT),
    case("gone", [endpoint(B, *GONE, node="n2")], REJECT),
    case("here, and not usable; another elsewhere",
         [endpoint(A, *UNREADY, node="n1"), endpoint(B, *READY, node="n2")], DROP),
    case("nowhere", [], REJECT),
]  # fmt: skip


@pytest.mark.parametrize(("served", "expected"), ANYWHERE)
def test_1_drop_or_reject(served: list[Any], expected: Outcome) -> None:
    asked = Judge([web(**LOCAL), endpoints(*served)], NODE)
    assert asked.outcome(POD, CLUSTER_IP, 80) == expected
    for target in ((CLUSTER_IP, 80), (VIP, 80), (OWN, 30080)):
        assert asked.outcome(OUTSIDER, *target) == expected


# -- 4: hints ----------------------------------------------------------------------------------


def hinted(
    address: str, zone: str, *conditions: str, node: str = "n2", nodes: str = ""
) -> dict[str, Any]:
    hints = {"forZones": [{"name": zone}]}
    if nodes:
        hints["forNodes"] = [{"name": nodes}]
    return {**endpoint(address, *(conditions or READY), node=node), "hints": hints}


HINTS = [
    # Who serves; what a client gets inside, and from outside by policy Cluster and by Local.
    case("for this zone", [hinted(A, "a"), hinted(B, "b")], {A}, {A}, None),
    case("one without a hint", [hinted(A, "a"), hinted(B, "b"), endpoint(C, *READY)],
         {A, B, C}, {A, B, C}, None),
    case("one that is not ready has none", [hinted(A, "a"), hinted(B, "b"), endpoint(C, *LEAVES)],
         {A}, {A}, None),
    case("for another zone alone", [hinted(A, "b"), hinted(B, "b")], {A, B}, {A, B}, None),
    case("for this node before its zone",
         [hinted(A, "a", nodes="n3"), hinted(B, "a", nodes="n1")], {B}, {B}, None),
    case("one without a hint for nodes: the zone",
         [hinted(A, "a", nodes="n1"), hinted(B, "a"), hinted(C, "b", nodes="n1")],
         {A, B}, {A, B}, None),
    case("local ones are not asked", [hinted(A, "b", node="n1"), hinted(B, "a")], {B}, {B}, {A}),
    case("those that terminate are not asked",
         [hinted(A, "b", *LEAVES, node="n1"), hinted(B, "a", *LEAVES)], {A, B}, {A, B}, {A}),
]  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"trafficDistribution": "PreferClose"}], ids=["", "field"])
@pytest.mark.parametrize(("served", "inside", "outside", "local"), HINTS)
def test_4_hints(
    served: list[Any], inside: set[str], outside: set[str], local: set[str] | None, more: Any
) -> None:
    """They are the endpoints': what the Service says does not matter."""
    asked = Judge([web(**more), endpoints(*served)], NODE)
    assert asked.outcome(POD, CLUSTER_IP, 80) == forward(*inside)
    for target in ((VIP, 80), (OWN, 30080)):
        assert asked.outcome(OUTSIDER, *target) == forward(*outside, masquerade=True)
    asked = Judge([web(**LOCAL, **more), endpoints(*served)], NODE)
    here = forward(*local) if local else DROP
    assert asked.outcome(POD, CLUSTER_IP, 80) == here
    for target in ((VIP, 80), (OWN, 30080)):
        assert asked.outcome(POD, *target) == forward(*inside), "the short-circuit obeys them"
        assert asked.outcome(OUTSIDER, *target) == here


# -- 5: targetPort is not read ---------------------------------------------------------------------

JOINED = [
    case("number", {"targetPort": 9999}, [endpoints(A)], {(A, 8080)}),
    case("name", {"targetPort": "nobody"}, [endpoints(A)], {(A, 8080)}),
    case("a number of each slice", {"targetPort": "http"},
         [endpoints(A), endpoints(B, name="web-2", ports=[port(9090)])], {(A, 8080), (B, 9090)}),
    case("one address in two slices", {},
         [endpoints(A), endpoints(A, name="web-2", ports=[port(9090)])], {(A, 8080), (A, 9090)}),
    case("another name", {}, [endpoints(A, ports=[port(80, "https")])], set()),
    case("another protocol", {}, [endpoints(A, ports=[port(80, protocol="UDP")])], set()),
]  # fmt: skip


@pytest.mark.parametrize(("more", "slices", "expected"), JOINED)
def test_5_the_join_is_by_name_and_protocol(
    more: dict[str, Any], slices: list[Any], expected: set[tuple[str, int]]
) -> None:
    dataplane = Dataplane(64, seed=1)
    dataplane.apply(resolve([web(ports=[port(nodePort=30080, **more)]), *slices], NODE))
    for address, number in ((CLUSTER_IP, 80), (VIP, 80), (OWN, 30080)):
        said = dataplane.explain(f"tcp {POD}:4000 -> {address}:{number}")
        assert said.action == ("forward" if expected else "reject")
        assert {(each.address, each.port) for each in said.destinations} == expected
        seen = set()
        for client_port in range(40000, 40004):
            result = dataplane.process(wire.packet("tcp", POD, client_port, address, number, "S"))
            assert result.verdict.name.lower() == said.action
            if expected:
                sent = wire.read(bytes(result.packet))
                seen.add((sent.destination, sent.destination_port))
        assert seen == expected


# -- 6: affinity -----------------------------------------------------------------------------------


def test_6_affinity_is_a_service_ports_and_new_connections_refresh_it() -> None:
    now = 0
    dataplane = Dataplane(256, seed=1, clock=lambda: now)
    sticky = {
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "ports": [port(80, "http", nodePort=30080), port(443, "https", nodePort=30443)],
    }
    two_ports = {"ports": [port(8080, "http"), port(8443, "https")]}
    dataplane.apply(resolve([web(**sticky), endpoints(A, B, **two_ports)], NODE))
    client_port = 40000

    def goes(address: str, number: int, *, bound: bool) -> str:
        """Where a new connection goes, as explain() said before."""
        nonlocal client_port
        client_port += 1
        said = dataplane.explain(f"tcp {POD}:{client_port} -> {address}:{number}")
        result = dataplane.process(wire.packet("tcp", POD, client_port, address, number, "S"))
        found = wire.read(bytes(result.packet)).destination
        possible = {each.address for each in said.destinations}
        assert possible == ({found} if bound else {A, B})
        return found

    first = goes(CLUSTER_IP, 80, bound=False)
    for target in ((CLUSTER_IP, 80), (VIP, 80), (OWN, 30080)):
        assert goes(*target, bound=True) == first, "one service port, whatever its address"
    other = goes(OWN, 30443, bound=False)
    assert goes(CLUSTER_IP, 443, bound=True) == other, "the other one has its own"
    for _ in range(3):
        now += 59 * SECOND
        assert goes(VIP, 80, bound=True) == first, "a new connection restarts the time"
    # Packets of the connection that is there do not.
    now += 59 * SECOND
    again = wire.packet("tcp", POD, client_port, VIP, 80, "S")
    assert wire.read(bytes(dataplane.process(again).packet)).destination == first
    now += 2 * SECOND
    goes(CLUSTER_IP, 80, bound=False)


# -- 7: health-check node ports --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("served", "ready", "outside"),
    [
        case("one that terminates serves, and does not count",
             [endpoint(A, *LEAVES, node="n1")], 0, forward(A)),
        case("ready elsewhere", [endpoint(B, *READY, node="n2")], 0, DROP),
        case("ready here", [endpoint(A, *READY, node="n1")], 1, forward(A)),
        case("both here: by address",
             [endpoint(A, *READY, node="n1"), endpoint(B, *READY, node="n1")], 2, forward(A, B)),
    ],
)  # fmt: skip
def test_7_what_health_checks_count_is_not_what_serves(
    served: list[Any], ready: int, outside: Outcome
) -> None:
    more = {"ports": [port(80, nodePort=30080), port(81, "more")], "healthCheckNodePort": 30500}
    slices = [
        endpoints(*served, ports=[port(8080), port(8081, "more")]),
        endpoints(*served, name="web-2", ports=[port(8080)]),
    ]
    objects = [web(externalTrafficPolicy="Local", **more), *slices]
    asked = Judge(objects, NODE)
    for target in ((VIP, 80), (OWN, 30080)):
        assert asked.outcome(OUTSIDER, *target) == outside
    tracker = Tracker(NODE)
    records = tuple(record for each in objects for record in decode_value(each))
    tracker.apply([(0, "", Change(objects=records))])
    assert [check.endpoints for check in tracker.health_checks()] == [ready]


# -- 8: what is said of one family -----------------------------------------------------------------

DUAL = ("10.96.0.10", "fd00::10")
VIP6 = "2001:db8:2::1"
FAMILIES = [
    # Node ports' CIDRs, ranges; what outsiders get at two of the node's addresses, at its IPv6 one,
    # at the load balancer's address and at its IPv6 one.
    case("nothing said", [], [], "forward pass forward forward forward"),
    case("of IPv4", [f"{OTHER_OWN}/32"], ["198.51.100.0/24"], "pass forward forward drop forward"),
    case("of IPv6", [f"{OWN6}/128"], ["2001:db8:7::/48"], "forward forward forward forward drop"),
    case("of nobody", ["198.51.100.0/24"], ["198.18.0.0/24"], "pass pass forward forward forward"),
    case("of both", [f"{OWN}/32", "fd99::/64"], ["198.18.0.0/16", "2001:db8:9::/48"],
         "forward pass pass forward forward"),
    case("everywhere", ["0.0.0.0/0"], ["0.0.0.0/0"], "forward forward forward forward forward"),
    case("everywhere, and somewhere", [f"{OWN}/32", "0.0.0.0/0"], ["198.51.100.0/24", "0.0.0.0/0"],
         "forward forward forward forward forward"),
]  # fmt: skip


@pytest.mark.parametrize(("cidrs", "ranges", "expected"), FAMILIES)
def test_8_one_family_leaves_the_other_open(
    cidrs: list[str], ranges: list[str], expected: str
) -> None:
    objects = [
        web(*DUAL, ingress=(VIP, VIP6), loadBalancerSourceRanges=ranges),
        endpoints(A),
        endpoints(A6, name="six"),
    ]
    asked = Judge(objects, replace(NODE, node_port_addresses=cidrs))
    targets = [(OWN, 30080), (OTHER_OWN, 30080), (OWN6, 30080), (VIP, 80), (VIP6, 80)]
    for target, action in zip(targets, expected.split(), strict=True):
        client, serves = (OUTSIDER6, A6) if ":" in target[0] else (OUTSIDER, A)
        outcomes = {"forward": forward(serves, masquerade=True), "pass": PASS, "drop": DROP}
        assert asked.outcome(client, *target) == outcomes[action], target


# -- 9: labels on the slice ------------------------------------------------------------------------

LABELS = ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"]


@pytest.mark.parametrize("value", ["", "svcdp", "true"])
@pytest.mark.parametrize("label", LABELS)
def test_9_a_label_hides_a_slice_as_it_hides_a_service(label: str, value: str) -> None:
    labels = {label: value}
    targets = [(CLUSTER_IP, 80), (VIP, 80), (OWN, 30080)]
    asked = Judge([web(), endpoints(A, labels=labels)], NODE)
    assert {asked.outcome(OUTSIDER, *target) for target in targets} == {REJECT}
    asked = Judge([web(), endpoints(A, labels=labels), endpoints(B, name="seen")], NODE)
    served = forward(B, masquerade=True)
    assert {asked.outcome(OUTSIDER, *target) for target in targets} == {served}
    asked = Judge([web(labels=labels), endpoints(A)], NODE)
    assert {asked.outcome(OUTSIDER, *target) for target in targets} == {PASS}
