"""``svcdp ipvs``, against a daemon's admin socket in front of a dataplane."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from itertools import chain, count, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipvsadm
import pytest
import wire
import yaml

from svcdp import Dataplane
from svcdp._version import __version__
from svcdp.cli.group import run
from svcdp.node import ipvs
from svcdp.node.admin import AdminServer
from svcdp.node.ipvs import IpvsServices, IpvsViews

RULES = """\
-A -t 192.0.2.10:80 -s rr -p 300
-a -t 192.0.2.10:80 -r 10.0.0.2:8080 -m -w 2
-a -t 192.0.2.10:80 -r 10.0.0.1:8080 -m -w 1
-A -u [2001:db8::10]:53 -s wlc
"""


class Daemon:
    """An admin socket and what is behind it. Its clock stands still."""

    def __init__(self, path: str, *, manifests: bool = False) -> None:
        self.path = path
        self.dataplane = Dataplane(1024, 1, clock=lambda: 0, timeouts={"fin_wait": 30.5})
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._task = self._loop.create_task(self._serve(manifests))
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._task,))
        self._thread.start()
        assert self._started.wait(10)

    async def _serve(self, manifests: bool) -> None:
        services = None if manifests else IpvsServices(self.dataplane, self.dataplane)
        views = IpvsViews(self.dataplane, services)
        server = AdminServer(self.path, views.handlers())
        await server.start()
        self._started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await server.close()
            await views.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)
        self._loop.close()

    def connect(self, port: int) -> None:
        packet = wire.packet("tcp", "198.51.100.7", port, "192.0.2.10", 80, "S")
        self.dataplane.process(bytearray(packet))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(str(tmp_path / "admin.sock"))
    yield daemon
    daemon.close()


Svcdp = Callable[..., str]


@pytest.fixture
def svcdp(capsys: pytest.CaptureFixture[str], daemon: Daemon) -> Svcdp:
    def call(*arguments: str, status: int = 0) -> str:
        assert run(["ipvs", *arguments, "--admin-socket", daemon.path]) == status
        captured = capsys.readouterr()
        assert not (captured.out and captured.err)
        return captured.err if status else captured.out

    return call


@pytest.fixture
def rules(tmp_path: Path) -> Callable[[str], str]:
    """Writes lines into a file; its path."""

    def write(text: str) -> str:
        path = tmp_path / "rules"
        path.write_text(text)
        return str(path)

    return write


Rules = Callable[[str], str]
TITLE = f"svcdp version {__version__} (size=1024)"


def test_list(svcdp: Svcdp, rules: Rules, daemon: Daemon) -> None:
    assert svcdp("restore", rules(RULES)) == ""
    daemon.connect(4000)
    assert svcdp("list", "-n").splitlines() == [
        TITLE,
        "Prot LocalAddress:Port Scheduler Flags",
        "  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn",
        "TCP  192.0.2.10:80 rr persistent 300",
        "  -> 10.0.0.1:8080                Masq    1      1          0         ",
        "  -> 10.0.0.2:8080                Masq    2      0          0         ",
        "UDP  [2001:db8::10]:53 wlc",
    ]
    assert svcdp("list", "-n", "--nosort").split("\n")[4].startswith("  -> 10.0.0.1:8080 ")
    assert "UDP  [2001:db8::10]:domain wlc" in svcdp("list").splitlines()
    shown = svcdp("list", "-n", "--persistent-conn").splitlines()
    assert shown[4:6] == [
        "  -> 10.0.0.1:8080                1         1           1          0         ",
        "  -> 10.0.0.2:8080                2         0           0          0         ",
    ]
    assert svcdp("list", "--timeout") == "Timeout (tcp tcpfin udp): 900 30.5 300\n"


def test_the_whole_of_ipvsadms_listing(svcdp: Svcdp, rules: Rules) -> None:
    text = ipvsadm.golden("services.rules")
    # A dataplane knows no source for tunnels: a node does.
    svcdp("restore", rules("".join(f"{x}\n" for x in text.splitlines() if " -i" not in x)))
    wanted = [line for line in ipvsadm.listing("list") if "Tunnel" not in line]
    assert svcdp("list", "-n").splitlines() == [TITLE, *wanted]


def test_stats(svcdp: Svcdp, rules: Rules, daemon: Daemon) -> None:
    svcdp("restore", rules(RULES))
    daemon.connect(4000)
    assert svcdp("stats", "-n").splitlines()[3:5] == [
        "TCP  192.0.2.10:80                       1        1        0       40        0",
        "  -> 10.0.0.1:8080                       1        1        0       40        0",
    ]


def test_rate(svcdp: Svcdp, rules: Rules, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first two looks at the counters, 2 s apart, there was a connection."""
    svcdp("restore", rules(RULES))
    idle = daemon.dataplane.services()
    daemon.connect(4000)
    looks = chain([idle], repeat(daemon.dataplane.services()))
    monkeypatch.setattr(Dataplane, "services", lambda dataplane: next(looks))
    monkeypatch.setattr(ipvs, "INTERVAL", 0.0)
    monkeypatch.setattr(ipvs, "time", SimpleNamespace(monotonic=count(0, 2).__next__))
    monkeypatch.setattr(ipvs, "IDLE", 0)
    assert svcdp("rate", "-n").splitlines()[3:6] == [
        "TCP  192.0.2.10:80                       0        0        0       20        0",
        "  -> 10.0.0.1:8080                       0        0        0       20        0",
        "  -> 10.0.0.2:8080                       0        0        0        0        0",
    ]


