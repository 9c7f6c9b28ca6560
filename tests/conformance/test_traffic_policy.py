"""The verdict matrix of kube-proxy's traffic policies: who is served by whom, and as whom.

Endpoints L are on this node, R on another one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import wire
from judged import DROP, PASS, REJECT, Judge, Outcome, forward
from kube_objects import case, endpoint, endpoints, port, service

from svcdp.kube import NodeContext

L, R = "10.1.1.1", "10.1.2.1"
CLUSTER_IP, EXTERNAL, VIP, OWN = "10.96.0.10", "198.51.100.1", "203.0.113.1", "192.0.2.1"
#: Clients: a Pod, the node itself by its address and by loopback's, somebody else.
POD, NODE, LOOPBACK, OUTSIDER = "10.1.1.9", OWN, "127.0.0.1", "198.18.0.9"

NODE_HERE = NodeContext(
    name="n1", addresses=[OWN, "2001:db8::1"], pod_cidrs=["10.1.0.0/16", "fd01::/48"]
)
#: Only Pods of this node are known to be Pods.
NODE_CIDR = replace(
    NODE_HERE, pod_cidrs=["10.1.1.0/24", "fd01:0:0:1::/64"], detect_local="NodeCIDR"
)
NO_DETECTOR = replace(NODE_HERE, pod_cidrs=[])
MASQUERADE_ALL = replace(NODE_HERE, masquerade_all=True)
BY_INTERFACE = replace(NODE_HERE, pod_cidrs=[], detect_local="InterfaceNamePrefix")

EVERYWHERE = [endpoint(L, "ready", node="n1"), endpoint(R, "ready", node="n2")]
ELSEWHERE = EVERYWHERE[1:]
NOWHERE: list[dict[str, Any]] = []

INSIDE = [(CLUSTER_IP, 80)]
OUTSIDE = [(EXTERNAL, 80), (VIP, 80), (OWN, 30080)]

both, both_masqueraded = forward(L, R), forward(L, R, masquerade=True)
here, here_masqueraded = forward(L), forward(L, masquerade=True)
there, there_masqueraded = forward(R), forward(R, masquerade=True)


def web(internal: str, external: str, protocol: str = "TCP") -> dict[str, Any]:
    return {
        **service(
            type="LoadBalancer",
            ports=[port(nodePort=30080, protocol=protocol)],
            externalIPs=[EXTERNAL],
            internalTrafficPolicy=internal,
            externalTrafficPolicy=external,
        ),
        "status": {"loadBalancer": {"ingress": [{"ip": VIP}]}},
    }


def judge(
    internal: str, external: str, served: list[dict[str, Any]], node: NodeContext = NODE_HERE
) -> Judge:
    return Judge([web(internal, external), endpoints(*served)], node)


#: Destinations, policies (internal, external), who serves, what a Pod, the node and others get.
MATRIX = [
    case("ClusterIP, Cluster", INSIDE, ("Cluster", "Local"), EVERYWHERE,
         both, both_masqueraded, both_masqueraded),
    case("ClusterIP, Cluster, elsewhere", INSIDE, ("Cluster", "Local"), ELSEWHERE,
         there, there_masqueraded, there_masqueraded),
    case("ClusterIP, Local", INSIDE, ("Local", "Cluster"), EVERYWHERE,
         here, here_masqueraded, here_masqueraded),
    case("ClusterIP, Local, elsewhere", INSIDE, ("Local", "Cluster"), ELSEWHERE,
         DROP, DROP, DROP),
    case("ClusterIP, nowhere", INSIDE, ("Local", "Local"), NOWHERE, REJECT, REJECT, REJECT),
    case("outside, Cluster", OUTSIDE, ("Local", "Cluster"), EVERYWHERE,
         both_masqueraded, both_masqueraded, both_masqueraded),
    case("outside, Cluster, elsewhere", OUTSIDE, ("Local", "Cluster"), ELSEWHERE,
         there_masqueraded, there_masqueraded, there_masqueraded),
    case("outside, Local", OUTSIDE, ("Cluster", "Local"), EVERYWHERE,
         both, both_masqueraded, here),
    case("outside, Local, elsewhere", OUTSIDE, ("Cluster", "Local"), ELSEWHERE,
         there, there_masqueraded, DROP),
    case("outside, nowhere", OUTSIDE, ("Cluster", "Local"), NOWHERE, REJECT, REJECT, REJECT),
    case("outside, Cluster, nowhere", OUTSIDE, ("Cluster", "Cluster"), NOWHERE,
         REJECT, REJECT, REJECT),
]  # fmt: skip


REMOTE_POD = "10.1.2.9"
MARK = BY_INTERFACE.pod_mark
#: How Pods are told, what clients with what marks are in the matrix then, and whether all or none
#: are masqueraded inside, whoever they are.
VARIANTS = [
    case("ClusterCIDR", NODE_HERE,
         {(POD, 0): "pod", (REMOTE_POD, 0): "pod", (NODE, 0): "node", (LOOPBACK, 0): "node",
          (OUTSIDER, 0): "other", (OUTSIDER, MARK): "other"}, None),
    case("NodeCIDR", NODE_CIDR,
         {(POD, 0): "pod", (REMOTE_POD, 0): "other", (NODE, 0): "node", (LOOPBACK, 0): "node",
          (OUTSIDER, 0): "other"}, None),
    case("BridgeInterface", replace(BY_INTERFACE, detect_local="BridgeInterface"),
         {(POD, MARK): "pod", (POD, 0): "other", (NODE, 0): "node", (LOOPBACK, 0): "node",
          (OUTSIDER, 0): "other", (OUTSIDER, MARK): "pod"}, None),
    case("InterfaceNamePrefix", BY_INTERFACE,
         {(POD, MARK | 1): "pod", (REMOTE_POD, 0x8000): "other", (NODE, 0): "node",
          (LOOPBACK, 0): "node", (OUTSIDER, 0): "other", (OUTSIDER, MARK | 0x8000): "pod"}, None),
    case("no detector", NO_DETECTOR,
         {(POD, 0): "other", (REMOTE_POD, 0): "other", (NODE, 0): "node", (LOOPBACK, 0): "node",
          (OUTSIDER, 0): "other"}, False),
    case("masqueradeAll", MASQUERADE_ALL,
         {(POD, 0): "pod", (REMOTE_POD, 0): "pod", (NODE, 0): "node", (LOOPBACK, 0): "node",
          (OUTSIDER, 0): "other"}, True),
    case("masqueradeAll, by interface", replace(BY_INTERFACE, masquerade_all=True),
         {(POD, MARK): "pod", (POD, 0): "other", (NODE, 0): "node", (LOOPBACK, 0): "node",
          (OUTSIDER, 0): "other"}, True),
]  # fmt: skip

#: The same places in IPv6.
SIX = {
    L: "fd01:0:0:1::1", R: "fd01:0:0:2::1", POD: "fd01:0:0:1::9", REMOTE_POD: "fd01:0:0:2::9",
    CLUSTER_IP: "fd00::10", EXTERNAL: "2001:db8:1::1", VIP: "2001:db8:2::1", OWN: "2001:db8::1",
    LOOPBACK: "::1", OUTSIDER: "2001:db8:9::9",
}  # fmt: skip
PACKETS = [("tcp", False), ("tcp", True), ("udp", False), ("udp", True), ("sctp", False)]


def in_six(value: Any) -> Any:
    """With all addresses exchanged for those of IPv6."""
    if isinstance(value, dict):
        return {key: in_six(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [in_six(each) for each in value]
    return {**SIX, "IPv4": "IPv6"}.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize(("protocol", "is_six"), PACKETS)
@pytest.mark.parametrize(("here", "clients", "inside"), VARIANTS)
@pytest.mark.parametrize(("targets", "policies", "served", "pod", "node", "other"), MATRIX)
def test_matrix(
    targets: list[tuple[str, int]],
    policies: tuple[str, str],
    served: list[dict[str, Any]],
    pod: Outcome,
    node: Outcome,
    other: Outcome,
    here: NodeContext,
    clients: dict[tuple[str, int], str],
    inside: bool | None,
    protocol: str,
    is_six: bool,
) -> None:
    """Every cell, by every way to tell Pods, of every protocol."""
    ports = [port(8080, protocol=protocol.upper())]
    objects = [web(*policies, protocol=protocol.upper()), endpoints(*served, ports=ports)]
    asked = Judge([in_six(each) for each in objects] if is_six else objects, here)
    for target in targets:
        for (client, mark), column in clients.items():
            expected = {"pod": pod, "node": node, "other": other}[column]
            if inside is not None and target in INSIDE and expected.action == "forward":
                expected = expected._replace(masquerade=inside)
            ends = (client, target[0])
            if is_six:
                ends = (SIX[client], SIX[target[0]])
                six = frozenset(SIX[each] for each in expected.endpoints)
                expected = expected._replace(endpoints=six)
            found = asked.outcome(*ends, target[1], protocol, mark=mark)
            assert found == expected, (target, client, mark)


#: Node, client, its mark, what it gets at the ClusterIP and outside, both Cluster, then both Local.
NODES = [
    case("no detector: nobody is masqueraded inside", NO_DETECTOR, POD, 0,
         both, both_masqueraded, here, here),
    case("no detector, node", NO_DETECTOR, NODE, 0,
         both, both_masqueraded, here, both_masqueraded),
    case("no detector, others", NO_DETECTOR, OUTSIDER, 0, both, both_masqueraded, here, here),
    case("masqueradeAll", MASQUERADE_ALL, POD, 0,
         both_masqueraded, both_masqueraded, here_masqueraded, both),
    case("masqueradeAll, others", MASQUERADE_ALL, OUTSIDER, 0,
         both_masqueraded, both_masqueraded, here_masqueraded, here),
    case("NodeCIDR", NODE_CIDR, POD, 0, both, both_masqueraded, here, both),
    case("NodeCIDR, a Pod of another node", NODE_CIDR, REMOTE_POD, 0,
         both_masqueraded, both_masqueraded, here_masqueraded, here),
    case("interface", BY_INTERFACE, POD, BY_INTERFACE.pod_mark,
         both, both_masqueraded, here, both),
    case("interface, any address", BY_INTERFACE, OUTSIDER, BY_INTERFACE.pod_mark | 0x8000,
         both, both_masqueraded, here, both),
    case("interface, not of a Pod", BY_INTERFACE, POD, 0x8000,
         both_masqueraded, both_masqueraded, here_masqueraded, here),
    case("interface, node", BY_INTERFACE, NODE, 0,
         both_masqueraded, both_masqueraded, here_masqueraded, both_masqueraded),
]  # fmt: skip


@pytest.mark.parametrize(
    ("node", "client", "mark", "inside", "outside", "local_inside", "local_outside"), NODES
)
def test_nodes(
    node: NodeContext,
    client: str,
    mark: int,
    inside: Outcome,
    outside: Outcome,
    local_inside: Outcome,
    local_outside: Outcome,
) -> None:
    cluster = judge("Cluster", "Cluster", EVERYWHERE, node)
    local = judge("Local", "Local", EVERYWHERE, node)
    assert cluster.outcome(client, CLUSTER_IP, 80, mark=mark) == inside
    assert local.outcome(client, CLUSTER_IP, 80, mark=mark) == local_inside
    for target in OUTSIDE:
        assert cluster.outcome(client, *target, mark=mark) == outside
        assert local.outcome(client, *target, mark=mark) == local_outside


@pytest.mark.parametrize("target", [*INSIDE, *OUTSIDE])
@pytest.mark.parametrize(("here", "_clients", "_inside"), VARIANTS)
def test_hairpin_is_masqueraded_in_every_row(
    here: NodeContext, _clients: Any, _inside: Any, target: tuple[str, int]
) -> None:
    for policy in ("Cluster", "Local"):
        for mark in (0, MARK):
            asked = judge(policy, policy, EVERYWHERE[:1], here)
            assert asked.outcome(L, *target, mark=mark) == here_masqueraded


#: Where to, and policies that leave a Pod its address.
UNMASQUERADED = [
    case("inside", (CLUSTER_IP, 80), "Cluster"),
    *(case(f"at {target[0]}", target, "Local") for target in OUTSIDE),
]


@pytest.mark.parametrize(("target", "policy"), UNMASQUERADED)
def test_hairpin_is_a_matter_of_each_pick(target: tuple[str, int], policy: str) -> None:
    """Who could reach itself is masqueraded when it does, and not when another one serves it."""
    asked = judge("Cluster", policy, EVERYWHERE).dataplane
    said = asked.explain(f"tcp {L}:4000 -> {target[0]}:{target[1]}").destinations
    seen = {}
    for number in range(41000, 41004):
        result = asked.process(wire.packet("tcp", L, number, *target, "S"))
        sent = wire.read(bytes(result.packet))
        seen[sent.destination] = (sent.source, sent.source_port) != (L, number)
    assert {each.address: each.masquerade for each in said} == seen == {L: True, R: False}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        case("LoadBalancer", {}, here),
        case("external addresses", {"type": "ClusterIP"}, here),
        case("was a LoadBalancer", {"type": "ClusterIP", "externalIPs": None}, both_masqueraded),
    ],
)
def test_who_has_a_policy_for_outside(more: dict[str, Any], expected: Outcome) -> None:
    """kube-proxy's ExternalPolicyLocal: what a status still says is no address of its own."""
    left = web("Cluster", "Local")
    left["spec"] = {**left["spec"], **more}
    asked = Judge([left, endpoints(*EVERYWHERE)], NODE_HERE)
    assert asked.outcome(OUTSIDER, VIP, 80) == expected


