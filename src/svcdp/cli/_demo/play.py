"""What the demo does on its stage, step by step."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

from svcdp.cli._demo import introduction
from svcdp.cli._demo.daemon import RunningDaemon, running_daemon
from svcdp.cli._demo.introduction import Place
from svcdp.cli._demo.manifests import (
    DR,
    ECHO,
    TUNNEL,
    WEB,
    Backend,
    Served,
    write,
    write_one,
)
from svcdp.cli._demo.report import MethodResult, PathResult, PhaseResult, Report
from svcdp.cli._demo.stage import Stage, take_virtual_addresses, traces
from svcdp.errors import SvcdpError
from svcdp.lab import Namespace, wait_until

__all__ = ["ask", "ask_everything", "client", "compare_methods", "play"]

CLIENT = [sys.executable, "-m", "svcdp.cli._demo.client"]
REQUESTS = 20  # to each address
PHASE_TIME = 1.0  # seconds of load between two changes
FORCE_TIME = 10.0  # seconds in which a change must be in force
KEPT = 4  # connections that stay, to each address under load

Note = Callable[[str], None]


def play(stage: Stage, folder: Path, note: Note) -> Report:
    """Do all of it. What goes wrong is in the report, or a :class:`svcdp.SvcdpError`."""
    report = Report()
    before = traces(stage.node)
    note("serving the manifests of an introduction to Services")
    _introduce(stage, folder / "introduction", report)
    (folder / "manifests").mkdir()
    write(folder / "manifests", stage.backends[:2])
    for served in (TUNNEL, DR):
        write_one(folder / "manifests", served, stage.backends[:2])
    note("giving two servers the addresses of Services without NAT")
    take_virtual_addresses(stage.topology.servers[:2], DR.cluster_ips, TUNNEL.cluster_ips)
    note("starting svcdp run in the node's namespace")
    with running_daemon(stage.node.popen, folder, *stage.daemon_arguments) as daemon:
        for source in (stage.client, stage.node):
            note(f"asking for everything from the {source.name}")
            report.paths += ask_everything(source, stage.node_addresses)
        note("comparing NAT, tunnels and DR")
        report.methods = compare_methods(stage)
        note("changing the endpoints under load")
        _change_under_load(stage, daemon, folder / "manifests", report)
        report.queues = daemon.get("queues")
        report.exit_status = daemon.stop()
    report.left_behind = sorted(traces(stage.node) ^ before)
    return report


def ask_everything(source: Namespace, node_addresses: Sequence[str]) -> list[PathResult]:
    """Every Service by its cluster IPs and by its node port on the node's addresses."""
    asked: list[Place] = []
    for served in (WEB, ECHO):
        for target, addresses, port in (
            ("ClusterIP", served.cluster_ips, served.port),
            ("NodePort", node_addresses, served.node_port),
        ):
            name = f"{target} {served.name}"
            asked += [(name, served.protocol, address, port) for address in addresses]
    return _ask_places(source, asked)


def _ask_places(source: Namespace, places: Sequence[Place]) -> list[PathResult]:
    jobs = [
        {"protocol": protocol, "address": address, "port": port, "count": REQUESTS}
        for _, protocol, address, port in places
    ]
    answers = _run_client(source, {"requests": jobs})
    return [
        PathResult(source.name, *place, answer["served"], answer["failed"])
        for place, answer in zip(places, answers, strict=True)
    ]


def _introduce(stage: Stage, folder: Path, report: Report) -> None:
    """Reach its Pod by each of its Services, from outside and from another Pod; by name, too."""
    (folder / "manifests").mkdir(parents=True)
    introduction.write(folder / "manifests")
    pod = stage.topology.servers[2].namespace
    with running_daemon(stage.node.popen, folder, *stage.daemon_arguments, "--dns") as daemon:
        services = {each["name"]: each for each in daemon.get("services")}
        for source in (stage.client, pod):
            places = introduction.places(services, stage.topology.node_ipv4)
            report.paths += _ask_places(source, places)
        report.names = introduction.look_up(pod, stage.dns_address, services)
        told = daemon.get("environment", namespace="default")
        report.environment = {
            each["name"]: each["value"]
            for each in told
            if each["name"].startswith("SERVICE_PYTHON_SERVICE_")
        }
        if status := daemon.stop():
            raise SvcdpError(f"the daemon ended with exit status {status}")


