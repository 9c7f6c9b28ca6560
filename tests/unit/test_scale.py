"""A large cluster from manifests to packets: 10,000 Services with 10 endpoints each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path

import wire

from svcdp import Dataplane, Reason, ServiceSpec
from svcdp.kube import ManifestSource, NodeContext
from svcdp.sync import Sync

SERVICES, ENDPOINTS, PER_FILE = 10_000, 10, 500
CHANGED = 4321


def address(number: int) -> str:
    return f"10.96.{number // 250}.{number % 250 + 1}"


def endpoint(number: int, index: int) -> str:
    return f"10.{index + 1}.{number // 250}.{number % 250 + 1}"


def manifests(number: int, endpoints: int = ENDPOINTS) -> list[dict[str, object]]:
    name = f"service-{number}"
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": "scale"},
            "spec": {
                "clusterIP": address(number),
                "clusterIPs": [address(number)],
                "ipFamilies": ["IPv4"],
                "ports": [{"port": 80, "targetPort": 8080}],
            },
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": name,
                "namespace": "scale",
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": "IPv4",
            "ports": [{"port": 8080, "name": "", "protocol": "TCP"}],
            "endpoints": [{"addresses": [endpoint(number, i)]} for i in range(endpoints)],
        },
    ]


def write(folder: Path, first: int, endpoints_of_changed: int = ENDPOINTS) -> None:
    items = [
        manifest
        for number in range(first, first + PER_FILE)
        for manifest in manifests(number, endpoints_of_changed if number == CHANGED else ENDPOINTS)
    ]
    file = folder / f"{first:05}.json"
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    new.rename(file)


class Watched:
    """A dataplane, and the keys of each update that it got."""

    def __init__(self) -> None:
        self.dataplane = Dataplane(1024, seed=1)
        self.updates: list[tuple[set[str], list[object]]] = []

    def update(self, specs: Iterable[ServiceSpec], removed: Iterable[tuple[str, int, str]]) -> None:
        specs, removed = list(specs), list(removed)
        self.updates.append(({spec.address for spec in specs}, [*removed]))
        self.dataplane.update(specs, removed)


async def follow(folder: Path, watched: Watched) -> None:
    source = ManifestSource(folder)
    async with Sync(watched, NodeContext(name="n1", addresses=["192.0.2.1"])) as sync:
        sync.follow(source)
        await sync.ready()
        assert not sync.problems
        before, generation = len(watched.updates), sync.generation
        served = {s.spec.address: s for s in watched.dataplane.services()}
        assert len(served) == SERVICES
        assert all(len(status.destinations) == ENDPOINTS for status in served.values())
        write(folder, CHANGED // PER_FILE * PER_FILE, ENDPOINTS - 1)
        source.rescan()
        await asyncio.wait_for(sync.wait(generation), 60)
        assert watched.updates[before:] == [({address(CHANGED)}, [])]


def test_ten_thousand_services_and_a_change_of_one(tmp_path: Path) -> None:
    for first in range(0, SERVICES, PER_FILE):
        write(tmp_path, first)
    watched = Watched()
    asyncio.run(follow(tmp_path, watched))
    for number, endpoints in ((CHANGED - 1, ENDPOINTS), (CHANGED, ENDPOINTS - 1)):
        seen = set()
        for port in range(1, 2 * ENDPOINTS + 1):
            result = watched.dataplane.process(
                wire.packet("tcp", "192.0.2.4", port, address(number), 80, "S")
            )
            assert result.reason == Reason.NEW
            seen.add(result.destination)
        assert seen == {(endpoint(number, i), 8080) for i in range(endpoints)}
