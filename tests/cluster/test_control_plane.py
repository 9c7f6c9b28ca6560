"""The control plane itself: what the tests of svcdp's source rely on."""

from __future__ import annotations

import json
import subprocess
from http import HTTPStatus
from typing import Any

import pytest
from controlplane import ControlPlane

SERVICES = "/api/v1/services"


def names(plane: ControlPlane, user: str = "admin") -> list[str]:
    items = plane.get(SERVICES, user=user)["items"]
    return [item["metadata"]["name"] for item in items if item["metadata"]["name"] != "kubernetes"]


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


def test_starts_empty_after_another_test(plane: ControlPlane) -> None:
    assert names(plane) == []


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


@pytest.mark.parametrize("crash", [False, True])
def test_a_restart_keeps_the_objects_and_forgets_the_changes(
    plane: ControlPlane, crash: bool
) -> None:
    version = plane.get(SERVICES)["metadata"]["resourceVersion"]
    plane.kubectl("create", "service", "clusterip", "web", "--tcp=80:8080")
    assert first_event(plane, version)["type"] == "ADDED"
    plane.compact()
    plane.restart(crash=crash)
    assert names(plane) == ["web"]
    event = first_event(plane, version)
    assert event["type"] == "ERROR"
    assert event["object"]["code"] == HTTPStatus.GONE