def test_one_service(svcdp: Svcdp, rules: Rules) -> None:
    svcdp("restore", rules(f"{RULES}-A -f 7 -6 -s rr\n"))
    for options, title in (
        (("-t", "192.0.2.10:80"), "TCP  192.0.2.10:80 rr persistent 300"),
        (("-u", "[2001:db8::10]:53"), "UDP  [2001:db8::10]:53 wlc"),
        (("-f", "7", "-6"), "FWM  7 IPv6 rr"),
    ):
        lines = svcdp("list", "-n", *options).splitlines()
        assert [line for line in lines[3:] if not line.startswith("  ->")] == [title]
    assert svcdp("stats", "-n", "-t", "192.0.2.10:80").count("\n") == 6
    assert svcdp("rate", "--sctp-service", "192.0.2.10:80", status=1).endswith(
        "there is no service 192.0.2.10:80/sctp\n"
    )
    error = svcdp("list", "-t", "192.0.2.10:80", "-f", "7", status=2)
    assert "-t, -u, --sctp-service and -f exclude each other" in error
    assert "which service?" in svcdp("list", "-6", status=2)


def test_zero(svcdp: Svcdp, rules: Rules, daemon: Daemon) -> None:
    def shown() -> list[list[str]]:
        lines = svcdp("stats", "-n").splitlines()[3:]
        return [line.split()[2:5] for line in lines if "10.0.0.1" in line or "53" in line]

    svcdp("restore", rules(RULES))
    daemon.connect(4000)
    svcdp("zero", "-u", "[2001:db8::10]:53")
    assert shown()[0] == ["1", "1", "0"]
    for port, zero in (4001, ("zero",)), (4002, ("restore", rules("-Z"), "--edit")):
        svcdp(*zero)
        assert shown()[0] == ["0", "0", "0"]
        daemon.connect(port)
        assert shown()[0] == ["1", "1", "0"]
    # The counters themselves go on.
    assert sum(d.packets_in for s in daemon.dataplane.services() for d in s.destinations) == 3


def test_connections(svcdp: Svcdp, rules: Rules, daemon: Daemon) -> None:
    svcdp("restore", rules(RULES))
    daemon.connect(4000)
    lines = svcdp("connections", "-n").splitlines()
    assert lines[1] == "pro expire state       source             virtual            destination"
    assert sorted(lines[2:]) == [
        "TCP 01:00  SYN_RECV    198.51.100.7:4000  192.0.2.10:80      10.0.0.1:8080",
        "TCP 05:00  NONE        198.51.100.7:0     192.0.2.10:80      10.0.0.1:8080",
    ]
    items = json.loads(svcdp("connections", "-o", "json"))["items"]
    assert {item["state"] for item in items} == {"SYN_RECV", "NONE"}


