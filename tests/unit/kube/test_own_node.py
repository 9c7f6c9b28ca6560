"""What a cluster says of the node itself: addresses, Pods' CIDRs, where cluster IPs are."""

from __future__ import annotations

from typing import Any

import pytest

from svcdp.errors import ManifestError
from svcdp.kube import Change, NodeContext, resolve
from svcdp.kube.decode import decode_value
from svcdp.kube.model import Node, Object, ServiceCIDR
from svcdp.kube.own import informed
from svcdp.kube.tracker import Tracker

INTERFACES = ("192.0.2.9", "192.0.2.1", "2001:db8::9", "2001:db8::1", "198.51.100.1")


def node(
    *addresses: tuple[str, str], pods: tuple[str, ...] = (), zone: str = "", name: str = "n1"
) -> Any:
    labels = {"topology.kubernetes.io/zone": zone} if zone else {}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {"podCIDR": pods[0], "podCIDRs": list(pods)} if pods else {},
        "status": {"addresses": [{"type": kind, "address": text} for kind, text in addresses]},
    }


def service_cidr(*cidrs: str, name: str = "kubernetes") -> Any:
    kind = {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR"}
    return {**kind, "metadata": {"name": name}, "spec": {"cidrs": list(cidrs)}}


def decoded(value: Any) -> Object:
    [found] = decode_value(value)
    return found


def told(context: NodeContext, own: Any, *cidrs: Any) -> NodeContext:
    found = decoded(own)
    assert isinstance(found, Node)
    records = [each for each in map(decoded, cidrs) if isinstance(each, ServiceCIDR)]
    return informed(context, found, records)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ((), ("192.0.2.9", "2001:db8::9")),
        ([("InternalIP", "192.0.2.1")], ("192.0.2.1", "2001:db8::9")),
        (
            [("InternalIP", "192.0.2.1"), ("InternalIP", "2001:db8::1")],
            ("192.0.2.1", "2001:db8::1"),
        ),
        (
            [("ExternalIP", "198.51.100.1"), ("InternalIP", "192.0.2.1")],
            ("192.0.2.1", "2001:db8::9"),
        ),
        ([("ExternalIP", "198.51.100.1")], ("198.51.100.1", "2001:db8::9")),
        ([("InternalIP", "203.0.113.1")], ("192.0.2.9", "2001:db8::9")),
        ([("Hostname", "n1"), ("InternalIP", "none")], ("192.0.2.9", "2001:db8::9")),
    ],
    ids=["none", "v4", "dual", "internal-first", "external", "on-no-interface", "no-address"],
)
def test_the_addresses_that_a_node_is_known_by(
    listed: list[tuple[str, str]], expected: tuple[str, str]
) -> None:
    found = told(NodeContext(name="n1", addresses=INTERFACES), node(*listed))
    assert (found.primary_address("IPv4"), found.primary_address("IPv6")) == expected


def test_settings_come_before_what_a_node_says() -> None:
    given = NodeContext(
        name="n1",
        addresses=INTERFACES,
        primary_addresses=["192.0.2.9"],
        zone="a",
        detect_local="NodeCIDR",
        pod_cidrs=["10.9.0.0/24"],
    )
    said = node(("InternalIP", "192.0.2.1"), pods=("10.1.0.0/24",), zone="b")
    assert told(given, said) == given


@pytest.mark.parametrize(
    ("mode", "expected"), [("NodeCIDR", ("10.1.0.0/24", "fd01::/64")), ("ClusterCIDR", ())]
)
def test_the_nodes_pods_are_told_by_its_cidrs(mode: Any, expected: tuple[str, ...]) -> None:
    given = NodeContext(name="n1", detect_local=mode)
    assert told(given, node(pods=("10.1.0.0/24", "fd01::/64"))).pod_cidrs == expected


def test_service_cidrs_are_added_to_those_of_the_settings() -> None:
    given = NodeContext(name="n1", service_cidrs=["10.96.0.0/12"])
    cidrs = service_cidr("10.96.0.0/12"), service_cidr("10.200.0.0/16", "fd02::/112", name="more")
    assert told(given, node(), *cidrs).service_cidrs == (
        "10.96.0.0/12",
        "10.200.0.0/16",
        "fd02::/112",
    )


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (service_cidr("10.96.0.0/12", "10.96"), "$.spec.cidrs[1]"),
        (node(pods=("10.1.0.0/40",)), "$.spec.podCIDRs[0]"),
        ({**node(), "spec": {"podCIDR": "10.1"}}, "$.spec.podCIDR"),
    ],
)
def test_what_is_no_network_is_a_mistake(value: Any, field: str) -> None:
    with pytest.raises(ManifestError) as raised:
        decode_value(value)
    assert raised.value.field == field


SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web"},
    "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80, "nodePort": 30080}]},
}
WEB, REST = ("10.96.0.1", 80, "tcp"), ("10.96.0.1", 0, "any")


def test_what_is_served_follows_the_node_live() -> None:
    given = NodeContext(name="n1", addresses=INTERFACES, detect_local="NodeCIDR")
    tracker = Tracker(given)
    objects = {"web": SERVICE}

    def put(name: str, value: Any) -> set[tuple[str, int, str]]:
        change = Change(deleted=(decoded(objects.pop(name)).key,))
        if value is not None:
            objects[name] = value
            change = Change(objects=(decoded(value),))
        keys = tracker.apply([(0, "api", change)])
        # It says what `resolve` says from scratch.
        scratch = {spec.key: spec for spec in resolve(objects.values(), given)}
        assert {spec.key: spec for spec in tracker.claims} == scratch
        return keys

    put("web", SERVICE)
    assert ("192.0.2.9", 30080, "tcp") in {spec.key for spec in tracker.claims}
    objects["n1"] = node()
    put("n1", node(("InternalIP", "192.0.2.1"), pods=("10.1.0.0/24",)))
    assert ("192.0.2.1", 30080, "tcp") in {spec.key for spec in tracker.claims}
    web = tracker.spec(WEB)
    assert web is not None
    assert web.rules[0].sources == ("10.1.0.0/24",)
    objects["n2"] = node()
    assert put("n2", node(zone="b", name="n2")) == set()
    objects["cidr"] = service_cidr()
    assert {REST, ("10.96.0.0/12", 0, "any")} <= put("cidr", service_cidr("10.96.0.0/12"))
    put("cidr", None)
    assert tracker.spec(REST) is None
    put("n1", None)
    assert ("192.0.2.9", 30080, "tcp") in {spec.key for spec in tracker.claims}


def test_beside_another_proxy_addresses_of_nobody_are_left_alone() -> None:
    given = NodeContext(service_cidrs=["10.96.0.0/12"], service_proxy_name="svcdp")
    assert resolve([SERVICE], given) == []
    own = {**SERVICE, "metadata": {"name": "web", "labels": {LABEL: "svcdp"}}}
    assert {spec.key for spec in resolve([own], given)} == {WEB, REST}


LABEL = "service.kubernetes.io/service-proxy-name"
