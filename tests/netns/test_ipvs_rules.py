"""A director that had ipvsadm's rules, and has svcdp now: its lines, on real traffic."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from traffic import TIMEOUT, Kept, ask

from svcdp.cli._demo.daemon import RunningDaemon, running_daemon
from svcdp.lab import Topology, wait_until

pytestmark = pytest.mark.netns

VIRTUAL = ("198.18.0.10", 80)
VIRTUAL6 = ("fd00:18::10", 80)

Svcdp = Callable[..., "subprocess.CompletedProcess[str]"]


def rules(topology: Topology) -> str:
    """In the order of ipvsadm-save; the second server has twice the weight."""
    a, b, _ = topology.servers
    return (
        f"-A -t {VIRTUAL[0]}:80 -s wrr\n"
        f"-a -t {VIRTUAL[0]}:80 -r {a.ipv4}:8080 -m -w 1\n"
        f"-a -t {VIRTUAL[0]}:80 -r {b.ipv4}:8080 -m -w 2\n"
        f"-A -t [{VIRTUAL6[0]}]:80 -s rr -p 300\n"
        f"-a -t [{VIRTUAL6[0]}]:80 -r [{a.ipv6}]:9000 -m -w 1\n"
        f"-a -t [{VIRTUAL6[0]}]:80 -r [{b.ipv6}]:9000 -m -w 1\n"
    )


@pytest.fixture
def file(cluster: Topology, tmp_path: Path) -> Path:
    path = tmp_path / "ipvsadm.rules"
    path.write_text(rules(cluster))
    return path


@pytest.fixture
def daemon(cluster: Topology, file: Path, tmp_path: Path) -> Iterator[RunningDaemon]:
    """On a director that has its virtual addresses, as those of IPVS do."""
    cluster.node.ip(f"addr add {VIRTUAL[0]}/32 dev lo", f"addr add {VIRTUAL6[0]}/128 dev lo")
    with running_daemon(cluster.node.popen, tmp_path, "--ipvs", str(file)) as daemon:
        yield daemon


@pytest.fixture
def svcdp(cluster: Topology, daemon: RunningDaemon) -> Svcdp:
    def run(*words: str, lines: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "svcdp", "ipvs", *words]
        command += ["--run-dir", str(daemon.folder / "run")]
        return subprocess.run(command, input=lines, text=True, capture_output=True, timeout=60)

    return run


def servers(topology: Topology, target: tuple[str, int], count: int = 6) -> Counter[str]:
    return Counter(ask(topology.client, target)["server"] for _ in range(count))


def test_it_serves_what_the_lines_say(cluster: Topology, svcdp: Svcdp) -> None:
    a, b, _ = (server.name for server in cluster.servers)
    assert servers(cluster, VIRTUAL) == {a: 2, b: 4}
    (bound,) = servers(cluster, VIRTUAL6)
    assert bound in (a, b)
    assert svcdp("save").stdout == rules(cluster)
    stats = svcdp("stats", "-n", "--nosort").stdout.splitlines()
    # Of each line, protocol or arrow, address and connections; the newest server is first.
    assert [line.split()[1:3] for line in stats[3:6]] == [
        [f"{VIRTUAL[0]}:80", "6"],
        [f"{cluster.servers[1].ipv4}:8080", "4"],
        [f"{cluster.servers[0].ipv4}:8080", "2"],
    ]
    listed = svcdp("connections", "-n").stdout
    assert f" {VIRTUAL[0]}:80 " in listed
    assert " ASSURED " in listed


def test_a_server_is_drained(cluster: Topology, svcdp: Svcdp) -> None:
    """As with ipvsadm -e ... -w 0: its connections go on, new ones are others'."""
    address = {server.name: server.ipv4 for server in cluster.servers}
    with Kept(cluster.client, VIRTUAL) as kept:
        name = kept.ask()["server"]
        line = f"-e -t {VIRTUAL[0]}:80 -r {address[name]}:8080 -m -w 0"
        assert svcdp("restore", "--edit", lines=line).returncode == 0
        assert name not in servers(cluster, VIRTUAL)
        assert kept.ask()["server"] == name


def test_a_wrong_line_changes_nothing(cluster: Topology, svcdp: Svcdp) -> None:
    done = svcdp("restore", lines=f"-A -t {VIRTUAL[0]}:81 -s rr\n-A -t {VIRTUAL[0]}:82 -q\n")
    assert done.returncode == 1
    assert done.stderr.endswith("line 2: '-q': no option of what changes services\n")
    assert svcdp("save").stdout == rules(cluster)
    assert sum(servers(cluster, VIRTUAL).values()) == 6


def test_the_file_is_read_again(
    cluster: Topology, svcdp: Svcdp, daemon: RunningDaemon, file: Path
) -> None:
    c = cluster.servers[2]
    file.write_text(f"-A -t {VIRTUAL[0]}:80\n-a -t {VIRTUAL[0]}:80 -r {c.ipv4}:8080 -m\n")
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: c.ipv4 in svcdp("save").stdout, TIMEOUT, "the daemon has read the file")
    assert servers(cluster, VIRTUAL) == {c.name: 6}
