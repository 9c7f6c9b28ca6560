"""What is written into which Service's status, and what its owner is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from svcdp.errors import ManifestError
from svcdp.kube.assign import (
    MANAGER,
    Decision,
    ObservedService,
    decide,
    decode_pool,
    decode_service,
)
from svcdp.kube.model import LoadBalancerPool
from svcdp.kube.pools import ADDRESSES_ANNOTATION, CLEANUP_FINALIZER, POOL_CLASS

OWN = {"loadBalancerClass": POOL_CLASS}


def service(
    name: str,
    *addresses: str,
    by: str = "",
    hostname: str = "",
    mode: str = "VIP",
    asks: str = "",
    finalizers: tuple[str, ...] = (),
    deleted: str | None = None,
    **spec: Any,
) -> ObservedService:
    """One whose status was written ``by`` somebody, as an API server has it."""
    ingress: list[dict[str, str]] = [{"ip": text, "ipMode": mode} for text in addresses]
    ingress += [{"hostname": hostname}] if hostname else []
    status = {"f:status": {"f:loadBalancer": {"f:ingress": {}}}}
    value = {
        "metadata": {
            "name": name,
            "namespace": "default",
            "resourceVersion": "7",
            "annotations": {ADDRESSES_ANNOTATION: asks} if asks else None,
            "deletionTimestamp": deleted,
            "finalizers": list(finalizers),
            "managedFields": [
                {"manager": "kubectl", "operation": "Update", "fieldsV1": {"f:spec": {}}},
                {"manager": by, "operation": "Update", "fieldsV1": status, "subresource": "status"},
            ],
        },
        "spec": {"type": "LoadBalancer", "ports": [{"port": 80}], **spec},
        "status": {"loadBalancer": {"ingress": ingress}},
    }
    return decode_service(json.dumps(value).encode())


def pool(*addresses: str, **spec: Any) -> LoadBalancerPool:
    value = {"metadata": {"name": "lan"}, "spec": {"addresses": addresses, **spec}}
    found = decode_pool(json.dumps(value).encode()).pool
    assert found is not None
    return found


LAN = pool("192.0.2.8-192.0.2.9")


def written(decision: Decision) -> dict[str, str]:
    return {each.service.ref.name: " ".join(each.after) for each in decision.assignments}


def reasons(decision: Decision) -> dict[str, str]:
    return {event.regarding.name: event.reason for event in decision.events}


def test_what_is_already_so_is_not_written() -> None:
    services = [service("a", "192.0.2.9", by=MANAGER), service("b")]
    decision = decide(services, [LAN])
    assert written(decision) == {"b": "192.0.2.8"}
    [assignment] = decision.assignments
    assert (assignment.version, assignment.before) == ("7", ())
    event = assignment.event
    assert (event.type, event.reason) == ("Normal", "LoadBalancerIPAllocated")
    assert event.message == "its addresses are 192.0.2.8"
    assert (decision.events, decision.lacking) == ([], 0)


def test_servers_without_ip_modes_need_no_second_write() -> None:
    value = {
        "metadata": {"name": "a"},
        "spec": {"type": "LoadBalancer", **OWN},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}},
    }
    assert not decide([decode_service(json.dumps(value).encode())], [LAN]).assignments


@pytest.mark.parametrize(
    "other",
    [
        service("a", loadBalancerClass="example.com/cloud"),
        service("a", "198.51.100.1", by="metallb", loadBalancerClass="example.com/cloud"),
        service("a", "198.51.100.1", by="cloud"),
        service("a", hostname="lb.example.com", by="cloud"),
        service("a", "198.51.100.1", mode="Proxy", by="cloud"),
        service("a", "192.0.2.9", mode="Proxy", by="cloud"),
        service("a", finalizers=(CLEANUP_FINALIZER,)),
        service("a", "192.0.2.9", by="cloud", finalizers=(CLEANUP_FINALIZER,)),
        service("a", "192.0.2.9", by=MANAGER, finalizers=(CLEANUP_FINALIZER,)),
        service("a", "198.51.100.1", by="somebody", type="ClusterIP"),
        service("a", "192.0.2.9", by=MANAGER, finalizers=(CLEANUP_FINALIZER,), type="ClusterIP"),
        service("a", type="NodePort"),
        service("a", deleted="2026-01-01T00:00:00Z"),
        service("a", "198.51.100.1", by=MANAGER, deleted="2026-01-01T00:00:00Z"),
    ],
)
def test_what_others_serve_is_left_alone(other: ObservedService) -> None:
    decision = decide([other], [LAN])
    assert (list(decision.assignments), list(decision.events), decision.lacking) == ([], [], 0)


@pytest.mark.parametrize("mode", ["VIP", "Proxy"])
def test_what_others_have_is_given_to_nobody(mode: str) -> None:
    cloud = service("a", "192.0.2.9", mode=mode, by="cloud", finalizers=(CLEANUP_FINALIZER,))
    asks = service("b", asks="192.0.2.9")
    decision = decide([asks, service("c"), cloud], [LAN])
    assert written(decision) == {"c": "192.0.2.8"}
    assert reasons(decision) == {"b": "LoadBalancerIPAlreadyAllocated"}
    assert "Service default/a" in decision.events[0].message
    assert decision.lacking == 1


def test_what_somebody_wrote_that_is_in_a_pool_is_kept() -> None:
    """As when another controller of such pools is replaced."""
    assert not decide([service("a", "192.0.2.9", by="metallb")], [LAN]).assignments
    decision = decide([service("a", "192.0.2.9", by="metallb"), service("b"), service("c")], [LAN])
    assert written(decision) == {"b": "192.0.2.8"}


def test_what_is_in_a_pool_for_others_is_left_alone() -> None:
    pools = [pool("192.0.2.9/32", namespaces=["shop"]), pool("192.0.2.8/32")]
    assert written(decide([service("a", "192.0.2.9", by="cloud")], pools)) == {}


def test_of_its_own_class_it_serves_what_others_wrote() -> None:
    decision = decide([service("a", "198.51.100.1", by="somebody", **OWN)], [pool("192.0.2.9/32")])
    assert written(decision) == {"a": "192.0.2.9"}
    named = service("a", "192.0.2.9", hostname="lb.example.com", by="somebody", **OWN)
    assert written(decide([named], [LAN])) == {"a": "192.0.2.9"}


@pytest.mark.parametrize(
    "former",
    [
        service("a", "192.0.2.9", by=MANAGER, type="ClusterIP"),
        service("a", "192.0.2.9", by=MANAGER, loadBalancerClass="example.com/cloud"),
    ],
)
def test_what_it_gave_it_takes_back(former: ObservedService) -> None:
    decision = decide([service("b", asks="192.0.2.9"), former], [LAN])
    # Nobody gets what another one still has.
    assert written(decision) == {"a": ""}
    event = decision.assignments[0].event
    assert (event.reason, event.message) == ("LoadBalancerIPReleased", "it has no more 192.0.2.9")


@pytest.mark.parametrize(
    ("type_", "mode", "wrong"),
    [("BetterLoadBalancer", "VIP", "type"), ("LoadBalancer", "Better", "ipMode")],
)
def test_of_services_that_cannot_be_read_the_addresses_are_taken(
    type_: str, mode: str, wrong: str
) -> None:
    """As of a later version of the API."""
    value = {
        "metadata": {"name": "new", "resourceVersion": "7"},
        "spec": {"type": type_},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9", "ipMode": mode}]}},
    }
    new = decode_service(json.dumps(value).encode())
    assert wrong in str(new.problem)
    decision = decide([new, service("a", asks="192.0.2.9")], [LAN])
    assert written(decision) == {}
    assert reasons(decision) == {"a": "LoadBalancerIPAlreadyAllocated"}
    assert "Service default/new" in decision.events[0].message


def test_who_leaves_an_address_goes_first() -> None:
    services = [
        service("b", asks="192.0.2.9"),
        service("a", "192.0.2.9", by=MANAGER, asks="192.0.2.8"),
    ]
    assert written(decide(services, [LAN])) == {"a": "192.0.2.8"}
    services[1] = service("a", "192.0.2.8", by=MANAGER, asks="192.0.2.8")
    assert written(decide(services, [LAN])) == {"b": "192.0.2.9"}


def test_those_who_want_each_others_leave_theirs_first() -> None:
    services = [
        service("b", "192.0.2.8", by=MANAGER, asks="192.0.2.9"),
        service("a", "192.0.2.9", by=MANAGER, asks="192.0.2.8"),
    ]
    assert written(decide(services, [LAN])) == {"a": "", "b": ""}
    services = [service("b", asks="192.0.2.9"), service("a", asks="192.0.2.8")]
    assert written(decide(services, [LAN])) == {"a": "192.0.2.8", "b": "192.0.2.9"}


def test_class_only() -> None:
    services = [
        service("plain"),
        service("given", "192.0.2.9", by=MANAGER),
        service("clouds", "192.0.2.7", by="cloud"),
        service("own", **OWN),
    ]
    decision = decide(services, [pool("192.0.2.8/32")], class_only=True)
    assert written(decision) == {"given": "", "own": "192.0.2.8"}


def test_without_pools() -> None:
    services = [service("plain"), service("own", **OWN), service("had", "192.0.2.9", by=MANAGER)]
    decision = decide(services, [])
    assert written(decision) == {"had": ""}
    assert reasons(decision) == {"own": "NoLoadBalancerPool", "had": "NoLoadBalancerPool"}
    assert decision.lacking == 2
    # A pool for others is none for it, and it may be a cloud's.
    elsewhere = pool("192.0.2.0/24", namespaces=["shop"])
    decision = decide(services, [elsewhere])
    assert written(decision) == {"had": ""}
    assert reasons(decision) == dict.fromkeys(("own", "had"), "LoadBalancerPoolFull")


def test_where_pools_may_be_missing_nothing_is_taken_back() -> None:
    services = [
        service("had", "198.51.100.1", by=MANAGER),
        service("moved", "192.0.2.9", by=MANAGER, asks="192.0.2.8"),
        service("new"),
    ]
    decision = decide(services, [LAN], is_partial=True)
    assert written(decision) == {"moved": "192.0.2.8"}
    assert written(decide(services[:1], [], is_partial=True)) == {}
    [event] = decide([service("own", **OWN)], [], is_partial=True).events
    assert event.message == "there is no LoadBalancerPool that can be read"


def test_two_families_are_one_status() -> None:
    dual = {"ipFamilies": ["IPv6", "IPv4"], "ipFamilyPolicy": "PreferDualStack"}
    pools = [pool("192.0.2.9/32", "2001:db8::9/128")]
    assert written(decide([service("a", **dual)], pools)) == {"a": "2001:db8::9 192.0.2.9"}
    half = service("a", "192.0.2.9", by=MANAGER, **dual)
    [assignment] = decide([half], pools).assignments
    assert assignment.before == ("192.0.2.9",)
    assert assignment.after == ("2001:db8::9", "192.0.2.9")


def test_twice_the_same_address_is_the_elders() -> None:
    """As it is after a time in which two replicas wrote."""
    services = [service(name, "192.0.2.9", by=MANAGER) for name in "ba"]
    assert written(decide(services, [LAN])) == {"b": "192.0.2.8"}
    assert written(decide(services, [pool("192.0.2.9/32")])) == {"b": ""}


def test_pools_that_cannot_be_read() -> None:
    value = {
        "metadata": {"name": "lan", "uid": "u"},
        "spec": {"addresses": ["192.0.2.9-192.0.2.1"]},
    }
    found = decode_pool(json.dumps(value).encode())
    assert (found.key.name, found.uid, found.pool) == ("lan", "u", None)
    assert "ends before it starts" in str(found.problem)
    for data in (b"", b"[]", b'{"metadata":{}}'):
        with pytest.raises(ManifestError):
            decode_pool(data)
        with pytest.raises(ManifestError):
            decode_service(data)


def test_what_was_emptied_is_no_longer_its_own() -> None:
    """As the server does when the type changes, without a note of who wrote that."""
    assert not service("a", by=MANAGER).is_own
    assert service("a", "192.0.2.9", by=MANAGER).is_own


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"f:status": {}},
        {"f:status": {"f:conditions": {}}},
        {"f:status": {"f:loadBalancer": {}}},
        {"f:metadata": {"f:annotations": {".": {}}}},
        None,
    ],
)
def test_who_wrote_something_else_did_not_give_the_address(fields: Any) -> None:
    value = {
        "metadata": {"name": "a", "managedFields": [{"manager": MANAGER, "fieldsV1": fields}]},
        "spec": {"type": "ClusterIP"},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}},
    }
    assert not decode_service(json.dumps(value).encode()).is_own
