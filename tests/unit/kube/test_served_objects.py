"""Objects as API servers of 1.33 to 1.36 write them: every field, nulls, and fields yet to come."""

from __future__ import annotations

import json
from typing import Any

import pytest

from svcdp.errors import ManifestError
from svcdp.kube import NodeContext, resolve_all
from svcdp.kube.decode import decode_json, decode_value
from svcdp.kube.model import EndpointSlice, Node, Service, ServiceCIDR

ZONE = "topology.kubernetes.io/zone"
META: dict[str, Any] = {
    "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}\n"},
    "creationTimestamp": "2026-01-01T00:00:00Z",
    "deletionGracePeriodSeconds": None,
    "finalizers": ["service.kubernetes.io/load-balancer-cleanup"],
    "generation": 3,
    "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}, "time": None}],
    "namespace": "default",
    "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": "web", "uid": "u"}],
    "resourceVersion": "1234",
    "selfLink": "",
    "uid": "5f6ff7a1-9cf8-4a4b-bb3a-1f1f6a3c3f6d",
    "yetToCome": {"a": [1]},
}
WEB: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {**META, "name": "web", "labels": {"app": "web"}},
    "spec": {
        "allocateLoadBalancerNodePorts": True,
        "clusterIP": "10.96.0.10",
        "clusterIPs": ["10.96.0.10", "fd00::a"],
        "externalIPs": None,
        "externalName": "",
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 31000,
        "internalTrafficPolicy": "Cluster",
        "ipFamilies": ["IPv4", "IPv6"],
        "ipFamilyPolicy": "PreferDualStack",
        "loadBalancerClass": "example.com/lb",
        "loadBalancerIP": "198.51.100.1",
        "loadBalancerSourceRanges": ["203.0.113.0/24 "],
        "ports": [
            {
                "appProtocol": "kubernetes.io/h2c",
                "name": "http",
                "nodePort": 30080,
                "port": 80,
                "protocol": "TCP",
                "targetPort": "web",
                "yetToCome": None,
            },
            {"name": "dns", "nodePort": 30053, "port": 53, "protocol": "UDP", "targetPort": 53},
        ],
        "publishNotReadyAddresses": False,
        "selector": {"app": "web"},
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}},
        "trafficDistribution": "PreferSameNode",
        "type": "LoadBalancer",
        "yetToCome": "x",
    },
    "status": {
        "conditions": [{"type": "LoadBalancerPortsError", "status": "False", "reason": "r"}],
        "loadBalancer": {
            "ingress": [
                {"ip": "198.51.100.1", "ipMode": "VIP", "ports": [{"port": 80, "protocol": "TCP"}]},
                {"hostname": "lb.example.com", "ipMode": None, "ports": None},
            ]
        },
    },
}
SLICE: dict[str, Any] = {
    "apiVersion": "discovery.k8s.io/v1",
    "kind": "EndpointSlice",
    "metadata": {
        **META,
        "generateName": "web-",
        "labels": {
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            "kubernetes.io/service-name": "web",
        },
        "name": "web-7xk2p",
    },
    "addressType": "IPv4",
    "endpoints": [
        {
            "addresses": ["10.1.0.7"],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "deprecatedTopology": {"topology.kubernetes.io/region": "r1"},
            "hints": {"forNodes": [{"name": "n1"}], "forZones": [{"name": "z1"}]},
            "hostname": "web-0",
            "nodeName": "n1",
            "targetRef": {"kind": "Pod", "name": "web-0", "namespace": "default", "uid": "u"},
            "zone": "z1",
            "yetToCome": {},
        },
        {"addresses": ["10.1.0.8"], "conditions": {}, "hints": None, "nodeName": None},
        {"addresses": ["10.1.0.9"], "conditions": {"ready": None}, "targetRef": None},
    ],
    "ports": [
        {"appProtocol": None, "name": "http", "port": 8080, "protocol": "TCP"},
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "", "port": None, "protocol": "TCP"},
    ],
}
BARE: dict[str, Any] = {
    **SLICE,
    "metadata": {**META, "name": "web-00000"},
    "endpoints": None,
    "ports": None,
}
NAMES: dict[str, Any] = {
    **BARE,
    "metadata": {**META, "name": "names"},
    "addressType": "FQDN",
    "endpoints": [{"addresses": ["web.example.com"]}],
}
HEADLESS: dict[str, Any] = {
    **WEB,
    "metadata": {**META, "name": "db", "labels": None, "annotations": None},
    "spec": {
        "clusterIP": "None",
        "clusterIPs": ["None"],
        "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack",
        "sessionAffinity": "None",
        "type": "ClusterIP",
    },
    "status": {"loadBalancer": {}},
}
EXTERNAL: dict[str, Any] = {
    **HEADLESS,
    "metadata": {**META, "name": "elsewhere"},
    "spec": {"externalName": "db.example.com.", "sessionAffinity": "None", "type": "ExternalName"},
}
NODE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {**META, "name": "n1", "namespace": None, "labels": {ZONE: "z1"}},
    "spec": {
        "podCIDR": "10.1.0.0/24",
        "podCIDRs": ["10.1.0.0/24", "fd01::/64"],
        "providerID": "kind://docker/a/b",
        "taints": [{"effect": "NoSchedule", "key": "a", "timeAdded": None}],
        "unschedulable": True,
    },
    "status": {
        "addresses": [
            {"address": "192.0.2.1", "type": "InternalIP"},
            {"address": "n1", "type": "Hostname"},
        ],
        "features": {"supplementalGroupsPolicy": True},
        "images": [{"names": None, "sizeBytes": 1}],
        "volumesInUse": None,
    },
}
CIDR: dict[str, Any] = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "ServiceCIDR",
    "metadata": {**META, "name": "kubernetes", "namespace": None},
    "spec": {"cidrs": ["10.96.0.0/16", "fd00::/112"]},
    "status": {"conditions": [{"type": "Ready", "status": "True", "message": "", "reason": ""}]},
}
ALL = [WEB, SLICE, BARE, NAMES, HEADLESS, EXTERNAL, NODE, CIDR]
TYPES: dict[str, Any] = {
    each.__name__: each for each in (Service, EndpointSlice, Node, ServiceCIDR)
}


@pytest.mark.parametrize("value", ALL)
def test_each_is_read(value: dict[str, Any]) -> None:
    (expected,) = decode_value(value)
    # Items of lists have no kind.
    bare = {key: value[key] for key in value if key not in ("apiVersion", "kind")}
    assert decode_json(json.dumps(bare).encode(), TYPES[value["kind"]]) == expected


def test_they_are_served() -> None:
    node = NodeContext(name="n1", addresses=["192.0.2.1"])
    found = resolve_all(ALL, node)
    assert not found.problems
    held = {spec.key: [each.address for each in spec.destinations] for spec in found.specs}
    all_three = ["10.1.0.7", "10.1.0.8", "10.1.0.9"]  # one hint is none
    assert held["10.96.0.10", 80, "tcp"] == all_three
    assert held["198.51.100.1", 53, "udp"] == all_three
    assert held["192.0.2.1", 30080, "tcp"] == all_three
    assert held["fd00::a", 80, "tcp"] == []


def test_what_would_change_the_meaning_is_a_problem() -> None:
    """A value that is not known here is none to guess at."""
    policy = {**WEB, "spec": {**WEB["spec"], "internalTrafficPolicy": "Nearest"}}
    with pytest.raises(ManifestError, match="internalTrafficPolicy"):
        decode_value(policy)
