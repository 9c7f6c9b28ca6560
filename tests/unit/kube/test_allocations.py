"""Services of a folder get addresses, and keep them over restarts."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import stat
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import pytest

from svcdp import Dataplane
from svcdp.errors import PlatformError, StateError
from svcdp.kube import Change, ManifestSource, NodeContext, read_folder, resolve_all
from svcdp.kube.allocate import NODE_PORTS
from svcdp.kube.allocations import AllocatingSource, allocated
from svcdp.kube.allocationsfile import AllocationsFile
from svcdp.kube.model import Service, ServiceRef
from svcdp.kube.state import State

INTRODUCTION = Path(__file__).parents[3] / "examples" / "introduction"
CIDRS = ["10.96.0.0/12", "fd00:96::/112"]


def write(folder: Path, file: str, **names: str | None) -> None:
    items = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"clusterIP": text, "ports": [{"port": 80}]},
        }
        for name, text in names.items()
    ]
    (folder / file).write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))


class Follower:
    """What a node knows of a source: its Services' cluster IPs."""

    def __init__(self, folder: Path, path: Path | str = "", cidrs: Sequence[str] = CIDRS) -> None:
        self.folder = ManifestSource(folder)
        self.source = AllocatingSource(self.folder, cidrs, NODE_PORTS, AllocationsFile(path))
        self.state = State()

    async def _one_batch(self) -> list[Change]:
        async with aclosing(self.source.changes()) as batches:  # type: ignore[type-var]
            async for batch in batches:
                return batch
        raise AssertionError

    def look(self) -> dict[str, str | None]:
        for change in asyncio.run(self._one_batch()):
            self.state.apply(0, "folder", change)
        return {ref.name: each.spec.cluster_ip for ref, each in self.state.services.items()}


def test_a_restart_gives_the_same_addresses(tmp_path: Path) -> None:
    folder = tmp_path / "manifests"
    folder.mkdir()
    file = tmp_path / "lib" / "allocations.json"
    write(folder, "a.json", **dict.fromkeys(["a", "b"]))
    got = Follower(folder, file).look()
    assert None not in got.values()
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    # Somebody asks for what another one has, while nobody looks.
    write(folder, "0.json", thief=got["a"])
    later = Follower(folder, file)
    assert later.look() == {**got, "thief": None}
    assert [str(error) for error in later.source.errors] == [
        f"Service default/thief: $.spec.clusterIP: {got['a']} is already allocated to"
        " Service default/a"
    ]
    (folder / "a.json").unlink()
    last = Follower(folder, file)
    assert last.look() == {"thief": got["a"]}
    assert {*AllocationsFile(file).services} == {ServiceRef("default", "thief")}


def test_another_file_gets_what_is_set_free(tmp_path: Path) -> None:
    write(tmp_path, "a.json", a="10.96.0.9")
    write(tmp_path, "b.json", b="10.96.0.9", c=None)
    follower = Follower(tmp_path)
    before = follower.look()
    assert (before["a"], before["b"]) == ("10.96.0.9", None)
    write(tmp_path, "a.json", a="10.96.0.10")
    assert follower.look() == {"a": "10.96.0.10", "b": "10.96.0.9", "c": before["c"]}
    (tmp_path / "b.json").unlink()
    assert follower.look() == {"a": "10.96.0.10"}


def test_a_service_in_two_files(tmp_path: Path) -> None:
    write(tmp_path, "a.json", a="10.96.0.9")
    write(tmp_path, "b.json", a="10.96.0.10")
    follower = Follower(tmp_path)
    assert follower.look() == {"a": "10.96.0.9"}
    (tmp_path / "a.json").unlink()
    assert follower.look() == {"a": "10.96.0.10"}


def test_the_second_copy_takes_over_complete(tmp_path: Path) -> None:
    write(tmp_path, "a.json", a=None)
    write(tmp_path, "b.json", a=None)
    follower = Follower(tmp_path)
    before = follower.look()
    assert before["a"]
    (tmp_path / "a.json").unlink()
    assert follower.look() == before


