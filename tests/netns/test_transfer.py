"""Long streams through a virtual address, with and without segmentation offload (GSO).

The rules are written by hand here: queues and core are judged without ``svcdp.rules``.
"""

from __future__ import annotations

import hashlib
import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from svcdp import Dataplane
from svcdp.io.nfqueue import FORWARD_MARK, PASS_MARK, QueueWorkers
from svcdp.lab import Topology
from svcdp.lab.servers import PATTERN

pytestmark = [pytest.mark.netns, pytest.mark.slow]

DOWNLOAD = 1 << 30  # bytes
UPLOAD = 1 << 28
SEGMENT_MAX = 1460  # bytes of payload in a frame of 1500
QUEUES = (100, 101)
TIMEOUT = 30.0  # seconds without a byte

RULES = f"""\
*raw
-A PREROUTING -m mark --mark {PASS_MARK}/{PASS_MARK} -j ACCEPT
-A PREROUTING -m mark --mark {FORWARD_MARK}/{FORWARD_MARK} -j CT --notrack
-A PREROUTING -m mark --mark {FORWARD_MARK}/{FORWARD_MARK} -j ACCEPT
-A PREROUTING -d {{virtual}} -j NFQUEUE --queue-balance {QUEUES[0]}:{QUEUES[1]}
-A PREROUTING -s {{real}} -p tcp --sport 8080 -j NFQUEUE --queue-balance {QUEUES[0]}:{QUEUES[1]}
COMMIT
"""


@contextmanager
def serving(cluster: Topology, tool: str, virtual: str, *, gso: bool) -> Iterator[QueueWorkers]:
    """The first server behind ``virtual``, port 80, by queues in the node."""
    first = cluster.servers[0]
    real = first.ipv6 if ":" in virtual else first.ipv4
    dataplane = Dataplane(max_connections=1024)
    with dataplane.transaction() as transaction:
        transaction.service(virtual, 80).add(real, 8080)
    workers = QueueWorkers(dataplane, *QUEUES, gso=gso, netns=cluster.node.path)
    workers.start()
    try:
        cluster.node.run([f"{tool}-restore"], input=RULES.format(virtual=virtual, real=real))
        yield workers
    finally:
        workers.stop()


def repeated(count: int) -> Iterator[memoryview]:
    """The first ``count`` bytes of what the server sends."""
    for start in range(0, count, len(PATTERN)):
        yield memoryview(PATTERN)[: count - start]


def digest_of(count: int) -> str:
    digest = hashlib.sha256()
    for block in repeated(count):
        digest.update(block)
    return digest.hexdigest()


def transfer(host: str) -> tuple[str, dict[str, Any]]:
    """Over one connection: the digest of what came, and what the server says of what it got."""
    connection = http.client.HTTPConnection(host, 80, timeout=TIMEOUT)
    try:
        connection.request("GET", f"/bytes/{DOWNLOAD}")
        response = connection.getresponse()
        digest = hashlib.sha256()
        while block := response.read(1 << 18):
            digest.update(block)
        connection.request("POST", "/", repeated(UPLOAD), {"Content-Length": str(UPLOAD)})
        return digest.hexdigest(), json.loads(connection.getresponse().read())
    finally:
        connection.close()


@pytest.mark.parametrize("gso", [True, False], ids=["gso", "no gso"])
@pytest.mark.parametrize(
    ("tool", "virtual"), [("iptables", "10.96.0.10"), ("ip6tables", "fd00:10:96::a")]
)
def test_a_long_stream_arrives_intact(
    cluster: Topology, tool: str, virtual: str, gso: bool
) -> None:
    with serving(cluster, tool, virtual, gso=gso) as workers:
        down, up = cluster.client.call(transfer, virtual)
        stats = workers.stats().values()
    assert down == digest_of(DOWNLOAD)
    assert up["length"] == UPLOAD
    assert up["sha256"] == digest_of(UPLOAD)
    assert sum(s.errors + s.truncated + s.dropped_kernel + s.dropped_user for s in stats) == 0
    # What goes through the queues is whole segments, or frames.
    assert (sum(s.received for s in stats) < (DOWNLOAD + UPLOAD) // SEGMENT_MAX) == gso