@pytest.mark.parametrize(("style", "read"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_documents(svcdp: Svcdp, rules: Rules, style: str, read: Callable[[str], Any]) -> None:
    svcdp("restore", rules(RULES))
    whole = read(svcdp("stats", "-o", style))
    assert (whole["apiVersion"], whole["kind"]) == ("svcdp.io/v1alpha1", "List")
    status = whole["items"][0]["status"]
    assert status["spec"]["address"] == "192.0.2.10"
    assert [each["weight"] for each in status["destinations"]] == [2, 1]


def test_restore_makes_it_so(svcdp: Svcdp, rules: Rules, daemon: Daemon) -> None:
    """What is not in the new text goes; a bad one changes nothing."""
    svcdp("restore", rules(RULES))
    assert svcdp("save") == f"--set 0 30 0\n{RULES}"
    daemon.connect(4000)
    svcdp("restore", rules("".join(RULES.splitlines(keepends=True)[:2])))
    assert svcdp("save").splitlines()[1:] == RULES.splitlines()[:2]
    error = svcdp("restore", rules(f"-C\n{RULES}-A -t 192.0.2.10:80\n"), status=1)
    assert error == (
        f"error: the daemon at {daemon.path} says: line 6: 192.0.2.10:80/tcp exists already\n"
    )
    assert svcdp("save").splitlines()[1:] == RULES.splitlines()[:2]


def test_edit(svcdp: Svcdp, rules: Rules) -> None:
    svcdp("restore", rules(RULES))
    svcdp("restore", rules("-e -t 192.0.2.10:80 -r 10.0.0.1:8080 -m -w 0"), "--edit")
    assert svcdp("save").endswith(RULES.replace("-w 1", "-w 0"))
    error = svcdp("restore", rules("-d -t 192.0.2.10:80 -r 10.0.0.9"), "--edit", status=1)
    assert error.endswith("line 1: 192.0.2.10:80/tcp has no server 10.0.0.9\n")


def test_the_dataplane_has_a_say(svcdp: Svcdp, rules: Rules) -> None:
    svcdp("restore", rules(RULES))
    text = "-A -t 192.0.2.11:80\n-a -t 192.0.2.11:80 -r 10.0.0.1 -i\n"
    error = svcdp("restore", rules(text), status=1)
    assert "tunnel source: '' is no IP address" in error
    assert svcdp("save").endswith(RULES)


def test_a_daemon_with_manifests(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, rules: Rules
) -> None:
    daemon = Daemon(str(tmp_path / "admin.sock"), manifests=True)
    try:
        with daemon.dataplane.transaction() as tx:
            tx.service("192.0.2.10", 80, scheduler="rr")
        assert run(["ipvs", "restore", rules(RULES), "--admin-socket", daemon.path]) == 1
        assert "it serves manifests" in capsys.readouterr().err
        assert run(["ipvs", "save", "--admin-socket", daemon.path]) == 0
        captured = capsys.readouterr()
        assert captured.out == "--set 0 30 0\n-A -t 192.0.2.10:80 -s rr\n"
        assert captured.err == "warning: not saved: 192.0.2.10:80/tcp: rules\n"
    finally:
        daemon.close()


def test_check_needs_no_daemon(capsys: pytest.CaptureFixture[str], rules: Rules) -> None:
    assert run(["ipvs", "restore", "--check", rules(RULES)]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "2 services, 2 servers\n")
    assert run(["ipvs", "restore", rules(RULES), "-o", "json"]) == 0
    items = json.loads(capsys.readouterr().out)["items"]
    assert [item["port"] for item in items] == [80, 53]
    assert run(["ipvs", "restore", "--check", rules("-A -t 192.0.2.10:http -q")]) == 2
    assert capsys.readouterr().err == "error: line 1: '-q': no option of what changes services\n"
    assert run(["ipvs", "restore", "--check", "--numeric", rules("-A -t 192.0.2.10:http")]) == 2
    assert capsys.readouterr().err == "error: line 1: 'http' is no port\n"
    assert run(["ipvs", "restore", "--check", "--edit", rules(RULES)]) == 2
    assert "--edit needs a daemon" in capsys.readouterr().err


def test_no_daemon(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for verb in ("list", "stats", "rate", "connections", "save"):
        assert run(["ipvs", verb, "--run-dir", str(tmp_path)]) == 1
        assert f"error: no daemon listens at {tmp_path}/admin.sock" in capsys.readouterr().err
