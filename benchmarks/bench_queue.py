"""The queue path in network namespaces, beside plain forwarding and the NetfilterQueue package.

    sudo .venv/bin/python benchmarks/bench_queue.py [-o json]

A client sends through a node to a server. The node's kernel forwards, or gives every packet to
one queue in raw PREROUTING (8,192 long) whose consumer runs on a core of its own. Cases take turns,
round by round; ratios are medians of the rounds' ratios. UDP: 60-byte frames of 16 flows, as fast
as one core sends them; delivered is what the server's interface has seen. The consumer's CPU time
holds the rest of the forwarding too, which the kernel does when it takes the verdict. It is what
to look at where other programs keep the cores busy. TCP: one stream.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from svcdp import Dataplane
from svcdp.lab import Lab, Namespace

SOURCE = Path(__file__).with_name("sender.c")
VIRTUAL, SERVER = "10.96.0.10", "10.1.1.11"
PORT, SERVED = 9, 5001
QUEUE_MAX = 8192
FLOWS = 16
FORWARD_MARK = 0x00100000
SENDER_CORE, CONSUMER_CORE = "0", "1"
#: A delivery has ended when nothing more came for so many seconds.
QUIET = 0.3
#: What svcdp must reach, times the NetfilterQueue package's rate in the same rounds.
GATES = {"udp": 1.3, "tcp": 4.0}
TRIES = 4

RULES = f"""*raw
:PREROUTING ACCEPT
-A PREROUTING -m mark --mark {FORWARD_MARK:#x}/{FORWARD_MARK:#x} -j ACCEPT
-A PREROUTING -p udp --dport {PORT} -j NFQUEUE
-A PREROUTING -p tcp --dport {SERVED} -j NFQUEUE
-A PREROUTING -p tcp --sport {SERVED} -j NFQUEUE
COMMIT
"""


class Udp(NamedTuple):
    """A round: packets/s while sending, packets/s that arrived, the share that did, and the
    consumer's ns for each of these."""

    offered: float
    delivered: float
    share: float
    cpu: float


class Lane(NamedTuple):
    """Three hosts in a row, and the program that sends."""

    client: Namespace
    node: Namespace
    server: Namespace
    sender: str


# -- consumers: programs in the node ------------------------------------------------------------


def dataplane() -> Dataplane:
    dp = Dataplane()
    with dp.transaction() as tx:
        tx.service(VIRTUAL, PORT, "udp").add(SERVER, PORT)
        tx.service(VIRTUAL, SERVED, "tcp").add(SERVER, SERVED)
    return dp


def consume_svcdp(*, gso: bool) -> None:
    from svcdp.io.nfqueue import NFQueue

    with NFQueue(dataplane(), 0, gso=gso, fail_open=False, max_packets=QUEUE_MAX) as queue:
        signal.signal(signal.SIGTERM, lambda *_: queue.stop())
        print("ready", flush=True)
        queue.run()


def consume_netfilterqueue(callback: Callable[[Any], None]) -> None:
    from netfilterqueue import NetfilterQueue

    queue = NetfilterQueue()
    queue.bind(0, callback, max_len=QUEUE_MAX, sock_len=8 << 20)
    print("ready", flush=True)
    queue.run()


def accept_payload(packet: Any) -> None:
    """The least that a program which rewrites packets must do."""
    packet.set_payload(packet.get_payload())
    packet.accept()


def consume_handler() -> None:
    from svcdp.io.netfilterqueue import handler

    consume_netfilterqueue(handler(dataplane()))


CONSUMERS: dict[str, Callable[[], None]] = {
    "svcdp": lambda: consume_svcdp(gso=True),
    "svcdp, no GSO": lambda: consume_svcdp(gso=False),
    "NetfilterQueue": lambda: consume_netfilterqueue(accept_payload),
    "NetfilterQueue + handler(dp)": consume_handler,
}
FORWARDING = "plain forwarding"


def target(case: str) -> str:
    """Where the client sends. NetfilterQueue alone rewrites nothing."""
    return SERVER if case in (FORWARDING, "NetfilterQueue") else VIRTUAL


class Consumer:
    """The case's rules and program in the node, while the block lasts."""

    def __init__(self, node: Namespace, case: str) -> None:
        self.node, self.case = node, case

    def __enter__(self) -> Consumer:
        if self.case == FORWARDING:
            return self
        argv = ["taskset", "-c", CONSUMER_CORE, sys.executable, __file__, "--consume", self.case]
        self.process = self.node.popen(argv, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{self.case}: its consumer did not start")
        self.node.run(["iptables-restore"], input=RULES)
        return self

    def cpu(self) -> int:
        """ns that it has had so far."""
        if self.case == FORWARDING:
            return 0
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[0])

    def __exit__(self, *_: object) -> None:
        if self.case != FORWARDING:
            self.node.run(["iptables", "-t", "raw", "-F"])
            self.process.terminate()
            self.process.communicate(timeout=10)


# -- measuring ----------------------------------------------------------------------------------


def build(lab: Lab, directory: str) -> Lane:
    sender = os.path.join(directory, "sender")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    subprocess.run([*compiler, "-O2", str(SOURCE), "-o", sender], check=True)
    client, node, server = map(lab.namespace, ("client", "node", "server"))
    lab.link(client, node)
    lab.link(node, server)
    client.add_address("node", "192.0.2.10/24")
    node.add_address("client", "192.0.2.1/24")
    node.add_address("server", "10.1.1.1/24")
    server.add_address("node", f"{SERVER}/24")
    client.ip("route add default via 192.0.2.1")
    server.ip("route add default via 10.1.1.1")
    node.sysctl("net.ipv4.ip_forward", 1)
    return Lane(client, node, server, sender)


def arrivals(server: Namespace) -> int:
    """Packets that came into the server."""

    def read() -> int:
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
            name, _, fields = line.partition(":")
            if name.strip() == "node":
                return int(fields.split()[1])
        raise RuntimeError("the server has no interface")

    return server.call(read)


def udp_round(lane: Lane, case: str, count: int) -> Udp:
    def open_sink() -> socket.socket:
        sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sink.bind((SERVER, PORT))  # nobody reads: what does not fit is dropped without an answer
        return sink

    with lane.server.call(open_sink), Consumer(lane.node, case) as consumer:
        before, cpu = arrivals(lane.server), consumer.cpu()
        arguments = [target(case), str(PORT), str(count), str(FLOWS)]
        process = lane.client.popen(
            ["taskset", "-c", SENDER_CORE, lane.sender, *arguments], stdout=subprocess.PIPE
        )
        output, _ = process.communicate(timeout=60)
        start, sent = map(int, output.split())
        arrived, last = arrivals(lane.server) - before, time.monotonic_ns()
        while arrived < count and time.monotonic_ns() - last < QUIET * 1e9:
            time.sleep(0.002)
            more = arrivals(lane.server) - before
            if more != arrived:
                arrived, last = more, time.monotonic_ns()
        cpu = consumer.cpu() - cpu
    arrived = min(arrived, count)
    seconds = (last - start) / 1e9
    return Udp(count / (sent - start) * 1e9, arrived / seconds, arrived / count, cpu / arrived)


def tcp_round(lane: Lane, case: str, seconds: float) -> float:
    """Gbit/s of payload."""
    received = 0

    def receive(listener: socket.socket) -> None:
        nonlocal received
        buffer = bytearray(1 << 20)
        connection, _ = listener.accept()
        with connection:
            while size := connection.recv_into(buffer):
                received += size

    with (
        lane.server.call(lambda: socket.create_server((SERVER, SERVED))) as listener,
        Consumer(lane.node, case),
    ):
        thread = threading.Thread(target=receive, args=(listener,))
        thread.start()
        data = bytes(1 << 18)
        with lane.client.call(socket.create_connection, (target(case), SERVED), 10) as client:
            client.settimeout(30)
            client.sendall(data)
            before, start = received, time.perf_counter()
            while time.perf_counter() - start < seconds:
                client.sendall(data)
            rate = (received - before) * 8 / (time.perf_counter() - start) / 1e9
        thread.join(10)
    return rate


def ratio(rates: dict[str, list[float]], case: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(rates[case], rates[other], strict=True))


def measure(rounds: int, count: int, seconds: float) -> dict[str, Any]:
    udp_cases = [FORWARDING, "svcdp", "NetfilterQueue", "NetfilterQueue + handler(dp)"]
    tcp_cases = [FORWARDING, "svcdp", "svcdp, no GSO", "NetfilterQueue"]
    udp: dict[str, list[Udp]] = {case: [] for case in udp_cases}
    tcp: dict[str, list[float]] = {case: [] for case in tcp_cases}
    with tempfile.TemporaryDirectory() as directory, Lab() as lab:
        lane = build(lab, directory)
        for _ in range(rounds):
            for case in udp_cases:
                udp[case].append(udp_round(lane, case, count))
            for case in tcp_cases:
                tcp[case].append(tcp_round(lane, case, seconds))
    delivered = {case: [each.delivered for each in done] for case, done in udp.items()}
    return {
        "rounds": rounds,
        "udp": [
            {
                "case": case,
                "offered_kpps": statistics.median(each.offered for each in done) / 1e3,
                "delivered_kpps": statistics.median(each.delivered for each in done) / 1e3,
                "best_kpps": max(each.delivered for each in done) / 1e3,
                "share": statistics.median(each.share for each in done),
                "cpu_ns": statistics.median(each.cpu for each in done),
                "to_netfilterqueue": ratio(delivered, case, "NetfilterQueue"),
            }
            for case, done in udp.items()
        ],
        "tcp": [
            {
                "case": case,
                "gbits": statistics.median(done),
                "best_gbits": max(done),
                "to_netfilterqueue": ratio(tcp, case, "NetfilterQueue"),
            }
            for case, done in tcp.items()
        ],
    }


def show(results: dict[str, Any]) -> None:
    heads = {
        "udp": ("UDP, 60-byte frames", "offered kpps", "delivered (best)", "share", "CPU ns"),
        "tcp": ("TCP, one stream", "", "Gbit/s (best)", "", ""),
    }
    for kind, head in heads.items():
        print("{:<30}{:>14}{:>18}{:>7}{:>8}{:>18}".format(*head, "x NetfilterQueue"))
        for row in results[kind]:
            if kind == "udp":
                offered, share = f"{row['offered_kpps']:.0f}", f"{row['share']:.2f}"
                cpu = f"{row['cpu_ns']:.0f}" if row["cpu_ns"] else ""
                rate = f"{row['delivered_kpps']:.0f} ({row['best_kpps']:.0f})"
            else:
                offered = share = cpu = ""
                rate = f"{row['gbits']:.2f} ({row['best_gbits']:.2f})"
            times = row["to_netfilterqueue"]
            print(f"{row['case']:<30}{offered:>14}{rate:>18}{share:>7}{cpu:>8}{times:>18.2f}")
        print()


def missed(results: dict[str, Any]) -> list[str]:
    """The bounds that svcdp missed."""
    return [
        f"{kind}: {row['to_netfilterqueue']:.2f} x NetfilterQueue, at least {bound}"
        for kind, bound in GATES.items()
        for row in results[kind]
        if row["case"] == "svcdp" and row["to_netfilterqueue"] < bound
    ]


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--packets", type=int, default=250_000, help="of a UDP round")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a TCP round")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    parser.add_argument(
        "--gate", action="store_true", help=f"fail below {GATES} x NetfilterQueue in {TRIES} tries"
    )
    parser.add_argument("--consume", choices=list(CONSUMERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.consume:
        CONSUMERS[arguments.consume]()
        return
    results = measure(arguments.rounds, arguments.packets, arguments.seconds)
    tries = 1
    while arguments.gate and missed(results) and tries < TRIES:
        # Neighbours on the machine take from all, but not evenly.
        results = measure(arguments.rounds, arguments.packets, arguments.seconds)
        tries += 1
    if arguments.output == "json":
        print(json.dumps(results, indent=2))
    else:
        show(results)
    if arguments.gate and missed(results):
        sys.exit("\n".join(["missed:", *missed(results)]))


if __name__ == "__main__":
    main()