LEAVING = ("-ready", "serving", "terminating")
#: Who serves, what a Pod and somebody else get outside, external policy Local.
TERMINATING = [
    case("the local one leaves", [endpoint(L, *LEAVING, node="n1"), ELSEWHERE[0]], there, here),
    case("all leave",
         [endpoint(L, *LEAVING, node="n1"), endpoint(R, *LEAVING, node="n2")], both, here),
    case("only a remote one, which leaves", [endpoint(R, *LEAVING, node="n2")], there, DROP),
    case("none serves", [endpoint(L, "-ready", "-serving", "terminating", node="n1")],
         REJECT, REJECT),
    case("of an unknown node", [endpoint(L, "ready")], here, DROP),
]  # fmt: skip


@pytest.mark.parametrize(("served", "pod", "other"), TERMINATING)
def test_terminating(served: list[dict[str, Any]], pod: Outcome, other: Outcome) -> None:
    asked = judge("Cluster", "Local", served)
    for target in OUTSIDE:
        assert asked.outcome(POD, *target) == pod
        assert asked.outcome(OUTSIDER, *target) == other


def test_the_short_circuit_obeys_hints_and_the_local_set_does_not() -> None:
    node = replace(NODE_HERE, zone="a")
    hinted = [
        {**each, "hints": {"forZones": [{"name": zone}]}}
        for each, zone in zip(EVERYWHERE, "ba", strict=True)
    ]
    asked = judge("Cluster", "Local", hinted, node)
    assert asked.outcome(POD, VIP, 80) == there
    assert asked.outcome(OUTSIDER, VIP, 80) == here


