"""Environment variables of Services: kube-proxy's neighbour kubelet, row by row."""

from __future__ import annotations

from typing import Any

import pytest

from svcdp.discovery.env import environment
from svcdp.kube.decode import decode_value

TCP = {"port": 6379}


def service(name: str, namespace: str = "shop", **spec: Any) -> dict[str, Any]:
    spec = {"clusterIP": "10.0.0.11", "ports": [TCP], **spec}
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def told(*manifests: dict[str, Any], namespace: str = "shop", links: bool = True) -> dict[str, str]:
    services = [found for each in manifests for found in decode_value(each)]
    return environment(services, namespace, enable_service_links=links)  # type: ignore[arg-type]


def test_one_port_as_kubernetes_documents_it() -> None:
    """The example of kubernetes.io's page on Services."""
    assert list(told(service("redis-primary")).items()) == [
        ("REDIS_PRIMARY_SERVICE_HOST", "10.0.0.11"),
        ("REDIS_PRIMARY_SERVICE_PORT", "6379"),
        ("REDIS_PRIMARY_PORT", "tcp://10.0.0.11:6379"),
        ("REDIS_PRIMARY_PORT_6379_TCP", "tcp://10.0.0.11:6379"),
        ("REDIS_PRIMARY_PORT_6379_TCP_PROTO", "tcp"),
        ("REDIS_PRIMARY_PORT_6379_TCP_PORT", "6379"),
        ("REDIS_PRIMARY_PORT_6379_TCP_ADDR", "10.0.0.11"),
    ]


def test_named_ports_of_several_protocols() -> None:
    ports = [
        {"name": "dns-tcp", "port": 53},
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "m3", "port": 9, "protocol": "SCTP"},
    ]
    found = told(service("a", ports=ports))
    assert found["A_SERVICE_PORT"] == "53"
    assert found["A_PORT"] == "tcp://10.0.0.11:53"
    assert {name: value for name, value in found.items() if name.startswith("A_SERVICE_PORT_")} == {
        "A_SERVICE_PORT_DNS_TCP": "53",
        "A_SERVICE_PORT_DNS": "53",
        "A_SERVICE_PORT_M3": "9",
    }
    assert found["A_PORT_53_UDP"] == "udp://10.0.0.11:53"
    assert found["A_PORT_53_TCP_PROTO"] == "tcp"
    assert found["A_PORT_9_SCTP_PROTO"] == "sctp"
    assert len(found) == 2 + 3 + 1 + 3 * 4


def test_ipv6_has_brackets_in_urls_only() -> None:
    found = told(service("a", clusterIP="fd00::1", clusterIPs=["fd00::1", "10.0.0.1"]))
    assert found["A_SERVICE_HOST"] == found["A_PORT_6379_TCP_ADDR"] == "fd00::1"
    assert found["A_PORT"] == found["A_PORT_6379_TCP"] == "tcp://[fd00::1]:6379"


@pytest.mark.parametrize(
    "spec",
    [
        {"clusterIP": "None"},
        {"clusterIP": ""},
        {"clusterIP": None},
        {"type": "ExternalName", "externalName": "a.example", "clusterIP": None, "ports": None},
        {"type": "ExternalName", "externalName": "a.example"},
    ],
    ids=repr,
)
def test_who_has_no_address_is_not_told_of(spec: dict[str, Any]) -> None:
    assert told(service("a", **spec)) == {}


KUBERNETES = service("kubernetes", "default", clusterIP="10.0.0.1", ports=[{"port": 443}])
OWN = service("kubernetes", clusterIP="10.0.0.2")
SCOPES = [
    # Services, namespace, links, hosts that are told
    ([service("a"), service("b", "other")], "shop", True, {"A": "10.0.0.11"}),
    ([service("a"), service("b", "other")], "shop", False, {}),
    ([KUBERNETES, service("a")], "shop", True, {"A": "10.0.0.11", "KUBERNETES": "10.0.0.1"}),
    ([KUBERNETES, service("a")], "shop", False, {"KUBERNETES": "10.0.0.1"}),
    ([KUBERNETES, OWN], "shop", True, {"KUBERNETES": "10.0.0.2"}),
    ([OWN, KUBERNETES], "shop", True, {"KUBERNETES": "10.0.0.2"}),
    ([KUBERNETES, OWN], "shop", False, {"KUBERNETES": "10.0.0.1"}),
    ([KUBERNETES, service("a", "default")], "default", False, {"KUBERNETES": "10.0.0.1"}),
    (
        [KUBERNETES, service("a", "default")],
        "default",
        True,
        {"A": "10.0.0.11", "KUBERNETES": "10.0.0.1"},
    ),
]


@pytest.mark.parametrize(("services", "namespace", "links", "hosts"), SCOPES)
def test_who_is_told_of_whom(
    services: list[dict[str, Any]], namespace: str, links: bool, hosts: dict[str, str]
) -> None:
    found = told(*services, namespace=namespace, links=links)
    assert {
        name.removesuffix("_SERVICE_HOST"): value
        for name, value in found.items()
        if name.endswith("_SERVICE_HOST")
    } == hosts
