"""A node whose packets are captured.

``SVCDP_TEST_RULES=nft`` runs all of this with that backend, where the kernel has what it needs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from capture import Directing, Serve, node_addresses, specs

from svcdp import Dataplane, ServiceSpec
from svcdp.io.nfqueue import QueueWorkers
from svcdp.lab import Namespace, Topology
from svcdp.modes.nfqueue import NfqueueMode
from svcdp.rules import Backend, CapturePlan, choose
from svcdp.rules.plan import items_of

BACKEND = os.environ.get("SVCDP_TEST_RULES", "auto")
QUEUES = (100, 101)


@pytest.fixture
def dataplane(cluster: Topology) -> Dataplane:
    dataplane = Dataplane(4096)
    dataplane.apply(specs(cluster))
    return dataplane


@pytest.fixture
def plan(cluster: Topology, dataplane: Dataplane) -> CapturePlan:
    return CapturePlan(
        queues=QUEUES,
        service_cidrs=cluster.service_cidrs,
        addresses=node_addresses(cluster),
        items=items_of(dataplane.captures()),
    )


@pytest.fixture
def new_backend(cluster: Topology, tmp_path: Path) -> Callable[[], Backend]:
    """Makes backends, as processes that are started one after the other would."""
    name = cluster.node.full_name
    return lambda: choose(BACKEND, netns=name, run_dir=str(tmp_path / "run"))


@pytest.fixture
def backend(new_backend: Callable[[], Backend]) -> Backend:
    return new_backend()


@pytest.fixture
def serve(cluster: Topology, dataplane: Dataplane, backend: Backend, plan: CapturePlan) -> Serve:
    @contextlib.contextmanager
    def serving(plan: CapturePlan = plan) -> Iterator[QueueWorkers]:
        workers = QueueWorkers(dataplane, *plan.queues, netns=cluster.node.full_name)
        workers.start()
        try:
            backend.apply(plan)
            if backend.name == "nft":
                let_through(cluster.node, plan)
            yield workers
        finally:
            workers.stop()

    return serving


@pytest.fixture
def started() -> list[QueueWorkers]:
    """Those of ``directing``."""
    return []


@pytest.fixture
def directing(
    cluster: Topology,
    dataplane: Dataplane,
    backend: Backend,
    plan: CapturePlan,
    started: list[QueueWorkers],
) -> Directing:
    dataplane.apply(())

    @contextlib.contextmanager
    def directing(*specs: ServiceSpec) -> Iterator[NfqueueMode]:
        tunnels, node = plan.tunnel_queues, cluster.node.full_name
        workers = QueueWorkers(dataplane, *plan.queues, tunnel_queues=tunnels, netns=node)
        mode = NfqueueMode(dataplane, backend, plan)
        with contextlib.ExitStack() as stack:
            stack.callback(workers.stop)
            workers.start()
            started.append(workers)
            mode.update(specs, [])
            stack.callback(mode.close)
            mode.install()
            if backend.name == "nft":
                let_through(cluster.node, plan)
            yield mode

    return directing


def let_through(node: Namespace, plan: CapturePlan) -> None:
    """What docs/limitations.md asks for: an accept in our own nft table overrules no drop."""
    mark = f"{plan.forward_mark:#x}/{plan.forward_mark:#x}"
    for tool in ("iptables", "ip6tables"):
        node.run([tool, "-I", "FORWARD", "-m", "mark", "--mark", mark, "-j", "ACCEPT"])
