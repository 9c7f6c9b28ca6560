"""Datagrams that do not fit into one packet."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from traffic import CLUSTER_IPS, UDP_PORT, Start, ask_udp, write_service

from svcdp.lab import Topology

pytestmark = [
    pytest.mark.netns,
    # With the firewall, which tracks connections, the kernel puts fragments together anyway.
    pytest.mark.parametrize("cluster", [False, True], indirect=True, ids=["plain", "firewall"]),
]

#: Bytes: the reply is, by a few bytes, the first that is cut; then both; then very many pieces.
SIZES = (1472, 1473, 4000, 65000)


def test_datagrams_of_any_size(cluster: Topology, folder: Path, start: Start) -> None:
    """The kernel puts fragments together before they come to the queue, and cuts them after."""
    write_service(folder / "manifests", cluster.servers[:1])
    randomness = random.Random(1)
    with start():
        for source in (cluster.client, cluster.node, cluster.servers[1].namespace):
            for address in CLUSTER_IPS:
                for size in SIZES:
                    payload = randomness.randbytes(size)
                    assert ask_udp(source, (address, UDP_PORT), payload) == b"a " + payload