def test_service_cidrs_of_the_folder_are_where_cluster_ips_are(tmp_path: Path) -> None:
    def service_cidr(*cidrs: str) -> None:
        written = {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": cidrs},
        }
        (folder / "cidr.json").write_text(json.dumps(written))

    folder = tmp_path / "manifests"
    folder.mkdir()
    file = tmp_path / "allocations.json"
    write(folder, "a.json", a=None, b="10.97.0.200")
    service_cidr("10.97.0.0/24")
    follower = Follower(folder, file, [])
    before = follower.look()
    assert ipaddress.ip_address(before["a"] or "") in ipaddress.ip_network("10.97.0.0/24")
    # A restart, then a larger network: all is kept. Then another one.
    follower = Follower(folder, file, [])
    assert follower.look() == before
    service_cidr("10.97.0.0/16", "fd00:97::/112")
    assert follower.look() == before
    service_cidr("10.98.0.0/24")
    moved = follower.look()
    assert ipaddress.ip_address(moved["a"] or "") in ipaddress.ip_network("10.98.0.0/24")
    assert moved["b"] is None
    assert [(each.regarding.name, each.reason) for each in follower.source.events] == [
        ("b", "ClusterIPOutOfRange")
    ]
    assert Follower(folder, file, []).look() == moved
    (folder / "cidr.json").unlink()
    assert follower.look() == {"a": None, "b": "10.97.0.200"}


def test_a_file_that_cannot_be_written_is_told_of(tmp_path: Path) -> None:
    folder = tmp_path / "manifests"
    folder.mkdir()
    write(folder, "a.json", a=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(PlatformError, match="cannot be read"):
        Follower(folder, tmp_path / "file" / "allocations.json")
    follower = Follower(folder, tmp_path / "lib" / "allocations.json")
    (tmp_path / "lib").write_text("")
    assert follower.look()["a"]
    assert "allocations are not saved" in str(follower.source.errors[0])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"version": 2, "services": {}}',
        '{"version": 1, "services": {"a": {}}}',
        '{"version": 1, "services": {"a/b": {"IPv4": "fd00::1"}}}',
        '{"version": 1, "services": {"a/b": {"IPv4": 7}}}',
        '{"version": 1, "services": {"a/b": {"80/TCP": "x"}}}',
        '{"version": 1, "services": {"a/b": {"80/TCP": 65536}}}',
        '{"version": 1, "services": {"a/b": {"80/TCP": 30080}, "c/d": {"80/TCP": 30080}}}',
        '{"version": 1, "services": {}, "loadBalancers": {"a": ["192.0.2.7"]}}',
        '{"version": 1, "services": {}, "loadBalancers": {"a/b": ["192.0.2"]}}',
        '{"version": 1, "services": {}, "loadBalancers": {"a/b": "192.0.2.7"}}',
    ],
)
def test_a_damaged_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "allocations.json"
    file.write_text(text)
    with pytest.raises(StateError, match="no allocations of svcdp"):
        AllocationsFile(file)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "allocations.json"
    number = int(ipaddress.ip_address("fd00:96::7"))
    holdings = {ServiceRef("a", "b"): {"IPv4": 0x0A600001, "IPv6": number, "80/TCP": 30080}}
    balanced = {ServiceRef("a", "b"): ("192.0.2.7", "2001:db8::7")}
    saved = AllocationsFile(file)
    assert (saved.services, saved.load_balancers) == ({}, {})
    saved.services, saved.load_balancers = holdings, balanced
    for _ in range(2):
        asyncio.run(saved.save())
    loaded = AllocationsFile(file)
    assert (loaded.services, loaded.load_balancers) == (holdings, balanced)
    assert json.loads(file.read_text()) == {
        "version": 1,
        "services": {"a/b": {"80/TCP": 30080, "IPv4": "10.96.0.1", "IPv6": "fd00:96::7"}},
        "loadBalancers": {"a/b": ["192.0.2.7", "2001:db8::7"]},
    }
    assert os.listdir(tmp_path) == ["allocations.json"]


def test_the_introduction_works_as_written() -> None:
    decoded = read_folder(INTRODUCTION)
    assert not decoded.errors
    objects, problems = allocated(decoded.objects, CIDRS)
    assert not problems
    services = {each.metadata.name: each.spec for each in objects if isinstance(each, Service)}
    node = NodeContext(addresses=["192.0.2.1"], service_cidrs=CIDRS)
    resolution = resolve_all(objects, node)
    assert not resolution.problems
    dataplane = Dataplane()
    dataplane.apply(resolution.specs)
    balancer = services["service-python-load-balancer"]
    assert balancer.ports
    wanted = [
        (services[f"service-python{kind}"].cluster_ip, 3000)
        for kind in ("", "-node-port", "-load-balancer")
    ]
    wanted += [("192.0.2.1", 30080), ("192.0.2.1", balancer.ports[0].node_port or 0)]
    for address, port in wanted:
        answer = dataplane.explain(f"tcp 198.51.100.7:40000 -> {address}:{port}")
        assert answer.action == "forward"
        assert [(each.address, each.port) for each in answer.destinations] == [("10.1.1.11", 443)]
    assert services["service-python-external"].cluster_ip is None
