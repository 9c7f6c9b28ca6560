"""Questions a second of `svcdp dns`, beside dnsmasq and CoreDNS with the same names.

    .venv/bin/python benchmarks/bench_dns.py [-o json] [--services 1000] [--seconds 3]

Each server has a core of its own and dnsperf another one, all on loopback. The questions are
those of Pods: half for a Service's A record, a quarter for its AAAA record, which there is
none of, and a quarter for names that a search list makes and nobody has. Servers take turns,
round by round; figures are medians. What is not installed (`dnsmasq`, `coredns`) is left out.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

ZONE = "cluster.local"
SERVER_CORE, CLIENT_CORE = "1", "0"
START_TIME = 30.0  # seconds

COREFILE = """\
{zone}:{port} {{
    bind 127.0.0.1
    file {folder}/zone
}}
"""
ZONE_FILE = """\
$ORIGIN {zone}.
@ 5 IN SOA ns.dns hostmaster 1 7200 1800 86400 5
@ 5 IN NS ns.dns
ns.dns 5 IN A 127.0.0.1
"""


class Service(NamedTuple):
    """A name and its address."""

    name: str
    address: str

    @property
    def host(self) -> str:
        return f"{self.name}.default.svc.{ZONE}"


class Result(NamedTuple):
    """Questions answered a second, the average time of one in ms, and the share that was lost."""

    rate: float
    latency: float
    lost: float


def services(count: int) -> list[Service]:
    return [Service(f"web-{n}", f"10.96.{n >> 8}.{n & 255}") for n in range(1, count + 1)]


def questions(every: list[Service]) -> str:
    lines = []
    for each in every:
        lines += [f"{each.host} A", f"{each.host} AAAA"]
        lines += [f"{each.host} A", f"{each.name}.default.default.svc.{ZONE} A"]
    return "".join(f"{line}\n" for line in lines)


def svcdp(folder: Path, port: int, every: list[Service]) -> list[str]:
    items = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": each.name},
            "spec": {"clusterIP": each.address, "ports": [{"port": 80}]},
        }
        for each in every
    ]
    document = {"apiVersion": "v1", "kind": "List", "items": items}
    (folder / "services.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "svcdp", "dns", "-f", str(folder), "--dns-rate", "0"]
    return [*command, "--listen", f"127.0.0.1:{port}", "--log-level", "error"]


def dnsmasq(folder: Path, port: int, every: list[Service]) -> list[str]:
    lines = [f"host-record={each.host},{each.address}" for each in every]
    lines += [f"port={port}", "listen-address=127.0.0.1", "bind-interfaces", "no-resolv"]
    lines += ["no-hosts", "pid-file=", "user=root", "local-ttl=5", f"local=/{ZONE}/"]
    file = folder / "dnsmasq.conf"
    file.write_text("".join(f"{line}\n" for line in lines))
    return ["dnsmasq", "--keep-in-foreground", f"--conf-file={file}"]


def coredns(folder: Path, port: int, every: list[Service]) -> list[str]:
    records = "".join(f"{each.name}.default.svc 5 IN A {each.address}\n" for each in every)
    (folder / "zone").write_text(ZONE_FILE.format(zone=ZONE) + records)
    corefile = COREFILE.format(zone=ZONE, port=port, folder=folder)
    (folder / "Corefile").write_text(corefile)
    return ["coredns", "-conf", str(folder / "Corefile")]


SERVERS: dict[str, Callable[[Path, int, list[Service]], list[str]]] = {
    "svcdp": svcdp,
    "dnsmasq": dnsmasq,
    "coredns": coredns,
}


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start(argv: list[str], port: int, host: str) -> subprocess.Popen[bytes]:
    """The server, when it answers."""
    process = subprocess.Popen(["taskset", "-c", SERVER_CORE, *argv], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + START_TIME
    asked = ["dig", "+short", "+tries=1", "+time=1", "@127.0.0.1", f"-p{port}", host]
    while not subprocess.run(asked, capture_output=True).stdout.startswith(b"10."):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise SystemExit(f"{argv[0]} does not answer")
        time.sleep(0.1)
    return process


def load(port: int, file: Path, seconds: float) -> Result:
    argv = ["taskset", "-c", CLIENT_CORE, "dnsperf", "-s", "127.0.0.1", "-p", str(port)]
    argv += ["-d", str(file), "-l", str(seconds), "-c", "16", "-q", "200"]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    def number(pattern: str) -> float:
        found = re.search(pattern, said)
        if found is None:
            raise SystemExit(f"dnsperf says nothing of {pattern!r}:\n{said}")
        return float(found[1])

    lost = number(r"Queries lost:.*\(([\d.]+)%\)") / 100
    return Result(
        number(r"Queries per second:\s+([\d.]+)"),
        number(r"Average Latency \(s\):\s+([\d.]+)") * 1000,
        lost,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    parser.add_argument("--services", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for tool in ("dnsperf", "dig", "taskset"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed")
    every = services(arguments.services)
    results: dict[str, list[Result]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "questions").write_text(questions(every))
        ports: dict[str, int] = {}
        for name, command in SERVERS.items():
            if name != "svcdp" and shutil.which(name) is None:
                continue
            own = folder / name
            own.mkdir()
            ports[name] = free_port()
            process = start(command(own, ports[name], every), ports[name], every[0].host)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        for _ in range(arguments.rounds):
            for name, port in ports.items():
                said = load(port, folder / "questions", arguments.seconds)
                results.setdefault(name, []).append(said)
    medians = {
        name: Result(*map(statistics.median, zip(*found, strict=True)))
        for name, found in results.items()
    }
    if arguments.output == "json":
        print(json.dumps({name: found._asdict() for name, found in medians.items()}))
        return
    print(f"{'server':10}{'questions/s':>14}{'of dnsmasq':>12}{'latency ms':>12}{'lost':>8}")
    beside = medians.get("dnsmasq")
    for name, found in medians.items():
        ratio = f"{found.rate / beside.rate:.2f}" if beside else "-"
        print(f"{name:10}{found.rate:14,.0f}{ratio:>12}{found.latency:12.2f}{found.lost:8.1%}")


if __name__ == "__main__":
    main()
