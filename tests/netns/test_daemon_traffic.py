"""The node daemon on real traffic: a client, a node and three servers, each in a namespace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from svcdp.cli._demo.daemon import RunningDaemon, running_daemon
from svcdp.cli._demo.manifests import PORT, WEB, write
from svcdp.cli._demo.play import ask, ask_everything, client
from svcdp.cli._demo.report import PathResult
from svcdp.cli._demo.stage import Stage, open_stage, traces
from svcdp.errors import SvcdpError
from svcdp.lab import Namespace, wait_until

pytestmark = pytest.mark.netns

TIMEOUT = 10.0  # seconds


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """The namespaces, with servers that run."""
    with open_stage() as stage:
        yield stage


@pytest.fixture
def folder(stage: Stage, tmp_path: Path) -> Path:
    """A folder with manifests for two of the three servers."""
    (tmp_path / "manifests").mkdir()
    write(tmp_path / "manifests", stage.backends[:2])
    return tmp_path


@pytest.fixture
def untouched(stage: Stage) -> Iterator[None]:
    """The node is afterwards as it was before."""
    before = traces(stage.node)
    yield
    assert traces(stage.node) == before


@pytest.fixture
def daemon(untouched: None, stage: Stage, folder: Path) -> Iterator[RunningDaemon]:
    """The daemon, serving ``folder``."""
    with running_daemon(stage.node.popen, folder, *stage.daemon_arguments) as daemon:
        yield daemon


def ask_web(place: Namespace, count: int = 10) -> dict[str, Any]:
    """HTTP requests to the IPv4 cluster IP."""
    return ask(place, "TCP", WEB.cluster_ips[0], WEB.port, count)


def ask_pod(stage: Stage) -> dict[str, Any]:
    """HTTP requests straight to the first server, past the Service."""
    return ask(stage.client, "TCP", stage.backends[0].ipv4, PORT, 5)


def problems(daemon: RunningDaemon) -> list[str]:
    return list(daemon.get("status")[0]["problems"])


def failures(results: list[PathResult]) -> list[PathResult]:
    return [result for result in results if not result.ok]


@pytest.mark.parametrize("source", ["client", "node"])
def test_every_path_is_served(daemon: RunningDaemon, stage: Stage, source: str) -> None:
    """HTTP and UDP, ClusterIP and NodePort, IPv4 and IPv6, from outside and from the node."""
    results = ask_everything(getattr(stage, source), stage.node_addresses)
    assert len(results) == 8
    assert failures(results) == []
    names = {backend.name for backend in stage.backends[:2]}
    assert {frozenset(result.served) for result in results} == {frozenset(names)}


def test_verbs(daemon: RunningDaemon, stage: Stage) -> None:
    """What an operator sees: get, check and rules, while the daemon runs."""
    ask_web(stage.client)

    def svcdp(*arguments: str) -> str:
        run_dir = str(daemon.folder / "run")
        command = [sys.executable, "-m", "svcdp", *arguments, "--run-dir", run_dir]
        return stage.node.run(command).stdout

    checks = json.loads(svcdp("check", "-o", "json"))["checks"]
    assert {check["status"] for check in checks} <= {"ok", "warn"}
    assert "running: 2 services, 0 problems" in [check["detail"] for check in checks]
    assert "SVCDP-PREROUTING" in svcdp("rules", "show")
    assert sum(queue["received"] for queue in daemon.get("queues")) > 0
    assert svcdp("get", "services", "-o", "name").split() == ["service/echo", "service/web"]
    assert "80:30080/TCP" in svcdp("get", "services")
    assert len(svcdp("get", "endpoints").splitlines()) == 1 + 2 * 8
    items = json.loads(svcdp("get", "connections", "-o", "json"))["items"]
    assert {item["virtual"] for item in items} == {WEB.cluster_ips[0]}
    assert all(item["destination"] in {b.ipv4 for b in stage.backends[:2]} for item in items)


def test_trace_says_what_the_daemon_does(daemon: RunningDaemon, stage: Stage) -> None:
    """By what is in force and what it knows: no folder is read."""
    address = WEB.cluster_ips[0]

    def trace(flow: str, *more: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "svcdp", "trace", flow, *more]
        command += ["--admin-socket", str(daemon.folder / "run" / "admin.sock")]
        result = subprocess.run(command, capture_output=True, text=True)
        return result.returncode, result.stdout + result.stderr

    for each in (stage.client, stage.node):
        ask_web(each, 3)
    known = next(each for each in daemon.get("connections") if each["virtual"] == address)
    flow = f"tcp {known['client']}:{known['clientPort']} -> {address}:{WEB.port}"
    status, said = trace(flow)
    assert status == 0
    assert "known connection" in said or "picks among 2" in said
    status, said = trace(f"tcp {known['client']}:7 -> {address}:{WEB.port}", "-o", "json")
    found = json.loads(said)
    assert (status, found["action"]) == (0, "forward")
    servers = {each.ipv4 for each in stage.backends[:2]}
    assert {each["address"] for each in found["destinations"]} == servers
    write(daemon.folder / "manifests", [])
    wait_until(lambda: json.loads(trace(flow, "-o", "json")[1])["action"] == "reject", TIMEOUT,
               "nobody serves")  # fmt: skip
    for wrong in ("somewhere", flow.replace("tcp", "icmp")):
        status, said = trace(wrong)
        assert status == 2
        assert said.startswith("error: flow ")


def test_a_bad_manifest_keeps_the_last_good_state(daemon: RunningDaemon, stage: Stage) -> None:
    file = daemon.folder / "manifests" / "web.json"
    good = file.read_text()
    file.write_text(good.replace('"port": 80,', '"port": 99999,'))
    (problem,) = wait_until(lambda: problems(daemon), TIMEOUT, "the daemon sees the bad file")
    assert str(file) in problem
    assert "port" in problem
    assert ask_web(stage.client)["failed"] == 0
    file.write_text(good)
    wait_until(lambda: not problems(daemon), TIMEOUT, "the daemon sees the good file")
    assert ask_web(stage.client)["failed"] == 0


def test_it_stops_when_told_and_leaves_nothing(untouched: None, stage: Stage, folder: Path) -> None:
    before = traces(stage.node)
    with running_daemon(stage.node.popen, folder, *stage.daemon_arguments) as daemon:
        assert traces(stage.node) != before
        assert ask_web(stage.client)["failed"] == 0
        assert daemon.stop() == 0
    assert list((folder / "run").iterdir()) == []
    assert ask_web(stage.client, 1)["failed"] == 1


def test_a_killed_daemon_is_succeeded(untouched: None, stage: Stage, folder: Path) -> None:
    """After ``kill -9`` pods stay reachable; the next start takes over what is there."""
    with running_daemon(stage.node.popen, folder, *stage.daemon_arguments) as daemon:
        held = traces(stage.node)
        daemon.process.kill()
        daemon.process.wait()
        assert ask_pod(stage)["failed"] == 0
        assert traces(stage.node) == held
    with running_daemon(stage.node.popen, folder, *stage.daemon_arguments) as daemon:
        assert traces(stage.node) == held
        assert ask_web(stage.client)["failed"] == 0
        assert daemon.stop() == 0


def test_direct_traffic_is_left_alone(untouched: None, stage: Stage, folder: Path) -> None:
    """One connection straight to a pod lives through start, stop, start and kill."""
    pod = stage.backends[0]
    with client(stage.client) as load:
        assert load.stdin is not None
        load.stdin.write(json.dumps({"targets": [[pod.ipv4, PORT], [pod.ipv6, PORT]], "kept": 2}))
        load.stdin.write("\n")
        load.stdin.flush()
        for end in (signal.SIGTERM, signal.SIGKILL):
            assert ask_pod(stage)["failed"] == 0
            with running_daemon(stage.node.popen, folder, *stage.daemon_arguments) as daemon:
                assert ask_pod(stage)["failed"] == 0
                assert ask_web(stage.client)["failed"] == 0
                daemon.process.send_signal(end)
                daemon.process.wait()
            assert ask_pod(stage)["failed"] == 0
        out, _ = load.communicate(timeout=30)
    result = json.loads(out.splitlines()[-1])
    assert result["errors"] == {}
    assert result["kept"]["lost"] == result["kept"]["moved"] == 0
    assert sum(Counter(result["phases"][0]).values()) > 0
    with running_daemon(stage.node.popen, folder, *stage.daemon_arguments):
        pass  # takes away what the killed one left


@pytest.fixture
def firewall(stage: Stage) -> Iterator[None]:
    """A node that forwards only what it has accepted, and nothing that is INVALID."""
    commands = [
        [tool, *rule]
        for tool in ("iptables", "ip6tables")
        for rule in (
            ["-P", "FORWARD", "DROP"],
            ["-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"],
            ["-A", "FORWARD", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT"],
        )
    ]
    for command in commands:
        stage.node.run(command)
    yield
    for tool in ("iptables", "ip6tables"):
        stage.node.run([tool, "-P", "FORWARD", "ACCEPT"])
        stage.node.run([tool, "-F", "FORWARD"])


def test_a_firewall_that_drops_by_default(
    firewall: None, daemon: RunningDaemon, stage: Stage
) -> None:
    """Services work, and what the firewall forbids stays forbidden."""
    assert failures(ask_everything(stage.client, stage.node_addresses)) == []
    assert ask(stage.client, "TCP", stage.backends[0].ipv4, PORT, 1)["failed"] == 1


def test_rules_that_cannot_be_are_an_error(untouched: None, stage: Stage, folder: Path) -> None:
    """Where a backend is missing the daemon says so, and nothing is left behind."""
    command = ["env", "PATH=/nonexistent", sys.executable, "-m", "svcdp", "run"]
    command += ["-f", str(folder / "manifests"), "--run-dir", str(folder / "run")]
    with stage.node.popen(command, stderr=subprocess.PIPE) as process:
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("error: packets cannot be captured here")


TOOLS = ("ipset", "iptables-restore", "ip6tables-restore", "nft")


def test_what_is_served_goes_on_while_rules_cannot_be_changed(
    untouched: None, stage: Stage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while another program holds the lock of iptables for long: probes fail, no client does,
    and what came meanwhile is served afterwards.
    """
    broken = folder / "broken"
    tools = folder / "bin"
    tools.mkdir()
    for tool in filter(shutil.which, TOOLS):
        script = tools / tool
        script.write_text(
            f'#!/bin/sh\n[ ! -e {broken} ] && exec {shutil.which(tool)} "$@"\nexit 4\n'
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    with running_daemon(stage.node.popen, folder, *stage.daemon_arguments) as daemon:
        assert failures(ask_everything(stage.client, stage.node_addresses)) == []
        broken.touch()
        write(folder / "manifests", stage.backends)
        told = "update failed, will be tried again"
        log = folder / "log"
        wait_until(lambda: told in log.read_text(), TIMEOUT, "the failure")
        for _ in range(3):  # the first retries come within seconds
            assert failures(ask_everything(stage.client, stage.node_addresses)) == []
        assert any(told in problem for problem in problems(daemon))
        broken.unlink()
        every = {each.ipv4 for each in stage.backends}

        def served() -> set[str]:
            return {each["address"] for each in daemon.get("endpoints")} & every

        wait_until(lambda: served() == every, TIMEOUT * 4, "the third server")
        assert failures(ask_everything(stage.client, stage.node_addresses)) == []


def test_rules_can_be_applied_and_removed_by_hand(
    untouched: None, stage: Stage, folder: Path
) -> None:
    def rules(verb: str, *arguments: str) -> str:
        command = [sys.executable, "-m", "svcdp", "rules", verb, *arguments]
        return stage.node.run([*command, "--run-dir", str(folder / "run")]).stdout

    before = traces(stage.node)
    applied = rules("apply", "-f", str(folder / "manifests"), "--dry-run")
    assert "add SVCDP-VIRTUAL4-NEW 10.96.0.10,tcp:80\n" in applied
    assert traces(stage.node) == before
    rules("apply", "-f", str(folder / "manifests"))
    shown = rules("show")
    assert "10.96.0.10,tcp:80" in shown
    assert rules("remove", "--dry-run") == shown
    assert traces(stage.node) != before
    assert ask_pod(stage)["failed"] == 0
    rules("remove")
    assert rules("show") == ""


def test_the_namespace_can_be_named(untouched: None, stage: Stage, folder: Path) -> None:
    """A daemon that is started elsewhere serves the node's namespace."""
    arguments = [*stage.daemon_arguments, "--netns", stage.node.full_name]
    with running_daemon(here, folder, *arguments) as daemon:
        assert ask_web(stage.client)["failed"] == 0
        assert ask_web(stage.node)["failed"] == 0
        assert daemon.stop() == 0


def here(command: list[str], **arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command, text=True, **arguments)


def test_one_daemon_a_namespace(daemon: RunningDaemon, stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "other" / "manifests").mkdir(parents=True)
    with (
        pytest.raises(SvcdpError, match="another svcdp serves this network namespace"),
        running_daemon(stage.node.popen, tmp_path / "other", *stage.daemon_arguments),
    ):
        pytest.fail("it started")
    assert ask_web(stage.client)["failed"] == 0
