"""The inside of user-mode Linux: pid 1, working scenarios off on the kernel's own IPVS.

A scenario has its own director, in a network namespace of its own. What is beyond the director's
interfaces are the other ends of veth pairs and nothing else: no address, no stack that answers,
only packet sockets. So all that moves is what the scenario sends and what the director makes of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import tty
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from topology import (
    FOREIGN_NETWORK,
    MARKED_NETWORK,
    MTU,
    ROUTER,
    SIDES,
    VIRTUAL,
    VIRTUAL_NETWORK,
    director,
    prefix,
    server,
)

LINE = "/dev/ttyS0"
SCENARIO_SECONDS = 120
WORKERS = 32
LISTINGS = 20  # tries

CLONE_NEWNET = 0x40000000
SYS_FINIT_MODULE = 313  # x86-64, as user-mode Linux
ETH_P_ALL, ETH_P_IP, ETH_P_IPV6 = 3, 0x0800, 0x86DD
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17

MODULES = ("veth", "iptable_mangle", "ip6table_mangle", "xt_mark", "ip_vs_ftp", "ip_vs_pe_sip")
SCHEDULERS = ["rr", "wrr", "lc", "wlc", "sed", "nq", "fo", "ovf", "dh", "sh", "mh", "lblc", "lblcr"]

#: Ethernet: what the director's interfaces have, and what is beyond them.
INSIDE, OUTSIDE = b"\x02\0\0\0\0\1", b"\x02\0\0\0\0\2"
#: From the client to its router, by the director. It goes after each packet, and when it comes
#: out, all that the packet led to has come out: there is one CPU, with one queue.
PROBE = bytes.fromhex("45000014feed000040fd8dc9c6336404c00002fe")

SYNC_GROUP = socket.inet_aton("224.0.0.81")

libc = ctypes.CDLL(None, use_errno=True)


def check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# -- the machine ---------------------------------------------------------------------------------


def mount(kind: str, where: str) -> None:
    check(libc.mount(b"none", where.encode(), kind.encode(), 0, None))


def load(modules: Iterator[str]) -> None:
    """Load modules and what they need, in the order that modules.dep gives (no kmod needed)."""
    folder = Path("/usr/lib/uml/modules", os.uname().release)
    needs = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[Path(path).name.partition(".")[0]] = [path, *others.split()]
    loaded = set()
    for module in modules:
        for path in reversed(needs[module]):
            if path not in loaded:
                loaded.add(path)
                with open(folder / path, "rb") as file:
                    check(libc.syscall(SYS_FINIT_MODULE, file.fileno(), b"", 0))


def sysctl(name: str, value: object) -> None:
    Path("/proc/sys", name.replace(".", "/")).write_text(str(value))


def boot() -> None:
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
    mount("proc", "/proc")
    mount("sysfs", "/sys")
    mount("tmpfs", "/run")
    load(iter((*MODULES, *(f"ip_vs_{name}" for name in SCHEDULERS))))
    # What is beyond the director must not speak by itself.
    sysctl("net.ipv6.conf.default.disable_ipv6", 1)
    sysctl("net.ipv4.icmp_msgs_per_sec", 1000000)
    sysctl("net.ipv4.icmp_msgs_burst", 1000000)


# -- a scenario ----------------------------------------------------------------------------------


class Director:
    """The namespace of a scenario. Made in a process of its own, and gone with it."""

    def __init__(self, number: int, mtus: dict[str, int]) -> None:
        with open("/proc/self/ns/net") as outside:
            check(libc.unshare(CLONE_NEWNET))
            with open("/proc/self/ns/net") as inside:
                self._configure(number, mtus)
                check(libc.setns(outside.fileno(), CLONE_NEWNET))
                names = {side: f"{side}x{number}" for side in SIDES}
                run("ip", "-batch", "-", text="".join(f"link set {n} up\n" for n in names.values()))
                self._sides = {side: side_socket(name) for side, name in names.items()}
                check(libc.setns(inside.fileno(), CLONE_NEWNET))
        self._host = [host_socket(family, kind) for family in (4, 6) for kind in HOST_PROTOCOLS]

    def _configure(self, number: int, mtus: dict[str, int]) -> None:
        for name, value in {
            "net.ipv4.ip_forward": 1,
            "net.ipv4.conf.all.rp_filter": 0,
            "net.ipv4.conf.default.rp_filter": 0,
            "net.ipv4.conf.default.accept_local": 1,
            "net.ipv4.conf.all.send_redirects": 0,
            "net.ipv4.conf.default.send_redirects": 0,
            "net.ipv4.icmp_ratelimit": 0,
            "net.ipv6.icmp.ratelimit": 0,
            "net.ipv6.conf.all.forwarding": 1,
            "net.ipv6.auto_flowlabels": 0,
            "net.ipv6.conf.default.disable_ipv6": 0,
            "net.ipv6.conf.default.accept_dad": 0,
            "net.ipv6.conf.default.addr_gen_mode": 1,
            # As behind a device that has verified checksums. Connection tracking's own check of
            # IPv6 leaves a sum with the IP header in it, which IPVS takes for TCP's alone: it
            # drops all that an IPv6 service with a helper gets.
            "net.netfilter.nf_conntrack_checksum": 0,
        }.items():
            sysctl(name, value)
        run("ip", "-batch", "-", text="\n".join(links(number, mtus)) + "\n")
        for side in SIDES:
            complete_checksums(side)

    def do_ipvs(self, *lines: str) -> list[str]:
        """Run ipvsadm's commands; what it says to each."""
        return run("ipvsadm", "-R", text="".join(f"{line}\n" for line in lines), check=False)

    def do_sysctl(self, name: str, value: object) -> None:
        sysctl(f"net.ipv4.vs.{name}", value)

    def do_marks(self) -> None:
        """From now on packets to the marked networks have the firewall mark 1, and are local."""
        for family, command in {4: "iptables-legacy", 6: "ip6tables-legacy"}.items():
            networks = f"{MARKED_NETWORK[family]},{FOREIGN_NETWORK[family]}"
            rule = f"-w -t mangle -A PREROUTING -d {networks} -j MARK --set-mark 1"
            run(command, *rule.split())
            routes = "rule add fwmark 1 table 100\nroute add local default dev lo table 100\n"
            run("ip", f"-{family}", "-batch", "-", text=routes)

    def do_send(self, side: str, *packets: str) -> list[list[list[str]]]:
        """Let packets come in from a side; what each makes come out: [[side, packet], ...].

        What the director's own stack gets comes out at the side "host", IPv6 without its header.
        """
        return [self._send(side, bytes.fromhex(packet)) for packet in packets]

    def do_pieces(self, side: str, *packets: str) -> list[list[str]]:
        """Let the fragments of a packet come in; what they all make come out."""
        return [out for came in self.do_send(side, *packets) for out in came]

    def _send(self, side: str, packet: bytes) -> list[list[str]]:
        self._sides[side].send(frame(packet))
        self._sides["c"].send(frame(PROBE))
        came: list[tuple[str, bytes]] = []
        while (answer := payload(self._sides["c"].recv(65536 + 14)))[4:6] != PROBE[4:6]:
            came.append(("c", answer))
        for name, sock in self._sides.items():
            came += ((name, payload(data)) for data in waiting(sock))
        out = [[name, data.hex()] for name, data in came if data and is_unicast(data)]
        return out + [["host", data.hex()] for sock in self._host for data in waiting(sock)]

    def do_sync(self, role: str, side: str, syncid: int) -> None:
        """Start the kernel's sync daemon."""
        arguments = ("--mcast-interface", side, "--syncid", str(syncid))
        run("ipvsadm", "--start-daemon", role, *arguments)

    def do_messages(self, side: str, seconds: float) -> list[str]:
        """What the sync daemon says at a side within some time."""
        deadline = time.monotonic() + seconds
        sock = self._sides[side]
        heard = []
        while (left := deadline - time.monotonic()) > 0:
            if select.select([sock], [], [], left)[0]:
                packet = payload(sock.recv(65536 + 14))
                if packet[16:20] == SYNC_GROUP:
                    heard.append(packet[28:].hex())
        return heard

    def do_connections(self) -> list[list[Any]]:
        """[protocol, client, port, virtual, port, server, port, state, seconds left], sorted."""
        # A listing that takes several reads leaves one out where another before it has expired
        # since the last read. Two that have the same connections left none out.
        rows: list[list[Any]] = []
        for _ in range(LISTINGS):
            before = rows
            lines = Path("/proc/net/ip_vs_conn").read_text().splitlines()[1:]
            rows = sorted(connection(line.split()) for line in lines)
            if [row[:-2] for row in rows] == [row[:-2] for row in before]:
                return rows
        raise RuntimeError(f"connections are never the same in two of {LISTINGS} listings")

    def do_services(self) -> list[Any]:
        """[service, scheduler, [[server, forward, weight, active, inactive], ...]], in order."""
        return listing(Path("/proc/net/ip_vs").read_text().splitlines()[3:])

    def do_counters(self) -> list[Any]:
        """[service, [[connections, packets in, out, bytes in, out], of servers ...]]."""
        text = run("ipvsadm", "-Ln", "--stats", "--exact", "--nosort")
        services: list[Any] = []
        for line in text.splitlines()[3:]:
            kind, name, *numbers = line.split()
            if kind != "->":
                services.append([f"{kind} {name}", []])
            services[-1][1].append([int(number) for number in numbers])
        return services

    def do_list(self, *options: str) -> str:
        """What ``ipvsadm -L`` prints."""
        return run("ipvsadm", "-L", *options)


