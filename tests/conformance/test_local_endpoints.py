"""What a node tells load balancers of its own endpoints, and whether they may send to it."""

from __future__ import annotations

from typing import Any

import pytest
from kube_objects import Manifest, case, endpoint, endpoints, port, service

from svcdp.kube import NodeContext
from svcdp.kube.decode import decode_value
from svcdp.kube.model import ObjectKey
from svcdp.kube.state import Change
from svcdp.kube.tracker import Tracker

A, B, C, SIX = "10.1.0.1", "10.1.0.2", "10.1.0.3", "fd01::1"
HERE, THERE = "n1", "n2"
PORT = 30500


def tracker(*manifests: Manifest) -> Tracker:
    tracker = Tracker(NodeContext(name=HERE))
    found = [record for manifest in manifests for record in decode_value(manifest)]
    tracker.apply([(0, "", Change(objects=tuple(found)))])
    return tracker


def balanced(*cluster_ips: str, **more: Any) -> Manifest:
    given = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": PORT}
    return service("web", *cluster_ips, **{**given, **more})


def here(address: str, *conditions: str) -> Manifest:
    return endpoint(address, *(conditions or ("ready",)), node=HERE)


def there(address: str) -> Manifest:
    return endpoint(address, "ready", node=THERE)


TWO_PORTS = [port(80, "http"), port(443, "https")]
TWO_TARGETS = [port(8080, "http"), port(8443, "https")]
DUAL = ("10.96.0.10", "fd96::10")
TERMINATING = ("-ready", "serving", "terminating")

# Service, slices, and what each family's load balancers hear.
CHECKS = [
    case("ready", balanced(), [endpoints(here(A))], {"IPv4": 1}),
    case("two Pods", balanced(), [endpoints(here(A), here(B))], {"IPv4": 2}),
    case("those elsewhere do not count", balanced(), [endpoints(here(A), there(B))], {"IPv4": 1}),
    case("all elsewhere", balanced(), [endpoints(there(A))], {"IPv4": 0}),
    case("of no node", balanced(), [endpoints(endpoint(A, "ready"))], {"IPv4": 0}),
    case("nobody at all", balanced(), [], {"IPv4": 0}),
    case("terminating ones serve and do not count", balanced(),
         [endpoints(here(A, *TERMINATING))], {"IPv4": 0}),
    case("ready is the default", balanced(), [endpoints({"addresses": [A], "nodeName": HERE})],
         {"IPv4": 1}),
    case("not ready", balanced(), [endpoints(here(A, "-ready", "serving"))], {"IPv4": 0}),
    case("a Pod with two ports is one", balanced(ports=TWO_PORTS),
         [endpoints(here(A), ports=TWO_TARGETS)], {"IPv4": 1}),
    case("a Pod in two slices is one", balanced(),
         [endpoints(here(A)), endpoints(here(A), name="other")], {"IPv4": 1}),
    case("ports that no Service port has", balanced(),
         [endpoints(here(A), ports=[port(1, "metrics")])], {"IPv4": 0}),
    case("each family by itself", balanced(*DUAL),
         [endpoints(here(A), here(B)), endpoints(here(SIX), name="six")], {"IPv4": 2, "IPv6": 1}),
    case("a family that the Service lacks", balanced(),
         [endpoints(here(A)), endpoints(here(SIX), name="six")], {"IPv4": 1}),
    case("Cluster", balanced(externalTrafficPolicy="Cluster"), [endpoints(here(A))], {}),
    case("no load balancer", balanced(type="NodePort"), [endpoints(here(A))], {}),
    case("no port", balanced(healthCheckNodePort=None), [endpoints(here(A))], {}),
    case("port 0", balanced(healthCheckNodePort=0), [endpoints(here(A))], {}),
    case("headless", balanced("None", ipFamilies=None), [endpoints(here(A))], {}),
    case("another proxy's", balanced(labels={"service.kubernetes.io/service-proxy-name": "x"}),
         [endpoints(here(A))], {}),
]  # fmt: skip


