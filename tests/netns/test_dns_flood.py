"""One client asks 10,000 questions a second; others notice nothing of it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import dns.exception
import dns.message
import dns.query
import dns.rcode
import pytest
from traffic import CLUSTER_IPS, PORT, Load, Start, endpoint_slice, write_objects

from svcdp.lab import Namespace, Topology

pytestmark = pytest.mark.netns

#: Of kube-dns, where the Service of the tests is not.
SERVER = "10.96.0.53"
RATE, SECONDS = 10_000, 4
QUESTIONS = 100
TIMEOUT, ATTEMPTS = 2.0, 3  # seconds, and how often a resolver asks
#: Of a headless Service. To tell of it takes so long that few questions leave no time for others.
CROWD = [f"10.1.{number >> 8}.{number & 255}" for number in range(512, 1512)]
REFUSES, SILENT = "127.0.0.1:9", "192.0.2.77"  # upstreams
#: The label that a question begins with, if it is not another one each time, zones in turn, and
#: whom the server may ask.
FLOODS = {
    "names that nobody has": ("", ("default.svc.cluster.local", "example.com"), REFUSES),
    "names that nobody tells": ("", ("example.com",), SILENT),
    "all of a large Service": ("crowd", ("default.svc.cluster.local",), REFUSES),
}

#: A question in each datagram. What was not sent in time is sent as soon as can be; the number
#: that was sent is printed.
FLOOD = f"""
import os, socket, struct, sys, time

HEAD = struct.pack("!6H", 0, 0x0100, 1, 0, 0, 0)
ZONES = [
    b"".join(bytes([len(label)]) + label.encode() for label in zone.split(".")) + b"\\0"
    for zone in sys.argv[2:]
]
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect(("{SERVER}", 53))
print("ready", flush=True)
sys.stdin.readline()
begin, sent = time.monotonic(), 0
while sent < {RATE * SECONDS}:
    while sent < min((time.monotonic() - begin) * {RATE}, {RATE * SECONDS}):
        label = (sys.argv[1] or os.urandom(8).hex()).encode()
        name = bytes([len(label)]) + label + ZONES[sent % len(ZONES)]
        try:
            sock.send(HEAD + name + b"\\0\\1\\0\\1")
        except ConnectionRefusedError:
            sys.exit("nobody listens any more")
        sent += 1
    time.sleep(0.001)
print(sent)
"""


def ask(source: Namespace, name: str) -> tuple[dns.message.Message, int]:
    """What a resolver gets, and how often it asked."""
    query = dns.message.make_query(f"{name}.default.svc.cluster.local", "A")
    for attempt in range(1, ATTEMPTS):
        with suppress(dns.exception.Timeout):
            return source.call(dns.query.udp, query, SERVER, TIMEOUT), attempt
    return source.call(dns.query.udp, query, SERVER, TIMEOUT), ATTEMPTS


@pytest.mark.parametrize(("label", "zones", "upstream"), FLOODS.values(), ids=FLOODS)
def test_a_flood(
    cluster: Topology, folder: Path, start: Start, label: str, zones: tuple[str, ...], upstream: str
) -> None:
    pod = cluster.servers[2].namespace
    crowd = [{"addresses": [each]} for each in CROWD]
    write_objects(
        folder / "manifests",
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "crowd"},
            "spec": {"clusterIP": "None", "ports": [{"port": PORT}]},
        },
        endpoint_slice("crowd", "IPv4", [{"port": PORT, "protocol": "TCP"}], crowd),
        name="crowd",
    )
    with start("--dns", "--dns-addresses", SERVER, "--dns-upstreams", upstream) as daemon:
        flood = cluster.client.popen(
            [sys.executable, "-c", FLOOD, label, *zones],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert flood.stdin is not None
        assert flood.stdout is not None
        assert flood.stdout.readline() == "ready\n"
        with Load(pod, [(address, PORT) for address in CLUSTER_IPS]) as load:
            flood.stdin.write("go\n")
            flood.stdin.flush()
            attempts: Counter[int] = Counter()
            while flood.poll() is None or attempts.total() < QUESTIONS:
                answer, attempt = ask(pod, "web")
                assert [record.to_text() for record in answer.answer[0]] == [CLUSTER_IPS[0]]
                attempts[attempt] += 1
        assert int(flood.stdout.read()) == RATE * SECONDS
        assert attempts[1] > 0.9 * attempts.total()
        assert load.failures == []
        assert ask(pod, "nobody")[0].rcode() == dns.rcode.NXDOMAIN
        assert daemon.process.poll() is None
