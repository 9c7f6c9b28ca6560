"""Masquerade, affinity, node ports, annotations and conflicts, one row each."""

from __future__ import annotations

from typing import Any

import pytest
from kube_objects import case, endpoint, endpoints, port, service, summary

from svcdp.kube import NodeContext, resolve, resolve_all
from svcdp.types import DestinationSpec, ServiceSpec, SourceRule

NODE: dict[str, Any] = {"name": "n1", "addresses": ["192.0.2.1", "192.0.2.2", "2001:db8::1"]}
PODS = "10.1.0.0/16"
NOT_MASQUERADED = (SourceRule(),)
MASQUERADED = (SourceRule(masquerade=True),)


def nodeport(name: str = "web", *cluster_ips: str, number: int = 30080, **more: Any) -> dict:
    return service(name, *cluster_ips, type="NodePort", ports=[port(nodePort=number)], **more)


def test_the_whole_spec() -> None:
    node = NodeContext(**NODE, pod_cidrs=[PODS])
    assert resolve([nodeport(), endpoints("10.1.0.7")], node) == [
        ServiceSpec(
            address="10.96.0.10",
            port=80,
            protocol="tcp",
            destinations=(DestinationSpec("10.1.0.7", 8080),),
            rules=(SourceRule(sources=(PODS,)), SourceRule(masquerade=True)),
            masquerade_address="192.0.2.1",
            name="shop/web:http",
        ),
        ServiceSpec(
            address="192.0.2.1",
            port=30080,
            protocol="tcp",
            destinations=(DestinationSpec("10.1.0.7", 8080),),
            rules=MASQUERADED,
            masquerade_address="192.0.2.1",
            name="shop/web:http",
        ),
    ]


def test_an_unnamed_port_has_the_name_of_the_service() -> None:
    [spec] = resolve([service(ports=[port(name=None)])], NodeContext())
    assert spec.name == "shop/web"


PODS_FIRST = (SourceRule(sources=(PODS,)), SourceRule(masquerade=True))
MASQUERADE = [
    # node, rules of the cluster IP, rules of the node port
    case("pod CIDR known", {"pod_cidrs": [PODS]}, PODS_FIRST, MASQUERADED),
    case("pod CIDR not known", {}, NOT_MASQUERADED, MASQUERADED),
    case(
        "pod CIDR of the other family", {"pod_cidrs": ["fd01::/48"]}, NOT_MASQUERADED, MASQUERADED
    ),
    case(
        "this node's pods",
        {"pod_cidrs": ["10.1.3.0/24", "fd01::/64"], "detect_local": "NodeCIDR"},
        (SourceRule(sources=("10.1.3.0/24",)), SourceRule(masquerade=True)),
        MASQUERADED,
    ),
    case("everything", {"pod_cidrs": [PODS], "masquerade_all": True}, MASQUERADED, MASQUERADED),
]


@pytest.mark.parametrize(("context", "cluster_ip", "node_port"), MASQUERADE)
def test_masquerade(context: dict, cluster_ip: tuple, node_port: tuple) -> None:
    at_cluster_ip, at_node = resolve([nodeport()], NodeContext(**NODE, **context))
    assert at_cluster_ip.rules == cluster_ip
    assert at_node.rules == node_port
    assert at_node.masquerade_address == at_cluster_ip.masquerade_address == "192.0.2.1"


def test_who_has_no_endpoint_is_rejected() -> None:
    for spec in resolve([nodeport()], NodeContext(**NODE, pod_cidrs=[PODS])):
        assert not spec.destinations
        assert {rule.on_empty for rule in spec.rules} == {"reject"}


def test_masquerade_address_follows_the_family() -> None:
    found = resolve([service("web", "fd00::10", "10.96.0.10")], NodeContext(**NODE))
    assert {spec.address: spec.masquerade_address for spec in found} == {
        "fd00::10": "2001:db8::1",
        "10.96.0.10": "192.0.2.1",
    }


