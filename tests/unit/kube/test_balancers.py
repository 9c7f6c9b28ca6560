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
from svcdp.kube.allocate import NODE_PORTS
from svcdp.kube.allocations import AllocatingSource
from svcdp.kube.allocationsfile import AllocationsFile
from svcdp.kube.balancers import BalancingSource, balanced
from svcdp.kube.model import Service, ServiceRef
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

    def __init__(self, folder: Path, path: Path | str = "") -> None:
        self.folder = folder
        file = AllocationsFile(path)
        allocating = AllocatingSource(ManifestSource(folder), (), NODE_PORTS, file)
        self.source = BalancingSource(allocating, file)
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


def test_a_restart_gives_the_same_addresses(tmp_path: Path) -> None:
    folder, file = tmp_path / "manifests", tmp_path / "lib" / "allocations.json"
    folder.mkdir()
    follower = Follower(folder, file)
    follower.write("pool", pool("192.0.2.0/24"))
    follower.write("a", service("a"), service("b"))
    before = follower.look()
    # Somebody asks for what another one has, while nobody looks.
    (wanted,) = before["a"]
    follower.write("thief", service("c", loadBalancerIP=wanted))
    later = Follower(folder, file)
    assert later.look() == before | {"c": []}
    assert len(later.source.errors) == 1
    # Without pools nobody has any, and nothing is forgotten.
    (folder / "pool.json").unlink()
    alone = Follower(folder, file)
    assert alone.look() == {"a": [], "b": [], "c": []}
    alone.write("pool", pool("192.0.2.0/24"))
    assert alone.look() == before | {"c": []}
    (folder / "a.json").unlink()
    assert Follower(folder, file).look() == {"c": [wanted]}
    assert AllocationsFile(file).load_balancers == {ServiceRef("default", "c"): (wanted,)}


def test_what_trace_says_is_what_the_daemon_gave(tmp_path: Path) -> None:
    folder, file = tmp_path / "manifests", tmp_path / "allocations.json"
    folder.mkdir()
    follower = Follower(folder, file)
    follower.write("a", service("a"))
    follower.write("pool", pool("192.0.2.0/24"))
    before = follower.look()
    follower.write("thief", service("c", loadBalancerIP=before["a"][0]))
    objects, problems = balanced(read_folder(folder).objects, AllocationsFile(file).load_balancers)
    assert len(problems) == 1
    given = {each.metadata.name: ingress(each) for each in objects if isinstance(each, Service)}
    assert given == before | {"c": []}


def test_a_file_that_cannot_be_written_is_told_of_once(tmp_path: Path) -> None:
    folder = tmp_path / "manifests"
    folder.mkdir()
    follower = Follower(folder, tmp_path / "lib" / "allocations.json")
    (tmp_path / "lib").write_text("")
    follower.write("a", service("a"))
    follower.write("pool", pool("192.0.2.0/24"))
    assert follower.look()["a"]
    (error,) = follower.source.errors
    assert "allocations are not saved" in str(error)
    (tmp_path / "lib").unlink()
    follower.write("b", service("b"))
    before = follower.look()
    assert follower.source.errors == []
    assert Follower(folder, tmp_path / "lib" / "allocations.json").look() == before


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
