"""Labs: what is made works, and nothing of it stays."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from svcdp.errors import ClosedError, ConfigError, MissingCapability, PlatformError
from svcdp.lab import Lab, Namespace, Server, Topology, wait_until
from svcdp.lab.servers import PATTERN

pytestmark = pytest.mark.netns

TIMEOUT = 20.0  # seconds

#: Makes a lab in which a program runs, says so, and then waits for its end.
PROGRAM = """
import sys, time
from svcdp.lab import Lab
with Lab() as lab:
    process = lab.namespace("busy").popen(["sleep", "1000"])
    print(lab.prefix, process.pid, flush=True)
    time.sleep(1000)
"""


def named(prefix: str) -> list[str]:
    """What `ip netns` knows of a lab."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line.split()[0] for line in listed.stdout.splitlines() if line.startswith(prefix)]


def gone(pid: int) -> bool:
    try:
        stat = Path("/proc", str(pid), "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"  # init takes its time


def get(host: str, port: int, path: str = "/") -> bytes:
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


def who(source: Namespace, host: str, port: int = 8080) -> dict[str, Any]:
    return dict(json.loads(source.call(get, host, port)))


def ask_udp(host: str, payload: bytes) -> bytes:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect((host, 5353))
        sock.send(payload)
        return sock.recv(65535)


def addresses(server: Server) -> tuple[str, str]:
    return server.ipv4, server.ipv6


# -- what is made works ---------------------------------------------------------------------------


def test_every_server_answers_on_both_families(cluster: Topology) -> None:
    clients = (cluster.client_ipv4, cluster.client_ipv6)
    for server in cluster.servers:
        for address, client in zip(addresses(server), clients, strict=True):
            answer = who(cluster.client, address)
            assert answer["server"] == server.name
            assert answer["client"][0] == client
            assert (
                cluster.client.call(ask_udp, address, b"hello") == f"{server.name} hello".encode()
            )


def test_servers_stream_a_known_pattern(cluster: Topology) -> None:
    count = 2 * len(PATTERN) + 5
    body = cluster.client.call(get, cluster.servers[0].ipv4, 8080, f"/bytes/{count}")
    assert body == (PATTERN * 3)[:count]


def test_a_connection_to_a_server_serves_many_requests(cluster: Topology) -> None:
    def ask() -> list[dict[str, Any]]:
        connection = http.client.HTTPConnection(cluster.servers[0].ipv6, 8080, timeout=TIMEOUT)
        answers = []
        for body in (None, PATTERN, None):
            connection.request("POST" if body else "GET", "/", body)
            answers.append(json.loads(connection.getresponse().read()))
        connection.close()
        return answers

    first, second, third = cluster.client.call(ask)
    assert first == third
    assert second == first | {
        "length": len(PATTERN),
        "sha256": hashlib.sha256(PATTERN).hexdigest(),
    }


def test_packets_to_cluster_ips_go_to_the_node(cluster: Topology) -> None:
    for address, node in (("10.96.0.10", cluster.node_ipv4), ("fd00:10:96::a", cluster.node_ipv6)):
        assert f"via {node} " in cluster.client.run(["ip", "route", "get", address]).stdout


@pytest.mark.parametrize("cluster", [True], indirect=True)
def test_a_firewall_lets_only_direct_connections_pass(cluster: Topology) -> None:
    def connect(host: str, port: int) -> None:
        socket.create_connection((host, port), 0.3).close()

    for address in addresses(cluster.servers[1]):
        assert who(cluster.client, address, cluster.direct_port)["server"] == "b"
        with pytest.raises(TimeoutError):
            cluster.client.call(connect, address, 8080)


def test_what_is_called_in_a_namespace_sees_its_interfaces(lab: Lab) -> None:
    one, other = lab.namespace("one"), lab.namespace("other")
    before = socket.if_nameindex()
    lab.link(one, other)
    assert {name for _, name in one.call(socket.if_nameindex)} >= {"lo", "other"}
    assert {name for _, name in other.call(socket.if_nameindex)} >= {"lo", "one"}
    assert socket.if_nameindex() == before


def test_settings_are_those_of_the_namespace(lab: Lab) -> None:
    here = Path("/proc/sys/net/ipv4/ip_default_ttl")
    before = here.read_text()
    space = lab.namespace("one")
    space.sysctl("net.ipv4.ip_default_ttl", 77)
    assert space.call(here.read_text) == "77\n"
    assert here.read_text() == before


def test_run_hands_over_input_output_and_failure(lab: Lab) -> None:
    space = lab.namespace("one")
    assert space.run(["cat"], input="text").stdout == "text"
    assert space.run(["false"], check=False).returncode == 1
    with pytest.raises(subprocess.CalledProcessError) as caught:
        space.run(["sh", "-c", "echo why >&2; exit 3"])
    assert caught.value.returncode == 3
    assert caught.value.__notes__ == ["why\n"]
    with pytest.raises(subprocess.TimeoutExpired):
        space.run(["sleep", "1000"], timeout=0.1)


def test_a_name_may_be_a_word_of_ip(lab: Lab) -> None:
    one, other = lab.namespace("a"), lab.namespace("dev")
    lab.link(one, other)
    one.add_address("dev", "192.0.2.1/24")
    assert "192.0.2.1/24" in one.run(["ip", "address", "show", "dev", "dev"]).stdout


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "Node", "a b", "../x", "a-name-that-is-too-long"])
def test_a_bad_name_is_refused(lab: Lab, name: str) -> None:
    with pytest.raises(ConfigError, match="namespace"):
        lab.namespace(name)


