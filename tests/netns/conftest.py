"""Labs for tests with real traffic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from traffic import Start, write_service

from svcdp.cli._demo.daemon import running_daemon
from svcdp.lab import Lab, Topology


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def cluster(lab: Lab, request: pytest.FixtureRequest) -> Topology:
    """The standard topology with servers that run. Parametrized indirectly with True: its node
    has a firewall."""
    topology = Topology.build(lab, firewall=getattr(request, "param", False))
    topology.start_servers()
    return topology


@pytest.fixture
def folder(cluster: Topology, tmp_path: Path) -> Path:
    """The daemon's: manifests of a Service that the first two servers serve."""
    (tmp_path / "manifests").mkdir()
    write_service(tmp_path / "manifests", cluster.servers[:2])
    return tmp_path


@pytest.fixture
def start(cluster: Topology, folder: Path) -> Start:
    """Starts the daemon in the cluster's node, serving ``folder``."""
    settings = ["--node-name", "node", "--pod-cidrs", ",".join(cluster.pod_cidrs)]
    settings += ["--service-cidrs", ",".join(cluster.service_cidrs)]
    return lambda *more: running_daemon(cluster.node.popen, folder, *settings, *more)
