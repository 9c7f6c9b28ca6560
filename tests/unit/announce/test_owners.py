"""Which node has an address."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svcdp.announce.owner import Holder, candidates, holder_of, owner
from svcdp.kube.context import NodeContext
from svcdp.kube.decode import decode_value
from svcdp.kube.model import ServiceRef
from svcdp.kube.pools import CLEANUP_FINALIZER, POOL_CLASS

NAMES = st.text(min_size=1, max_size=8)
NODES = st.sets(NAMES, min_size=1, max_size=8)
ADDRESSES = [f"192.0.2.{number}" for number in range(256)]


@given(NODES, NAMES)
def test_a_node_that_comes_takes_and_one_that_goes_leaves_only_its_own(
    nodes: set[str], other: str
) -> None:
    without, complete = nodes - {other}, nodes | {other}
    for address in ADDRESSES[:32]:
        before, after = owner(address, without), owner(address, complete)
        assert after in (before, other)
        assert after in complete


@given(NODES)
def test_the_order_is_nothing(nodes: set[str]) -> None:
    for address in ADDRESSES[:8]:
        assert owner(address, sorted(nodes)) == owner(address, sorted(nodes, reverse=True))


def test_all_get_their_share() -> None:
    shares = Counter(owner(address, ["n1", "n2", "n3", "n4"]) for address in ADDRESSES)
    assert len(shares) == 4
    assert min(shares.values()) > 256 / 4 / 2


def test_nobody_is_left() -> None:
    assert owner("192.0.2.1", []) is None


def holder(name: str, *nodes: str) -> Holder:
    """By the policy Local where nodes are given; "-": none has endpoints."""
    local = frozenset(each for each in nodes if each != "-")
    return Holder(ServiceRef("default", name), ("192.0.2.1",), local if nodes else None)


@pytest.mark.parametrize(
    ("holders", "expected"),
    [
        pytest.param([holder("a")], "123", id="any"),
        pytest.param([holder("a", "1", "2")], "12", id="with endpoints"),
        pytest.param([holder("a", "4")], "", id="not alive"),
        pytest.param([holder("a", "-")], "", id="without endpoints"),
        pytest.param([holder("a", "1", "2"), holder("b", "2", "3")], "2", id="shared"),
        pytest.param([holder("a", "1"), holder("b", "3")], "13", id="shared by strangers"),
        pytest.param([holder("a"), holder("b", "2")], "2", id="shared with one for any"),
        pytest.param([holder("a"), holder("b", "-")], "123", id="one without endpoints"),
    ],
)
def test_candidates(holders: list[Holder], expected: str) -> None:
    assert candidates(holders, frozenset("123")) == set(expected)


def read(
    spec: dict[str, Any],
    ingress: list[Any],
    *slices: Any,
    labels: Any = None,
    finalizers: Any = None,
) -> Any:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "labels": labels, "finalizers": finalizers},
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": "10.96.0.10",
            "ports": [{"port": 80}],
            **spec,
        },
        "status": {"loadBalancer": {"ingress": ingress}},
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080}],
        "endpoints": list(slices),
    }
    (first,), (second,) = map(decode_value, (service, endpoints))
    return holder_of(first, [second], NodeContext())  # type: ignore[arg-type, list-item]


IP = [{"ip": "192.0.2.1"}]
LOCAL = {"externalTrafficPolicy": "Local"}


NUMBERS = itertools.count(1)


def endpoint(node: str | None, **conditions: bool) -> dict[str, Any]:
    address = f"10.1.1.{next(NUMBERS)}"
    return {"addresses": [address], "nodeName": node, "conditions": conditions}


def test_addresses_of_a_service() -> None:
    ingress = [
        {"ip": "192.0.2.1", "ipMode": "VIP"},
        {"ip": "192.0.2.2", "ipMode": "Proxy"},
        {"hostname": "lb.example"},
        {"ip": "2001:DB8::1"},
        {"ip": "192.0.2.1"},
    ]
    found = read({}, ingress)
    assert found.addresses == ("192.0.2.1", "2001:db8::1")
    assert found.nodes is None


def test_addresses_that_a_cloud_gave_are_the_clouds() -> None:
    finalizers = ["example.com/other", CLEANUP_FINALIZER]
    assert read({}, IP, finalizers=finalizers) is None
    assert read({}, IP, finalizers=finalizers[:1]) is not None
    assert read({"loadBalancerClass": POOL_CLASS}, IP, finalizers=finalizers) is not None


@pytest.mark.parametrize(
    ("spec", "ingress", "labels"),
    [
        pytest.param({"type": "NodePort"}, IP, None, id="no load balancer"),
        pytest.param({"loadBalancerClass": "example.com/lb"}, IP, None, id="of another class"),
        pytest.param({"clusterIP": "None"}, IP, None, id="headless"),
        pytest.param({}, [], None, id="no address"),
        pytest.param({}, [{"ip": "192.0.2.1", "ipMode": "Proxy"}], None, id="in front of it"),
        pytest.param(
            {}, IP, {"service.kubernetes.io/service-proxy-name": "other"}, id="of another proxy"
        ),
    ],
)
def test_services_without_addresses(spec: Any, ingress: Any, labels: Any) -> None:
    assert read(spec, ingress, labels=labels) is None


@pytest.mark.parametrize(
    ("endpoints", "nodes"),
    [
        pytest.param([endpoint("n1"), endpoint("n2", ready=True)], {"n1", "n2"}, id="ready"),
        pytest.param([endpoint("n1", ready=False), endpoint("n2")], {"n2"}, id="one is not"),
        pytest.param([endpoint(None)], set(), id="nowhere"),
        pytest.param(
            [endpoint("n1", ready=False, serving=True, terminating=True)], {"n1"}, id="serving"
        ),
        pytest.param([endpoint("n1", ready=False, serving=True)], set(), id="not terminating"),
        pytest.param([], set(), id="none"),
    ],
)
def test_nodes_with_endpoints(endpoints: list[Any], nodes: set[str]) -> None:
    assert read(LOCAL, IP, *endpoints).nodes == nodes