#: Client, what it gets at the load balancer's address and at a node port.
RANGES = [
    case("in the range", OUTSIDER, here, here),
    case("outside of it", "198.18.1.9", DROP, here),
    case("a Pod in it", POD, both, both),
    case("a Pod outside of it", "10.1.2.9", DROP, both),
    case("the node", NODE, DROP, both_masqueraded),
]


@pytest.mark.parametrize(("client", "balanced", "at_node"), RANGES)
def test_source_ranges_come_before_the_policy(
    client: str, balanced: Outcome, at_node: Outcome
) -> None:
    ranged = web("Cluster", "Local")
    ranged["spec"]["loadBalancerSourceRanges"] = ["198.18.0.0/24", "10.1.1.0/24"]
    asked = Judge([ranged, endpoints(*EVERYWHERE)], NODE_HERE)
    assert asked.outcome(client, VIP, 80) == balanced
    assert asked.outcome(client, OWN, 30080) == at_node
    nobody = Judge([ranged], NODE_HERE)
    assert nobody.outcome(client, VIP, 80) == (DROP if balanced == DROP else REJECT)


def test_each_family_has_its_own_nodes_and_pods() -> None:
    node = NodeContext(name="n1", addresses=[OWN, "2001:db8::1"], pod_cidrs=["fd01::/48"])
    web6 = service(
        "web", "fd00::10", type="NodePort", externalTrafficPolicy="Local",
        ports=[port(nodePort=30080)],
    )  # fmt: skip
    local, remote = endpoint("fd01::1", "ready", node="n1"), endpoint("fd01:0:0:1::1", "ready")
    asked = Judge([web6, endpoints(local, remote)], node)
    every = frozenset({"fd01::1", "fd01:0:0:1::1"})
    assert asked.outcome("fd01::9", "2001:db8::1", 30080) == Outcome("forward", every)
    assert asked.outcome("2001:db8::1", "2001:db8::1", 30080) == Outcome("forward", every, True)
    assert asked.outcome("2001:db8::9", "2001:db8::1", 30080) == forward("fd01::1")