def test_a_name_is_used_once(lab: Lab) -> None:
    lab.namespace("one")
    with pytest.raises(ConfigError, match="already"):
        lab.namespace("one")


def test_only_settings_of_namespaces_can_be_changed(lab: Lab) -> None:
    with pytest.raises(ConfigError, match=r"kernel\.hostname"):
        lab.namespace("one").sysctl("kernel.hostname", "x")


def test_what_ip_says_is_in_the_error(lab: Lab) -> None:
    with pytest.raises(PlatformError, match="nowhere"):
        lab.namespace("one").ip("link set nowhere up")


def test_it_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MissingCapability, match="root"):
        Lab().__enter__()


def test_a_closed_lab_makes_nothing() -> None:
    lab = Lab()
    with lab:
        pass
    with pytest.raises(ClosedError):
        lab.namespace("one")


# -- nothing stays --------------------------------------------------------------------------------


def test_an_exception_leaves_nothing() -> None:
    def fail() -> None:
        with lab:
            running.append(lab.namespace("one").popen(["sleep", "1000"]))
            assert named(lab.prefix) == [f"{lab.prefix}one"]
            raise ZeroDivisionError

    lab, running = Lab(), list[subprocess.Popen[str]]()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert named(lab.prefix) == []
    assert running[0].returncode == -signal.SIGTERM


def test_processes_of_processes_are_ended_too() -> None:
    with Lab() as lab:
        shell = ["sh", "-c", "trap '' TERM; sleep 1000 & echo $!; exec sleep 1000"]
        process = lab.namespace("one").popen(shell, stdout=subprocess.PIPE)
        assert process.stdout
        with process.stdout:
            child = int(process.stdout.readline())
    assert process.returncode == -signal.SIGKILL
    wait_until(lambda: gone(child), TIMEOUT, "the end of the child")


def test_signals_have_their_handlers_again() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Lab():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        assert program.stdout
        prefix, pid = program.stdout.readline().split()
        assert named(prefix) == [f"{prefix}busy"]
        program.send_signal(number)
        _, error = program.communicate(timeout=TIMEOUT)
    expected = 128 + number if number == signal.SIGTERM else -number
    assert program.returncode == expected, error
    assert named(prefix) == []
    assert gone(int(pid))


def test_what_a_killed_program_left_is_found_and_removed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], text=True, stdout=subprocess.PIPE
    ) as program:
        assert program.stdout
        prefix, pid = program.stdout.readline().split()
        assert f"{prefix}busy" not in Lab.stale()
        program.kill()
    assert f"{prefix}busy" in Lab.stale()
    assert f"{prefix}busy" in Lab.remove_stale()
    assert named(prefix) == []
    wait_until(lambda: gone(int(pid)), TIMEOUT, "the end of the process")


def test_waiting_has_an_end() -> None:
    assert wait_until(lambda: "yes", 0, "an answer") == "yes"
    with pytest.raises(TimeoutError, match=r"the moon: not within 0\.05 s"):
        wait_until(lambda: False, 0.05, "the moon")
