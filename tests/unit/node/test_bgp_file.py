"""The file of a BGP speaker, and what becomes of it when the speaker does not read it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from svcdp.announce.announcer import Holders
from svcdp.announce.bgp import render
from svcdp.errors import ConfigError
from svcdp.kube.context import NodeContext
from svcdp.kube.decode import decode_value
from svcdp.node import announcing
from svcdp.node.announcing import BgpFile
from svcdp.node.config import load

#: Notes each time that it runs, and fails while there is a file called "broken".
SPEAKER = """\
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
if (folder / "broken").exists():
    sys.exit("it is broken")
with open(folder / "read", "a") as file:
    file.write("x")
"""


def holders(*addresses: str, policy: str = "Cluster") -> Holders:
    """Of Services with these addresses, without endpoints."""
    found = Holders(NodeContext(name="n1"))
    tell(found, *addresses, policy=policy)
    return found


def tell(found: Holders, *addresses: str, policy: str = "Cluster") -> None:
    for number, address in enumerate(addresses):
        item: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": f"web-{number}"},
            "spec": {
                "type": "LoadBalancer",
                "clusterIP": f"10.96.0.{number + 10}",
                "externalTrafficPolicy": policy,
                "ports": [{"port": 80}],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": address}]}},
        }
        (service,) = decode_value(item)
        found.tell([(service.ref, service, [])])  # type: ignore[union-attr, list-item]


def bgp_file(folder: Path, found: Holders, *reload: str) -> BgpFile:
    return BgpFile(str(folder / "svcdp.conf"), "bird", 0, reload, found)


def speaker(folder: Path) -> tuple[str, ...]:
    return (sys.executable, "-c", SPEAKER, str(folder))


def reads(folder: Path) -> int:
    return len((folder / "read").read_text()) if (folder / "read").exists() else 0


def text_of(*addresses: str) -> str:
    return render("bird", addresses)


def test_it_has_the_addresses_until_they_are_withdrawn(tmp_path: Path) -> None:
    found = holders("192.0.2.80", "2001:db8::80")
    file = bgp_file(tmp_path, found, *speaker(tmp_path))
    place = tmp_path / "svcdp.conf"
    asyncio.run(file.write())
    assert place.read_text() == text_of("192.0.2.80", "2001:db8::80")
    assert place.stat().st_mode & 0o777 == 0o644
    assert reads(tmp_path) == 1
    asyncio.run(file.write())  # nothing changed
    assert reads(tmp_path) == 1
    tell(found, "192.0.2.81")
    asyncio.run(file.write())
    assert place.read_text() == text_of("192.0.2.81", "2001:db8::80")
    asyncio.run(file.write(withdrawn=True))
    assert place.read_text() == text_of()
    assert (reads(tmp_path), file.problem) == (3, "")


def test_local_addresses_are_announced_where_endpoints_are(tmp_path: Path) -> None:
    file = bgp_file(tmp_path, holders("192.0.2.80", policy="Local"))
    asyncio.run(file.write())
    assert (tmp_path / "svcdp.conf").read_text() == text_of()


def test_what_was_not_read_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = bgp_file(tmp_path, holders("192.0.2.80"), *speaker(tmp_path))
    (tmp_path / "broken").touch()
    for _ in range(2):
        asyncio.run(file.write())
        assert file.problem.endswith("failed (1): it is broken")
    assert [each.levelname for each in caplog.records].count("ERROR") == 1
    (tmp_path / "broken").unlink()
    asyncio.run(file.write())
    assert (reads(tmp_path), file.problem) == (1, "")


@pytest.mark.parametrize(
    ("reload", "problem"),
    [
        (("/nowhere/birdc", "configure"), "No such file or directory"),
        ((sys.executable, "-c", "import time; time.sleep(60)"), "not read within 0.2 s"),
    ],
)
def test_a_reload_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reload: tuple[str, ...], problem: str
) -> None:
    monkeypatch.setattr(announcing, "RELOAD_TIME", 0.2)
    file = bgp_file(tmp_path, holders("192.0.2.80"), *reload)
    asyncio.run(file.write())
    assert problem in file.problem


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    file = BgpFile(str(tmp_path / "none" / "x"), "bird", 0, (), holders("192.0.2.80"))
    asyncio.run(file.write())
    assert "No such file or directory" in file.problem
    (tmp_path / "none").mkdir()
    asyncio.run(file.write())
    assert file.problem == ""
    assert (tmp_path / "none" / "x").read_text() == text_of("192.0.2.80")


def test_frr_needs_a_number() -> None:
    flags = {"bgp_file": "/etc/frr/svcdp.conf", "bgp_format": "frr"}
    with pytest.raises(ConfigError, match="set bgpASN"):
        load(environ={}, flags=flags)
    assert load(environ={}, flags={**flags, "bgp_asn": "64512"}).config.bgp_asn == 64512