def links(number: int, mtus: dict[str, int]) -> Iterator[str]:
    """The director's interfaces, addresses, routes and neighbours, as lines of ``ip -batch``."""
    yield "link set lo up"
    for side in SIDES:
        yield (
            f"link add {side} address {INSIDE.hex(':')} mtu {mtus.get(side, MTU)} numtxqueues 1"
            f" numrxqueues 1 type veth peer name {side}x{number} address {OUTSIDE.hex(':')}"
            f" mtu 9000 netns 1"
        )
        yield f"link set {side} up"
        for family in (4, 6):
            yield f"addr add {director(side, family)}/{prefix(family)} dev {side}"
            other = ROUTER[family] if side == "c" else server(int(side[1:]), family)
            yield f"neigh add {other} lladdr {OUTSIDE.hex(':')} dev {side} nud permanent"
    for family in (4, 6):
        yield f"addr add {VIRTUAL[family]} dev lo"
        yield f"route add default via {ROUTER[family]} dev c"
        yield f"route add local {VIRTUAL_NETWORK[family]} dev lo"
        yield f"route add local {MARKED_NETWORK[family]} dev lo"


#: What the director's own stack gets is seen by raw sockets of these protocols.
HOST_PROTOCOLS = (1, 4, 6, 17, 41, 47, 58, 132)


