"""One client asks for 10,000 names a second that nobody has; others notice nothing of it."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

import dns.exception
import dns.message
import dns.query
import dns.rcode
import pytest
from traffic import CLUSTER_IPS, PORT, Load, Start

from svcdp.lab import Namespace, Topology

pytestmark = pytest.mark.netns

#: Of kube-dns, where the Service of the tests is not.
SERVER = "10.96.0.53"
RATE, SECONDS = 10_000, 4
QUESTIONS = 100
TIMEOUT, ATTEMPTS = 2.0, 3  # seconds, and how often a resolver asks

#: A question of its own in each datagram, half of them for names outside of the cluster. What was
#: not sent in time is sent as soon as can be; the number that was sent is printed.
FLOOD = f"""
import os, socket, struct, sys, time

HEAD = struct.pack("!6H", 0, 0x0100, 1, 0, 0, 0)
ZONES = (b"\\x07default\\x03svc\\x07cluster\\x05local\\0", b"\\x07example\\x03com\\0")
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect(("{SERVER}", 53))
print("ready", flush=True)
sys.stdin.readline()
begin, sent = time.monotonic(), 0
while sent < {RATE * SECONDS}:
    while sent < min((time.monotonic() - begin) * {RATE}, {RATE * SECONDS}):
        label = os.urandom(8).hex().encode()
        try:
            sock.send(HEAD + bytes([len(label)]) + label + ZONES[sent % 2] + b"\\0\\1\\0\\1")
        except ConnectionRefusedError:
            sys.exit("nobody listens any more")
        sent += 1
    time.sleep(0.001)
print(sent)
"""


def ask(source: Namespace, name: str) -> dns.message.Message:
    """What a resolver gets."""
    query = dns.message.make_query(f"{name}.default.svc.cluster.local", "A")
    for _ in range(ATTEMPTS - 1):
        with suppress(dns.exception.Timeout):
            return source.call(dns.query.udp, query, SERVER, TIMEOUT)
    return source.call(dns.query.udp, query, SERVER, TIMEOUT)


def test_a_flood_of_names(cluster: Topology, start: Start) -> None:
    pod = cluster.servers[2].namespace
    with start("--dns", "--dns-addresses", SERVER, "--dns-upstreams", "127.0.0.1:9") as daemon:
        flood = cluster.client.popen(
            [sys.executable, "-c", FLOOD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert flood.stdin is not None
        assert flood.stdout is not None
        assert flood.stdout.readline() == "ready\n"
        with Load(pod, [(address, PORT) for address in CLUSTER_IPS]) as load:
            flood.stdin.write("go\n")
            flood.stdin.flush()
            asked = 0
            while flood.poll() is None or asked < QUESTIONS:
                (rrset,) = ask(pod, "web").answer
                assert [record.to_text() for record in rrset] == [CLUSTER_IPS[0]]
                asked += 1
        assert int(flood.stdout.read()) == RATE * SECONDS
        assert load.failures == []
        assert ask(pod, "nobody").rcode() == dns.rcode.NXDOMAIN
        assert daemon.process.poll() is None
