"""``svcdp dns`` as a program of its own."""

from __future__ import annotations

import ipaddress
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import dns.message
import dns.query
import dns.rcode
import pytest
from prometheus_client.parser import text_string_to_metric_families

import svcdp
from svcdp.cli.group import run

DEADLINE = 20.0  # seconds
INTRODUCTION = Path(__file__).parents[3] / "examples" / "introduction"


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


def ask(port: int, name: str, namespace: str = "shop") -> dns.message.Message:
    query = dns.message.make_query(f"{name}.{namespace}.svc.example.org.", "A")
    return dns.query.udp(query, "127.0.0.1", port=port, timeout=DEADLINE)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server that answers, and its port."""
    port = free_port()
    command = [sys.executable, "-m", "svcdp", "dns", "--zone", "example.org", *arguments]
    process = subprocess.Popen(
        [*command, "--listen", f"127.0.0.1:{port}"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        while "message=serving" not in (line := process.stderr.readline()):
            assert line, "it ended"
        yield process, port
    finally:
        process.kill()
        process.communicate()


def test_names_of_a_folder_and_its_changes(tmp_path: Path) -> None:
    write(tmp_path, web="10.96.0.10")
    with serving("-f", str(tmp_path)) as (process, port):
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
        assert process.stderr is not None
        assert "message=stopped" in process.stderr.read()


def test_addresses_that_manifests_leave_out_are_those_of_a_node(tmp_path: Path) -> None:
    """Of the introduction's four Services none says its cluster IP."""
    file = tmp_path / "allocations.json"
    held = {"default/service-python": {"IPv4": "10.111.0.7"}}
    file.write_text(json.dumps({"version": 1, "services": held}))
    before = file.read_bytes()
    arguments = ["-f", str(INTRODUCTION), "--service-cidrs", "10.111.0.0/24"]
    with serving(*arguments, "--allocations-file", str(file)) as (_, port):
        assert str(ask(port, "service-python", "default").answer[0][0]) == "10.111.0.7"
        for name in ("service-python-node-port", "service-python-load-balancer"):
            address = ipaddress.ip_address(str(ask(port, name, "default").answer[0][0]))
            assert address in ipaddress.ip_network("10.111.0.0/24")
    assert file.read_bytes() == before  # it is the node's


def test_metrics(tmp_path: Path) -> None:
    write(tmp_path, web="10.96.0.10")
    there = free_port()
    with serving("-f", str(tmp_path), "--metrics", f"127.0.0.1:{there}") as (_, port):
        for name in ("web", "web", "nobody"):
            ask(port, name)
        with urlopen(f"http://127.0.0.1:{there}/metrics", timeout=DEADLINE) as response:
            text = response.read().decode()
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert found["svcdp_dns_queries_total", "udp"] == 3
        assert found["svcdp_dns_responses_total", "NOERROR"] == 2
        assert found["svcdp_dns_responses_total", "NXDOMAIN"] == 1
        assert found["svcdp_build_info", svcdp.__version__] == 1
        assert ("process_start_time_seconds",) in found
        assert not [name for name, *_ in found if name.startswith("kubeproxy")]
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"http://127.0.0.1:{there}/configz", timeout=DEADLINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no names: give a folder with -f, or a cluster with --kubeconfig"),
        (["--listen", "here"], "'here' is not an address and port"),
        (["-f", ".", "--zone", "a..b"], "'a..b' is not a zone such as cluster.local"),
        (["-f", ".", "--upstream", "ns.example"], "dnsUpstreams[0]: 'ns.example' is not an addr"),
        (["-f", ".", "--dns-recursion", "me"], "dnsRecursion[0]: 'me' does not appear to be"),
        (["-f", ".", "--listen", "192.0.2.1:1053"], "192.0.2.1, port 1053: "),
        (["-f", ".", "--metrics", "here"], "'here' is not an address and port"),
        (["-f", ".", "--metrics", "192.0.2.1:9153"], "192.0.2.1, port 9153: "),
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
