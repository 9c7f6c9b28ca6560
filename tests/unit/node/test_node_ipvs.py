"""Services of ipvsadm's lines: what reaches the mode, and what an error leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import pytest

from svcdp import Dataplane
from svcdp.errors import ConfigError, RulesError
from svcdp.node import daemon, views
from svcdp.node.config import NodeConfig, load
from svcdp.node.ipvs import IpvsServices
from svcdp.types import DestinationSpec, ServiceSpec, fwmark_key

ONE = "-A -t 192.0.2.10:80 -s rr\n"
TWO = "-A -t 192.0.2.11:80 -s rr\n"
Key = tuple[str, int, str]


class Mode:
    """Remembers what it was told: addresses of changed and of removed services."""

    def __init__(self) -> None:
        self.updates: list[tuple[list[str], list[str]]] = []
        self.fails = False

    def update(self, specs: Iterable[ServiceSpec], removed: Iterable[Key]) -> None:
        if self.fails:
            raise RulesError("it went wrong")
        self.updates.append(([spec.address for spec in specs], [key[0] for key in removed]))


def test_only_what_changes_is_told() -> None:
    async def main() -> None:
        services = IpvsServices(mode, Dataplane(16))
        await services.restore(ONE + TWO)
        await services.restore(TWO + ONE)
        await services.restore(ONE.replace("rr", "wlc"))

    mode = Mode()
    asyncio.run(main())
    assert mode.updates == [
        (["192.0.2.10", "192.0.2.11"], []),
        (["192.0.2.10"], ["192.0.2.11"]),
    ]


def test_a_failed_update_comes_again() -> None:
    async def main() -> None:
        services = IpvsServices(mode, Dataplane(16))
        await services.restore(ONE)
        mode.fails = True
        with pytest.raises(RulesError):
            await services.restore(TWO)
        assert [spec.address for spec in services.specs] == ["192.0.2.10"]
        mode.fails = False
        await services.restore(TWO)
        assert [spec.address for spec in services.specs] == ["192.0.2.11"]

    mode = Mode()
    asyncio.run(main())
    assert mode.updates == [(["192.0.2.10"], []), (["192.0.2.11"], ["192.0.2.10"])]


def test_edits_do_not_overtake_each_other() -> None:
    async def main() -> list[str]:
        services = IpvsServices(Mode(), Dataplane(16))
        await asyncio.gather(
            *(services.restore(f"-A -t 192.0.2.{n}:80", edit=True) for n in range(1, 20))
        )
        return [spec.address for spec in services.specs]

    assert asyncio.run(main()) == [f"192.0.2.{n}" for n in range(1, 20)]


def test_timeouts_are_those_of_the_dataplane() -> None:
    """Of services to come too; restored anew they are those of the daemon's settings."""

    async def main() -> None:
        services = IpvsServices(Mode(), dataplane)
        seen = []
        for text, edit in ((ONE, False), ("--set 100 0 30", True), (TWO, True), (ONE, False)):
            await services.restore(text, edit=edit)
            seen.append(tuple(dataplane.timeouts[s] for s in ("established", "fin_wait", "udp")))
        assert seen == [(900, 50, 300), (100, 50, 30), (100, 50, 30), (900, 50, 300)]

    dataplane = Dataplane(16, timeouts={"fin_wait": 50})
    asyncio.run(main())


def test_they_are_listed() -> None:
    """By `svcdp get`, whatever the namespace: they are in none."""
    dataplane = Dataplane(16)
    web = ServiceSpec(
        "192.0.2.10", 80, last_port=89, destinations=(DestinationSpec("10.1.0.1", 80),)
    )
    marked = ServiceSpec(*fwmark_key(7))
    dataplane.apply([web, marked])
    rows = {
        item["name"]: (item["clusterIPs"], item["ports"][0]["lastPort"], item["endpoints"])
        for item in views.virtual_services(dataplane, {"namespace": "default"})
    }
    assert rows == {
        "192.0.2.10:80-89/tcp": (["192.0.2.10"], 89, 1),
        "fwmark 7 (IPv4)": ([], None, 0),
    }
    (endpoint,) = views.endpoints(dataplane.services(), {"namespace": "default"})
    assert (endpoint["service"], endpoint["address"]) == ("192.0.2.10:80-89/tcp", "10.1.0.1")


def test_a_bad_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "rules"

    async def main() -> None:
        services = IpvsServices(Mode(), Dataplane(16))
        with pytest.raises(ConfigError, match=f"cannot read {file}: "):
            await services.load(str(file))
        file.write_bytes(b"\xff")
        with pytest.raises(ConfigError, match=f"cannot read {file}: "):
            await services.load(str(file))
        file.write_text(ONE)
        await services.load(str(file))
        file.write_text(f"{ONE}\n-q")
        services.reload(str(file))
        while not caplog.records:
            await asyncio.sleep(0.01)
        assert [spec.address for spec in services.specs] == ["192.0.2.10"]

    with caplog.at_level("ERROR", "svcdp"):
        asyncio.run(asyncio.wait_for(main(), 10))
    assert caplog.records[0].message == "serving what was served before"
    assert vars(caplog.records[0])["error"] == (
        f"{file}: line 3: '-q': no option of what changes services"
    )


def test_manifests_or_lines() -> None:
    config = load(None, environ={}, flags={"ipvs": "rules", "manifests": "folder"}).config
    with pytest.raises(ConfigError, match="manifests and ipvs exclude each other"):
        daemon.run(config)
    with pytest.raises(ConfigError, match="a cluster with --kubeconfig"):
        daemon.run(NodeConfig())