NODE_PORTS = [
    # node, cluster IPs, where the node port is served
    case("the primary address", {}, ["10.96.0.10"], ["192.0.2.1"]),
    case("said in a word", {"node_port_addresses": ["primary"]}, ["10.96.0.10"], ["192.0.2.1"]),
    case(
        "a primary that is not first",
        {"primary_addresses": ["192.0.2.2"]},
        ["10.96.0.10"],
        ["192.0.2.2"],
    ),
    case("each family", {}, ["10.96.0.10", "fd00::10"], ["192.0.2.1", "2001:db8::1"]),
    case("only the families of the Service", {}, ["fd00::10"], ["2001:db8::1"]),
    case(
        "every address",
        {"node_port_addresses": ["0.0.0.0/0"]},
        ["10.96.0.10"],
        ["192.0.2.1", "192.0.2.2"],
    ),
    case("one CIDR", {"node_port_addresses": ["192.0.2.2/32"]}, ["10.96.0.10"], ["192.0.2.2"]),
    case("a CIDR of nobody", {"node_port_addresses": ["198.51.100.0/24"]}, ["10.96.0.10"], []),
    case(
        "CIDRs of one family leave the other open",
        {"node_port_addresses": ["192.0.2.2/32"]},
        ["10.96.0.10", "fd00::10"],
        ["192.0.2.2", "2001:db8::1"],
    ),
    case(
        "loopback does not serve",
        {"addresses": ["127.0.0.1", "192.0.2.1"], "node_port_addresses": ["127.0.0.0/8"]},
        ["10.96.0.10"],
        [],
    ),
    case(
        "loopback is not primary",
        {"addresses": ["127.0.0.1", "192.0.2.1"]},
        ["10.96.0.10"],
        ["192.0.2.1"],
    ),
    case(
        "loopback by its own setting",
        {"localhost_node_ports": True},
        ["10.96.0.10", "fd00::10"],
        ["192.0.2.1", "127.0.0.1", "2001:db8::1", "::1"],
    ),
    case("a node without addresses", {"addresses": []}, ["10.96.0.10"], []),
]


@pytest.mark.parametrize(("context", "cluster_ips", "expected"), NODE_PORTS)
def test_node_ports(context: dict, cluster_ips: list, expected: list) -> None:
    found = resolve([nodeport("web", *cluster_ips)], NodeContext(**{**NODE, **context}))
    assert [spec.address for spec in found if spec.port == 30080] == expected


AFFINITY = [
    case("none", {}, None),
    case("None", {"sessionAffinity": "None"}, None),
    case("default", {"sessionAffinity": "ClientIP"}, 10800),
    case(
        "given",
        {
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        },
        60,
    ),
    case(
        "off, whatever the timeout",
        {
            "sessionAffinity": "None",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        },
        None,
    ),
]


@pytest.mark.parametrize(("fields", "seconds"), AFFINITY)
def test_affinity(fields: dict, seconds: int | None) -> None:
    [spec] = resolve([service(**fields)], NodeContext())
    assert spec.persistence == seconds
    assert bool(spec.persistence_group) == (seconds is not None)


def test_affinity_is_shared_by_the_addresses_of_one_service_port_only() -> None:
    ports = [port(80, "http", nodePort=30080), port(443, "https", nodePort=30443)]
    found = resolve(
        [
            service(type="NodePort", ports=ports, sessionAffinity="ClientIP"),
            service("api", "10.96.0.11", sessionAffinity="ClientIP"),
        ],
        NodeContext(**NODE),
    )
    groups: dict[str, list[int]] = {}
    for spec in found:
        groups.setdefault(spec.persistence_group, []).append(spec.port)
    assert groups == {
        "shop/api:http/tcp": [80],
        "shop/web:http/tcp": [80, 30080],
        "shop/web:https/tcp": [443, 30443],
    }


ANNOTATIONS = [
    # annotations, (scheduler, methods, weights of 10.1.0.1, 10.1.0.2, fd01::1), problems
    case("none", {}, ("rr", "masq", [1, 1, 1]), 0),
    case("scheduler", {"scheduler": "wlc"}, ("wlc", "masq", [1, 1, 1]), 0),
    case("unknown scheduler", {"scheduler": "best"}, ("rr", "masq", [1, 1, 1]), 1),
    case("empty scheduler", {"scheduler": ""}, ("rr", "masq", [1, 1, 1]), 1),
    case("forwarding", {"forwarding": "dr"}, ("rr", "dr", [1, 1, 1]), 0),
    case("unknown forwarding", {"forwarding": "local"}, ("rr", "masq", [1, 1, 1]), 1),
    case("weights", {"weights": "10.1.0.1=3, web-1=0,fd01:0::1 = 7"}, ("rr", "masq", [3, 0, 7]), 0),
    case("address before name", {"weights": "web-0=9,10.1.0.1=3"}, ("rr", "masq", [3, 1, 1]), 0),
    case("nobody's weight", {"weights": "web-9=9"}, ("rr", "masq", [1, 1, 1]), 0),
    case("negative weight", {"weights": "web-0=-1,web-1=2"}, ("rr", "masq", [1, 1, 1]), 1),
    case("large weight", {"weights": "web-0=65536"}, ("rr", "masq", [1, 1, 1]), 1),
    case("no weight", {"weights": "web-0"}, ("rr", "masq", [1, 1, 1]), 1),
    case("two weights", {"weights": "web-0=1,web-0=2"}, ("rr", "masq", [1, 1, 1]), 1),
    case("several mistakes", {"weights": "x", "scheduler": "y"}, ("rr", "masq", [1, 1, 1]), 2),
    case("nobody's", {"colour": "red"}, ("rr", "masq", [1, 1, 1]), 1),
    case("nearly one", {"schedular": "wlc"}, ("rr", "masq", [1, 1, 1]), 1),
    case(
        "those of pools",
        {"load-balancer-ips": "192.0.2.9", "load-balancer-sharing": "x"},
        ("rr", "masq", [1, 1, 1]),
        0,
    ),
]


