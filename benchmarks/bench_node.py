"""How long `svcdp run` takes until it serves a large cluster, and the memory that it has then.

    .venv/bin/python -m benchmarks.bench_node [--services N] [--endpoints N] [--all-kinds]

Each round starts a daemon on a folder of manifests and, where ``make test-cluster`` has built
one, on a real API server on the same cores; figures are medians. Needs root: everything runs in a
network namespace that is gone with this program.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from svcdp.cli._demo import daemon
from svcdp.kube.model import Object

from .cluster import NODE, cluster, plain_cluster

#: Has `controlplane`.
SUPPORT = Path(__file__).parents[1] / "tests/support"

#: What a folder of manifests has in a file.
FILE = 50
MIB = 1024  # of what /proc counts in KiB
START_TIME = 240.0  # seconds
VERSIONS = {"Service": "v1", "EndpointSlice": "discovery.k8s.io/v1"}
INSIDE = "SVCDP_BENCH_NODE"  # in the environment of who is in the namespace


class Figures(NamedTuple):
    """Seconds from the start of the process until it serves; MiB then, and the most before."""

    ready: float
    resident: float
    peak: float


def manifests(objects: Iterable[Object]) -> Iterator[dict[str, Any]]:
    """As an API server has them."""
    for each in objects:
        kind = type(each).__name__
        value = _without_null(msgspec.to_builtins(each))
        yield {"apiVersion": VERSIONS[kind], "kind": kind, **value}


def _without_null(value: Any) -> Any:
    """What is left out an API server fills in."""
    if isinstance(value, dict):
        return {key: _without_null(each) for key, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [_without_null(each) for each in value]
    return value


def start(folder: Path, *arguments: str) -> Figures:
    """A daemon on ``folder/manifests``, or what the arguments say."""
    settings = (
        f"--node-name={NODE.name}",
        f"--addresses={','.join(NODE.addresses)}",
        f"--service-cidrs={','.join(map(str, NODE.service_cidrs))}",
        "--rules=iptables",
    )
    began = time.perf_counter()
    with daemon.running_daemon(subprocess.Popen, folder, *settings, *arguments) as running:
        ready = time.perf_counter() - began
        status = Path("/proc", str(running.process.pid), "status").read_text()
        kib = {
            line.partition(":")[0]: int(line.split()[1])
            for line in status.splitlines()
            if line.startswith("Vm")
        }
        return Figures(ready, kib["VmRSS"] / MIB, kib["VmHWM"] / MIB)


def from_folder(items: Sequence[Any], rounds: int, folder: Path) -> list[Figures]:
    """Files of some Services each, as JSON."""
    (folder / "manifests").mkdir()
    for first in range(0, len(items), FILE):
        listed = {"apiVersion": "v1", "kind": "List", "items": items[first : first + FILE]}
        (folder / "manifests" / f"{first}.json").write_text(json.dumps(listed))
    return [start(folder) for _ in range(rounds)]


def from_api_server(items: Sequence[Any], rounds: int, folder: Path) -> list[Figures]:
    """A kube-apiserver with an etcd."""
    from controlplane import ControlPlane

    (folder / "plane").mkdir()
    (folder / "node").mkdir()
    with ControlPlane(folder / "plane") as plane:
        plane.stop()
        plane.store(*items)
        plane.start()
        kubeconfig = str(plane.kubeconfig())
        return [start(folder / "node", "--kubeconfig", kubeconfig) for _ in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_node",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--services", type=int, default=5000)
    parser.add_argument("--endpoints", type=int, default=50, help="of each Service")
    parser.add_argument(
        "--all-kinds", action="store_true", help="two ports, node ports, both IP families..."
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        os.execvp(
            "unshare", ["unshare", "--net", sys.executable, "-m", __spec__.name, *sys.argv[1:]]
        )
    commands = ["link set lo up", *(f"address add {each} dev lo" for each in NODE.addresses)]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)
    sys.path.append(str(SUPPORT))
    from controlplane import PROGRAM

    daemon.START_TIME = START_TIME
    make = cluster if options.all_kinds else plain_cluster
    items = list(manifests(make(options.services, options.endpoints)))
    print(
        f"{options.services:,} Services of {options.endpoints} endpoints, {options.rounds} rounds"
    )
    line = "{:<14} {:>9} {:>14} {:>10}"
    print(line.format("from", "ready, s", "resident, MiB", "peak, MiB"), flush=True)
    measures = {"a folder": from_folder}
    if PROGRAM.exists():
        measures["an API server"] = from_api_server
    for name, measure in measures.items():
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(items, options.rounds, Path(folder))
        ready, resident, peak = (statistics.median(each) for each in zip(*figures, strict=True))
        print(line.format(name, f"{ready:.1f}", f"{resident:.0f}", f"{peak:.0f}"), flush=True)
    if not PROGRAM.exists():
        print("no API server: make build/cluster/apiserver")


if __name__ == "__main__":
    main()
