"""What a node says of pools: of those in its folder, and of an API server's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import pytest

from svcdp import Dataplane
from svcdp.kube import ManifestSource, NodeContext
from svcdp.kube.apiserver import list_pools
from svcdp.kube.balancers import BalancingSource
from svcdp.kube.reflector import ApiError
from svcdp.node import views
from svcdp.sync import Sync

MANIFESTS = """\
apiVersion: svcdp.io/v1alpha1
kind: LoadBalancerPool
metadata: {name: lan, creationTimestamp: "2026-01-01T00:00:00Z"}
spec: {addresses: [192.0.2.9/32], namespaces: [shop], serviceSelector: {matchLabels: {a: b}}}
---
apiVersion: svcdp.io/v1alpha1
kind: LoadBalancerPool
metadata: {name: any}
spec: {addresses: [198.51.100.0/29], autoAssign: false}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {a: b}}
spec: {type: LoadBalancer, clusterIP: 10.96.0.1, ports: [{port: 80}]}
"""
LAN = {"metadata": {"name": "lan"}, "spec": {"addresses": ["203.0.113.0/24"]}}
WAN = {"metadata": {"name": "wan"}, "spec": {"addresses": ["192.0.2.8-192.0.2.9"]}}
BAD = {"metadata": {"name": "bad"}, "spec": {"addresses": ["192.0.2.9-192.0.2.8"]}}


class FakeServer:
    url = "https://fake"

    def __init__(self, answer: object) -> None:
        self._answer = answer

    async def get(self, path: str, params: Mapping[str, str]) -> bytes:
        assert path == "/apis/svcdp.io/v1alpha1/loadbalancerpools"
        if isinstance(self._answer, Exception):
            raise self._answer
        return json.dumps(self._answer).encode()

    def watch(
        self, path: str, params: Mapping[str, str], silence: float
    ) -> AsyncGenerator[bytes, None]:
        raise NotImplementedError

    post = patch = watch


def known(folder: Path, client: Any) -> list[views.Item]:
    async def ask() -> list[views.Item]:
        async with Sync(Dataplane(64), NodeContext(name="n1")) as sync:
            sync.follow(BalancingSource(ManifestSource(folder)))
            await sync.ready()
            return await views.pools(sync, client)

    (folder / "all.yaml").write_text(MANIFESTS)
    return asyncio.run(ask())


def test_of_manifests(tmp_path: Path) -> None:
    lan = {
        "name": "lan",
        "addresses": ["192.0.2.9/32"],
        "size": 1,
        "used": 1,
        "free": 0,
        "autoAssign": True,
        "namespaces": ["shop"],
        "serviceSelector": {"matchLabels": {"a": "b"}, "matchExpressions": None},
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    anybodys = {
        "name": "any",
        "addresses": ["198.51.100.0/29"],
        "size": 6,
        "used": 0,
        "free": 6,
        "autoAssign": False,
        "namespaces": [],
        "serviceSelector": None,
        "creationTimestamp": None,
    }
    assert known(tmp_path, None) == [anybodys, lan]


def test_of_an_api_server_too(tmp_path: Path) -> None:
    found = known(tmp_path, FakeServer({"items": [WAN, BAD, LAN]}))
    # Of two with one name the folder's counts, as of all objects.
    assert [(each["name"], each["addresses"], each["used"]) for each in found] == [
        ("any", ["198.51.100.0/29"], 0),
        ("lan", ["192.0.2.9/32"], 1),
        ("wan", ["192.0.2.8-192.0.2.9"], 1),
    ]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (ApiError("no", status=404), "install its CustomResourceDefinition"),
        (ApiError("no", status=403), r"grant the verb list on loadbalancerpools\.svcdp\.io"),
        (ApiError("gone", status=0), "cannot list loadbalancerpools.*gone"),
        ({"items": [5]}, "no API server's answer"),
        ({"items": [{"metadata": {}}]}, "no API server's answer"),
        ([], "no API server's answer"),
    ],
)
def test_whoever_asks_is_told_what_is_wrong(answer: object, words: str) -> None:
    with pytest.raises(ApiError, match=words):
        asyncio.run(list_pools(FakeServer(answer)))
