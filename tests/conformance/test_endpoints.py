"""Which objects count and which endpoints serve: kube-proxy's rules, one row each."""

from __future__ import annotations

import pytest
from kube_objects import case, endpoint, endpoints, port, service, summary

from svcdp.kube import NodeContext, resolve

WEB = "tcp 10.96.0.10:80"
A, B, C = "10.1.0.1", "10.1.0.2", "10.1.0.3"

OBJECTS = [
    case("a slice joins by port name", [service(), endpoints(A)], {WEB: ["10.1.0.1:8080"]}),
    case("no slice: a service nobody serves", [service()], {WEB: []}),
    case("slice without service", [endpoints(A)], {}),
    case("slice of another namespace", [service(), endpoints(A, namespace="x")], {WEB: []}),
    case(
        "no namespace is the namespace default",
        [service(namespace="default"), _no_namespace := endpoints(A, namespace="default")],
        {WEB: ["10.1.0.1:8080"]},
    ),
    case(
        "service hidden by the name of another proxy",
        [service(labels={"service.kubernetes.io/service-proxy-name": ""}), endpoints(A)],
        {},
    ),
    case(
        "service hidden by the headless label",
        [service(labels={"service.kubernetes.io/headless": ""}), endpoints(A)],
        {},
    ),
    case(
        "hidden slice leaves the service without endpoints",
        [service(), endpoints(A, labels={"service.kubernetes.io/service-proxy-name": "x"})],
        {WEB: []},
    ),
    case(
        "headless slice label",
        [service(), endpoints(A, labels={"service.kubernetes.io/headless": ""})],
        {WEB: []},
    ),
    case(
        "headless service",
        [service(clusterIP="None", clusterIPs=["None"]), endpoints(A)],
        {},
    ),
    case("no cluster IP", [service(clusterIP="", clusterIPs=None, ipFamilies=None)], {}),
    case(
        "ExternalName even with a cluster IP",
        [service(type="ExternalName", externalName="x.example"), endpoints(A)],
        {},
    ),
    case(
        "headless service has no node port either",
        [service(clusterIP="None", type="NodePort", ports=[port(nodePort=30080)])],
        {},
    ),
    case(
        "unnamed port",
        [service(ports=[port(name=None)]), endpoints(A, ports=[port(8080, "")])],
        {WEB: ["10.1.0.1:8080"]},
    ),
    case(
        "slice port without a name key does not count",
        [service(ports=[port(name=None)]), endpoints(A, ports=[port(8080, None)])],
        {WEB: []},
    ),
    case(
        "slice port 0 or without number does not count",
        [service(), endpoints(A, ports=[port(0), {"name": "http", "protocol": "TCP"}])],
        {WEB: []},
    ),
    case("slice without ports", [service(), endpoints(A, ports=None)], {WEB: []}),
    case("slice without endpoints", [service(), endpoints(endpoints=None)], {WEB: []}),
    case(
        "same name, other protocol",
        [service(), endpoints(A, ports=[port(8080, protocol="UDP")])],
        {WEB: []},
    ),
    case(
        "other name",
        [service(), endpoints(A, ports=[port(8080, "https")])],
        {WEB: []},
    ),
    case(
        "targetPort is not read",
        [service(ports=[port(targetPort=9999)]), endpoints(A)],
        {WEB: ["10.1.0.1:8080"]},
    ),
    case(
        "a port number per slice",
        [service(), endpoints(A), endpoints(B, name="web-2", ports=[port(9090)])],
        {WEB: ["10.1.0.1:8080", "10.1.0.2:9090"]},
    ),
    case(
        "three protocols on one number",
        [
            service(
                ports=[port(53, "t"), port(53, "u", "UDP"), port(53, "s", "SCTP")],
            ),
            endpoints(A, ports=[port(5353, "u", "UDP"), port(54, "s", "SCTP")]),
        ],
        {
            "tcp 10.96.0.10:53": [],
            "udp 10.96.0.10:53": ["10.1.0.1:5353"],
            "sctp 10.96.0.10:53": ["10.1.0.1:54"],
        },
    ),
    case(
        "protocol defaults to TCP on both sides",
        [
            service(ports=[{"port": 80, "name": "http"}]),
            endpoints(A, ports=[{"port": 8080, "name": "http"}]),
        ],
        {WEB: ["10.1.0.1:8080"]},
    ),
    case(
        "dual stack, each family its own endpoints",
        [
            service("web", "10.96.0.10", "fd00::10"),
            endpoints(A),
            endpoints("fd01::1", name="web-6"),
        ],
        {WEB: ["10.1.0.1:8080"], "tcp [fd00::10]:80": ["[fd01::1]:8080"]},
    ),
    case(
        "dual stack, IPv6 first",
        [service("web", "fd00::10", "10.96.0.10"), endpoints(A)],
        {WEB: ["10.1.0.1:8080"], "tcp [fd00::10]:80": []},
    ),
    case(
        "no ipFamilies: the family of clusterIP",
        [service("web", "10.96.0.10", "fd00::10", ipFamilies=None), endpoints(A)],
        {WEB: ["10.1.0.1:8080"]},
    ),
    case(
        "address of the wrong family in a slice",
        [service(), endpoints(A, "fd01::1")],
        {WEB: ["10.1.0.1:8080"]},
    ),
    case(
        "FQDN slice",
        [service(), endpoints({"addresses": ["web.example"]}, addressType="FQDN")],
        {WEB: []},
    ),
    case(
        "only the first address of an endpoint",
        [service(), endpoints({"addresses": [A, B]})],
        {WEB: ["10.1.0.1:8080"]},
    ),
    case(
        "endpoint without address",
        [service(), endpoints({"addresses": []}, A)],
        {WEB: ["10.1.0.1:8080"]},
    ),
    case(
        "leading zeros are decimal",
        [service("web", "172.030.000.041"), endpoints("10.001.000.010")],
        {"tcp 172.30.0.41:80": ["10.1.0.10:8080"]},
    ),
    case(
        "one endpoint in two slices counts once",
        [service(), endpoints(A, B), endpoints(A, C, name="web-2")],
        {WEB: ["10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.3:8080"]},
    ),
    case(
        "of copies the first slice by name counts",
        [
            service(),
            endpoints(endpoint(A, "ready"), name="web-2"),
            endpoints(endpoint(A, "-ready", "-serving"), B, name="web-1"),
        ],
        {WEB: ["10.1.0.2:8080"]},
    ),
    case(
        "but a copy on this node goes before one elsewhere",
        [
            service(),
            endpoints(endpoint(A, "-ready", "-serving", node="n2"), B, name="web-1"),
            endpoints(endpoint(A, "ready", node="n1"), name="web-2"),
        ],
        {WEB: ["10.1.0.1:8080", "10.1.0.2:8080"]},
    ),
    case(
        "sorted as text",
        [service(), endpoints("10.1.0.9", "10.1.0.10", "10.1.0.100")],
        {WEB: ["10.1.0.100:8080", "10.1.0.10:8080", "10.1.0.9:8080"]},
    ),
    case(
        "a List stands for its items, other kinds for nothing",
        [
            {"apiVersion": "v1", "kind": "List", "items": [service(), endpoints(A)]},
            {"apiVersion": "apps/v1", "kind": "Deployment", "spec": {"replicas": "bad"}},
            {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "spec": 7},
            {"apiVersion": "discovery.k8s.io/v1beta1", "kind": "EndpointSlice"},
        ],
        {WEB: ["10.1.0.1:8080"]},
    ),
    case(
        "items of a typed list have no kind",
        [
            {
                "apiVersion": "v1",
                "kind": "ServiceList",
                "items": [{k: v for k, v in service().items() if k in ("metadata", "spec")}],
            }
        ],
        {WEB: []},
    ),
]
del _no_namespace["metadata"]["namespace"]


