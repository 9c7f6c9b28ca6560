"""Labs for tests with real traffic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