@pytest.mark.parametrize(("web", "slices", "expected"), CHECKS)
def test_health_checks(web: Manifest, slices: list[Manifest], expected: dict[str, int]) -> None:
    checks = tracker(web, *slices).health_checks()
    assert {check.family: check.endpoints for check in checks} == expected
    assert {check.port for check in checks} <= {PORT}
    assert {str(check.service) for check in checks} <= {"shop/web"}


LOCAL_IN, LOCAL_OUT = {"internalTrafficPolicy": "Local"}, {"externalTrafficPolicy": "Local"}
NODE_PORT = {"type": "NodePort", **LOCAL_OUT}

# Service, slices, and whether it counts: for internal, and for external traffic.
LACKING = [
    case("internal", service(**LOCAL_IN), [endpoints(there(A))], (1, 0)),
    case("external", service(**NODE_PORT), [endpoints(there(A))], (0, 1)),
    case("both", service(**NODE_PORT, **LOCAL_IN), [endpoints(there(A))], (1, 1)),
    case("external addresses are outside too", service(externalIPs=["198.51.100.1"], **LOCAL_OUT),
         [endpoints(there(A))], (0, 1)),
    case("nothing is outside", service(**LOCAL_OUT), [endpoints(there(A))], (0, 0)),
    case("some are here", service(**LOCAL_IN), [endpoints(there(A), here(B))], (0, 0)),
    case("nobody anywhere", service(**LOCAL_IN), [], (0, 0)),
    case("terminating here", service(**LOCAL_IN),
         [endpoints(there(A), here(B, *TERMINATING))], (0, 0)),
    case("of one port", service(ports=TWO_PORTS, **LOCAL_IN),
         [endpoints(here(A), ports=TWO_TARGETS[:1]),
          endpoints(there(B), ports=TWO_TARGETS[1:], name="other")], (1, 0)),
    case("Cluster", service(), [endpoints(there(A))], (0, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("web", "slices", "expected"), LACKING)
def test_services_that_find_nobody_here(
    web: Manifest, slices: list[Manifest], expected: tuple[int, int]
) -> None:
    assert tracker(web, *slices).without_local_endpoints() == expected


def test_they_go_with_their_service() -> None:
    found = tracker(balanced(), endpoints(there(A)))
    key = next(iter(found.state.services.values())).key
    found.apply([(0, "", Change(deleted=(key,)))])
    assert found.health_checks() == []
    assert found.without_local_endpoints() == (0, 0)


NODES = [
    case("fine", {}, True),
    case("another taint", {"spec": {"taints": [{"key": "dedicated"}]}}, True),
    case("about to go", {"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}}, False),
    case("being deleted", {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}, False),
    case("unschedulable", {"spec": {"unschedulable": True, "taints": None}}, True),
]  # fmt: skip


def node(name: str = HERE, **fields: Any) -> Manifest:
    metadata = {"name": name, **fields.pop("metadata", {})}
    return {"apiVersion": "v1", "kind": "Node", "metadata": metadata, **fields}


@pytest.mark.parametrize(("fields", "expected"), NODES)
def test_eligible_nodes(fields: Manifest, expected: bool) -> None:
    assert tracker(node(**fields)).is_eligible is expected
    assert tracker(node(THERE, **fields)).is_eligible is True, "what others are is their business"


def test_a_node_that_is_gone() -> None:
    found = tracker(node(), balanced())
    found.apply([(0, "", Change(deleted=(ObjectKey("Node", "", HERE),)))])
    assert not found.is_eligible
    [back] = decode_value({"kind": "NodeList", "apiVersion": "v1", "items": [node()]})
    found.apply([(0, "", Change(objects=(back,)))])
    assert found.is_eligible
    assert found.state.changed == {"Node": 3, "Service": 1}


def test_without_a_node_there_is_nothing_against_it() -> None:
    assert tracker(balanced()).is_eligible