def run(*command: str, text: str = "", check: bool = True) -> str:
    done = subprocess.run(command, input=text, text=True, capture_output=True)
    if check and done.returncode:
        raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def side_socket(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    sock.bind((name, ETH_P_ALL))
    return sock


def host_socket(family: int, protocol: int) -> socket.socket:
    return socket.socket({4: socket.AF_INET, 6: socket.AF_INET6}[family], socket.SOCK_RAW, protocol)


def complete_checksums(interface: str) -> None:
    """Have the kernel write checksums, not leave them to a device that does not exist."""
    value = ctypes.create_string_buffer(struct.pack("II", ETHTOOL_STXCSUM, 0))
    request = struct.pack("16sP", interface.encode(), ctypes.addressof(value)).ljust(40, b"\0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        check(libc.ioctl(sock.fileno(), SIOCETHTOOL, request))


def frame(packet: bytes) -> bytes:
    kind = ETH_P_IP if packet[0] >> 4 == 4 else ETH_P_IPV6
    return INSIDE + OUTSIDE + kind.to_bytes(2, "big") + packet


def payload(data: bytes) -> bytes:
    """The IP packet in a frame, or nothing."""
    return data[14:] if data[12:14] in (b"\x08\0", b"\x86\xdd") else b""


def waiting(sock: socket.socket) -> Iterator[bytes]:
    with suppress(BlockingIOError):
        while True:
            yield sock.recv(65536 + 14, socket.MSG_DONTWAIT)


def is_unicast(packet: bytes) -> bool:
    return packet[16] >> 4 != 0xE if packet[0] >> 4 == 4 else packet[24] != 0xFF


def address_of(text: str) -> str:
    """Of /proc/net/ip_vs*: hexadecimal IPv4, or IPv6 as it is."""
    if len(text) == 8:
        return socket.inet_ntoa(bytes.fromhex(text))
    return socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, text.strip("[]")))