@pytest.mark.parametrize(("annotations", "expected", "problems"), ANNOTATIONS)
def test_annotations(annotations: dict, expected: tuple, problems: int) -> None:
    found = resolve_all(
        [
            service(
                "web",
                "10.96.0.10",
                "fd00::10",
                annotations={f"svcdp.io/{key}": value for key, value in annotations.items()},
                ports=[port(8080)],
            ),
            endpoints(
                endpoint("10.1.0.1", "ready", pod="web-0"),
                endpoint("10.1.0.2", "ready", pod="web-1"),
            ),
            endpoints("fd01::1", name="web-6"),
        ],
        NodeContext(),
    )
    destinations = [each for spec in found.specs for each in spec.destinations]
    assert {spec.scheduler for spec in found.specs} == {expected[0]}
    assert {each.method for each in destinations} == {expected[1]}
    assert [each.weight for each in destinations] == expected[2]
    assert len(found.problems) == problems
    for problem in found.problems:
        assert "Service shop/web: $.metadata.annotations['svcdp.io/" in str(problem)


def test_what_the_node_cannot_do_keeps_the_default() -> None:
    node = NodeContext(schedulers=["rr", "mine"], methods=["masq"])
    asked = {"svcdp.io/scheduler": "wlc", "svcdp.io/forwarding": "dr"}
    found = resolve_all([service(annotations=asked), endpoints("10.1.0.1")], node)
    assert found.specs[0].scheduler == "rr"
    assert found.specs[0].destinations[0].method == "masq"
    assert len(found.problems) == 2
    mine = {"svcdp.io/scheduler": "mine"}
    assert resolve([service(annotations=mine)], node)[0].scheduler == "mine"


@pytest.mark.parametrize("annotations", [{}, {"svcdp.io/thresholds": "upper=9"}])
def test_a_service_that_names_no_scheduler_has_the_nodes(annotations: dict[str, str]) -> None:
    (spec,) = resolve([service(annotations=annotations)], NodeContext(scheduler="lc"))
    assert spec.scheduler == "lc"


OLD, NEW = "2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z"
CONFLICTS = [
    # two Services of one address, who has it
    case("the older one", service("a", created=NEW), service("b", created=OLD), "shop/b:http"),
    case(
        "by name if of one age", service("b", created=OLD), service("a", created=OLD), "shop/a:http"
    ),
    case(
        "by namespace before name",
        service("a", namespace="y"),
        service("b", namespace="x"),
        "x/b:http",
    ),
    case("no age is younger than any", service("a"), service("b", created=NEW), "shop/b:http"),
    case(
        "a cluster IP before a node port, whatever their age",
        nodeport("a", "10.96.0.1", created=OLD),
        service("b", "192.0.2.1", ports=[port(30080)], created=NEW),
        "shop/b:http",
    ),
    case(
        "an external address that is the node's before a node port",
        nodeport("a", "10.96.0.1", created=OLD),
        service("b", externalIPs=["192.0.2.1"], ports=[port(30080)], created=NEW),
        "shop/b:http",
    ),
    case(
        "two node ports",
        nodeport("a", "10.96.0.1", created=NEW),
        nodeport("b", "10.96.0.2", created=OLD),
        "shop/b:http",
    ),
]


@pytest.mark.parametrize(("first", "second", "winner"), CONFLICTS)
def test_conflicts(first: dict, second: dict, winner: str) -> None:
    node = NodeContext(**NODE)
    for objects in ([first, second], [second, first]):
        found = resolve_all(objects, node)
        names = {spec.key: spec.name for spec in found.specs}
        contested = {("10.96.0.10", 80, "tcp"), ("192.0.2.1", 30080, "tcp")} & names.keys()
        assert [names[key] for key in contested] == [winner]
        [problem] = found.problems
        assert f"is held by Service {winner}" in str(problem)


def test_the_same_number_in_another_protocol_is_no_conflict() -> None:
    objects = [
        nodeport("a", "10.96.0.1"),
        service("b", "10.96.0.2", type="NodePort", ports=[port(53, "d", "UDP", nodePort=30080)]),
    ]
    found = resolve_all(objects, NodeContext(**NODE))
    assert not found.problems
    assert summary(found.specs).keys() >= {"tcp 192.0.2.1:30080", "udp 192.0.2.1:30080"}


def test_of_one_object_given_twice_the_first_counts() -> None:
    found = resolve_all([service("a", "10.96.0.1"), service("a", "10.96.0.2")], NodeContext())
    assert [spec.address for spec in found.specs] == ["10.96.0.1"]
    assert [str(problem) for problem in found.problems] == [
        "Service shop/a is given twice; the first counts"
    ]
