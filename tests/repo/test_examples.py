"""The examples run, and say what their texts promise."""

from __future__ import annotations

import configparser
import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from svcdp.cli.group import cli
from svcdp.kube import read_folder, resolve_all
from svcdp.kube.context import NodeContext
from svcdp.node.config import load

EXAMPLES = Path(__file__).parents[2] / "examples"


def output_of(name: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


def test_gateway() -> None:
    lines = output_of("gateway.py").splitlines()
    client, server, stranger = lines[:3]
    assert "192.0.2.10:80  becomes  198.51.100.7:40000 -> 10.0.0.2:8080" in client
    assert "10.0.0.2:8080 -> 198.51.100.7:40000  becomes  192.0.2.10:80 -> 198.51" in server
    assert "192.0.2.10:81  next hop (unchanged)" in stranger


def test_latency_scheduler() -> None:
    lines = output_of("latency_scheduler.py").splitlines()
    assert lines == ["40000 -> 10.0.0.2", "40001 -> 10.0.0.1", "40002 -> 10.0.0.1"]


class FakePacket:
    """A packet as the NetfilterQueue package hands it to callbacks."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.verdict = ""

    def get_payload(self) -> bytes:
        return self.payload

    def get_payload_len(self) -> int:
        return len(self.payload)

    def set_payload(self, payload: bytes) -> None:
        self.payload = bytes(payload)

    def get_mark(self) -> int:
        return 0

    def set_mark(self, mark: int) -> None:
        pass

    def accept(self) -> None:
        self.verdict = "accept"

    def drop(self) -> None:
        self.verdict = "drop"

    def repeat(self) -> None:
        self.verdict = "repeat"


def test_nfqueue_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    # A TCP SYN, 198.51.100.7:40000 -> 192.0.2.10:80.
    packet = FakePacket(
        bytes.fromhex(
            "4500002800004000400646c5c6336407c000020a9c4000500000000100000000500204001b460000"
        )
    )
    state: list[str] = []

    class FakeQueue:
        def bind(self, number: int, callback: Callable[[FakePacket], None]) -> None:
            self.callback = callback
            state.append(f"bound {number}")

        def run(self) -> None:
            self.callback(packet)
            raise KeyboardInterrupt

        def unbind(self) -> None:
            state.append("unbound")

    fake = types.ModuleType("netfilterqueue")
    fake.NetfilterQueue = FakeQueue  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "netfilterqueue", fake)
    runpy.run_path(str(EXAMPLES / "nfqueue_callback.py"), run_name="__main__")
    assert state == ["bound 1", "unbound"]
    assert packet.verdict in ("accept", "repeat")
    assert packet.payload[16:19] == bytes([10, 0, 0])
    assert packet.payload[22:24] == (8080).to_bytes(2, "big")


def test_manifests_have_no_problems() -> None:
    decoded = read_folder(str(EXAMPLES / "manifests"))
    assert decoded.objects
    assert not decoded.errors
    assert not resolve_all(decoded.objects, NodeContext()).problems


def test_node_config_is_valid() -> None:
    config = load(str(EXAMPLES / "node.yaml"), environ={}).config
    assert config.manifests == "/etc/svcdp/manifests"


def test_systemd_unit_uses_what_there_is() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign, assignment]
    unit.read(EXAMPLES / "svcdp.service")
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["AmbientCapabilities"].split() == ["CAP_NET_ADMIN", "CAP_NET_RAW"]
    assert int(service["WatchdogSec"]) > 0
    for command in (service["ExecStart"], service["ExecStopPost"]):
        verb = command.split()[1]
        assert verb in cli.list_commands(None)  # type: ignore[arg-type]