def connection(words: list[str]) -> list[Any]:
    protocol, *ends, state, seconds = words[:9]  # then those of a persistence engine
    pairs = zip(ends[::2], ends[1::2], strict=True)
    plain = [part for address, port in pairs for part in (address_of(address), int(port, 16))]
    return [protocol, *plain, state, int(seconds)]


def listing(lines: list[str]) -> list[Any]:
    services: list[Any] = []
    for line in lines:
        words = line.split()
        if words[0] == "->":
            address, _, port = words[1].rpartition(":")
            servers = services[-1][2]
            servers.append([address_of(address), int(port, 16), words[2], *map(int, words[3:])])
        else:
            services.append([" ".join(words[:2]), words[2], []])
    return services


# -- work ----------------------------------------------------------------------------------------


def work(number: int, scenario: dict[str, Any], turn: TextIO) -> list[Any] | str:
    """[second, outcome] of each step, or why there is none."""
    signal.alarm(SCENARIO_SECONDS)
    fcntl.flock(turn, fcntl.LOCK_EX)
    try:
        place = Director(number, scenario["mtu"])
        outcomes = []
        for kind, *arguments in scenario["steps"]:
            start = time.monotonic()
            if kind == "wait":
                # Let others work meanwhile.
                fcntl.flock(turn, fcntl.LOCK_UN)
                time.sleep(*arguments)
                fcntl.flock(turn, fcntl.LOCK_EX)
                outcome = None
            else:
                outcome = getattr(place, f"do_{kind}")(*arguments)
            outcomes.append([start, outcome])
        return outcomes
    except Exception:
        return traceback.format_exc()


def work_all(scenarios: list[dict[str, Any]], first: int) -> list[Any]:
    """Each in a process of its own, in turns: one works while others wait for time to pass."""
    files = [Path(f"/run/{first + index}") for index in range(len(scenarios))]
    running = 0
    for index, (scenario, file) in enumerate(zip(scenarios, files, strict=True)):
        if running == WORKERS:
            os.wait()
            running -= 1
        if not os.fork():
            with open("/run/turn", "w") as turn:
                file.write_text(json.dumps(work(first + index, scenario, turn)))
            os._exit(0)
        running += 1
    for _ in range(running):
        os.wait()
    return [json.loads(file.read_text()) for file in files]


def main(folder: Path) -> None:
    boot()
    (folder / "release").write_text(os.uname().release)
    line = os.open(LINE, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(line)
    done = 0
    os.write(line, b"ready\n")
    with os.fdopen(line, "rb", buffering=0) as names:
        while name := names.readline().decode().strip():
            scenarios = json.loads((folder / f"{name}.json").read_text())
            results = work_all(scenarios, done)
            done += len(scenarios)
            with open(folder / f"{name}.results", "w") as file:
                json.dump(results, file)
                file.flush()
                os.fsync(file.fileno())
            os.write(line, f"{name}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
