"""The callback in the loop of the real NetfilterQueue package."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

from svcdp.lab import Topology

pytest.importorskip("netfilterqueue", reason="NetfilterQueue builds for Python < 3.12 only")
pytestmark = pytest.mark.netns

PROGRAM = """
import sys, netfilterqueue, svcdp
from svcdp.io.netfilterqueue import handler

dp = svcdp.Dataplane(seed=1)
with dp.transaction() as tx:
    tx.service("10.96.0.10", 80).add(sys.argv[1], 8080)
    tx.service("10.96.0.11", 80)
nfq = netfilterqueue.NetfilterQueue()
nfq.bind(1, handler(dp))
print("ready", flush=True)
try:
    nfq.run()
except KeyboardInterrupt:
    nfq.unbind()
    for (verdict, reason), count in dp.stats().packets.items():
        if count:
            print(verdict.name, reason.name)
"""


def test_clients_reach_a_server(cluster: Topology) -> None:
    server = cluster.servers[0]
    for match in ("-d 10.96.0.10/31", f"-s {server.ipv4}"):
        rule = f"iptables -t raw -A PREROUTING {match} -p tcp -j NFQUEUE --queue-num 1"
        cluster.node.run(rule.split())
    process = cluster.node.popen(
        [sys.executable, "-c", PROGRAM, server.ipv4], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with cluster.client.call(socket.create_connection, ("10.96.0.10", 80), 10) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = bytearray()
        while data := connection.recv(4096):
            answer += data
    assert b"200" in answer.splitlines()[0]
    with pytest.raises(ConnectionRefusedError):
        cluster.client.call(socket.create_connection, ("10.96.0.11", 80), 10)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert {"FORWARD NEW", "FORWARD ESTABLISHED", "FORWARD REPLY", "REJECT NO_DESTINATION"} <= set(
        output.splitlines()
    )
