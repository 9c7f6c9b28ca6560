"""``svcdp describe service``: kubectl's lines, and what each endpoint gets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from svcdp import Dataplane
from svcdp.cli import describe
from svcdp.cli.group import run
from svcdp.kube import ManifestSource, NodeContext
from svcdp.node import views
from svcdp.sync import Sync

SERVICE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {
        "name": "web",
        "labels": {"tier": "front", "app": "web"},
        "annotations": {"svcdp.io/scheduler": "wrr", "svcdp.io/weights": "10.1.0.1=3"},
    },
    "spec": {
        "type": "NodePort",
        "clusterIP": "10.96.0.10",
        "clusterIPs": ["10.96.0.10"],
        "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack",
        "selector": {"app": "web"},
        "ports": [
            {"name": "http", "port": 80, "targetPort": "web", "nodePort": 30080},
            {"name": "dns", "port": 53, "protocol": "UDP"},
        ],
        "sessionAffinity": "ClientIP",
        "internalTrafficPolicy": "Cluster",
    },
}
OTHER = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web-2"},
    "spec": {"type": "ExternalName", "externalName": "remote.example"},
}
SLICE = {
    "apiVersion": "discovery.k8s.io/v1",
    "kind": "EndpointSlice",
    "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
    "addressType": "IPv4",
    "ports": [{"name": "http", "port": 8080}],
    "endpoints": [{"addresses": [f"10.1.0.{number}"]} for number in range(1, 6)],
}


async def serve(folder: Path, dataplane: Dataplane, request: dict[str, str]) -> list[Any]:
    async with Sync(dataplane, NodeContext(name="n1", addresses=["192.0.2.1"])) as sync:
        sync.follow(ManifestSource(folder))
        await sync.ready()
        return list(views.description(sync, dataplane.services(), request))


class FakeDaemon:
    """A daemon's answer, without its socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dataplane = Dataplane(64, seed=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get(self, what: str, **request: str) -> Iterator[Any]:
        assert what == "description"
        items = asyncio.run(serve(self.folder, self.dataplane, request))
        return iter(json.loads(json.dumps(items)))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "all.json").write_text(
        json.dumps({"apiVersion": "v1", "kind": "List", "items": [SERVICE, OTHER, SLICE]})
    )
    monkeypatch.setattr(describe, "AdminClient", lambda path: FakeDaemon(tmp_path))
    return tmp_path


def test_as_kubectl_and_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["describe", "svc", "web"]) == 0
    above, below = capsys.readouterr().out.split("\n\n")
    assert above.splitlines() == [
        "Name:                     web",
        "Namespace:                default",
        "Labels:                   app=web",
        "                          tier=front",
        "Annotations:              svcdp.io/scheduler: wrr",
        "                          svcdp.io/weights: 10.1.0.1=3",
        "Selector:                 app=web",
        "Type:                     NodePort",
        "IP Family Policy:         SingleStack",
        "IP Families:              IPv4",
        "IP:                       10.96.0.10",
        "IPs:                      10.96.0.10",
        "Port:                     http  80/TCP",
        "TargetPort:               web/TCP",
        "NodePort:                 http  30080/TCP",
        "Endpoints:                10.1.0.1:8080,10.1.0.2:8080,10.1.0.3:8080 + 2 more...",
        "Port:                     dns  53/UDP",
        "TargetPort:               53/UDP",
        "Endpoints:                <none>",
        "Session Affinity:         ClientIP",
        "Internal Traffic Policy:  Cluster",
        "Scheduler:                wrr",
        "Problems:                 <none>",
    ]
    header, first, *rest = below.splitlines()
    assert header.split()[:5] == ["VIRTUAL", "PROTO", "ENDPOINT", "METHOD", "WEIGHT"]
    assert first.split() == (
        ["10.96.0.10:80", "tcp", "10.1.0.1:8080", "masq", "3", "0", "0", "0", "0", "0", "<none>"]
    )
    assert len(rest) == 9  # five endpoints at two addresses


def test_problems_and_external_names(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    wrong = {**SERVICE, "metadata": {"name": "web", "annotations": {"svcdp.io/scheduler": "x"}}}
    (folder / "all.json").write_text(json.dumps(wrong))
    (folder / "other.json").write_text(json.dumps(OTHER))
    assert run(["describe", "service", "web"]) == 0
    assert "Problems:                 Service default/web: $.metadata" in capsys.readouterr().out
    assert run(["describe", "service", "web-2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "IP:" in lines
    assert "External Name:            remote.example" in lines


def test_json_and_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["describe", "service", "web", "-o", "json"]) == 0
    item = json.loads(capsys.readouterr().out)
    assert len(item["ports"][0]["endpoints"]) == 5
    assert {each["service"] for each in item["destinations"]} == {"web:http"}
    assert run(["describe", "service", "web", "-n", "other"]) == 1
    assert "Service other/web: the daemon knows none" in capsys.readouterr().err


def test_when_an_endpoint_failed() -> None:
    destination = {"lastFailure": 125.0, "ejected": True}
    assert describe._failure(destination) == "2m5s ago (ejected)"
    assert describe._failure({"lastFailure": 3.2, "ejected": False}) == "3s ago"
