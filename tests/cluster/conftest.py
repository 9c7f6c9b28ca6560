"""A real API server for tests; `controlplane.ControlPlane` says what can be done with it.

``make test-cluster`` builds the program and runs these tests; nothing else collects them. There are
no controllers: EndpointSlices, Nodes and Pods are what a test makes of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from controlplane import PROGRAM, ControlPlane
from relay import Relay


@pytest.fixture(scope="session")
def _shared() -> Iterator[ControlPlane]:
    if not PROGRAM.exists():
        pytest.exit("no API server to test with: run make test-cluster", returncode=2)
    # Not pytest's own temporary folder, which stays: etcd's takes 130 MB.
    with tempfile.TemporaryDirectory() as folder, ControlPlane(Path(folder)) as plane:
        yield plane


@pytest.fixture
def plane(_shared: ControlPlane) -> Iterator[ControlPlane]:
    """The session's one control plane, empty but for the Service ``default/kubernetes``. What the
    test makes is deleted after it; it may stop, restart and compact the server."""
    yield _shared
    _shared.reset()


@pytest.fixture
def relay(plane: ControlPlane) -> Iterator[Relay]:
    """The network before the API server: ``plane.kubeconfig(url=f"https://127.0.0.1:{relay.port}")``."""
    with Relay(plane.port) as relay:
        yield relay
