"""Paths that take smaller packets than their ends: ICMP errors must find who sent too much."""

from __future__ import annotations

import hashlib
import http.client
import json

import pytest
from traffic import Start, Target, targets

from svcdp.lab import Topology
from svcdp.lab.servers import PATTERN

pytestmark = pytest.mark.netns

SMALL = 1300  # bytes; IPv6 has at least 1280
TIMEOUT = 10.0  # seconds


def there_and_back(target: Target) -> tuple[str, str]:
    """The digests of what came and of what arrived."""
    connection = http.client.HTTPConnection(*target, timeout=TIMEOUT)
    try:
        connection.request("GET", f"/bytes/{len(PATTERN)}")
        down = hashlib.sha256(connection.getresponse().read()).hexdigest()
        connection.request("POST", "/", PATTERN)
        return down, json.loads(connection.getresponse().read())["sha256"]
    finally:
        connection.close()


@pytest.mark.parametrize("setting", ["--gso", "--no-gso"])
@pytest.mark.parametrize("narrow", [["client"], ["server-a", "server-b"]], ids=["client", "pods"])
def test_both_ends_learn_the_path_mtu(
    cluster: Topology, start: Start, narrow: list[str], setting: str
) -> None:
    """Only the node's end of a link is narrow, so no handshake tells of it: the node's kernel
    sends ICMP errors about rewritten packets, and they must reach the client or the pod."""
    cluster.node.ip(*(f"link set dev {interface} mtu {SMALL}" for interface in narrow))
    digest = hashlib.sha256(PATTERN).hexdigest()
    with start(setting) as daemon:
        for target in targets(cluster):
            assert cluster.client.call(there_and_back, target) == (digest, digest), target
        (status,) = daemon.get("status")
    assert status["packets"]["FORWARD/RELATED"] > 0