def compare_methods(stage: Stage) -> list[MethodResult]:
    """Ask the same servers by each method, from outside and from a Pod: whom do they see?"""
    pod = stage.topology.servers[2]
    client = (stage.topology.client_ipv4, stage.topology.client_ipv6)
    results = []
    for source, own in ((stage.client, client), (pod.namespace, (pod.ipv4, pod.ipv6))):
        # What comes from outside the Pods' networks is masqueraded, if it can be.
        by_nat = stage.node_addresses if source is stage.client else own
        methods = (("NAT", WEB, by_nat), ("tunnel", TUNNEL, own), ("DR", DR, own))
        asked = [
            (name, served, family, expected[family])
            for name, served, expected in methods
            for family in (0, 1)
        ]
        jobs = [_job(served, served.cluster_ips[family]) for _, served, family, _ in asked]
        answers = _run_client(source, {"requests": jobs})
        results += [
            MethodResult(
                name,
                source.name,
                served.cluster_ips[family],
                served.port,
                answer["served"],
                answer["failed"],
                answer["seen"],
                expected,
            )
            for (name, served, family, expected), answer in zip(asked, answers, strict=True)
        ]
    return results


def _job(served: Served, address: str) -> dict[str, Any]:
    return {
        "protocol": served.protocol,
        "address": address,
        "port": served.port,
        "count": REQUESTS,
    }


def ask(
    source: Namespace, protocol: str, address: str, port: int, count: int = REQUESTS
) -> dict[str, Any]:
    """``count`` requests to one address: who ``served``, how many ``failed``."""
    job = {"protocol": protocol, "address": address, "port": port, "count": count}
    (answer,) = _run_client(source, {"requests": [job]})
    return dict(answer)


@contextmanager
def client(place: Namespace) -> Iterator[subprocess.Popen[str]]:
    """A client program in a namespace; an exception ends it at once."""
    with place.popen(CLIENT, stdin=PIPE, stdout=PIPE) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def _run_client(source: Namespace, job: Mapping[str, Any]) -> Any:
    with client(source) as process:
        out, _ = process.communicate(json.dumps(job) + "\n")
    return _result(process, out)


def _result(process: subprocess.Popen[str], out: str) -> Any:
    if process.returncode:
        raise SvcdpError("a client of the demo failed; its error is above")
    return json.loads(out)


def _change_under_load(
    stage: Stage, daemon: RunningDaemon, manifests: Path, report: Report
) -> None:
    """Add an endpoint, give one the weight 0, remove one, while clients ask without pause."""
    first, second, third = stage.backends
    everybody = [first, second, third]
    targets = [(address, WEB.port) for address in WEB.cluster_ips]
    targets += [(address, WEB.node_port) for address in stage.node_addresses]
    steps: list[tuple[str, list[Backend], dict[Backend, int], list[Backend]]] = [
        (f"{third.name} added", everybody, {}, everybody),
        (f"{first.name} has weight 0", everybody, {first: 0}, [second, third]),
        (f"{second.name} removed", [first, third], {first: 0}, [third]),
        (f"{second.name} is back", everybody, {first: 0}, [second, third]),
    ]
    changes = [(f"{first.name} and {second.name}", [first, second])]
    with client(stage.client) as load:
        _say(load, json.dumps({"targets": targets, "kept": KEPT}))
        time.sleep(PHASE_TIME)
        for change, backends, weights, expected in steps:
            _say(load, "a change begins")
            write(manifests, backends, weights)
            _wait_in_force(daemon, WEB, backends, weights)
            _say(load, "it is in force")
            changes.append((change, expected))
            time.sleep(PHASE_TIME)
        assert load.stdin is not None
        assert load.stdout is not None
        load.stdin.close()
        out = load.stdout.read()
    result = _result(load, out)
    # Every second phase is that of a change: whoever was or will be there may answer.
    report.load = {key: result[key] for key in ("failed", "errors", "kept")}
    report.load["changing"] = sum(sum(served.values()) for served in result["phases"][1::2])
    report.phases = [
        PhaseResult(change, served, [backend.name for backend in expected])
        for (change, expected), served in zip(changes, result["phases"][::2], strict=True)
    ]


def _say(load: subprocess.Popen[str], line: str) -> None:
    """Send a line to the client, and wait until it knows: the next phase has begun."""
    assert load.stdin is not None
    assert load.stdout is not None
    load.stdin.write(f"{line}\n")
    load.stdin.flush()
    load.stdout.readline()


def _wait_in_force(
    daemon: RunningDaemon,
    served: Served,
    backends: Sequence[Backend],
    weights: Mapping[Backend, int],
) -> None:
    """Until the daemon's dataplane has these endpoints."""
    wanted = {(a, weights.get(b, 1)) for b in backends for a in (b.ipv4, b.ipv6)}

    def in_force() -> bool:
        items = [i for i in daemon.get("endpoints") if i["service"].startswith(f"{served.name}:")]
        return {(item["address"], item["weight"]) for item in items} == wanted

    wait_until(in_force, FORCE_TIME, "a change of the endpoints is in force")
