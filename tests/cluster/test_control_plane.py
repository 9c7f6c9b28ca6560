"""The control plane itself: what the tests of svcdp's source rely on."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import pytest
from controlplane import ControlPlane
from relay import Relay

SERVICES = "/api/v1/services"


def names(plane: ControlPlane, user: str = "admin") -> list[str]:
    items = plane.get(SERVICES, user=user)["items"]
    return [item["metadata"]["name"] for item in items if item["metadata"]["name"] != "kubernetes"]


def service(name: str, address: str, *, type: str = "ClusterIP", **port: int) -> dict[str, Any]:
    spec = {"type": type, "clusterIP": address, "clusterIPs": [address], "ports": [port]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def status(plane: ControlPlane, user: str) -> int:
    with plane.request("GET", SERVICES, user=user) as answer:
        return answer.status


def first_event(plane: ControlPlane, version: str) -> Any:
    """Of a watch from that version."""
    path = f"{SERVICES}?watch=true&timeoutSeconds=30&resourceVersion={version}"
    with plane.request("GET", path) as answer:
        return json.loads(answer.readline())


def test_kubectl_creates_what_plain_https_lists(plane: ControlPlane) -> None:
    plane.kubectl("create", "service", "clusterip", "web", "--tcp=80:8080")
    assert names(plane) == ["web"]
    address = plane.kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
    assert address == plane.get("/api/v1/namespaces/default/services/web")["spec"]["clusterIP"]


def test_a_reset_gives_back_every_object_address_and_port(plane: ControlPlane) -> None:
    for _ in range(2):
        plane.apply(service("web", "10.96.0.80", type="NodePort", port=80, nodePort=30080))
        assert names(plane) == ["web"]
        plane.reset()
        assert names(plane) == []


def test_stores_thousands(plane: ControlPlane) -> None:
    many = [service(f"web-{i}", f"10.97.{i >> 8}.{i & 255}", port=80) for i in range(5000)]
    plane.stop()
    plane.store(*many)
    plane.start()
    assert len(names(plane)) == len(many)
    first = plane.get("/api/v1/namespaces/default/services/web-0")
    assert first["spec"]["ports"][0]["protocol"] == "TCP"  # a default
    version = plane.get(SERVICES)["metadata"]["resourceVersion"]
    plane.erase(many[0])
    assert first_event(plane, version)["type"] == "DELETED"


def test_users_may_do_what_was_granted(plane: ControlPlane) -> None:
    assert status(plane, "restricted") == HTTPStatus.FORBIDDEN
    plane.grant("restricted", "list,watch", "services,endpointslices.discovery.k8s.io")
    assert names(plane, "restricted") == []
    with pytest.raises(subprocess.CalledProcessError) as refused:
        plane.kubectl("delete", "service", "kubernetes", user="restricted")
    assert "Forbidden" in refused.value.stderr


def test_an_expired_token_is_refused(plane: ControlPlane) -> None:
    old = plane.kubeconfig("restricted")
    plane.expire_token("restricted")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        plane.kubectl("get", "services", "--kubeconfig", old)
    assert "Unauthorized" in refused.value.stderr
    assert status(plane, "restricted") == HTTPStatus.FORBIDDEN


def test_a_restart_keeps_the_objects_and_forgets_the_changes(plane: ControlPlane) -> None:
    version = plane.get(SERVICES)["metadata"]["resourceVersion"]
    plane.kubectl("create", "service", "clusterip", "web", "--tcp=80:8080")
    assert first_event(plane, version)["type"] == "ADDED"
    plane.compact()
    plane.restart(crash=True)
    assert names(plane) == ["web"]
    event = first_event(plane, version)
    assert event["type"] == "ERROR"
    assert event["object"]["code"] == HTTPStatus.GONE


def test_the_relay_is_silent_slow_and_cut(plane: ControlPlane, relay: Relay) -> None:
    version = plane.get(SERVICES)["metadata"]["resourceVersion"]
    path = f"{SERVICES}?watch=true&timeoutSeconds=30&resourceVersion={version}"
    with plane.request("GET", path, port=relay.port) as answer:
        relay.pause()
        plane.kubectl("create", "service", "clusterip", "web", "--tcp=80:8080")
        assert relay.connections == 1
        relay.slow(10_000)
        relay.resume()
        assert json.loads(answer.readline())["type"] == "ADDED"
        relay.cut()
        with suppress(ConnectionResetError):
            assert answer.readline() == b""
