"""``svcdp dns`` as a program of its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dns.message
import dns.query
import dns.rcode
import pytest

from svcdp.cli.group import run

DEADLINE = 20.0  # seconds


def write(folder: Path, **services: str) -> None:
    items = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"clusterIP": address, "ports": [{"port": 80}]},
        }
        for name, address in services.items()
    ]
    hidden = folder / ".services.json"
    hidden.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    hidden.rename(folder / "services.json")


def ask(port: int, name: str) -> dns.message.Message:
    query = dns.message.make_query(f"{name}.shop.svc.example.org.", "A")
    return dns.query.udp(query, "127.0.0.1", port=port, timeout=DEADLINE)


def test_names_of_a_folder_and_its_changes(tmp_path: Path) -> None:
    write(tmp_path, web="10.96.0.10")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "svcdp", "dns", "-f", str(tmp_path), "--zone", "example.org"]
    process = subprocess.Popen(
        [*command, "--listen", f"127.0.0.1:{port}"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        while "message=serving" not in (line := process.stderr.readline()):
            assert line, "it ended"
        assert str(ask(port, "web").answer[0][0]) == "10.96.0.10"
        assert ask(port, "late").rcode() == dns.rcode.NXDOMAIN
        write(tmp_path, web="10.96.0.10", late="10.96.0.11")
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + DEADLINE
        while ask(port, "late").rcode() == dns.rcode.NXDOMAIN:
            assert time.monotonic() < end
        assert str(ask(port, "late").answer[0][0]) == "10.96.0.11"
        process.terminate()
        assert process.wait(DEADLINE) == 0
        assert "message=stopped" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no names: give a folder with -f, or a cluster with --kubeconfig"),
        (["--listen", "here"], "'here' is not an address and port"),
        (["-f", ".", "--zone", "a..b"], "'a..b' is not a zone such as cluster.local"),
        (["-f", ".", "--upstream", "ns.example"], "dnsUpstreams[0]: 'ns.example' is not an addr"),
        (["-f", ".", "--dns-recursion", "me"], "dnsRecursion[0]: 'me' does not appear to be"),
        (["-f", ".", "--listen", "192.0.2.1:1053"], "192.0.2.1, port 1053: "),
    ],
)
def test_what_is_wrong(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["dns", *arguments]) != 0
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
