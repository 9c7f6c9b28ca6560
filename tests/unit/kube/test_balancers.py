"""Services of a folder get load-balancer addresses from the pools in it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from svcdp import Dataplane
from svcdp.kube import Change, ManifestSource, NodeContext, read_folder, resolve_all
from svcdp.kube.balancers import BalancingSource, balanced
from svcdp.kube.model import Service
from svcdp.kube.state import State

SLICE = {
    "apiVersion": "discovery.k8s.io/v1",
    "kind": "EndpointSlice",
    "metadata": {"name": "a-1", "labels": {"kubernetes.io/service-name": "a"}},
    "addressType": "IPv4",
    "ports": [{"name": "", "port": 8080}],
    "endpoints": [{"addresses": ["10.1.0.1"]}],
}


def service(name: str, kind: str = "LoadBalancer", **more: Any) -> dict[str, Any]:
    spec = {"type": kind, "clusterIP": "10.96.0.9", "ports": [{"port": 80}], **more}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def pool(*addresses: str, name: str = "pool") -> dict[str, Any]:
    return {
        "apiVersion": "svcdp.io/v1alpha1",
        "kind": "LoadBalancerPool",
        "metadata": {"name": name},
        "spec": {"addresses": list(addresses)},
    }


class Follower:
    """What a node knows of a folder that changes: its Services' addresses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = BalancingSource(ManifestSource(folder))
        self.state = State()
        self.told: list[str] = []

    def write(self, file: str, *objects: dict[str, Any]) -> None:
        items = {"apiVersion": "v1", "kind": "List", "items": objects}
        (self.folder / f"{file}.json").write_text(json.dumps(items))

    def look(self) -> dict[str, list[str | None]]:
        """After the next batch."""

        async def one_batch() -> Sequence[Change]:
            changes: AsyncIterator[list[Change]] = self.source.changes()
            async with aclosing(changes) as batches:  # type: ignore[type-var]
                async for batch in batches:
                    return batch
            raise AssertionError

        self.told = []
        for change in asyncio.run(one_batch()):
            self.told += [each.metadata.name for each in change.objects]
            self.state.apply(0, "folder", change)
        return {ref.name: ingress(each) for ref, each in sorted(self.state.services.items())}


def ingress(service: Service) -> list[str | None]:
    status = service.status and service.status.load_balancer
    return [each.ip for each in (status and status.ingress) or ()]


def test_pools_and_services_come_and_go(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    follower.write("a", service("a"))
    assert follower.look() == {"a": []}
    assert follower.source.errors == []
    follower.write("pool", pool("192.0.2.7-192.0.2.7"))
    assert follower.look() == {"a": ["192.0.2.7"]}
    assert follower.told == ["pool", "a"]
    follower.write("b", service("b"))
    assert follower.look() == {"a": ["192.0.2.7"], "b": []}
    assert follower.told == ["b"]
    (error,) = follower.source.errors
    assert "Service default/b: $.spec.loadBalancerIP: no IPv4 address is left" in str(error)
    assert [event.reason for event in follower.source.events] == ["LoadBalancerPoolFull"]
    # The type goes, and with it the address, which the other one gets.
    follower.write("a", service("a", "ClusterIP"))
    assert follower.look() == {"a": [], "b": ["192.0.2.7"]}
    assert follower.source.errors == []
    follower.write("a", service("a"))
    assert follower.look() == {"a": [], "b": ["192.0.2.7"]}
    (tmp_path / "b.json").unlink()
    assert follower.look() == {"a": ["192.0.2.7"]}
    follower.write("pool", pool("192.0.2.8-192.0.2.8"))
    assert follower.look() == {"a": ["192.0.2.8"]}
    (tmp_path / "pool.json").unlink()
    assert follower.look() == {"a": []}


def test_without_pools_a_status_is_as_it_was_written(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    written = service("a") | {"status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}]}}}
    follower.write("a", written)
    assert follower.look() == {"a": ["198.51.100.1"]}
    follower.write("pool", pool("192.0.2.7-192.0.2.9"))
    (address,) = follower.look()["a"]
    assert address in ("192.0.2.7", "192.0.2.8", "192.0.2.9")
    (tmp_path / "pool.json").unlink()
    assert follower.look() == {"a": ["198.51.100.1"]}


def test_of_copies_the_first_counts(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    follower.write("pool", pool("192.0.2.0/24"))
    follower.write("a", service("a", loadBalancerIP="192.0.2.7"))
    follower.write("b", service("a", loadBalancerIP="192.0.2.8"))
    assert follower.look() == {"a": ["192.0.2.7"]}
    (tmp_path / "a.json").unlink()
    assert follower.look() == {"a": ["192.0.2.8"]}


def test_the_address_is_served(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    follower.write("all", service("a"), SLICE, pool("192.0.2.7-192.0.2.7"))
    objects, problems = balanced(read_folder(tmp_path).objects)
    assert problems == []
    node = NodeContext(name="n1", addresses=["198.51.100.1"])
    dataplane = Dataplane(64)
    dataplane.apply(resolve_all(objects, node).specs)
    said = dataplane.explain("tcp 203.0.113.9:40000 -> 192.0.2.7:80")
    assert [(each.address, each.masquerade) for each in said.destinations] == [("10.1.0.1", True)]