NAME = "service.kubernetes.io/service-proxy-name"
PROXY_NAMES = [
    # the proxy's name, labels of Service and slice, who serves
    case("no name and no label", "", {}, {}, ["10.1.0.1:8080"]),
    case("a name and no label", "svcdp", {}, {}, None),
    case("both have the name", "svcdp", {NAME: "svcdp"}, {NAME: "svcdp"}, ["10.1.0.1:8080"]),
    case("the name is on the Service alone", "svcdp", {NAME: "svcdp"}, {}, []),
    case("another name", "svcdp", {NAME: "other"}, {NAME: "other"}, None),
    case("a name within the name", "svcdp", {NAME: "svcdp2"}, {NAME: "svcdp"}, None),
    case(
        "headless all the same",
        "svcdp",
        {NAME: "svcdp", "service.kubernetes.io/headless": ""},
        {NAME: "svcdp"},
        None,
    ),
]


@pytest.mark.parametrize(("name", "on_service", "on_slice", "expected"), PROXY_NAMES)
def test_which_services_a_named_proxy_serves(
    name: str,
    on_service: dict[str, str],
    on_slice: dict[str, str],
    expected: list[str] | None,
) -> None:
    objects = [service(labels=on_service), endpoints(A, labels=on_slice)]
    found = resolve(objects, NodeContext(name="n1", service_proxy_name=name))
    assert summary(found) == ({} if expected is None else {WEB: expected})


@pytest.mark.parametrize(("objects", "expected"), OBJECTS)
def test_objects(node: NodeContext, objects: list, expected: dict) -> None:
    assert summary(resolve(objects, node)) == expected


CONDITIONS = [
    # (conditions of A), (conditions of B), who serves
    case("nothing said is ready", (), ("-ready", "-serving"), [A]),
    case("both ready", ("ready",), ("ready",), [A, B]),
    case("ready goes before terminating", ("ready",), ("-ready", "serving", "terminating"), [A]),
    case(
        "terminating ones serve when none is ready",
        ("-ready", "serving", "terminating"),
        ("-ready", "serving", "terminating"),
        [A, B],
    ),
    case("serving, not terminating, not ready: never", ("-ready", "serving"), ("-ready",), []),
    case(
        "terminating and not serving: never",
        ("-ready", "-serving", "terminating"),
        ("-ready", "-serving"),
        [],
    ),
    case(
        "serving not said counts as serving",
        ("-ready", "terminating"),
        ("-ready", "-serving", "terminating"),
        [A],
    ),
    case("publishNotReadyAddresses: ready while terminating", ("ready", "terminating"), (), [A, B]),
]


@pytest.mark.parametrize(("first", "second", "expected"), CONDITIONS)
def test_conditions(node: NodeContext, first: tuple, second: tuple, expected: list) -> None:
    objects = [service(), endpoints(endpoint(A, *first), endpoint(B, *second))]
    assert summary(resolve(objects, node)) == {WEB: [f"{address}:8080" for address in expected]}