def test_a_range_of_ports_keeps_its_policy() -> None:
    ranged = web("Cluster", "Local")
    ranged["metadata"]["annotations"] = {"svcdp.io/port-range": "http=80-90"}
    asked = Judge([ranged, endpoints(*EVERYWHERE)], NODE_HERE)
    assert asked.outcome(OUTSIDER, VIP, 85) == here
    assert asked.outcome(POD, VIP, 85) == both


CIDRS = replace(NODE_HERE, service_cidrs=["10.96.0.0/16", "fd00::/112"])
#: Where to, on a node that knows where cluster IPs are, and on one that does not.
UNMATCHED = [
    case("another port of a cluster IP", CLUSTER_IP, 81, "tcp", REJECT, PASS),
    case("another protocol", CLUSTER_IP, 80, "udp", REJECT, PASS),
    case("a node port there", CLUSTER_IP, 30080, "sctp", REJECT, PASS),
    case("nobody's cluster IP", "10.96.0.99", 80, "tcp", DROP, PASS),
    case("nobody's of the other family", "fd00::99", 80, "udp", DROP, PASS),
    case("of a headless Service", "10.96.0.12", 80, "tcp", DROP, PASS),
    case("elsewhere", "10.97.0.10", 80, "tcp", PASS, PASS),
    case("another port of an external address", EXTERNAL, 81, "tcp", PASS, PASS),
    case("another port of a load balancer's", VIP, 81, "tcp", PASS, PASS),
    case("another port of the node", OWN, 80, "tcp", PASS, PASS),
]


@pytest.mark.parametrize(("address", "number", "protocol", "known", "unknown"), UNMATCHED)
def test_what_no_service_serves(
    address: str, number: int, protocol: str, known: Outcome, unknown: Outcome
) -> None:
    objects = [web("Cluster", "Cluster"), endpoints(*EVERYWHERE), service("none", "None")]
    for node, expected in ((CIDRS, known), (NODE_HERE, unknown)):
        asked = Judge(objects, node)
        clients = (POD, NODE, OUTSIDER) if "." in address else ("2001:db8::9",)
        for client in clients:
            assert asked.outcome(client, address, number, protocol) == expected
